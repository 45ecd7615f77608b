"""A study as one HTML page that needs nothing else, and its figures as files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from dfmerge_studies.errors import InputError, RunError, first_line
from dfmerge_studies.report.figures.base import Drawing, Missing, canvas
from dfmerge_studies.report.races import races_of, races_text
from dfmerge_studies.report.renderings import standings_section
from dfmerge_studies.report.sections import Section, merged_table
from dfmerge_studies.report.standings import standings
from dfmerge_studies.report.stored_comparison import stored_comparison, stored_standings
from dfmerge_studies.report.tables import selection_text, sentence
from dfmerge_studies.report.verdict import verdict_of
from dfmerge_studies.report.view import StudyView
from dfmerge_studies.study import provenance
from dfmerge_studies.temporary import beside
from dfmerge_studies.trials.reading import counts

PAGE, FOLDER = "index.html", "figures"
GENERATOR = "dfmerge-studies"
_DPI = 150
_MARK = f'<meta name="generator" content="{GENERATOR}">'.encode()
_ENDINGS = (".png", ".svg", ".json")


@dataclass(frozen=True)
class Page:
    """What a page says beside its figures.

    Attributes:
        title: of the page.
        summary: a paragraph under it.
        verdict: what the study has come to, a line each.
        tables: sections with tables.
        command: lines that make it again.
        provenance: names and values.
        spec: the spec as YAML.
    """

    title: str
    summary: str
    verdict: Sequence[str]
    tables: Sequence[Section]
    command: str
    provenance: Sequence[tuple[str, str]]
    spec: str


@dataclass(frozen=True)
class ReportFiles:
    """Files of a report: the page, and every figure as PNG, SVG and JSON."""

    page: Path
    figures: Sequence[Path]

    def described(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {"page": str(self.page), "figures": [str(file) for file in self.figures]}


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
        value = f"{view.value_text(view.best)} {view.unit}".rstrip()
        summary += f". The best is trial {view.best.number}, with {value} {view.measure} on validation."
        if (races := races_of([*view.trials, *view.pruned])) is not None:
            summary += f" {sentence(races_text(races))}"
        if view.selection is not None:
            text = selection_text(view.selection.described(), view.metrics("validation"))
            summary += f" {sentence(text)}"
    scores, verdict = stored_standings(view), verdict_of(view)
    tables = [merged_table(view)]
    tables += [standings_section(t, f"{split.capitalize()} {t.metrics.heading}") for split, t in scores.items()]
    compared = stored_comparison(view)
    if compared is not None:
        (split,) = compared.splits
        summary += f" Its storage has {len(compared.variants)} methods over {len(compared.seeds)} seeds."
        found = standings(compared, split)
        tables.append(standings_section(found, f"Methods over seeds: {split} {found.metrics.heading}"))
    return Page(
        title=f"{view.name}: {view.method}",
        summary=summary,
        verdict=verdict.lines if verdict is not None else [],
        tables=tables,
        command=command,
        provenance=_provenance(view),
        spec=yaml.safe_dump(dict(view.spec), sort_keys=False, allow_unicode=True),
    )


def _provenance(view: StudyView) -> list[tuple[str, str]]:
    versions = view.study.user_attrs.get(provenance.VERSIONS, {})
    return [
        *((name, _text(value)) for name, value in view.fingerprint.items()),
        ("versions at creation", ", ".join(f"{name} {number}" for name, number in versions.items())),
        ("report made with", f"{GENERATOR} {version(GENERATOR)}"),
    ]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def write_report(out: Path, page: Page, drawings: Sequence[Drawing | Missing]) -> ReportFiles:
    """Write the page and, beside it, every figure as PNG, SVG and JSON.

    Args:
        out: directory; made if it is not there.
        page: what the page says.
        drawings: the figures, and those that are missing.

    Raises:
        InputError: there is another page or picture, or the directory is a file.
        RunError: it cannot be written.
    """
    check_out(out, [drawing.name for drawing in drawings])
    drawn = [drawing for drawing in drawings if isinstance(drawing, Drawing)]
    written = []
    try:
        (out / FOLDER).mkdir(parents=True, exist_ok=True)
        # The page first: by it the pictures are known as ours, also those of a run that was cut short.
        _replace(out / PAGE, render(page, drawings).encode())
        for drawing in drawn:
            written += _write_figure(out / FOLDER, drawing)
    except OSError as error:
        raise RunError(
            f"cannot be written: {first_line(error)}", where=str(out), hint="Free space or choose another place"
        ) from error
    return ReportFiles(out / PAGE, written)


def check_out(out: Path, figures: Iterable[str]) -> None:
    """Refuse a directory whose page, or whose pictures of the same names, are not of a report of ours.

    Args:
        out: the directory.
        figures: names of the figures that are to be written.

    Raises:
        InputError: it is a file, or holds another page or picture.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file", where="--out", hint="Name a directory")
    page = out / PAGE
    if page.is_file() and _MARK in page.read_bytes()[:2000]:
        return
    pictures = [out / FOLDER / f"{name}{ending}" for name in figures for ending in _ENDINGS]
    for file in (page, *pictures):
        if file.exists() or file.is_symlink():
            raise InputError(f"{file} is not a report of this program", where="--out", hint="Choose another directory")


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
    files = [folder / f"{drawing.name}{ending}" for ending in _ENDINGS]
    temporary = [beside(file) for file in files]
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
    new = beside(file)
    try:
        new.write_bytes(content)
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)
