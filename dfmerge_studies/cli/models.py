"""`merge`, `fisher`, `evaluate`, `export`: one model at a time."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfmerge_studies import limits
from dfmerge_studies.cli import common, forms
from dfmerge_studies.errors import InputError
from dfmerge_studies.methods import Coefficients, Importance, coefficient_range
from dfmerge_studies.tasks.splits import as_split

if TYPE_CHECKING:
    from dfmerge_studies.spec import StudySpec
    from dfmerge_studies.tasks.metrics import Metric, TaskScore

OutOption = Annotated[Path, typer.Option("--out", metavar="PATH", help="Where to write.")]


@common.with_method_parameters
def merge(
    spec: common.RequiredSpec,
    out: OutOption,
    coefficients: Annotated[
        str | None,
        typer.Option(
            "--coefficients",
            metavar="a=0.4,b=0.9",
            help="One per expert, or one number for all; with search.granularity also a.GROUP=0.4, or JSON.",
        ),
    ] = None,
    method: Annotated[str | None, typer.Option("--method", help="Row of the method table.")] = None,
    parameters: common.MethodParameters = None,
    dtype: forms.DtypeOption = "base",
    split_heads: forms.SplitOption = False,
    as_adapter: forms.AdapterOption = False,
    rank: forms.RankOption = None,
    push_to_hub: forms.PushOption = None,
    private: forms.PrivateOption = False,
    device: common.DeviceOption = None,
    cache: common.CacheOption = None,
    overrides: common.SetOption = None,
    trust: common.TrustOption = False,
    force: common.ForceOption = False,
    json: common.JsonOption = False,
) -> None:
    """Merge once at the given coefficients, without a study."""
    from dfmerge_studies.report.forms import Form

    form = Form(forms.precision_of(dtype), split_heads, adapter=as_adapter, rank=rank)
    forms.check_push(push_to_hub, private)
    overrides = common.trusting(overrides, trust)
    settings = common.load_spec(spec, overrides, method=method, device=device, cache=cache)
    row = settings.row
    given, own = _parse_coefficients(settings, coefficients), row.complete(parameters or {}, flags=True)
    from dfmerge_studies.report.forms import check_form
    from dfmerge_studies.report.outputs import model_target

    model_target(settings, out, force=force)
    check_form(settings, form)
    common.check_early(settings)
    with common.progress_bar() as progress:
        common.load_libraries()
        from dfmerge_studies.objective.loading import load_problem
        from dfmerge_studies.objective.merger import Merger
        from dfmerge_studies.objective.rehearsal import rehearse_
        from dfmerge_studies.report.card import Merged
        from dfmerge_studies.report.export import export_merge
        from dfmerge_studies.study.fishers import spec_cache

        problem = load_problem(settings, progress=progress, ranks=common.join_ranks(settings))
        if row.importance is not Importance.UNIFORM:  # what has no importance puts no input through the models
            rehearse_(problem, row)
        merger = Merger(problem, row, spec_cache(settings), progress=progress)
        point = merger.point(given, own, "--coefficients")
        exported = export_merge(merger, settings, Merged(row.name, point), out, form, force=force)
    result = {
        "out": str(out),
        "method": settings.method,
        **forms.outcome(exported, out, push_to_hub, private),
    }
    if json:
        common.print_json(result)
    else:
        common.output().print(f"merged with {settings.method} into {out} ({exported.dtype})", markup=False)
        forms.tell(exported, result)


def fisher(
    spec: common.RequiredSpec,
    expert: Annotated[str, typer.Option("--expert", metavar="NAME", help="Whose importance.")],
    out: OutOption,
    coefficient: Annotated[
        float, typer.Option("--coefficient", metavar="X", help="lambda: the parameters are theta_pre + X tau.")
    ] = 1.0,
    device: common.DeviceOption = None,
    cache: common.CacheOption = None,
    overrides: common.SetOption = None,
    trust: common.TrustOption = False,
    force: common.ForceOption = False,
    json: common.JsonOption = False,
) -> None:
    """Write one expert's diagonal Fisher information as a safetensors file."""
    overrides = common.trusting(overrides, trust)
    settings = common.load_spec(spec, overrides, device=device, cache=cache)
    from dfmerge_studies.spec import check_coefficients

    where = "--coefficient" if expert in settings.experts else "--expert"
    check_coefficients(settings, {**dict.fromkeys(settings.experts, coefficient), expert: coefficient}, where)
    from dfmerge_studies.report.outputs import fisher_target

    fisher_target(settings, out, force=force)
    common.check_early(settings)
    with common.progress_bar() as progress:
        common.load_libraries()
        from dfmerge_studies.importance.cache import key_metadata, save_fisher
        from dfmerge_studies.objective.loading import load_problem
        from dfmerge_studies.objective.merger import Merger
        from dfmerge_studies.objective.rehearsal import rehearse_
        from dfmerge_studies.study.fishers import spec_cache

        problem = load_problem(settings, progress=progress, ranks=common.join_ranks(settings))
        method = settings.row  # which may prescribe an estimator
        method = method if method.estimator else settings.row_of("df-merge")
        rehearse_(problem, method)
        merger = Merger(problem, method, spec_cache(settings), progress=progress)
        index, names = problem.experts.index(expert), merger.all_names()
        values, cached = merger.importance(index, coefficient, names=names)
        key = merger.importances.key(index, coefficient, names)
        samples = {task: len(problem.tasks[task].fisher) for task in key.indices}
        place = fisher_target(settings, out, force=force)  # again: something may have come there meanwhile
        save_fisher(place, values, {**key_metadata(key), "expert": expert, "samples": str(sum(samples.values()))})
    result = {
        "out": str(out),
        "expert": expert,
        "coefficient": coefficient,
        "estimator": key.estimator,
        "samples": sum(samples.values()),
        "cached": cached,
        "key": key.digest,
    }
    if json:
        common.print_json(result)
    else:
        source = "from the cache" if cached else f"over {result['samples']} inputs"
        common.output().print(f"Fisher information of {expert} at {coefficient:g} {source} in {out}", markup=False)


