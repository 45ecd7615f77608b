"""Scores on the way from the base to each expert (paper, Figure 2)."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

import plotly.graph_objects as go
from matplotlib.figure import Figure

from dfmerge_studies.report.figures.base import (
    DARK,
    Drawing,
    Missing,
    axis_label,
    blank,
    canvas,
    colour,
    digits,
    label,
    layout_,
    legend_,
    marker,
    markup,
    scaled,
    shorten,
    static_marker,
    tidy_,
)
from dfmerge_studies.report.view import StudyView
from dfmerge_studies.study.probed import ScoredLines

NAME, TITLE = "interpolation", "From the base to each expert"


@dataclass(frozen=True)
class Interpolation(Drawing):
    """Scores along the lines theta_pre + lambda * tau.

    Attributes:
        metric: what a score is.
        unit: of a shown score, "%" or nothing.
        lambdas: positions.
        own: per expert with a task of its own, score on that task.
        others: per expert, mean score on the other tasks (on all, for an expert without a task); may lack experts.
    """

    metric: str
    unit: str
    lambdas: list[float]
    own: dict[str, list[float]]
    others: dict[str, list[float]]

    @property
    def experts(self) -> list[str]:
        """All experts that have a line."""
        return list(dict.fromkeys([*self.own, *self.others]))

    def plotly(self) -> go.Figure:
        """Solid lines for own tasks, dotted ones for the others."""
        figure = go.Figure()
        for position, expert in enumerate(self.experts):
            for lines, style, words in ((self.own, "solid", "own task"), (self.others, "dot", "other tasks")):
                if expert in lines:
                    figure.add_scatter(
                        x=self.lambdas,
                        y=scaled(lines[expert], self.unit),
                        mode="lines+markers",
                        line={"color": colour(position), "dash": style, "width": 2 if style == "solid" else 1.3},
                        marker={"symbol": marker(position), "size": 7 if style == "solid" else 4},
                        name=f"{markup(expert, 15)}: {words}",
                        hovertemplate=f"λ = %{{x:.2f}}: %{{y:{digits(self.unit)}}}",
                    )
        figure.update_xaxes(title_text="λ: 0 is the base, 1 the expert")
        figure.update_yaxes(title_text=axis_label(f"validation {self.metric}", self.unit))
        return layout_(figure, height=430)

    def static(self) -> Figure:
        """The same for a file."""
        with canvas():
            figure, axes = blank(size=(8.2, 4.2))
            for position, expert in enumerate(self.experts):
                for lines, style, words in ((self.own, "-", "own task"), (self.others, ":", "other tasks")):
                    if expert in lines:
                        axes.plot(
                            self.lambdas,
                            scaled(lines[expert], self.unit),
                            style,
                            color=colour(position),
                            marker=static_marker(marker(position)),
                            markersize=5 if style == "-" else 2.5,
                            linewidth=1.8 if style == "-" else 1.2,
                            label=label(f"{shorten(expert, 15)}: {words}"),
                        )
            tidy_(axes, x="λ: 0 is the base, 1 the expert", y=axis_label(f"validation {self.metric}", self.unit))
            axes.tick_params(colors=DARK)
            legend_(axes)
        return figure


def interpolation(view: StudyView) -> Interpolation | Missing:
    """The figure, if its scores have been computed."""
    found = ScoredLines.of(view.study)
    if found is None or set(found.scores) != set(view.experts):
        return Missing(NAME, TITLE, f"Not computed yet: add {NAME} to --figures; it needs the models.")
    own, others, metrics = {}, {}, view.metrics("validation").aims
    if len({metric.unit for metric in metrics.values()}) > 1:
        return Missing(NAME, TITLE, f"{metrics.text}: scores in percent and others do not share an axis.")
    for expert, task in view.experts.items():
        line = found.scores[expert]
        if task is not None:
            own[expert] = [scores[task] for scores in line]
        rest = [[value for name, value in scores.items() if name != task and name in metrics] for scores in line]
        if all(rest):
            others[expert] = [fmean(values) for values in rest]
    caption = (
        f"Validation {metrics.text} of θ_pre + λ·τ for one expert at a time, at {len(found.lambdas)} points from "
        "the base (λ = 0) to the expert (λ = 1): solid on the expert's own task, dotted the mean of the other tasks. "
        "Where a solid line is high before its end, the expert can be scaled down at little cost."
    )
    return Interpolation(
        NAME,
        TITLE,
        caption,
        metric=metrics.short,
        unit=metrics.unit,
        lambdas=list(found.lambdas),
        own=own,
        others=others,
    )
