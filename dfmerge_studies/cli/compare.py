"""`compare`: methods side by side, each a study per seed."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dfmerge_studies import limits
from dfmerge_studies.cli import common
from dfmerge_studies.cli.bars import TrialBars
from dfmerge_studies.errors import InputError, RunError

if TYPE_CHECKING:
    from dfmerge_studies.progress import Progress
    from dfmerge_studies.report.tracking import Tracking
    from dfmerge_studies.spec import StudySpec
    from dfmerge_studies.study.comparison import Comparison, Planned
    from dfmerge_studies.study.session import Session
    from dfmerge_studies.trials.loop import Summary


def compare(
    spec: common.SpecArgument = None,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods", metavar="A,B,...", help="What to compare, cells of the method table too; all by default."
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option("--seeds", metavar="K", min=1, max=limits.SEEDS, help="Seeds, from the spec's own upwards.")
    ] = 1,
    split: Annotated[
        str | None, typer.Option("--split", help="validation or test; test by default, where every task has one.")
    ] = None,
    ablation: Annotated[
        bool, typer.Option("--ablation", help="What df-merge loses without each of its parts, instead of all methods.")
    ] = False,
    multi_task: Annotated[
        str | None, typer.Option("--multi-task", metavar="DIR", help="A model fine-tuned on all tasks, as a row.")
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option("--trials", min=1, max=limits.TRIALS, help="Total of trials of every method that searches."),
    ] = None,
    storage: common.StorageOption = None,
    device: common.DeviceOption = None,
    cache: common.CacheOption = None,
    overrides: common.SetOption = None,
    trust: common.TrustOption = False,
    tracker: common.TrackerOption = None,
    json: common.JsonOption = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print one line per row and task, for other programs.")] = False,
    latex: Annotated[bool, typer.Option("--latex", help="Print a LaTeX tabular (booktabs).")] = False,
) -> None:
    """Run what is missing of the methods' studies, and print them side by side."""
    if json + csv + latex > 1:
        raise InputError("--json, --csv and --latex cannot be used together", where="compare", hint="Choose one")
    if ablation and methods is not None:
        raise InputError("--ablation names its methods itself", where="--methods", hint="Leave one of the two out")
    overrides = common.trusting(overrides, trust)
    settings = common.load_spec(
        spec, overrides, storage=storage, device=device, cache=cache, multi_task=_model(multi_task)
    )
    common.check_early(settings, storage=True)
    if settings.multi_task is not None:
        from dfmerge_studies.objective.preflight import check_model

        where = "--multi-task" if multi_task is not None else settings.where("multi_task")
        check_model(settings.multi_task, root=settings.root, where=where)
    names = (
        None
        if methods is None or methods.strip() == "all"
        else [name.strip() for name in methods.split(",") if name.strip()]
    )
    with common.tracking_of(tracker) as tracking:
        found = _compare(settings, names, seeds=seeds, split=split, trials=trials, ablation=ablation, tracking=tracking)
    if found.interrupted:
        common.messages().print("interrupted: nothing is lost, the same command goes on")
        if json:
            _tell(found, ablation=ablation, form="json")
        raise typer.Exit(130)
    _tell(found, ablation=ablation, form="json" if json else "csv" if csv else "latex" if latex else "")
    for entry in found.failed:
        common.messages().print(f"{entry.study} failed: {entry.error}", markup=False, soft_wrap=True)
    if found.failed:
        raise typer.Exit(1)


def _model(given: str | None) -> str | None:
    """A folder is meant from the working directory, unlike in the spec; anything else is a Hub id."""
    return str(Path(given).resolve()) if given is not None and Path(given).exists() else given


def _compare(
    spec: StudySpec,
    names: list[str] | None,
    *,
    seeds: int,
    split: str | None,
    trials: int | None,
    ablation: bool,
    tracking: Tracking | None,
) -> Comparison:
    """Run the comparison under bars, one of loading and one of trials in turn: two cannot be drawn at once."""
    with ExitStack() as loading:
        show: Progress | None = None

        def progress(what: str, done: int, total: int) -> None:
            nonlocal show
            if show is None:
                show = loading.enter_context(common.progress_bar())
            show(what, done, total)

        def work(session: Session, total: int, planned: Planned) -> Summary:
            nonlocal show
            loading.close()
            show = None
            return _work(session, total, planned, tracking)

        progress("starting", 0, 1)
        common.load_libraries()
        from dfmerge_studies.study import comparison

        return comparison.compare(
            spec, names, seeds=seeds, split=split, trials=trials, ablation=ablation, work=work, progress=progress
        )


def _work(session: Session, total: int, planned: Planned, tracking: Tracking | None) -> Summary:
    """Run one study under a bar, and say at once if it fails: the comparison goes on without it."""
    note = f" ({planned.note})" if planned.note else ""
    common.messages().print(f"study {planned.number} of {planned.of}: {planned.spec.name}{note}", markup=False)
    try:
        with TrialBars(tracking) as bars:
            bars.follow(session.study, session.spec, total)
            session.merger.progress = bars.phase
            name = session.spec.name
            return session.run(target=total, regardless=False, on_event=lambda event: bars.event(name, event))
    except RunError as error:
        common.messages().print(f"{planned.spec.name} failed, going on: {error}", markup=False, soft_wrap=True)
        raise


def _tell(found: Comparison, *, ablation: bool, form: str) -> None:
    from dfmerge_studies.report import renderings
    from dfmerge_studies.report.latex import standings_latex
    from dfmerge_studies.report.standings import standings
    from dfmerge_studies.study.variants import ABLATION

    table = standings(found, found.splits[-1])
    labels = ABLATION if ablation else {}
    if form == "json":
        common.print_json(renderings.standings_json(table, found))
    elif form == "csv":
        common.say(renderings.standings_csv(table), end="")
    elif form == "latex":
        common.say(standings_latex(table, labels), end="")
    else:
        title = f"{found.study}: {table.split} {table.metrics.heading}"
        out = common.output()
        out.print(renderings.standings_table(table, title=title, labels=labels))
        for note in renderings.notes(table):
            out.print(note, markup=False)
