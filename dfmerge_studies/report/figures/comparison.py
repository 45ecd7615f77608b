"""Methods side by side over several seeds, as `compare` leaves them in the storage."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean, stdev

import plotly.graph_objects as go
from matplotlib.figure import Figure

from dfmerge_studies.report.figures.base import (
    DARK,
    Drawing,
    Missing,
    blank,
    canvas,
    label,
    layout_,
    legend_,
    markup,
    shorten,
    tidy_,
)
from dfmerge_studies.report.figures.scores import MEAN, row_colours
from dfmerge_studies.report.view import StudyView
from dfmerge_studies.study.value import mean_score

NAME, TITLE = "comparison", "Methods over seeds"


@dataclass(frozen=True)
class Comparison(Drawing):
    """Scores by method, task and seed.

    Attributes:
        split: whose scores.
        tasks: names, in their order.
        scores: {method: {seed: {task: score in 0..1}}}.
    """

    split: str
    tasks: list[str]
    scores: dict[str, dict[int, dict[str, float]]]

    def spread(self, method: str, column: str) -> tuple[float, float]:
        """Mean and sample standard deviation over the seeds in percent, 0 for a single seed.

        Args:
            method: whose scores.
            column: a task, or "mean".
        """
        values = [100 * (mean_score(s) if column == MEAN else s[column]) for s in self.scores[method].values()]
        return fmean(values), stdev(values) if len(values) > 1 else 0.0

    def _name(self, method: str) -> str:
        count = len(self.scores[method])
        return f"{shorten(method, 20)} ({count} seed{'s' if count > 1 else ''})"

    def plotly(self) -> go.Figure:
        """Bars in groups, one group per task."""
        columns, figure = [*self.tasks, MEAN], go.Figure()
        for method, shade in row_colours(list(self.scores)).items():
            cells = [self.spread(method, column) for column in columns]
            figure.add_bar(
                x=[markup(column) for column in columns],
                y=[mean for mean, _ in cells],
                error_y={"array": [std for _, std in cells], "thickness": 1.2, "width": 3, "color": DARK},
                name=markup(self._name(method), 40),
                marker={"color": shade},
                hovertemplate="%{x}: %{y:.1f} ± %{error_y.array:.1f}",
            )
        figure.update_yaxes(title_text=f"{self.split} accuracy, %", range=[0, 105])
        return layout_(figure, height=440).update_layout(barmode="group", bargroupgap=0.05)

    def static(self) -> Figure:
        """The same for a file."""
        columns, shades = [*self.tasks, MEAN], row_colours(list(self.scores))
        with canvas():
            width = min(20.0, 3.6 + 0.17 * len(columns) * (len(shades) + 2))
            figure, axes = blank(size=(max(8.6, width), 4.0))
            bar = 0.85 / len(shades)
            for position, (method, shade) in enumerate(shades.items()):
                cells = [self.spread(method, column) for column in columns]
                axes.bar(
                    [i + (position + 0.5) * bar - 0.425 for i in range(len(columns))],
                    [mean for mean, _ in cells],
                    0.94 * bar,
                    yerr=[std for _, std in cells],
                    error_kw={"elinewidth": 1, "capsize": 2, "ecolor": DARK},
                    color=shade,
                    label=label(self._name(method)),
                )
            tidy_(axes, y=f"{self.split} accuracy, %")
            axes.grid(visible=False, axis="x")
            axes.set_ylim(0, 105)
            axes.set_xticks(range(len(columns)), [shorten(column, 14) for column in columns])
            legend_(axes)
        return figure


def comparison(view: StudyView) -> Comparison | Missing:
    """The methods of `compare --seeds`, on the test split where all of them have been scored on it.

    Args:
        view: the stored study.
    """
    if not any(len(views) > 1 for views in view.variants.values()):
        return Missing(NAME, TITLE, "It needs a method at several seeds in the storage, as compare --seeds makes them.")
    scores: dict[str, dict[str, dict[int, dict[str, float]]]] = {"test": {}, "validation": {}}
    whole = True
    for method, views in view.variants.items():
        for seed, each in sorted(views.items()):
            assert each.best is not None
            for split, table in scores.items():
                found = each.trial_scores(each.best, split)
                whole = whole and found is not None
                table.setdefault(method, {})[seed] = found or {}
    split = "test" if whole else "validation"
    caption = (
        f"Mean {split} accuracy over the seeds of each method's study in this storage, with one sample standard "
        "deviation to either side. Each seed has its own Fisher inputs and its own search; the trial shown is the best "
        "on validation."
    )
    return Comparison(NAME, TITLE, caption, split=split, tasks=view.tasks, scores=scores[split])