def evaluate(
    spec: common.RequiredSpec,
    model: Annotated[str, typer.Option("--model", metavar="DIR", help="Directory, Hub id or adapter.")],
    split: Annotated[str, typer.Option("--split", help="validation or test.")] = "validation",
    device: common.DeviceOption = None,
    overrides: common.SetOption = None,
    trust: common.TrustOption = False,
    json: common.JsonOption = False,
) -> None:
    """Score any model on the spec's tasks."""
    chosen = as_split(split, "--split")
    from dfmerge_studies.objective.preflight import check_model

    overrides = common.trusting(overrides, trust)
    settings = common.load_spec(spec, overrides, device=device)
    common.check_early(settings)
    check_model(model, root=Path.cwd(), where="--model")
    with common.progress_bar() as progress:
        common.load_libraries()
        from dfmerge_studies.objective.evaluate import base_on_guards, evaluate_model
        from dfmerge_studies.report.standings import BASE, Scored, side_by_side
        from dfmerge_studies.tasks.metrics import guarded

        ranks = common.join_ranks(settings)
        tasks = evaluate_model(settings, model, chosen, progress=progress, ranks=ranks)
        base = base_on_guards(settings, chosen, progress=progress, ranks=ranks)
    metrics = settings.metrics(chosen)
    scores, of_base = ({task: entry.score for task, entry in found.items()} for found in (tasks, base))
    guards = guarded(scores, of_base, metrics)
    if json:
        described = {task: _described(entry, metrics[task]) for task, entry in tasks.items()}
        found = {"model": model, "split": chosen, "tasks": described, "mean": metrics.mean_of(scores)}
        common.print_json({**found, **forms.guards_json(guards)})
        return
    from dfmerge_studies.report.renderings import standings_table

    rows = [Scored(BASE, {chosen: of_base}, compete=False, results={chosen: base})] if base else []
    rows.append(Scored(model, {chosen: scores}, results={chosen: tasks}))
    table = side_by_side(rows, {chosen: metrics})[chosen]
    common.output().print(standings_table(table, title=f"{chosen} {metrics.heading}"))
    forms.tell_guards(guards)


