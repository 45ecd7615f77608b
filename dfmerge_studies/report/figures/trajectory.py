"""The trajectory of a study: score per trial, the best so far, the coefficients under it (paper, Figures 4, 7-9)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial
from plotly.subplots import make_subplots

from dfmerge_studies.report.expectations import expected_of
from dfmerge_studies.report.figures.base import (
    BLUE,
    DARK,
    GREY,
    Drawing,
    Missing,
    axis_label,
    blank,
    canvas,
    colour,
    dash,
    digits,
    label,
    layout_,
    legend_,
    marker,
    markup,
    scaled,
    scaled_or_none,
    static_dash,
    static_marker,
    tidy_,
    whole_step,
)
from dfmerge_studies.report.kinds import kinds_of
from dfmerge_studies.report.tables import bounds_text
from dfmerge_studies.report.view import StudyView
from dfmerge_studies.study.value import best_trial
from dfmerge_studies.trials.marks import place_of
from dfmerge_studies.trials.reading import violation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME, TITLE = "trajectory", "Optimisation trajectory"
# How a trial's coefficients came about, in words, and its marker.
KINDS = {
    "known": ("given point", "square"),
    "grid": ("of the grid", "square"),
    "startup": ("random", "diamond"),
    "step": ("step down the loss", "triangle-up"),
    "search": ("proposed", "circle"),
}


@dataclass(frozen=True)
class Trajectory(Drawing):
    """Trials in the order of their places.

    Attributes:
        measure: what a score is.
        unit: of a shown score, "%" or nothing.
        places: ordinal of every trial.
        numbers: Optuna's number of every trial.
        scores: of every trial.
        kinds: how each trial's coefficients came about: a key of `KINDS`.
        feasible: whether a trial keeps the study's constraints.
        best: score of the trial that would be chosen after each; None before one keeps the constraints.
        coefficients: what every trial chose, per expert, or for all of them, and the method's own parameters.
        chosen: what those are.
        levels: value of other merges, drawn as level lines.
        expected: value that the sampler expected of every trial, None where it expected nothing.
        deviations: of what it expected.
        half_widths: of the trust region that every trial was looked for in, as a share of the range.
        restarts: places of the trials that a new region begins with.
    """

    measure: str
    unit: str
    places: list[int]
    numbers: list[int]
    scores: list[float]
    kinds: list[str]
    feasible: list[bool]
    best: list[float | None]
    coefficients: dict[str, list[float]]
    chosen: str
    levels: dict[str, float]
    expected: list[float | None]
    deviations: list[float | None]
    half_widths: list[float | None]
    restarts: list[int]

    @property
    def has_regions(self) -> bool:
        """Whether some trial was looked for in a trust region."""
        return any(width is not None for width in self.half_widths)

    def _expectations(self) -> tuple[list[int], list[float], list[float]]:
        """Places, values and deviations of what was expected, as they are shown."""
        known = [
            (place, mean, deviation)
            for place, mean, deviation in zip(self.places, self.expected, self.deviations, strict=True)
            if mean is not None and deviation is not None
        ]
        means, deviations = ([row[column] for row in known] for column in (1, 2))
        return [row[0] for row in known], scaled(means, self.unit), scaled(deviations, self.unit)

    def _of_kind(self, kind: str) -> list[int]:
        return [i for i, own in enumerate(self.kinds) if own == kind]

    def plotly(self) -> go.Figure:
        """Two panels over one axis of trials, and one of trust regions where there are any."""
        heights = [0.5, 0.34, 0.16] if self.has_regions else [0.6, 0.4]
        figure = make_subplots(rows=len(heights), cols=1, shared_xaxes=True, row_heights=heights, vertical_spacing=0.06)
        first, last = self.places[0], self.places[-1]
        for position, (name, level) in enumerate(self.levels.items()):
            shade, dashes = _level_looks(position)
            style = {"color": shade, "width": 1.4, "dash": dashes}
            figure.add_scatter(
                x=[first, last],
                y=scaled([level] * 2, self.unit),
                mode="lines",
                line=style,
                name=markup(name),
                row=1,
                col=1,
            )
        figure.add_scatter(
            x=self.places,
            y=scaled_or_none(self.best, self.unit),
            mode="lines",
            line={"color": BLUE, "width": 2.5, "shape": "hv"},
            name="best so far",
            row=1,
            col=1,
        )
        for kind, (words, symbol) in KINDS.items():
            chosen = self._of_kind(kind)
            if chosen:
                figure.add_scatter(
                    x=[self.places[i] for i in chosen],
                    y=scaled([self.scores[i] for i in chosen], self.unit),
                    mode="markers",
                    marker={
                        "symbol": [symbol if self.feasible[i] else f"{symbol}-open" for i in chosen],
                        "size": 8,
                        "color": BLUE,
                    },
                    customdata=[self.numbers[i] for i in chosen],
                    hovertemplate=f"trial %{{customdata}}: %{{y:{digits(self.unit, 1)}}}<extra></extra>",
                    name=f"trial, {words}",
                    row=1,
                    col=1,
                )
        self._add_expectations_(figure)
        for position, (expert, values) in enumerate(self.coefficients.items()):
            figure.add_scatter(
                x=self.places,
                y=values,
                mode="lines+markers",
                line={"color": colour(position), "width": 1.2, "dash": dash(position)},
                marker={"symbol": marker(position), "size": 5},
                name=markup(expert),
                legend="legend2",
                row=2,
                col=1,
            )
        figure.update_yaxes(title_text=axis_label(self.measure, self.unit), row=1, col=1)
        figure.update_yaxes(title_text=self.chosen, row=2, col=1)
        figure.update_xaxes(title_text="trial", row=len(heights), col=1)
        figure.update_xaxes(tick0=0, dtick=whole_step(last - first))
        layout_(figure, height=560)
        return figure.update_layout(
            legend={"y": 1, "yanchor": "top"},
            legend2={"y": 0.37, "yanchor": "top"},
            legend3={"y": 0.12, "yanchor": "top"},
            hovermode="closest",
        )

    def _add_expectations_(self, figure: go.Figure) -> None:
        places, means, deviations = self._expectations()
        if places:
            figure.add_scatter(
                x=places,
                y=means,
                error_y={"type": "data", "array": deviations, "thickness": 1, "width": 2},
                mode="markers",
                marker={"symbol": "line-ew-open", "size": 9, "color": GREY},
                name="expected ± deviation",
                row=1,
                col=1,
            )
        if self.has_regions:
            figure.add_scatter(
                x=self.places,
                y=self.half_widths,
                mode="lines",
                line={"color": GREY, "shape": "hv"},
                name="half width",
                legend="legend3",
                showlegend=True,
                row=3,
                col=1,
            )
            figure.update_yaxes(title_text="region", rangemode="tozero", row=3, col=1)
        style = {"color": GREY, "width": 1, "dash": "dot"}
        for place in self.restarts:
            for row in (1, 2, 3):  # the last one has the legend's line
                named = row == 3 and place == self.restarts[0]
                figure.add_vline(
                    x=place,
                    line=style,
                    name="restart",
                    legend="legend3",
                    showlegend=named,
                    row=row,
                    col=1,
                    exclude_empty_subplots=False,  # the coefficients are drawn after
                )

    def static(self) -> Figure:
        """The same for a file."""
        with canvas():
            panels = 3 if self.has_regions else 2
            ratios = (3, 2, 1)[:panels]
            figure, axes = blank(panels, 1, size=(8.6, 4.4 + 0.6 * panels), sharex=True, height_ratios=ratios)
            top, bottom, *others = axes
            places, means, deviations = self._expectations()
            if places:
                top.errorbar(
                    places, means, deviations, fmt="_", color=GREY, elinewidth=0.8, label="expected ± deviation"
                )
            for region in others:
                widths = [math.nan if width is None else width for width in self.half_widths]
                region.plot(self.places, widths, color=GREY, drawstyle="steps-post", label="half width")
                region.set_ylim(bottom=0)
                tidy_(region, x="trial", y="trust region")
            for place in self.restarts:
                for each in axes:
                    named = "restart" if place == self.restarts[0] and each in others else None
                    each.axvline(place, color=GREY, linewidth=0.8, linestyle=":", label=named)
            top.plot(
                self.places,
                [math.nan if value is None else value for value in scaled_or_none(self.best, self.unit)],
                color=BLUE,
                linewidth=2,
                drawstyle="steps-post",
                label="best so far",
            )
            for kind, (words, symbol) in KINDS.items():
                self._static_points(top, kind, f"trial, {words}", static_marker(symbol))
            for position, (name, level) in enumerate(self.levels.items()):
                shade, dashes = _level_looks(position)
                top.axhline(
                    *scaled([level], self.unit),
                    color=shade,
                    linestyle=static_dash(dashes),
                    linewidth=1.3,
                    label=label(name),
                )
            for position, (expert, values) in enumerate(self.coefficients.items()):
                bottom.plot(
                    self.places,
                    values,
                    color=colour(position),
                    linestyle=static_dash(dash(position)),
                    marker=static_marker(marker(position)),
                    markersize=3.5,
                    linewidth=1,
                    label=label(expert),
                )
            tidy_(top, y=axis_label(self.measure, self.unit))
            tidy_(bottom, x="" if others else "trial", y=self.chosen)
            bottom.xaxis.get_major_locator().set_params(integer=True)
            for each in axes:
                legend_(each)
        return figure

    def _static_points(self, axes: Axes, kind: str, words: str, symbol: str) -> None:
        for feasible in (True, False):
            chosen = [i for i in self._of_kind(kind) if self.feasible[i] == feasible]
            if chosen:
                axes.plot(
                    [self.places[i] for i in chosen],
                    scaled([self.scores[i] for i in chosen], self.unit),
                    symbol,
                    color=BLUE,
                    fillstyle="full" if feasible else "none",
                    markersize=4.5,
                    alpha=0.8,
                    label=words if feasible else f"{words}, misses max_drop",
                )


def _level_looks(position: int) -> tuple[str, str]:
    """Colour and dash of the n-th level line, other than those of the line of the study."""
    shades = (DARK, "#A0522D", "#6A51A3", "#4D7C2A", "#B8860B")
    return shades[position % len(shades)], ("dash", "dot", "dashdot")[position % 3]


def trajectory(view: StudyView) -> Trajectory | Missing:
    """The trajectory of a study."""
    if not view.policy.chosen:
        return Missing(NAME, TITLE, f"{view.method} has fixed coefficients, so there is one merge and no search.")
    if len(view.trials) < 2:
        return Missing(NAME, TITLE, f"{len(view.trials)} completed trial: a trajectory needs at least two.")
    best: list[float | None] = []
    for count in range(1, len(view.trials) + 1):
        kept = [trial for trial in view.trials[:count] if violation(trial) <= 0]
        leader = best_trial(kept, view.objective)
        best.append(None if leader is None else view.value(leader))
    experts = view.scores("experts", "validation") or {}
    levels = {
        method: _level(view, other)
        for method, other in view.baselines.items()
        if view.scores_alike(other, "validation")
    }
    if set(experts) == set(view.tasks):
        levels = {"each task's own expert": view.value_of(experts), **levels}
    kinds = kinds_of(view)
    return Trajectory(
        NAME,
        TITLE,
        _caption(view, kinds),
        measure=view.measure,
        unit=view.unit,
        places=[place_of(trial) for trial in view.trials],
        numbers=[trial.number for trial in view.trials],
        scores=[view.value(trial) for trial in view.trials],
        kinds=kinds,
        feasible=[violation(trial) <= 0 for trial in view.trials],
        best=best,
        coefficients=view.points(),
        chosen=", ".join(["coefficient", *view.searched_parameters]),
        levels=levels,
        expected=[_shown_mean(view, trial) for trial in view.trials],
        deviations=[expected_of(trial).get("deviation") for trial in view.trials],
        half_widths=[_region(trial).get("half_width") for trial in view.trials],
        restarts=_restarts(view.trials),
    )


def _shown_mean(view: StudyView, trial: FrozenTrial) -> float | None:
    mean = expected_of(trial).get("mean")
    return None if mean is None else view.metrics("validation").mean.worth(mean)


def _region(trial: FrozenTrial) -> Mapping[str, Any]:
    return expected_of(trial).get("region") or {}


def _restarts(trials: Sequence[FrozenTrial]) -> list[int]:
    """Places of the first trials of all regions but the first."""
    firsts: dict[int, int] = {}
    for trial in trials:
        if number := _region(trial).get("number"):
            firsts.setdefault(int(number), place_of(trial))
    return [place for number, place in sorted(firsts.items()) if number > 1]


def _level(view: StudyView, other: StudyView) -> float:
    assert other.best is not None
    return view.value_of(other.trial_scores(other.best, "validation") or {})


def _caption(view: StudyView, kinds: Sequence[str]) -> str:
    what = (
        f"Top: {view.measure} on the validation inputs of the merge that each trial tried, and of the trial that would "
        "have been chosen so far; level lines are the best merges of other methods in the same storage. Below: the "
        "coefficients that the trial used."
    )
    if "step" in kinds:
        what += " Triangles: steps down the loss of some validation inputs, each from what the earlier ones gave."
    if view.pruned:
        what += f" Without the {len(view.pruned)} trials that were stopped on a part of the rows, which have no score."
    if any("mean" in expected_of(trial) for trial in view.trials):
        what += " Grey bars: what the sampler expected of a trial before it ran, and its deviation."
    if any(map(_region, view.trials)):
        what += (
            " Lowest panel: half width of the trust region, as a share of the range; dotted lines are restarts, "
            "where a new region begins."
        )
    if view.allowed:
        within = bounds_text(view.allowed, view.metrics("validation").guards)
        what += (
            f" The best so far is one that keeps every task within max_drop: {within}; hollow markers lose more on "
            "some task."
        )
    return what
