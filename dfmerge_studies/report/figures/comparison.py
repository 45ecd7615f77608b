"""Methods side by side over several seeds, as `compare` leaves them in the storage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import plotly.graph_objects as go
from matplotlib.figure import Figure

from dfmerge_studies.report.figures.base import (
    DARK,
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
    shorten,
    tidy_,
)
from dfmerge_studies.report.figures.rows import MANY, Panel, plotly_rows, static_rows
from dfmerge_studies.report.figures.scores import row_colours
from dfmerge_studies.report.standings import Cell, column_score, spread
from dfmerge_studies.report.stored_comparison import stored_comparison
from dfmerge_studies.report.view import StudyView
from dfmerge_studies.study.comparison import FINE_TUNED, MULTI_TASK, ZERO_SHOT
from dfmerge_studies.tasks.metrics import MEAN, Metrics

NAME, TITLE = "comparison", "Methods over seeds"
_GREYS = {ZERO_SHOT: "#D6D6D6", FINE_TUNED: "#7F7F7F", MULTI_TASK: "#ADADAD"}
_WORDS = {ZERO_SHOT: "the base", FINE_TUNED: "each expert on its own task", MULTI_TASK: "one model trained on all"}
_GROUP = 0.86  # width of a group of bars; groups are 1 apart
_GAP = 0.6  # between references and methods, in bars

_ERRORS = {"thickness": 1.2, "width": 3, "color": DARK}

BySeed = dict[str, dict[int, dict[str, float]]]  # {row: {seed: {task: score}}}


@dataclass(frozen=True)
class _Bars:
    """The bars of one row: in which columns, from `start` on beside the middle of each; heights as shown."""

    name: str
    colour: str
    columns: list[int]
    start: float
    width: float
    means: list[float]
    deviations: list[float]


@dataclass(frozen=True)
class SeedScores(Drawing):
    """Scores by row, seed and task.

    Attributes:
        split: whose scores.
        metric: what they are.
        unit: of the shown numbers, "%" or nothing.
        task_metrics: what they are, by task.
        tasks: names, in their order.
        references: {row: {seed: {task: score}}} of whole models; the experts' may lack tasks.
        methods: the same of merges.
    """

    split: str
    metric: str
    unit: str
    task_metrics: dict[str, str]
    tasks: list[str]
    references: BySeed
    methods: BySeed

    @property
    def columns(self) -> list[str]:
        """Tasks, and their mean."""
        return [*self.tasks, MEAN]

    def cell(self, row: str, column: str) -> Cell | None:
        """Mean and sample standard deviation over the seeds.

        Args:
            row: a method or a reference.
            column: a task, or "mean".
        """
        by_seed = self.methods.get(row) or self.references[row]
        metrics = Metrics.named(self.task_metrics)
        values = [column_score(scores, metrics, column) for scores in by_seed.values()]
        known = [value for value in values if value is not None]
        return spread(known) if known else None

    @property
    def _is_share(self) -> bool:
        """Whether all numbers lie between 0 and 100."""
        return self.unit == "%" and all(metric.low >= 0 for metric in Metrics.named(self.task_metrics).values())

    def _bars(self) -> Iterator[_Bars]:
        """The bars of every row, the references' first."""
        shades = {**{row: _GREYS[row] for row in self.references}, **row_colours(list(self.methods))}
        gap = _GAP if self.references else 0.0
        width = _GROUP / (len(shades) + gap)
        for place, (row, shade) in enumerate(shades.items()):
            cells = [(i, self.cell(row, column)) for i, column in enumerate(self.columns)]
            found = [(i, cell) for i, cell in cells if cell is not None]
            yield _Bars(
                name=self._name(row),
                colour=shade,
                columns=[i for i, _ in found],
                start=(place + (gap if row in self.methods else 0.0)) * width - _GROUP / 2,
                width=0.94 * width,
                means=scaled([cell.mean for _, cell in found], self.unit),
                deviations=scaled([cell.std or 0.0 for _, cell in found], self.unit),
            )

    def _name(self, row: str) -> str:
        """The row, with its number of seeds where not all methods have the same."""
        if row in self.references or len({len(by_seed) for by_seed in self.methods.values()}) == 1:
            return row
        count = len(self.methods[row])
        return f"{shorten(row, 18)} ({count} seed{'s' if count > 1 else ''})"

    @property
    def _rows(self) -> list[str]:
        return [*self.references, *self.methods]

    def _panels(self) -> list[Panel]:
        """A column of numbers for each task and the mean."""
        panels = []
        for column in self.columns:
            cells = {row: self.cell(row, column) for row in self._rows}
            values = {row: (cell.mean, cell.std) for row, cell in cells.items() if cell is not None}
            panels.append(Panel(column, self.unit, self._is_share, f"{self.split} {self.metric}", values))
        return panels

    def plotly(self) -> go.Figure:
        """Bars in groups, one group per task, the references in grey at its left; of many rows a line each."""
        if len(self.methods) > MANY:
            return plotly_rows(self._rows, self._panels())
        figure, names = go.Figure(), [markup(column) for column in self.columns]
        for bars in self._bars():
            figure.add_bar(
                x=bars.columns,
                y=bars.means,
                offset=bars.start,
                width=bars.width,
                error_y={"array": bars.deviations, "visible": any(bars.deviations), **_ERRORS},
                name=markup(bars.name, 40),
                marker={"color": bars.colour},
                customdata=[names[i] for i in bars.columns],
                hovertemplate=f"%{{customdata}}: %{{y:{digits(self.unit)}}}"
                + (f" ± %{{error_y.array:{digits(self.unit)}}}" if any(bars.deviations) else ""),
            )
        figure.update_xaxes(tickvals=list(range(len(names))), ticktext=names, showgrid=False, zeroline=False)
        figure.update_yaxes(title_text=axis_label(f"{self.split} {self.metric}", self.unit))
        if self._is_share:
            figure.update_yaxes(range=[0, 105])
        return layout_(figure, height=460)

    def static(self) -> Figure:
        """The same for a file."""
        if len(self.methods) > MANY:
            return static_rows(self._rows, self._panels())
        with canvas():
            width = min(18.0, 3.4 + 0.12 * len(self.columns) * (len(self.references) + len(self.methods) + 2))
            figure, axes = blank(size=(max(8.6, width), 4.2))
            for bars in self._bars():
                axes.bar(
                    [i + bars.start for i in bars.columns],
                    bars.means,
                    bars.width,
                    align="edge",
                    yerr=bars.deviations if any(bars.deviations) else None,
                    error_kw={"elinewidth": 1, "capsize": 2, "ecolor": DARK},
                    color=bars.colour,
                    label=label(bars.name),
                )
            tidy_(axes, y=axis_label(f"{self.split} {self.metric}", self.unit))
            if self._is_share:
                axes.set_ylim(0, 105)
            columns_(axes, self.columns)
            legend_(axes)
        return figure


