"""A study as one HTML page that needs nothing else, and its figures as files."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from dfmerge_studies.errors import InputError, RunError
from dfmerge_studies.report.figures.base import Drawing, Missing, canvas
from dfmerge_studies.report.figures.scores import BASE, EXPERTS, MEAN, Scores, score_rows
from dfmerge_studies.report.view import StudyView
from dfmerge_studies.study import provenance
from dfmerge_studies.study.attributes import counts

PAGE, FOLDER = "index.html", "figures"
GENERATOR = "dfmerge-studies"
_DPI = 150


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


@dataclass(frozen=True)
class Page:
    """What a page says beside its figures.

    Attributes:
        title: of the page.
        summary: a paragraph under it.
        tables: sections with tables.
        command: lines that make it again.
        provenance: names and values.
        spec: the spec as YAML.
    """

    title: str
    summary: str
    tables: Sequence[Section]
    command: str
    provenance: Sequence[tuple[str, str]]
    spec: str


def study_page(view: StudyView, command: str) -> Page:
    """What the page of a study says.

    Args:
        view: the stored study.
        command: lines that make study and report again.
    """
    trials = counts(view.study)
    summary = f"{len(view.experts)} experts merged into one model with {view.method}: {trials['complete']} trials"
    if view.best is None:
        summary += ", none complete yet."
    else:
        value = 100 * view.value(view.best)
        summary += f". The best is trial {view.best.number}, with {value:.1f} % {view.measure} on validation."
    return Page(
        title=f"{view.name}: {view.method}",
        summary=summary,
        tables=[_merged(view), *score_tables(view)],
        command=command,
        provenance=_provenance(view),
        spec=yaml.safe_dump(dict(view.spec), sort_keys=False, allow_unicode=True),
    )


def _merged(view: StudyView) -> Section:
    """Base and experts with their places and the coefficients of the best trial."""
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
    return Section("What was merged", ["expert", "model", "task", "best coefficient"], rows, text=text)


def score_tables(view: StudyView) -> list[Section]:
    """One table per split that has scores.

    Args:
        view: the stored study.
    """
    shown = Scores("", "", "", tasks=view.tasks, rows=score_rows(view))
    columns = [*view.tasks, MEAN]
    sections = []
    for split in shown.splits:
        table = {row: [shown.value(row, split, column) for column in columns] for row in shown.rows}
        competing = [values for row, values in table.items() if row not in (BASE, EXPERTS)] or [[None] * len(columns)]
        best = [max((v for v in column if v is not None), default=None) for column in zip(*competing, strict=True)]
        rows = [
            TableRow([Cell(row), *_score_cells(values, best, row)], reference=row in (BASE, EXPERTS))
            for row, values in table.items()
            if any(value is not None for value in values)
        ]
        title = f"{split.capitalize()} {view.metric(split)} in percent"
        sections.append(Section(title, ["", *columns], rows, numbers=True))
    return sections


def _score_cells(values: Sequence[float | None], best: Sequence[float | None], row: str) -> list[Cell]:
    return [
        Cell("-" if value is None else f"{100 * value:.1f}", bold=row not in (BASE, EXPERTS) and value == top)
        for value, top in zip(values, best, strict=True)
    ]


def _provenance(view: StudyView) -> list[tuple[str, str]]:
    versions = view.study.user_attrs.get(provenance.VERSIONS, {})
    return [
        *((name, _text(value)) for name, value in view.science.items()),
        ("versions at creation", ", ".join(f"{name} {number}" for name, number in versions.items())),
        ("report made with", f"{GENERATOR} {version(GENERATOR)}"),
    ]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def write_report(
    out: Path, page: Page, drawings: Sequence[Drawing | Missing], *, force: bool = False
) -> dict[str, str | list[str]]:
    """Write the page and, beside it, every figure as PNG, SVG and JSON.

    Args:
        out: directory; made if it is not there.
        page: what the page says.
        drawings: the figures, and those that are missing.
        force: replace a page that something else has written.

    Returns:
        `page`, a path, and `figures`, paths.

    Raises:
        InputError: there is another page, or the directory is a file.
        RunError: it cannot be written.
    """
    check_out(out, force=force)
    drawn = [drawing for drawing in drawings if isinstance(drawing, Drawing)]
    written = []
    try:
        (out / FOLDER).mkdir(parents=True, exist_ok=True)
        for drawing in drawn:
            written += _write_figure(out / FOLDER, drawing)
        _replace(out / PAGE, render(page, drawings).encode())
    except OSError as error:
        raise RunError(
            f"cannot be written: {error}", where=str(out), mend="Free space or choose another place"
        ) from error
    return {"page": str(out / PAGE), "figures": [str(file) for file in written]}


def check_out(out: Path, *, force: bool) -> None:
    """Refuse a directory whose page is not a report of ours.

    Args:
        out: the directory.
        force: replace the page.

    Raises:
        InputError: it is a file, or holds another page.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file", where="--out", mend="Name a directory")
    file = out / PAGE
    if file.exists() and not force and GENERATOR.encode() not in file.read_bytes()[:2000]:
        raise InputError(
            f"{file} is not a report of this program", where="--out", mend="Choose another directory, or add --force"
        )


def render(page: Page, drawings: Sequence[Drawing | Missing]) -> str:
    """The page as HTML.

    Args:
        page: what it says.
        drawings: the figures, and those that are missing.
    """
    # Everything is escaped but plotly.js, which is no data.  `tojson` escapes what could end a script.
    environment = Environment(
        loader=PackageLoader("dfmerge_studies", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    drawn = [drawing for drawing in drawings if isinstance(drawing, Drawing)]
    plots: list[Mapping[str, Any]] = [json.loads(drawing.plotly().to_json()) for drawing in drawn]
    return environment.get_template("page.html.j2").render(
        generator=GENERATOR,
        **vars(page),
        figures=[
            {"name": d.name, "title": d.title, "caption": d.caption, "height": plot["layout"]["height"]}
            for d, plot in zip(drawn, plots, strict=True)
        ],
        missing=[drawing for drawing in drawings if isinstance(drawing, Missing)],
        drawn=plots,
        plotly=Markup(get_plotlyjs()),
    )


def _write_figure(folder: Path, drawing: Drawing) -> list[Path]:
    files = [folder / f"{drawing.name}.{ending}" for ending in ("png", "svg", "json")]
    temporary = [_beside(file) for file in files]
    try:
        with canvas():
            figure = drawing.static()
            figure.savefig(temporary[0], format="png", dpi=_DPI)
            figure.savefig(temporary[1], format="svg", metadata={"Date": None})
        temporary[2].write_text(json.dumps(drawing.data(), ensure_ascii=False, indent=1), encoding="utf-8")
        for new, file in zip(temporary, files, strict=True):
            new.replace(file)
    finally:
        for new in temporary:
            new.unlink(missing_ok=True)
    return files


def _replace(file: Path, content: bytes) -> None:
    new = _beside(file)
    try:
        new.write_bytes(content)
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)


def _beside(file: Path) -> Path:
    return file.with_name(f".{file.name}.{uuid.uuid4().hex[:12]}.tmp")
