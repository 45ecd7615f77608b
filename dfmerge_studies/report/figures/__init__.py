"""Figures of a study: data first, then the same data drawn by plotly (for the page) and matplotlib (for files).

A figure is a module with a function from a `StudyView` to a `Drawing`, or to the reason why there is none, and its
row in `FIGURES`.  All read the storage only; what needs the models is a figure's probe, which keeps its result in the
study.  Modules are imported when they draw: the command line names the figures in its help.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from dfmerge_studies.progress import Progress

if TYPE_CHECKING:
    import optuna
    import plotly.graph_objects as go

    from dfmerge_studies.report.figures.base import Drawing, Missing
    from dfmerge_studies.report.view import StudyView
    from dfmerge_studies.study.session import Session


@dataclass(frozen=True)
class ProbeOptions:
    """What a user may say of the probes.

    Attributes:
        points: of `interpolation`: models per expert, base included.
        grid: of `landscape`: coefficients per expert.
        pair: of `landscape`: two experts; the first two by default.
        ratios: of `ratio`: shares of the validation rows.
    """

    points: int = 11
    grid: int = 9
    pair: Sequence[str] | None = None
    ratios: Sequence[float] = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


@dataclass(frozen=True)
class Figure:
    """One row of the table.

    Attributes:
        name: as `--figures` names it.
        draw: one drawing or several, from the storage alone.
        probe: computes with the models what `draw` needs and the study does not have yet; None: it needs nothing.
    """

    name: str
    draw: Callable[[StudyView], Sequence[Drawing | Missing]]
    probe: Callable[[Session, ProbeOptions, Progress], Any] | None = None


def _drawn_by(module: str, function: str) -> Callable[[StudyView], Sequence[Drawing | Missing]]:
    def draw(view: StudyView) -> Sequence[Drawing | Missing]:
        found = getattr(import_module(f"{__name__}.{module}"), function)(view)
        return found if isinstance(found, list) else [found]

    return draw


def _interpolate(session: Session, options: ProbeOptions, progress: Progress) -> Any:
    from dfmerge_studies.study.probes import interpolate

    return interpolate(session, options.points, progress=progress)


def _reselect(session: Session, options: ProbeOptions, progress: Progress) -> Any:
    from dfmerge_studies.study.probes import reselect

    return reselect(session, options.ratios, progress=progress)


def _landscape(session: Session, options: ProbeOptions, progress: Progress) -> Any:
    from dfmerge_studies.study.landscape import landscape

    return landscape(session, options.grid, pair=options.pair, progress=progress)


FIGURES: Mapping[str, Figure] = {
    figure.name: figure
    for figure in (
        Figure("scores", _drawn_by("scores", "scores")),
        Figure("comparison", _drawn_by("comparison", "comparison")),
        Figure("trajectory", _drawn_by("trajectory", "trajectory")),
        Figure("importance", _drawn_by("importance", "importance")),
        Figure("slices", _drawn_by("slices", "slices")),
        Figure("interpolation", _drawn_by("interpolation", "interpolation"), _interpolate),
        Figure("ratio", _drawn_by("ratio", "ratio"), _reselect),
        Figure("landscape", _drawn_by("landscape", "landscapes"), _landscape),
    )
}


def figures(view: StudyView, names: Sequence[str] | None = None) -> list[Drawing | Missing]:
    """The figures of a study, from the storage alone.

    Args:
        view: the stored study.
        names: keys of `FIGURES`; all by default.
    """
    wanted = FIGURES if names is None else [name for name in FIGURES if name in names]
    return [drawing for name in wanted for drawing in FIGURES[name].draw(view)]


def plotly_figures(study: optuna.Study | Session) -> dict[str, go.Figure]:
    """The interactive figures that a study has, by name; needs its storage only.

    Args:
        study: from its storage, or an open session.
    """
    from dfmerge_studies.report.figures.base import Drawing
    from dfmerge_studies.report.view import StudyView

    stored = study if not hasattr(study, "study") else study.study
    drawings = [drawing for drawing in figures(StudyView.of(stored)) if isinstance(drawing, Drawing)]
    return {drawing.name: drawing.plotly() for drawing in drawings}
