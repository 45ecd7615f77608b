"""The landscape of two experts in their plane (paper, Figure 6, footnote 4)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
import plotly.graph_objects as go
from matplotlib.figure import Figure
from matplotlib.path import Path as MatplotlibPath
from numpy.typing import NDArray
from plotly.subplots import make_subplots
from scipy.interpolate import LinearNDInterpolator

from dfmerge_studies.report.figures.base import (
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
from dfmerge_studies.study.probed import ScoredPlane
from dfmerge_studies.tasks.metrics import Metrics

NAME, TITLE = "landscape", "Landscape of two experts"
_FINE = 120  # points along each axis of the page's contours
_RED = "#D00000"


@dataclass(frozen=True)
class Landscape(Drawing):
    """Scores of two experts' merges, and where in the plane the merges are.

    Attributes:
        metric: what the tasks' scores are.
        unit: of a shown score, "%" or nothing.
        experts: the two.
        lambdas: coefficients of either.
        x: per method, for every pair of coefficients [first][second], the place along u.
        y: the place along v.
        scores: mean validation score.
        marks: per method, named places in the plane.
    """

    metric: str
    unit: str
    experts: tuple[str, str]
    lambdas: list[float]
    x: dict[str, list[list[float]]]
    y: dict[str, list[list[float]]]
    scores: dict[str, list[list[float]]]
    marks: dict[str, dict[str, tuple[float, float]]]

    @property
    def range(self) -> tuple[float, float]:
        """Lowest and highest score as it is shown, over all methods."""
        everything = [value for table in self.scores.values() for row in table for value in row]
        low, high = scaled([min(everything), max(everything)], self.unit)
        return low, max(high, low + scaled([0.001], self.unit)[0])

    def _z(self, method: str) -> NDArray[np.float64]:
        """A method's scores as they are shown."""
        return np.array([scaled(row, self.unit) for row in self.scores[method]])

    def surface(self, method: str) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Scores as they are shown on a regular grid of the plane, linear between merges, NaN outside of them."""
        x, y = np.ravel(self.x[method]), np.ravel(self.y[method])
        across, up = np.linspace(x.min(), x.max(), _FINE), np.linspace(y.min(), y.max(), _FINE)
        between = LinearNDInterpolator(np.column_stack([x, y]), np.ravel(self._z(method)))
        places = np.column_stack([grid.ravel() for grid in np.meshgrid(across, up)])
        # The merges need not fill their convex hull: what is outside the grid's own border was never scored.
        slack = 1e-3 * max(np.ptp(x), np.ptp(y))
        border = MatplotlibPath(self._border(method))
        inside = border.contains_points(places, radius=slack) | border.contains_points(places, radius=-slack)
        return across, up, np.where(inside, between(places), np.nan).reshape(_FINE, _FINE)

    def _border(self, method: str) -> list[tuple[float, float]]:
        """Places of the merges around the grid, in order."""
        last = len(self.lambdas) - 1
        there, back = range(last), range(last, 0, -1)
        around = (
            [(i, 0) for i in there] + [(last, j) for j in there] + [(i, last) for i in back] + [(0, j) for j in back]
        )
        return [(self.x[method][i][j], self.y[method][i][j]) for i, j in around]

    def plotly(self) -> go.Figure:
        """One panel per method, in the same colours."""
        figure = make_subplots(
            rows=1, cols=len(self.scores), subplot_titles=list(self.scores), shared_yaxes=True, horizontal_spacing=0.04
        )
        low, high = self.range
        for column, method in enumerate(self.scores, start=1):
            across, up, surface = self.surface(method)
            figure.add_contour(
                x=across,
                y=up,
                z=[[None if np.isnan(value) else round(float(value), 5) for value in row] for row in surface],
                coloraxis="coloraxis",
                contours={"start": low, "end": high, "size": (high - low) / 12},
                line={"width": 0.5, "color": "white"},
                hoverinfo="skip",
                row=1,
                col=column,
            )
            figure.add_scatter(**self._dots(method), row=1, col=column)
            for position, (name, (x, y)) in enumerate(self.marks[method].items()):
                figure.add_scatter(
                    x=[x],
                    y=[y],
                    mode="markers",
                    marker={**_mark(name, position), "line": {"width": 1.5, "color": "white"}},
                    name=markup(name, 40),
                    legendgroup=markup(name, 40),
                    showlegend=column == 1 or name not in self.marks[next(iter(self.marks))],
                    hovertemplate=f"{markup(name, 60)}<extra></extra>",
                    row=1,
                    col=column,
                )
            axis = {"title_text": f"along u ({markup(self.experts[0], 18)})", "matches": "x"}
            figure.update_xaxes(**axis, row=1, col=column)
        figure.update_yaxes(title_text="along v", row=1, col=1)
        layout_(figure, height=500)
        return figure.update_layout(
            coloraxis={
                "colorscale": SCALE,
                "cmin": low,
                "cmax": high,
                "colorbar": {
                    "title": {"text": axis_label(f"mean<br>{self.metric}", self.unit)},
                    "tickformat": digits(self.unit),
                },
            },
            legend={"orientation": "h", "y": -0.16, "yanchor": "top"},
            margin={"b": 110},
        )

    def _dots(self, method: str) -> dict[str, Any]:
        """The merges themselves, for the pointer."""
        pairs = [(i, j) for i in range(len(self.lambdas)) for j in range(len(self.lambdas))]
        scores = self._z(method)
        return {
            "x": [self.x[method][i][j] for i, j in pairs],
            "y": [self.y[method][i][j] for i, j in pairs],
            "mode": "markers",
            "marker": {"size": 3, "color": "rgba(0,0,0,0.45)"},
            "customdata": [(self.lambdas[i], self.lambdas[j], scores[i][j]) for i, j in pairs],
            "hovertemplate": "λ = %{customdata[0]:.3f}, %{customdata[1]:.3f}: "
            f"%{{customdata[2]:{digits(self.unit)}}}<extra></extra>",
            "showlegend": False,
        }

    def static(self) -> Figure:
        """The same for a file."""
        low, high = self.range
        levels = np.linspace(low, high, 13)
        with canvas():
            figure, grid = blank(
                1, len(self.scores), size=(4.6 * len(self.scores) + 1, 4.9), sharex=True, sharey=True, squeeze=False
            )
            drawn: Any = None
            handles = {}
            for axes, method in zip(grid[0], self.scores, strict=True):
                z = self._z(method)
                drawn = axes.contourf(
                    self.x[method], self.y[method], z, levels=levels, cmap=SCALE.lower(), extend="both"
                )
                axes.plot(
                    np.ravel(self.x[method]), np.ravel(self.y[method]), ".", color="black", alpha=0.4, markersize=2
                )
                for position, (name, (x, y)) in enumerate(self.marks[method].items()):
                    looks = _mark(name, position)
                    symbol = {"circle": "o", "triangle-up": "^", "triangle-right": ">", "diamond": "D", "star": "*"}
                    (handles[name],) = axes.plot(
                        x,
                        y,
                        symbol.get(looks["symbol"], "P"),
                        color=looks["color"],
                        markersize=0.75 * looks["size"],
                        markeredgecolor="white",
                        linestyle="none",
                        clip_on=False,
                        zorder=5,
                    )
                axes.set_title(method)
                tidy_(axes, x=f"along u ({shorten(self.experts[0], 18)})", y="along v" if axes is grid[0, 0] else None)
            label = axis_label(f"mean {self.metric}", self.unit)
            ticks = "%.0f" if self.unit == "%" else "%.2f"
            figure.colorbar(drawn, ax=grid.ravel().tolist(), label=label, format=ticks, pad=0.02)
            figure.legend(
                list(handles.values()),
                [f" {shorten(name, 40)}" for name in handles],
                loc="outside lower center",
                ncols=3,
                frameon=False,
            )
        return figure


def _mark(name: str, position: int) -> dict[str, Any]:
    """Symbol, colour and size of a named place: the base, both experts, averaging, then what was found best."""
    symbols = ("circle", "triangle-right", "triangle-up", "diamond", "star")
    best = position >= 4
    size = 15 if best else 12
    colour = "black" if name.startswith("best trial") else _RED if best else "#E69F00" if position else "black"
    return {"symbol": symbols[min(position, 4)], "color": colour, "size": size}


def landscapes(view: StudyView) -> list[Landscape | Missing]:
    """One figure per pair of experts that has been computed."""
    if len(view.experts) < 2:
        return [Missing(NAME, TITLE, "A landscape needs two experts.")]
    found = [
        _landscape(i, j, stored, view.metrics("validation").only(stored.tasks))
        for i, j in permutations(range(len(view.experts)), 2)
        if (stored := ScoredPlane.of(view.study, i, j)) is not None and stored.whole
    ]
    return list(found) or [Missing(NAME, TITLE, f"Not computed yet: add {NAME} to --figures; it needs the models.")]


def _landscape(i: int, j: int, found: ScoredPlane, metrics: Metrics) -> Landscape:
    names, count = found.experts, range(len(found.lambdas))

    def table(method: str, part: int) -> list[list[float]]:
        return [[found.methods[method][a, b][part] for b in count] for a in count]

    (ax, ay), (bx, by) = found.corners
    common = {"base": (0.0, 0.0), names[0]: (ax, ay), names[1]: (bx, by), "averaging": ((ax + bx) / 2, (ay + by) / 2)}
    marks = {}
    for method, cells in found.methods.items():
        x, y, _ = max(cells.values(), key=lambda cell: metrics.mean.worth(cell.score))
        marks[method] = {**common, "best of the grid": (x, y)}
        if found.best is not None and found.best.method == method:
            marks[method][f"best trial ({found.best.number})"] = found.best.place
    methods = list(found.methods)
    caption = (
        f"Mean validation {metrics.short} on {', '.join(found.tasks)} of the merges of {names[0]} and {names[1]} "
        f"alone, at {len(count)} by {len(count)} coefficients from 0 to 1 (dots). The plane holds the base and both "
        f"experts: u runs along {names[0]}'s task vector, v along the part of {names[1]}'s that is orthogonal to it. "
        f"Merges of {methods[0]} lie in it; those of {methods[-1]} do not and are drawn where they project onto it."
    )
    return Landscape(
        f"{NAME}-{i + 1}-{j + 1}",
        f"{TITLE}: {names[0]} and {names[1]}",
        caption,
        metric=metrics.short,
        unit=metrics.unit,
        experts=names,
        lambdas=list(found.lambdas),
        x={method: table(method, 0) for method in methods},
        y={method: table(method, 1) for method in methods},
        scores={method: table(method, 2) for method in methods},
        marks=marks,
    )
