"""How many validation rows the choice of a trial needs (after paper, Figure 5)."""

from __future__ import annotations

from dataclasses import dataclass

import plotly.graph_objects as go
from matplotlib.figure import Figure

from dfmerge_studies.report.figures.base import (
    BLUE,
    GREY,
    Drawing,
    Missing,
    axis_label,
    blank,
    canvas,
    digits,
    layout_,
    legend_,
    scaled,
    tidy_,
)
from dfmerge_studies.report.tables import sentence
from dfmerge_studies.report.view import StudyView
from dfmerge_studies.study.probed import Rechosen
from dfmerge_studies.study.probes import why_not_reselect

NAME, TITLE = "ratio", "Score against the share of the validation set"


@dataclass(frozen=True)
class Ratio(Drawing):
    """Score of the chosen trial, over seeded draws of the rows.

    Attributes:
        measure: what a score is.
        unit: of a shown score, "%" or nothing.
        split: where the chosen trial is scored.
        ratios: shares of the validation rows.
        means: over draws, per ratio.
        lows: the lowest draw.
        highs: the highest draw.
        draws: how many.
    """

    measure: str
    unit: str
    split: str
    ratios: list[float]
    means: list[float]
    lows: list[float]
    highs: list[float]
    draws: int

    def plotly(self) -> go.Figure:
        """The mean and the range."""
        across = scaled(self.ratios, "%")
        hidden = {"width": 0, "color": BLUE}
        figure = go.Figure()
        figure.add_scatter(
            x=across, y=scaled(self.highs, self.unit), mode="lines", line=hidden, showlegend=False, hoverinfo="skip"
        )
        figure.add_scatter(
            x=across,
            y=scaled(self.lows, self.unit),
            mode="lines",
            line=hidden,
            fill="tonexty",
            fillcolor="rgba(0,114,178,0.18)",
            name=f"range over {self.draws} draws",
            hoverinfo="skip",
        )
        figure.add_scatter(
            x=across,
            y=scaled(self.means, self.unit),
            mode="lines+markers",
            line={"color": BLUE, "width": 2},
            name="mean over draws",
            hovertemplate=f"%{{x:.0f}} % of the rows: %{{y:{digits(self.unit, 1)}}}",
        )
        if self.ratios[-1] == 1:
            figure.add_hline(y=scaled(self.means, self.unit)[-1], line={"color": GREY, "dash": "dash", "width": 1})
        figure.update_xaxes(title_text="share of the validation rows, %", rangemode="tozero")
        figure.update_yaxes(title_text=axis_label(f"{self.measure} on {self.split}", self.unit))
        return layout_(figure, height=400)

    def static(self) -> Figure:
        """The same for a file."""
        across = scaled(self.ratios, "%")
        with canvas():
            figure, axes = blank(size=(7.6, 3.8))
            axes.fill_between(
                across,
                scaled(self.lows, self.unit),
                scaled(self.highs, self.unit),
                color=BLUE,
                alpha=0.18,
                linewidth=0,
                label=f"range over {self.draws} draws",
            )
            axes.plot(
                across,
                scaled(self.means, self.unit),
                "o-",
                color=BLUE,
                linewidth=2,
                markersize=5,
                label="mean over draws",
            )
            if self.ratios[-1] == 1:
                axes.axhline(
                    scaled(self.means, self.unit)[-1], color=GREY, linestyle="--", linewidth=1, label="all rows seen"
                )
            axes.set_xlim(left=0)
            tidy_(axes, x="share of the validation rows, %", y=axis_label(f"{self.measure} on {self.split}", self.unit))
            legend_(axes)
        return figure


def ratio(view: StudyView) -> Ratio | Missing:
    """The figure, if it has been computed for the trials that there are."""
    metrics = view.metrics("validation")
    reason = why_not_reselect(view.allowed, view.objective.kind, len(view.trials), metrics)
    if reason is not None:
        return Missing(NAME, TITLE, sentence(reason))
    found = Rechosen.of(view.study)
    if found is None:
        return Missing(NAME, TITLE, f"Not computed yet: add {NAME} to --figures; it needs the models.")
    if found.trials != sorted(trial.number for trial in view.trials):
        return Missing(
            NAME, TITLE, f"Computed before the latest trials: add {NAME} to --figures to bring it up to date."
        )
    by_ratio = [[metrics.mean.worth(found.scores[draw[i]]) for draw in found.chosen] for i in range(len(found.ratios))]
    caption = (
        f"{view.measure.capitalize()} on {found.split} of the trial that would have been chosen had only a share of "
        f"every task's validation rows been seen, over {len(found.chosen)} seeded orders of the rows in which a "
        f"larger share contains the smaller ones. The {len(found.trials)} trials are the study's own, whose search "
        "saw all rows: this is the effect on the choice, not on the search."
    )
    return Ratio(
        NAME,
        TITLE,
        caption,
        measure=view.measure,
        unit=view.unit,
        split=found.split,
        ratios=list(found.ratios),
        means=[sum(values) / len(values) for values in by_ratio],
        lows=[min(values) for values in by_ratio],
        highs=[max(values) for values in by_ratio],
        draws=len(found.chosen),
    )
