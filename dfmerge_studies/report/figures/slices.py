"""Score against one coefficient, and against every pair of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from matplotlib.figure import Figure
from plotly.subplots import make_subplots

from dfmerge_studies.report.figures.base import (
    DARK,
    SCALE,
    Drawing,
    Missing,
    axis_label,
    blank,
    canvas,
    digits,
    layout_,
    markup,
    scaled,
    shorten,
    tidy_,
)
from dfmerge_studies.report.view import StudyView

NAME, TITLE = "slices", "Score against the coefficients"


@dataclass(frozen=True)
class Slices(Drawing):
    """Trials as points.

    Attributes:
        measure: what a score is.
        unit: of a shown score, "%" or nothing.
        coefficients: per coefficient, of every trial.
        scores: of every trial.
        best: position of the best trial.
    """

    measure: str
    unit: str
    coefficients: dict[str, list[float]]
    scores: list[float]
    best: int

    def _cells(self) -> Iterator[tuple[int, int, str, str]]:
        """Rows, columns and coefficients of the lower triangle."""
        names = list(self.coefficients)
        for row, vertical in enumerate(names):
            for column, horizontal in enumerate(names[: row + 1]):
                yield row, column, vertical, horizontal

    def plotly(self) -> go.Figure:
        """A triangle of panels: on the diagonal the score, below it pairs of coefficients coloured by the score."""
        names, points = list(self.coefficients), scaled(self.scores, self.unit)
        size = len(names)
        figure = make_subplots(
            rows=size,
            cols=size,
            vertical_spacing=min(0.08, 0.24 / size),
            horizontal_spacing=min(0.1, 0.3 / size),
        )
        outline = [2.5 if i == self.best else 0.5 for i in range(len(points))]
        for row, column, vertical, horizontal in self._cells():
            diagonal = row == column
            figure.add_scatter(
                x=self.coefficients[horizontal],
                y=points if diagonal else self.coefficients[vertical],
                mode="markers",
                marker={
                    "color": points,
                    "coloraxis": "coloraxis",
                    "size": [13 if i == self.best else 8 for i in range(len(points))],
                    "line": {
                        "width": outline,
                        "color": ["#D00000" if i == self.best else "#555555" for i in range(len(points))],
                    },
                },
                customdata=points,
                hovertemplate=f"%{{x:.3f}}, %{{y:.3f}}: %{{customdata:{digits(self.unit)}}}<extra></extra>",
                row=row + 1,
                col=column + 1,
            )
            if row == size - 1:
                figure.update_xaxes(title_text=markup(horizontal, 18), row=row + 1, col=column + 1)
            if diagonal:  # its right is free, its left has the neighbour's points
                figure.update_yaxes(
                    title_text=axis_label("score", self.unit), side="right", row=row + 1, col=column + 1
                )
            elif column == 0:
                figure.update_yaxes(title_text=markup(vertical, 18), row=row + 1, col=column + 1)
        layout_(figure, height=max(360, 110 + 190 * size), legend=False)
        bar: dict[str, Any] = {"title": {"text": axis_label("score", self.unit)}, "len": min(1.0, 260 / (190 * size))}
        if size > 1:  # above the diagonal nothing is drawn
            bar |= {"x": 1.0, "xanchor": "right", "y": 1.0, "yanchor": "top", "len": min(bar["len"], 0.9 - 0.9 / size)}
        return figure.update_layout(coloraxis={"colorscale": SCALE, "colorbar": bar})

    def static(self) -> Figure:
        """The same for a file."""
        names, points = list(self.coefficients), scaled(self.scores, self.unit)
        size = len(names)
        edge = min(2.6, 16 / size)
        with canvas():
            figure, grid = blank(size, size, size=(max(5.0, edge * size + 1.4), max(3.4, edge * size)), squeeze=False)
            for axes in grid.flat:
                axes.set_visible(False)
            drawn: Any = None
            for row, column, vertical, horizontal in self._cells():
                axes, diagonal = grid[row, column], row == column
                axes.set_visible(True)
                across, up = self.coefficients[horizontal], points if diagonal else self.coefficients[vertical]
                drawn = axes.scatter(across, up, c=points, cmap=SCALE.lower(), s=22, edgecolors="0.35", linewidths=0.4)
                axes.scatter(
                    across[self.best], up[self.best], s=90, facecolors="none", edgecolors="#D00000", linewidths=1.6
                )
                label = axis_label("score", self.unit) if diagonal else shorten(vertical, 18)
                tidy_(
                    axes,
                    x=shorten(horizontal, 18) if row == size - 1 else "",
                    y=label if column == 0 or diagonal else "",
                )
            bar = figure.colorbar(drawn, ax=grid.ravel().tolist(), shrink=min(1.0, 1.4 / size + 0.3), pad=0.02)
            bar.set_label(axis_label(self.measure, self.unit), color=DARK)
        return figure


def slices(view: StudyView) -> Slices | Missing:
    """Slices through the space of coefficients."""
    if not view.policy.chosen:
        return Missing(NAME, TITLE, f"{view.method} has fixed coefficients.")
    if len(view.trials) < 2 or view.best is None:
        return Missing(NAME, TITLE, f"{len(view.trials)} completed trial: slices need at least two.")
    caption = (
        f"Every completed trial is a point, coloured by its {view.measure} on validation. On the diagonal: the score "
        "against one coefficient; below it: the trials over each pair of coefficients. The ring marks the best trial."
    )
    return Slices(
        NAME,
        TITLE,
        caption,
        measure=view.measure,
        unit=view.unit,
        coefficients=view.points(),
        scores=[view.value(trial) for trial in view.trials],
        best=[trial.number for trial in view.trials].index(view.best.number),
    )
