"""Which coefficients the score depends on."""

from __future__ import annotations

from dataclasses import dataclass

import optuna
import plotly.graph_objects as go
from matplotlib.figure import Figure

from dfmerge_studies.methods import Coefficients
from dfmerge_studies.report.figures.base import BLUE, Drawing, Missing, blank, canvas, layout_, markup, shorten, tidy_
from dfmerge_studies.report.view import StudyView

NAME, TITLE = "importance", "Importance of the coefficients"


@dataclass(frozen=True)
class CoefficientImportance(Drawing):
    """Shares of the coefficients in what decides the score.

    Attributes:
        shares: per coefficient, the largest first; they sum to 1.
    """

    shares: dict[str, float]

    def plotly(self) -> go.Figure:
        """Horizontal bars."""
        names = list(self.shares)[::-1]
        figure = go.Figure(
            go.Bar(
                x=[100 * self.shares[name] for name in names],
                y=[markup(name) for name in names],
                orientation="h",
                marker={"color": BLUE},
                texttemplate="%{x:.0f}",
                textposition="outside",
                cliponaxis=False,
                hovertemplate="%{y}: %{x:.1f}<extra></extra>",
            )
        )
        figure.update_xaxes(title_text="share, %", rangemode="tozero")
        figure.update_yaxes(automargin=True)
        return layout_(figure, height=130 + 34 * len(names), legend=False)

    def static(self) -> Figure:
        """The same for a file."""
        names = list(self.shares)[::-1]
        with canvas():
            figure, axes = blank(size=(7.0, 1.1 + 0.36 * len(names)))
            bars = axes.barh(range(len(names)), [100 * self.shares[name] for name in names], color=BLUE, height=0.65)
            axes.bar_label(bars, fmt="%.0f", padding=3)
            axes.set_yticks(range(len(names)), [shorten(name) for name in names])
            axes.margins(x=0.08)
            tidy_(axes, x="share, %")
            axes.grid(visible=False, axis="y")
        return figure


def importance(view: StudyView) -> CoefficientImportance | Missing:
    """Importance by Optuna's own evaluator."""
    names = view.dimensions
    if len(names) < 2 and view.policy is not Coefficients.PER_EXPERT:
        reason = "one coefficient that all experts share" if names else "fixed ones"
        return Missing(NAME, TITLE, f"Importance compares coefficients; {view.method} has {reason}.")
    if len(view.trials) < 2 or len({view.value(trial) for trial in view.trials}) < 2:
        return Missing(NAME, TITLE, "It needs at least two completed trials with different scores.")
    # No target: Optuna then knows the directions, and takes fronts for several objectives.
    shares = optuna.importance.get_param_importances(
        view.study, params=list(names), evaluator=optuna.importance.PedAnovaImportanceEvaluator()
    )
    what = "each coefficient" if view.policy is Coefficients.PER_EXPERT else f"{' and '.join(names.values())}"
    caption = (
        f"Share of {what} in what sets the best tenth of the {len(view.trials)} trials apart from the rest "
        f"(PED-ANOVA of optuna.importance). It says which of them must be right, not which "
        "should be large; with few trials it is a hint."
    )
    return CoefficientImportance(
        NAME, TITLE, caption, shares={names[name]: float(share) for name, share in shares.items()}
    )