def comparison(view: StudyView) -> SeedScores | Missing:
    """The methods of `compare --seeds`, on the test split where all of them have been scored on it."""
    found = stored_comparison(view)
    if found is None:
        return Missing(NAME, TITLE, "It needs a method at several seeds in the storage, as compare --seeds makes them.")
    (split,) = found.splits
    aims = view.metrics(split).aims  # guards are no part of a mean, and may have another axis
    references = {
        row: {seed: _only(scores[split], aims) for seed, scores in by_seed.items()}
        for row, by_seed in found.references.items()
    }
    methods = {
        variant: {entry.seed: _only(entry.scores[split], aims) for entry in found.of(variant)}
        for variant in found.variants
    }
    metrics = aims
    if len({metric.unit for metric in metrics.values()}) > 1:
        return Missing(NAME, TITLE, f"{metrics.text}: scores in percent and others do not share an axis.")
    counts = {len(by_seed) for by_seed in methods.values()}
    over = f"{max(counts)} seeds" if len(counts) == 1 else "the seeds"
    caption = (
        f"Mean {split} {metrics.text} over {over} of each method's study in this storage, with one sample standard "
        "deviation to either side. Each seed has its own Fisher inputs and its own search; the trial shown is the "
        "best on validation."
    )
    if references:
        caption += f" In grey, whole models: {', '.join(f'{row} ({_WORDS[row]})' for row in references)}."
    return SeedScores(
        NAME,
        TITLE,
        caption,
        split=split,
        metric=metrics.short,
        unit=metrics.unit,
        task_metrics=metrics.names,
        tasks=list(metrics),
        references=references,
        methods=methods,
    )


def _only(scores: Mapping[str, float], metrics: Metrics) -> dict[str, float]:
    return {task: score for task, score in scores.items() if task in metrics}