def export(
    spec: common.SpecArgument = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Directory to make.")] = None,
    trial: Annotated[
        int | None, typer.Option("--trial", metavar="N", min=0, max=limits.INTEGER, help="A trial other than the best.")
    ] = None,
    storage: common.StorageOption = None,
    device: common.DeviceOption = None,
    cache: common.CacheOption = None,
    overrides: common.SetOption = None,
    trust: common.TrustOption = False,
    dtype: forms.DtypeOption = "base",
    split_heads: forms.SplitOption = False,
    as_adapter: forms.AdapterOption = False,
    rank: forms.RankOption = None,
    shard_size: Annotated[str, typer.Option("--shard-size", help="Largest weights file.")] = "5GB",
    push_to_hub: forms.PushOption = None,
    private: forms.PrivateOption = False,
    force: common.ForceOption = False,
    json: common.JsonOption = False,
) -> None:
    """Write the best trial, or a given one, as a model directory that from_pretrained loads."""
    if out is None:
        raise InputError("nothing says where to write", where="--out", hint="Add --out DIR")
    from dfmerge_studies.report.forms import Form

    form = Form(forms.precision_of(dtype), split_heads, shard_size, as_adapter, rank)
    forms.check_push(push_to_hub, private)
    again = common.again(spec, overrides=overrides, device=device)
    overrides = common.trusting(overrides, trust)
    settings = common.load_spec(spec, overrides, storage=storage, device=device, cache=cache)
    from dfmerge_studies.report.forms import check_form
    from dfmerge_studies.report.outputs import model_target

    model_place = model_target(settings, out, force=force)
    check_form(settings, form)
    common.check_early(settings, storage=True, create=False)
    with common.progress_bar() as progress:
        common.load_libraries()
        from dfmerge_studies.report.card import CARD
        from dfmerge_studies.report.export import export_trial
        from dfmerge_studies.report.notes import keep_card
        from dfmerge_studies.storage import is_read_only, storage_of
        from dfmerge_studies.study.session import open_study, stored_study
        from dfmerge_studies.study.winner import find_trial

        ranks = common.join_ranks(settings)
        found = find_trial(stored_study(settings), settings, trial)
        session = open_study(settings, progress=progress, ranks=ranks, looking=True)
        exported = export_trial(session, found, out, form, force=force)
        if is_read_only(storage_of(session.study)):
            common.warn("note: the study cannot be written to, so it does not keep the model's card")
        else:
            keep_card(session.study, model_place / CARD, settings.workdir)
    result: dict[str, Any] = {"out": str(out), "study": settings.name, "trial": found.number}
    result |= forms.outcome(exported, out, push_to_hub, private)
    if json:
        common.print_json(result)
        return
    console = common.output()
    value = settings.metrics("validation").value_text([result["value"]])
    console.print(
        f"trial {found.number} ({value} {result['metric']}) written to {out} as {exported.dtype}", markup=False
    )
    forms.tell(exported, result)
    if spec is not None:
        split = [] if settings.untested else ["--split", "test"]
        common.tell_next(["evaluate", *again, "--model", str(out), *split, *(["--trust-remote-code"] if trust else [])])


def _described(score: TaskScore, metric: Metric) -> dict[str, Any]:
    """A score for `--json`."""
    from dfmerge_studies.tasks.uncertainty import standard_error

    error = standard_error(score, metric)
    return {"score": score.score, "metric": score.metric, "n": score.n, "standard_error": error}


def _parse_coefficients(spec: StudySpec, text: str | None) -> dict[str, float | dict[str, float]] | None:
    """`a=0.4,b=0.9`, one number for all, or JSON, checked as far as the spec alone says; None for the method's own."""
    from dfmerge_studies.spec import check_coefficients

    where = "--coefficients"
    if text is None:
        if spec.row.coefficients.chosen:
            raise InputError(f"the method {spec.method!r} needs coefficients", where=where, hint="Give one per expert")
        return None
    if spec.row.coefficients is Coefficients.FISHER_TRACE:
        raise InputError(f"the method {spec.method!r} has its own", where=where, hint="Leave them out")
    if text.lstrip().startswith("{"):
        return _json_coefficients(text, where)
    point: dict[str, float] = {}
    for part in text.split(","):
        name, sign, value = part.rpartition("=")
        try:
            number = float(value)
        except ValueError as error:
            raise InputError(f"{part!r} is not NAME=NUMBER", where=where, hint="Write e.g. a=0.4,b=0.9") from error
        if name.strip() in point:
            raise InputError(f"{name.strip()!r} is given twice", where=where, hint="Give it once")
        point.update({name.strip(): number} if sign else dict.fromkeys(spec.experts, number))
    finer = any(name.startswith(f"{expert}.") for name in point.keys() - spec.experts.keys() for expert in spec.experts)
    if spec.search.granularity is None or not finer:
        check_coefficients(spec, point, where, bounds=coefficient_range(spec.row, spec.search.bounds))
    return {**point}


def _json_coefficients(text: str, where: str) -> dict[str, float | dict[str, float]]:
    """Coefficients by expert, by EXPERT.GROUP, or by expert and then by group."""
    hint = 'Write e.g. {"a": 0.4, "b": {"attention": 0.5, "mlp": 0.9}}'
    try:
        found = json_module.loads(text)
    except ValueError as error:
        raise InputError(f"{text!r} is no JSON: {error}", where=where, hint=hint) from error
    numbers = [n for value in found.values() for n in (value.values() if isinstance(value, dict) else [value])]
    if not all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in numbers):
        raise InputError(f"{text!r} holds something else than numbers", where=where, hint=hint)
    return dict(found)
