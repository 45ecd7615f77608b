"""Tables of the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dfmerge_studies.methods import DROP_RATE
from dfmerge_studies.report.comparison import ranked
from dfmerge_studies.report.figures.scores import REFERENCES, best_scores
from dfmerge_studies.report.view import StudyView
from dfmerge_studies.tasks.metrics import MEAN, Metric


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: what it says.
        bold: the best of its column.
        underline: the second best.
    """

    text: str
    bold: bool = False
    underline: bool = False


@dataclass(frozen=True)
class TableRow:
    """One row.

    Attributes:
        cells: from left to right.
        reference: shown in grey; it does not compete.
    """

    cells: Sequence[Cell]
    reference: bool = False


@dataclass(frozen=True)
class Section:
    """A table with a heading.

    Attributes:
        title: heading.
        columns: heads of the columns.
        rows: the rows.
        text: a paragraph above it.
        numbers: all columns but the first hold numbers.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[TableRow]
    text: str = ""
    numbers: bool = False


def merged_table(view: StudyView) -> Section:
    """Base and experts with their places and the coefficients of the best trial.

    Args:
        view: the stored study.
    """
    coefficients = view.coefficients(view.best) if view.best is not None else {}
    models = view.spec.get("experts", {})
    rows = [
        TableRow(
            [
                Cell(name),
                Cell(str(models.get(name, {}).get("model", ""))),
                Cell(task or "all tasks"),
                Cell(f"{coefficients[name]:.4g}" if name in coefficients else ""),
            ]
        )
        for name, task in view.experts.items()
    ]
    text = f"Base: {view.spec.get('base', '')}"
    if view.best is not None and DROP_RATE in view.best.user_attrs:
        text += f". Best drop rate: {view.best.user_attrs[DROP_RATE]:g}"
    return Section("What was merged", ["expert", "model", "task", "best coefficient"], rows, text=text)


def score_tables(view: StudyView) -> list[Section]:
    """One table per split that has scores.

    Args:
        view: the stored study.
    """
    shown = best_scores(view)
    columns = [*view.tasks, MEAN]
    sections = []
    for split in shown.splits:
        metrics = view.metrics(split)
        table = {row: {column: shown.value(row, split, column) for column in columns} for row in shown.rows}
        ranks = {
            column: ranked(
                {row: v for row, c in table.items() if row not in REFERENCES and (v := c[column]) is not None},
                metrics.of(column),
            )
            for column in columns
        }
        rows = [
            TableRow(
                [
                    Cell(row),
                    *(
                        _score_cell(value, metrics.of(column), ranks[column].get(row))
                        for column, value in cells.items()
                    ),
                ],
                reference=row in REFERENCES,
            )
            for row, cells in table.items()
            if any(value is not None for value in cells.values())
        ]
        title = f"{split.capitalize()} {metrics.heading}"
        sections.append(Section(title, ["", *columns], rows, numbers=True))
    return sections


def _score_cell(value: float | None, metric: Metric, rank: int | None) -> Cell:
    return Cell("-" if value is None else metric.shown(value), bold=rank == 1, underline=rank == 2)
