"""`report`: a study as a page and figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dfmerge_studies import limits
from dfmerge_studies.cli import common
from dfmerge_studies.errors import InputError, did_you_mean
from dfmerge_studies.report.figures import FIGURES, ProbeOptions

if TYPE_CHECKING:
    from dfmerge_studies.progress import Progress
    from dfmerge_studies.spec import StudySpec

PROBED = [name for name, figure in FIGURES.items() if figure.probe is not None]  # need models the first time
POINTS, GRID, RATIOS = 11, 9, "0.05,0.1,0.2,0.3,0.5,0.7,1"


def report(
    spec: common.SpecArgument = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where index.html and figures/ go.")] = Path(
        "report"
    ),
    figures: Annotated[
        str | None,
        typer.Option(
            "--figures",
            metavar="a,b|all",
            help=f"Which of {', '.join(FIGURES)}. By default all that the storage alone can give; "
            f"{', '.join(PROBED)} are computed, with the models, only when named here, and kept in the study.",
        ),
    ] = None,
    points: Annotated[
        int, typer.Option("--points", min=2, max=limits.POINTS, help="interpolation: models per expert, base included.")
    ] = POINTS,
    grid: Annotated[
        int, typer.Option("--grid", min=2, max=limits.GRID, help="landscape: coefficients per expert.")
    ] = GRID,
    pair: Annotated[
        str | None, typer.Option("--pair", metavar="a,b", help="landscape: two experts; the first two by default.")
    ] = None,
    ratios: Annotated[str, typer.Option("--ratios", help="ratio: shares of the validation rows.")] = RATIOS,
    storage: common.StorageOption = None,
    device: common.DeviceOption = None,
    cache: common.CacheOption = None,
    overrides: common.SetOption = None,
    trust: common.TrustOption = False,
    force: common.ForceOption = False,
    json: common.JsonOption = False,
) -> None:
    """Write a study's figures and one self-contained HTML page."""
    names, shares = _names(figures), _shares(ratios)
    overrides = common.trusting(overrides, trust)
    settings = common.load_spec(spec, overrides, storage=storage, device=device, cache=cache)
    from dfmerge_studies.report.outputs import report_target

    place = report_target(settings, out, force=force)
    wanted = [name for name in names if FIGURES[name].probe is not None] if figures is not None else []
    common.check_early(settings, models=bool(wanted), storage=True, create=False)
    common.quiet_libraries()
    from dfmerge_studies.report.figures import figures as drawings
    from dfmerge_studies.report.figures.base import Drawing
    from dfmerge_studies.report.page import check_out, study_page, write_report
    from dfmerge_studies.report.verdict import verdict_of
    from dfmerge_studies.report.view import StudyView
    from dfmerge_studies.storage import storage_errors
    from dfmerge_studies.study.plan import Plan

    check_out(place, names)
    plan = Plan.of(settings)
    study = plan.study()
    if wanted:
        with common.progress_bar() as progress:
            options = ProbeOptions(points, grid, pair.split(",") if pair else None, shares)
            _compute(settings, wanted, options, skip=figures == "all", progress=progress)
    again = common.again(spec, storage=storage, overrides=overrides)
    asked: list[tuple[str, object, object]] = [("--figures", figures, None)]
    if wanted:
        asked += [("--points", points, POINTS), ("--grid", grid, GRID), ("--pair", pair, None)]
        asked += [("--ratios", ratios, RATIOS)]
    own = [word for flag, value, usual in asked if value != usual for word in (flag, str(value))]
    made = common.command_line("report", *again, *own, "--out", out.name or "report")
    command = f"{common.command_line('run', *again)}\n{made}"
    with storage_errors(plan.url):
        view = StudyView.of(study)
        found = drawings(view, names)
        written = write_report(place, study_page(view, command), found)
        verdict = verdict_of(view)
    missing = {figure.name: figure.reason for figure in found if not isinstance(figure, Drawing)}
    if json:
        told = verdict.described() if verdict is not None else None
        common.print_json({"study": view.name, "verdict": told, **written.described(), "missing": missing})
        return
    console = common.output()
    console.print(f"{written.page}: {len(found) - len(missing)} figures", markup=False)
    for name, reason in missing.items():
        console.print(f"  no {name}: {reason}", markup=False)


def _compute(spec: StudySpec, wanted: list[str], options: ProbeOptions, *, skip: bool, progress: Progress) -> None:
    """Merge and score what the wanted figures need and the study does not have yet.

    With `skip`, what a study cannot have is passed over.
    """
    from dfmerge_studies.study.session import open_study

    session = open_study(spec, progress=progress)
    for name in wanted:
        probe = FIGURES[name].probe
        try:
            if probe is not None:
                probe(session, options, progress)
        except InputError:
            if not skip:
                raise


def _names(figures: str | None) -> list[str]:
    if figures in (None, "all"):
        return list(FIGURES)
    names = [name.strip() for name in figures.split(",")]
    for name in names:
        if name not in FIGURES:
            raise InputError(
                f"there is no figure {name!r}",
                where="--figures",
                hint=did_you_mean(name, FIGURES) or f"Figures: {', '.join(FIGURES)}",
            )
    return names


def _shares(ratios: str) -> list[float]:
    try:
        return [float(share) for share in ratios.split(",")]
    except ValueError:
        raise InputError(f"{ratios!r} is no list of numbers", where="--ratios", hint="For instance 0.1,0.5,1") from None
