"""`run`: create a study or join it, and work until its total is reached."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from dfmerge_studies import limits
from dfmerge_studies.cli import common
from dfmerge_studies.cli.bars import TrialBars
from dfmerge_studies.cli.workers import Wanted, run_pool
from dfmerge_studies.errors import InputError
from dfmerge_studies.ranks import launched, launched_rank
from dfmerge_studies.tasks.splits import Split

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from dfmerge_studies.importance.cache.shelf import Tally
    from dfmerge_studies.report.standings import Scored, Standings
    from dfmerge_studies.report.tracking import Tracking
    from dfmerge_studies.spec import StudySpec
    from dfmerge_studies.study.plan import Plan
    from dfmerge_studies.study.session import Session


def run(
    spec: common.SpecArgument = None,
    trials: Annotated[
        int | None, typer.Option("--trials", min=1, max=limits.TRIALS, help="Total of a search to reach.")
    ] = None,
    add: Annotated[
        int | None, typer.Option("--add", min=1, max=limits.TRIALS, help="Raise the total of a search by so many.")
    ] = None,
    storage: common.StorageOption = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, max=limits.SEED, help="Seed of everything random.")
    ] = None,
    method: Annotated[str | None, typer.Option("--method", help="Row of the method table, e.g. df-merge, gta.")] = None,
    acquisition: Annotated[str | None, typer.Option("--acquisition", help="ei or ucb.")] = None,
    workers: Annotated[
        int, typer.Option("--workers", min=1, max=limits.WORKERS, help="Processes of this machine that share it.")
    ] = 1,
    device: common.DeviceOption = None,
    cache: common.CacheOption = None,
    overrides: common.SetOption = None,
    trust: common.TrustOption = False,
    tracker: common.TrackerOption = None,
    test: Annotated[bool, typer.Option(help="Score the winner on the test splits, where there are any.")] = True,
    json: common.JsonOption = False,
) -> None:
    """Create the study or join it, and work until its total of trials is reached."""
    if trials is not None and add is not None:
        raise InputError(
            "--trials and --add cannot be used together", where="--add", hint="Give the total, or what to add to it"
        )
    if workers > 1 and launched() > 1:
        raise InputError(
            f"--workers cannot be used in a group of {launched()} launched processes, which are one worker together",
            where="--workers",
            hint="Leave it out, or start run without accelerate launch or torchrun",
        )
    overrides = common.trusting(overrides, trust)
    flags: dict[str, str | int | None] = {
        "method": method,
        "search__seed": seed,
        "search__acquisition": acquisition,
        "device": device,
        "cache": cache,
    }
    settings = common.load_spec(spec, overrides, storage=storage, **flags)
    if workers > 1 and settings.device_map is not None:
        raise InputError(
            f"{settings.device_map} spreads one model over all CUDA devices, and --workers {workers} asks "
            f"for {workers} models",
            where=settings.where("device_map"),
            hint="Leave out one of the two",
        )
    common.check_early(settings, storage=True)
    _say_unheard(settings, {"--trials": trials, "--add": add, "--acquisition": acquisition})
    again = common.again(spec, storage=storage, overrides=overrides, **flags)
    with common.tracking_of(tracker) as tracking:
        _run(settings, _Asked(trials, add, workers, _splits(settings, test)), again, tracking, as_json=json)


@dataclass(frozen=True)
class _Asked:
    """What a command line asks of a run, besides the spec."""

    trials: int | None
    add: int | None
    workers: int
    splits: list[Split]


def _run(settings: StudySpec, asked: _Asked, again: list[str], tracking: Tracking | None, *, as_json: bool) -> None:
    started = time.monotonic()
    trials, add, splits = asked.trials, asked.add, asked.splits
    if asked.workers > 1:
        from dfmerge_studies.study.plan import Plan

        plan = Plan.of(settings)
        wanted = Wanted.of(plan, trials, add)
        trials, add = wanted.total, None
        if not wanted.is_reached(plan) and not run_pool(settings, asked.workers, wanted, splits, tracking):
            _tell_interrupted(plan, again, as_json=as_json, seconds=time.monotonic() - started)
            raise typer.Exit(130)
    with common.progress_bar() as progress:
        progress("starting", 0, 1)
        common.load_libraries()
        from dfmerge_studies.study.session import open_study

        ranks = common.join_ranks(settings)
        session = open_study(settings, splits=splits, progress=progress, ranks=ranks)
    _say_search(session, settings)
    if add is not None:
        session.add_trials(add)
    # Workers were told the total already: what somebody has added since must not be undone.
    finished = _work(session, trials, tracking, alone=asked.workers == 1)
    tables: dict[Split, Standings] = {}
    if finished and session.best() is not None:
        baselines, finished = _baselines(session, tracking)
        if finished:
            tables = _tables(session, baselines, splits)
            _check_kept(session, *baselines)
    kept = session.merger.importances.shelf.tally
    seconds = time.monotonic() - started
    _tell(session.study, session.plan, tables, again, finished=finished, as_json=as_json, seconds=seconds, kept=kept)
    if not finished:
        raise typer.Exit(130)


def _say_unheard(settings: StudySpec, flags: Mapping[str, object]) -> None:
    """Say which flags of a search were given for a method that does not search."""
    given = [flag for flag, value in flags.items() if value is not None]
    if settings.row.searches or not given or launched_rank() != 0:
        return
    from dfmerge_studies.study.plan import Plan

    plan = Plan.of(settings)
    points = f"the {plan.trials} points of its grid" if plan.trials > 1 else "its one point"
    verb = "has" if len(given) == 1 else "have"
    common.warn(f"note: {plan.method.name} tries {points}; {' and '.join(given)} {verb} no say")


def _say_search(session: Session, asked: StudySpec) -> None:
    """Say what a study starts from, and which sampler it goes on with where a new study would have another."""
    from dfmerge_studies.study.plan import Plan
    from dfmerge_studies.study.warm_start import origin_text

    plan = session.plan
    if session.warm is not None:
        common.warn(f"note: {plan.spec.name} tries first {origin_text(session.warm)}")
    if plan.search is not None and plan.proposer != Plan.of(asked).proposer:
        common.warn(f"note: {plan.spec.name} goes on with the sampler {plan.proposer}, which it was begun with")


def _work(session: Session, total: int | None, tracking: Tracking | None, *, alone: bool = True) -> bool:
    """Run trials under a bar.

    Args:
        session: of the study.
        total: an explicit one.
        tracking: told of completed trials.
        alone: whether no workers were told it before.

    Returns:
        Whether the work was not interrupted.
    """
    with TrialBars(tracking) as bars:
        bars.follow(session.study, session.spec, session.total(total))
        session.merger.progress = bars.phase
        name = session.spec.name
        summary = session.run(
            target=total, lower=alone, regardless=alone, on_event=lambda event: bars.event(name, event)
        )
    return not summary.interrupted


def _baselines(session: Session, tracking: Tracking | None) -> tuple[list[Session], bool]:
    """Run the methods that the spec shows beside its own, each as a study of its own in the same storage."""
    from dfmerge_studies.study.session import open_study
    from dfmerge_studies.study.variants import baseline_specs

    done: list[Session] = []
    for spec in baseline_specs(session.spec):
        _check_kept(session, *done)  # a file that was deleted must not be made anew
        baseline = open_study(spec, problem=session.problem)
        if not _work(baseline, None, tracking):
            return done, False
        done.append(baseline)
    return done, True


def _check_kept(*sessions: Session) -> None:
    """Look whether the storage still has what was told to it."""
    from dfmerge_studies.trials.keeping import check_all

    check_all(each.keeper for each in sessions if each.keeper is not None)


def _splits(spec: StudySpec, test: bool) -> list[Split]:
    return ["validation", "test"] if test and not spec.untested else ["validation"]


def _tables(session: Session, baselines: list[Session], splits: list[Split]) -> dict[Split, Standings]:
    """Base, experts, baselines and the winner; what is not in the study yet is scored now."""
    from dfmerge_studies.report.standings import BASE, EXPERTS, Scored, side_by_side
    from dfmerge_studies.study.scores import results_by_split

    with common.progress_bar() as progress:
        session.merger.progress = progress
        rows = []
        for name, row in ((BASE, "base"), (EXPERTS, "experts")):
            scores = {split: session.reference_scores(row, split) for split in splits}
            rows.append(Scored(name, scores, compete=False, results=results_by_split(session.study, row, splits)))
        for each in [*baselines, session]:
            best = each.best()
            assert best is not None
            each.merger.progress = progress
            scores = {split: each.trial_scores(best, split) for split in splits}
            name = f"{each.method.name} (trial {best.number})" if each is session else each.method.name
            found = results_by_split(each.study, best, splits)
            rows.append(Scored(name, scores, detail=each.point(best).described(), results=found))
            if each is session:
                rows += _rescored(session, name, best)
    return side_by_side(rows, {split: session.spec.metrics(split) for split in splits}, session.spec.name)


def _rescored(session: Session, name: str, winner: FrozenTrial) -> list[Scored]:
    """The winner on all rows that its choice rests on: the number that is not the best of many."""
    from dfmerge_studies.report.standings import Scored
    from dfmerge_studies.study.winner import selection_of
    from dfmerge_studies.tasks.metrics import TaskScore
    from dfmerge_studies.trials.reading import results

    selection = selection_of(session.study, results(session.study))
    if selection is None or selection.rescored is None:
        return []
    metrics, tasks = session.spec.metrics("validation"), selection.rescored.tasks
    scores = {task: TaskScore(score, metrics[task].name, selection.rows[task]) for task, score in tasks.items()}
    row = f"{name}, on all rows"
    detail = session.point(winner).described()
    return [Scored(row, {"validation": tasks}, compete=False, detail=detail, results={"validation": scores})]


def _tell_interrupted(plan: Plan, again: list[str], *, as_json: bool, seconds: float) -> None:
    """The state of a study that workers have left; nothing if they had not founded it yet."""
    study = plan.study_if_any()
    if study is not None:
        _tell(study, plan, {}, again, finished=False, as_json=as_json, seconds=seconds)


def _tell(
    study: optuna.Study,
    plan: Plan,
    tables: dict[Split, Standings],
    again: list[str],
    *,
    finished: bool,
    as_json: bool,
    seconds: float,
    kept: Tally | None = None,
) -> None:
    from dfmerge_studies.methods import label
    from dfmerge_studies.report.renderings import rows_json, standings_table
    from dfmerge_studies.report.summary import study_summary
    from dfmerge_studies.report.tables import (
        coefficients_text,
        method_parameters,
        progress_text,
        selection_text,
        verdict_lines,
    )

    spec, summary = plan.spec, study_summary(study, plan)
    if as_json:
        texts = {split: table.metrics.text for split, table in tables.items()}
        shown = {"interrupted": not finished, "metrics": texts, "rows": rows_json(tables)}
        if kept is not None:
            shown["cache"] = asdict(kept)
        common.print_json({**summary, **shown})
        return
    out, best = common.output(), summary["best"]
    for line in verdict_lines(summary) if finished else ():
        out.print(f"verdict: {line}", markup=False)
    for split, table in tables.items():
        out.print(standings_table(table, title=f"{summary['study']}: {split} {table.metrics.heading}"))
    state = progress_text(summary)
    out.print(f"{state}{'' if finished else ', interrupted: nothing is lost, run it again to go on'} ({seconds:.0f} s)")
    if best is not None:
        value = spec.metrics("validation").value_text([best["value"]])
        out.print(f"winner: trial {best['number']}, {value} ({summary['metric']})")
        if best["selection"] is not None:
            out.print(f"  {selection_text(best['selection'], spec.metrics('validation'))}", markup=False)
        own = "".join(f", {label(name)} {value:g}" for name, value in method_parameters(spec.row.name, best).items())
        means = " (means)" * ("groups" in best)
        out.print(f"  coefficients{means}: {coefficients_text(best['coefficients'])}{own}", markup=False)
        for expert, groups in best.get("groups", {}).items():
            out.print(f"    {expert}: {coefficients_text(groups)}", markup=False)
        if not best.get("feasible", True):
            out.print("  no trial keeps every task within max_drop; this one comes closest")
    if kept is not None and (text := kept.text()):
        out.print(f"Fisher cache: {text}", markup=False)
    common.tell_next(["status", *again], ["export", *again, "--out", "merged-model"])
