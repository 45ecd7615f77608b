"""Score per task of the merge beside its experts, the base and other methods."""

from __future__ import annotations

from dataclasses import dataclass

import plotly.graph_objects as go
from matplotlib.figure import Figure
from plotly.subplots import make_subplots

from dfmerge_studies.report.figures.base import (
    Drawing,
    Missing,
    axis_label,
    blank,
    canvas,
    columns_,
    digits,
    label,
    layout_,
    legend_,
    markup,
    scaled,
    scaled_or_none,
    tidy_,
)
from dfmerge_studies.report.figures.rows import MANY, Panel, plotly_rows, static_rows
from dfmerge_studies.report.standings import BASE, EXPERTS, column_score
from dfmerge_studies.report.stored_comparison import stored_standings
from dfmerge_studies.report.view import StudyView
from dfmerge_studies.tasks.metrics import MEAN, Metrics

NAME, TITLE = "scores", "Score per task"
REFERENCES = {BASE: "#C9C9C9", EXPERTS: "#8A8A8A"}
# As many as there are methods and variants to compare; no black and no grey, which references have.
_COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6D31", "#5B4B9E", "#B5BD00", "#8B1A1A",
    "#7FCDBB", "#F4A6A0",
)  # fmt: skip

Rows = dict[str, dict[str, dict[str, float]]]  # {row: {split: {task: score}}}


@dataclass(frozen=True)
class _Panel:
    """Numbers on one axis: those columns of a split that have one unit; `share` if all lie between 0 and 100 %."""

    split: str
    columns: list[str]
    unit: str
    label: str
    share: bool


@dataclass(frozen=True)
class Scores(Drawing):
    """Scores by row, split and task.

    Attributes:
        tasks: names, in their order.
        metrics: what the scores are, for each split that some row has.
        task_metrics: the same by task.
        rows: {row: {split: {task: score}}}; a row may lack a split or, the experts', a task.
        guards: of the tasks those that are no part of the mean, with the points that each may lose against the base.
    """

    tasks: list[str]
    metrics: dict[str, str]
    task_metrics: dict[str, dict[str, str]]
    rows: Rows
    guards: dict[str, float]

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
        return column_score(self.rows[row].get(split, {}), Metrics.named(self.task_metrics[split], self.guards), column)

    def _panels(self) -> list[_Panel]:
        """One per split; two where some numbers are in percent and others are not."""
        panels = []
        for split in self.splits:
            metrics = Metrics.named(self.task_metrics[split], self.guards)
            for unit in dict.fromkeys(metrics.of(column).unit for column in [*self.tasks, MEAN]):
                columns = [column for column in [*self.tasks, MEAN] if metrics.of(column).unit == unit]
                share = unit == "%" and all(metrics.of(column).low >= 0 for column in columns)
                words = " or ".join(sorted({metrics.of(column).name for column in columns if column != MEAN}))
                panels.append(_Panel(split, columns, unit, axis_label(words, unit), share))
        return panels

    def _columns(self) -> list[Panel]:
        """A column of numbers for each task and the mean of each split."""
        return [
            Panel(
                f"{column}\n{panel.split}" if len(self.splits) > 1 else column,
                panel.unit,
                panel.share,
                panel.label.removesuffix(f", {panel.unit}"),
                {
                    row: (value, None)
                    for row in self.rows
                    if (value := self.value(row, panel.split, column)) is not None
                },
            )
            for panel in self._panels()
            for column in panel.columns
        ]

    def plotly(self) -> go.Figure:
        """Bars in groups, one group per task; of many rows a line each."""
        if len(self.rows) > MANY:
            return plotly_rows(list(self.rows), self._columns())
        panels, colours = self._panels(), row_colours(list(self.rows))
        alike = len({tuple(panel.columns) for panel in panels}) == 1
        figure = make_subplots(
            rows=len(panels),
            cols=1,
            shared_xaxes=alike,
            vertical_spacing=0.12,
            subplot_titles=[panel.split for panel in panels],
        )
        for place, panel in enumerate(panels, start=1):
            for row in self.rows:
                values = [self.value(row, panel.split, column) for column in panel.columns]
                figure.add_bar(
                    x=[markup(column) for column in panel.columns],
                    y=scaled_or_none(values, panel.unit),
                    name=markup(row),
                    marker={"color": colours[row]},
                    hovertemplate=f"%{{x}}: %{{y:{digits(panel.unit)}}}",
                    legendgroup=markup(row),
                    showlegend=place == 1,
                    row=place,
                    col=1,
                )
            figure.update_yaxes(title_text=panel.label, row=place, col=1)
            if panel.share:
                figure.update_yaxes(range=[0, 100], row=place, col=1)
        return layout_(figure, height=140 + 240 * len(panels)).update_layout(
            barmode="group", bargroupgap=0.05, margin={"t": 50}
        )

    def static(self) -> Figure:
        """The same for a file."""
        if len(self.rows) > MANY:
            return static_rows(list(self.rows), self._columns())
        panels, colours = self._panels(), row_colours(list(self.rows))
        alike = len({tuple(panel.columns) for panel in panels}) == 1
        with canvas():
            width = min(18.0, 3.2 + 0.16 * max(len(panel.columns) for panel in panels) * (len(self.rows) + 2))
            figure, grid = blank(
                len(panels), 1, size=(max(8.0, width), 0.8 + 2.3 * len(panels)), sharex=alike, squeeze=False
            )
            bar = 0.85 / max(1, len(self.rows))
            for axes, panel in zip(grid[:, 0], panels, strict=True):
                for position, row in enumerate(self.rows):
                    values = [self.value(row, panel.split, column) for column in panel.columns]
                    places = [i + (position + 0.5) * bar - 0.425 for i, value in enumerate(values) if value is not None]
                    heights = scaled([value for value in values if value is not None], panel.unit)
                    axes.bar(places, heights, 0.94 * bar, color=colours[row], label=label(row))
                tidy_(axes, y=f"{panel.split} {panel.label}")
                if panel.share:
                    axes.set_ylim(0, 100)
                columns_(axes, panel.columns)
            legend_(grid[0, 0])
        return figure


