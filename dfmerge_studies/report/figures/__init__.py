"""Figures of a study: data first, then the same data drawn by plotly (for the page) and matplotlib (for files).

A figure is a module with a function from a `StudyView` to a `Drawing`, or to the reason why there is none.  All read
the storage only; the last three show what `study/probes.py` and `study/landscape.py` have computed with the models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from dfmerge_studies.report.figures.base import Drawing, Missing
from dfmerge_studies.report.figures.comparison import comparison
from dfmerge_studies.report.figures.importance import importance
from dfmerge_studies.report.figures.interpolation import interpolation
from dfmerge_studies.report.figures.landscape import landscapes
from dfmerge_studies.report.figures.ratio import ratio
from dfmerge_studies.report.figures.scores import scores
from dfmerge_studies.report.figures.slices import slices
from dfmerge_studies.report.figures.trajectory import trajectory
from dfmerge_studies.report.view import StudyView

__all__ = ["FIGURES", "Drawing", "Missing", "StudyView", "figures", "plotly_figures"]

if TYPE_CHECKING:
    import optuna
    import plotly.graph_objects as go

    from dfmerge_studies.study.session import Session

FIGURES: Mapping[str, Callable[[StudyView], Sequence[Drawing | Missing]]] = {
    "scores": lambda view: [scores(view)],
    "comparison": lambda view: [comparison(view)],
    "trajectory": lambda view: [trajectory(view)],
    "importance": lambda view: [importance(view)],
    "slices": lambda view: [slices(view)],
    "interpolation": lambda view: [interpolation(view)],
    "ratio": lambda view: [ratio(view)],
    "landscape": landscapes,
}


def figures(view: StudyView, names: Sequence[str] = tuple(FIGURES)) -> list[Drawing | Missing]:
    """The figures of a study, from the storage alone.

    Args:
        view: the stored study.
        names: keys of `FIGURES`.
    """
    return [figure for name in FIGURES if name in names for figure in FIGURES[name](view)]


def plotly_figures(study: optuna.Study | Session) -> dict[str, go.Figure]:
    """The interactive figures that a study has, by name; needs its storage only.

    Args:
        study: from its storage, or an open session.
    """
    stored = study if not hasattr(study, "study") else study.study
    drawings = [figure for figure in figures(StudyView.of(stored)) if isinstance(figure, Drawing)]
    return {drawing.name: drawing.plotly() for drawing in drawings}
