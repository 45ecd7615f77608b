"""Score per task of the merge beside its experts, the base and other methods."""

from __future__ import annotations

from dataclasses import dataclass

import plotly.graph_objects as go
from matplotlib.figure import Figure
from plotly.subplots import make_subplots

from dfmerge_studies.report.comparison import MEAN, column_score
from dfmerge_studies.report.figures.base import (
    Drawing,
    Missing,
    blank,
    canvas,
    columns_,
    label,
    layout_,
    legend_,
    markup,
    tidy_,
)
from dfmerge_studies.report.view import StudyView

NAME, TITLE = "scores", "Score per task"
BASE, EXPERTS = "base, unmerged", "each task's own expert"
REFERENCES = {BASE: "#C9C9C9", EXPERTS: "#8A8A8A"}
# As many as there are methods and variants to compare; no black and no grey, which references have.
_COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6D31", "#5B4B9E", "#B5BD00", "#8B1A1A",
    "#7FCDBB", "#F4A6A0",
)  # fmt: skip

Rows = dict[str, dict[str, dict[str, float]]]  # {row: {split: {task: score}}}


@dataclass(frozen=True)
class Scores(Drawing):
    """Scores by row, split and task.

    Attributes:
        tasks: names, in their order.
        metrics: what the scores are, for each split that some row has.
        rows: {row: {split: {task: score in 0..1}}}; a row may lack a split or, the experts', a task.
    """

    tasks: list[str]
    metrics: dict[str, str]
    rows: Rows

    @property
    def splits(self) -> list[str]:
        """Splits that some row has."""
        return list(self.metrics)

    def value(self, row: str, split: str, column: str) -> float | None:
        """One bar.

        Args:
            row: what was scored.
            split: "validation" or "test".
            column: a task, or "mean".
        """
        return column_score(self.rows[row].get(split, {}), self.tasks, column)

    def plotly(self) -> go.Figure:
        """Bars in groups, one group per task."""
        splits, columns, colours = self.splits, [*self.tasks, MEAN], row_colours(list(self.rows))
        figure = make_subplots(
            rows=len(splits), cols=1, shared_xaxes=True, vertical_spacing=0.12, subplot_titles=splits
        )
        for place, split in enumerate(splits, start=1):
            for row in self.rows:
                values = [self.value(row, split, column) for column in columns]
                figure.add_bar(
                    x=[markup(column) for column in columns],
                    y=[None if value is None else 100 * value for value in values],
                    name=markup(row),
                    marker={"color": colours[row]},
                    hovertemplate="%{x}: %{y:.1f}",
                    legendgroup=markup(row),
                    showlegend=place == 1,
                    row=place,
                    col=1,
                )
            figure.update_yaxes(title_text=f"{self.metrics[split]}, %", range=[0, 100], row=place, col=1)
        return layout_(figure, height=140 + 240 * len(splits)).update_layout(
            barmode="group", bargroupgap=0.05, margin={"t": 50}
        )

    def static(self) -> Figure:
        """The same for a file."""
        splits, columns, colours = self.splits, [*self.tasks, MEAN], row_colours(list(self.rows))
        with canvas():
            width = min(18.0, 3.2 + 0.16 * len(columns) * (len(self.rows) + 2))
            figure, grid = blank(
                len(splits), 1, size=(max(8.0, width), 0.8 + 2.3 * len(splits)), sharex=True, squeeze=False
            )
            bar = 0.85 / max(1, len(self.rows))
            for axes, split in zip(grid[:, 0], splits, strict=True):
                for position, row in enumerate(self.rows):
                    values = [self.value(row, split, column) for column in columns]
                    places = [i + (position + 0.5) * bar - 0.425 for i, value in enumerate(values) if value is not None]
                    heights = [100 * value for value in values if value is not None]
                    axes.bar(places, heights, 0.94 * bar, color=colours[row], label=label(row))
                tidy_(axes, y=f"{split} {self.metrics[split]}, %")
                axes.set_ylim(0, 100)
                columns_(axes, columns)
            legend_(grid[0, 0])
        return figure


def row_colours(rows: list[str]) -> dict[str, str]:
    """Colour per row: greys for references, blue for the last, which is the study's own.

    Args:
        rows: what was scored.
    """
    others = [row for row in rows if row not in REFERENCES]
    shades = {row: _COLOURS[(len(others) - 1 - i) % len(_COLOURS)] for i, row in enumerate(others)}
    return {row: REFERENCES.get(row) or shades[row] for row in rows}


def best_scores(view: StudyView) -> Scores:
    """What the study keeps: base, experts, the best of other methods in its storage, and its own best trial last.

    Args:
        view: the stored study.
    """
    rows: Rows = {}
    splits = ("validation", "test")
    for row, key in ((BASE, "base"), (EXPERTS, "experts")):
        kept = {split: view.scores(key, split) for split in splits}
        rows[row] = {split: scores for split, scores in kept.items() if scores}
    for name, each in [*view.baselines.items(), ("", view)]:
        if each.best is not None:
            kept = {split: each.trial_scores(each.best, split) for split in splits if view.scores_alike(each, split)}
            rows[f"{each.method} (trial {each.best.number})" if each is view else name] = {
                split: scores for split, scores in kept.items() if scores
            }
    metrics = {split: view.metric(split) for split in splits if any(split in row for row in rows.values())}
    alike = len(set(metrics.values())) == 1
    words = " and ".join([*metrics.values()][:1] if alike else [f"{kind} ({split})" for split, kind in metrics.items()])
    caption = (
        f"{words.capitalize()} of the study's best trial on every task, beside the base, each task's own expert, and "
        "the best of the other methods in the same storage. Coefficients were chosen on validation; test is only "
        "reported, where it has been computed."
    )
    found = {row: splits for row, splits in rows.items() if splits}
    return Scores(NAME, TITLE, caption, tasks=view.tasks, metrics=metrics, rows=found)


def scores(view: StudyView) -> Scores | Missing:
    """Bars of everything that was scored.

    Args:
        view: the stored study.
    """
    return best_scores(view) if view.best is not None else Missing(NAME, TITLE, "No trial has completed yet.")