def row_colours(rows: list[str]) -> dict[str, str]:
    """Colour per row: greys for references, blue for the last, which is the study's own."""
    others = [row for row in rows if row not in REFERENCES]
    shades = {row: _COLOURS[(len(others) - 1 - i) % len(_COLOURS)] for i, row in enumerate(others)}
    return {row: REFERENCES.get(row) or shades[row] for row in rows}


def scores(view: StudyView) -> Scores | Missing:
    """Bars of everything that was scored."""
    if view.best is None:
        return Missing(NAME, TITLE, "No trial has completed yet.")
    tables = stored_standings(view)
    rows: Rows = {}
    for split, table in tables.items():
        for row in table.rows:
            found = {column: cell.mean for column, cell in row.cells.items()}
            rows.setdefault(row.method, {})[split] = {task: found[task] for task in table.tasks if task in found}
    texts = {split: table.metrics.text for split, table in tables.items()}
    alike = len(set(texts.values())) == 1
    words = " and ".join([*texts.values()][:1] if alike else [f"{kind} ({split})" for split, kind in texts.items()])
    caption = (
        f"{words[:1].upper()}{words[1:]} of the study's best trial on every task, beside the base, each task's own "
        "expert, and the best of the other methods in the same storage. Coefficients were chosen on validation; test "
        "is only reported, where it has been computed."
    )
    shorts: dict[str, str] = {split: table.metrics.short for split, table in tables.items()}
    names: dict[str, dict[str, str]] = {split: table.metrics.names for split, table in tables.items()}
    guards = view.metrics("validation").guards
    if guards:
        caption += f" The mean is without guards ({', '.join(guards)}), which are compared with the base."
    return Scores(NAME, TITLE, caption, tasks=view.tasks, metrics=shorts, task_metrics=names, rows=rows, guards=guards)
