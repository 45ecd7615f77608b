"""Tables of the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dfmerge_studies.methods import label
from dfmerge_studies.report.view import StudyView


@dataclass(frozen=True)
class PageCell:
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

    cells: Sequence[PageCell]
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
    """Base and experts with their places and the coefficients of the best trial."""
    coefficients = view.coefficients(view.best) if view.best is not None else {}
    models = view.spec.get("experts", {})
    rows = [
        TableRow(
            [
                PageCell(name),
                PageCell(str(models.get(name, {}).get("model", ""))),
                PageCell(task or "all tasks"),
                PageCell(f"{coefficients[name]:.4g}" if name in coefficients else ""),
            ]
        )
        for name, task in view.experts.items()
    ]
    text = f"Base: {view.spec.get('base', '')}"
    for name, value in (view.parameters(view.best) if view.best is not None else {}).items():
        text += f". Best {label(name)}: {value:g}"
    return Section("What was merged", ["expert", "model", "task", "best coefficient"], rows, text=text)
