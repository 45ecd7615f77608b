"""`run`: create a study or join it, and work until its total is reached."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfmerge_studies.cli import common
from dfmerge_studies.errors import InputError

if TYPE_CHECKING:
    from dfmerge_studies.report.tables import Row
    from dfmerge_studies.spec import StudySpec
    from dfmerge_studies.study.loop import Event
    from dfmerge_studies.study.session import Session


def run(
    spec: common.SpecArgument = None,
    trials: Annotated[int | None, typer.Option("--trials", min=1, help="Total of trials to reach.")] = None,
    add: Annotated[int | None, typer.Option("--add", min=1, help="Raise the total by so many.")] = None,
    storage: common.StorageOption = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Seed of everything random.")] = None,
    method: Annotated[str | None, typer.Option("--method", help="Row of the method table, e.g. df-merge, gta.")] = None,
    acquisition: Annotated[str | None, typer.Option("--acquisition", help="ei.")] = None,
    device: common.DeviceOption = None,
    cache: common.CacheOption = None,
    overrides: common.SetOption = None,
    test: Annotated[bool, typer.Option(help="Score the winner on the test splits, where there are any.")] = True,
    json: common.JsonOption = False,
) -> None:
    """Create the study or join it, and work until its total of trials is reached."""
    if trials is not None and add is not None:
        raise InputError(
            "--trials and --add cannot be used together", where="--add", mend="Give the total, or what to add to it"
        )
    settings = common.load_spec(
        spec,
        overrides,
        storage=storage,
        search__seed=seed,
        method=method,
        search__acquisition=acquisition,
        device=device,
        cache=cache,
    )
    common.check_early(settings, storage=True)
    started = time.monotonic()
    with common.progress_bar() as progress:
        common.quiet_libraries()
        progress("starting", 0, 1)
        from dfmerge_studies.study.session import open_study

        session = open_study(settings, splits=_splits(settings, test), progress=progress)
    total = trials
    if add is not None:
        total = session.total() + add
    finished = _work(session, total)
    rows: list[Row] = []
    if finished and session.best() is not None:
        baselines, finished = _baselines(session)
        if finished:
            rows = _rows(session, baselines, _splits(settings, test))
    again = common.again(spec, storage=storage, overrides=overrides)
    _tell(session, rows, again, finished=finished, as_json=json, seconds=time.monotonic() - started)
    if not finished:
        raise typer.Exit(130)


def _work(session: Session, total: int | None) -> bool:
    """Run trials under a bar.

    Returns:
        Whether the work was not interrupted.
    """
    with _trial_bar(session, session.total(total)) as show:
        summary = session.run(target=total, on_event=show)
    return not summary.interrupted


def _baselines(session: Session) -> tuple[list[Session], bool]:
    """Run the methods that the spec shows beside its own, each as a study of its own in the same storage."""
    from dfmerge_studies.study.session import open_study
    from dfmerge_studies.study.variants import VARIANTS, study_spec

    done: list[Session] = []
    for method in session.spec.baselines:
        spec = study_spec(session.spec, VARIANTS[method], session.spec.search.seed)
        baseline = open_study(spec, problem=session.problem)
        if not _work(baseline, None):
            return done, False
        done.append(baseline)
    return done, True


def _splits(spec: StudySpec, test: bool) -> list[str]:
    with_test = test and all(task.test_split is not None for task in spec.tasks.values())
    return ["validation", "test"] if with_test else ["validation"]


def _rows(session: Session, baselines: list[Session], splits: list[str]) -> list[Row]:
    """Base, experts, baselines and the winner; what is not in the study yet is scored now."""
    from dfmerge_studies.report.tables import Row

    with common.progress_bar() as progress:
        session.merger.progress = progress
        rows = [
            Row("base, unmerged", {s: session.reference_scores("base", s) for s in splits}, compete=False),
            Row("each task's own expert", {s: session.reference_scores("experts", s) for s in splits}, compete=False),
        ]
        for each in [*baselines, session]:
            best = each.best()
            assert best is not None
            each.merger.progress = progress
            scores = {split: each.trial_scores(best, split) for split in splits}
            name = f"{each.spec.method} (trial {best.number})" if each is session else each.spec.method
            rows.append(Row(name, scores, detail=each.coefficients(best), drop_rate=each.drop_rate(best)))
    return rows


def _tell(session: Session, rows: list[Row], again: str, *, finished: bool, as_json: bool, seconds: float) -> None:
    from dfmerge_studies.report.summary import study_summary
    from dfmerge_studies.report.tables import coefficients_text, comparison_table, rows_as_json

    summary = study_summary(session.study, session.spec)
    if as_json:
        common.print_json({**summary, "interrupted": not finished, "rows": rows_as_json(rows)})
        return
    out, best = common.output(), summary["best"]
    trials = summary["trials"]
    for split in rows[0].scores if rows else ():
        title = f"{summary['study']}: {split} accuracy in percent"
        out.print(comparison_table(rows, list(session.spec.tasks), split, title=title))
    state = f"{trials['complete']} of {trials['target']} trials complete"
    out.print(f"{state}{'' if finished else ', interrupted: nothing is lost, run it again to go on'} ({seconds:.0f} s)")
    if best is not None:
        out.print(f"winner: trial {best['number']}, {100 * best['value']:.1f}")
        dropped = f", drop rate {best['drop_rate']:g}" if "drop_rate" in best else ""
        out.print(f"  coefficients: {coefficients_text(best['coefficients'])}{dropped}", markup=False)
        if not best.get("feasible", True):
            out.print("  no trial keeps every task within max_drop; this one comes closest")
    out.print(f"next:\n  dfmerge status{again}\n  dfmerge export{again} --out merged-model", markup=False)


@contextmanager
def _trial_bar(session: Session, target: int) -> Iterator[Any]:
    """A bar over trials with the best value so far and the time left; lines instead where nobody watches."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = common.messages()
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[best]}"),
    )
    watched = sys.stderr.isatty()
    with Progress(*columns, console=console, disable=not watched) as bars:
        task = bars.add_task(session.spec.name, total=target, completed=_completed(session), best="")

        def show(event: Event) -> None:
            best = session.best()
            done = _completed(session)
            text = f"best {_shown(best.values)} (trial {best.number})" if best is not None else ""
            bars.update(task, completed=done, best=text)
            if event.kind in ("failed", "recovered", "applied", "interrupted", "superseded"):
                console.print(f"trial {event.number} {event.kind}: {event.message}", markup=False)
            elif event.kind == "completed" and not watched:
                console.print(
                    f"{session.spec.name}: {done}/{target}  trial {event.number} {_shown(event.values)}  {text}",
                    markup=False,
                )

        phase = bars.add_task("", total=None, best="", visible=False)

        def show_phase(what: str, done: int, total: int) -> None:
            bars.update(phase, description=f"  {what}", completed=done, total=total, visible=True)

        session.merger.progress = show_phase
        yield show
        bars.update(phase, visible=False)


def _completed(session: Session) -> int:
    from dfmerge_studies.study.loop import counts

    return counts(session.study)["complete"]


def _shown(values: Any) -> str:
    return " ".join(f"{100 * value:.1f}" for value in values or ())
