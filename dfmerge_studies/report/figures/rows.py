"""Many rows on one figure: a line for each, under what it chooses for C, with a panel for each task and the mean.

Bars side by side tell a dozen rows apart; twenty methods need a line each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
from matplotlib.figure import Figure
from plotly.subplots import make_subplots

from dfmerge_studies.methods import Coefficients, Importance, Method, find_method
from dfmerge_studies.report.figures.base import (
    COLOURS,
    DARK,
    axis_label,
    blank,
    canvas,
    digits,
    layout_,
    markup,
    scaled,
    shorten,
    tidy_,
)
from dfmerge_studies.study.variants import variants

MANY = 12  # rows that bars side by side tell apart
_WHOLE = "whole models, not merged"
_LENGTH = 46  # characters of a row's label
_IMPORTANCES = {
    Importance.UNIFORM: "C = 1",
    Importance.AT_EXPERT: "C = F(θ_i)",
    Importance.AT_SCALED_EXPERT: "C = F(θ_pre + λ_i τ_i)",
    Importance.GRAM_AT_EXPERT: "C: Gram matrices of inputs at θ_i",
    Importance.KFAC_AT_EXPERT: "C: Kronecker factors of F(θ_i)",
    Importance.KFAC_AT_SCALED_EXPERT: "C: Kronecker factors of F(θ_pre + λ_i τ_i)",
}
_COEFFICIENTS = {
    Coefficients.FIXED: "λ = 1/M",
    Coefficients.FISHER_TRACE: "λ by layer",
    Coefficients.SHARED_GRID: "one λ",
    Coefficients.PER_EXPERT: "λ_i searched",
}


@dataclass(frozen=True)
class Panel:
    """One column of numbers.

    Attributes:
        title: below it, lines of text.
        unit: of the shown numbers.
        share: whether they lie between 0 and 100.
        words: what they are.
        values: by row, the number and how far it spreads, as scores; rows without one are left out.
    """

    title: str
    unit: str
    share: bool
    words: str
    values: Mapping[str, tuple[float, float | None]]


@dataclass(frozen=True)
class Line:
    """A line of the figure: a heading, or a row.

    Attributes:
        text: what stands at its left.
        row: its row; None for a heading.
        colour: of its numbers.
    """

    text: str
    row: str | None
    colour: str


def method_of(row: str) -> Method | None:
    """The method of a row of a table: a method, a variant of one, or a study's best trial; None for whole models.

    Args:
        row: its name.
    """
    name = re.sub(r" \(trial \d+\)$", "", row)
    variant = variants().get(name)
    return find_method(variant.method if variant is not None else name)


def lines_of(rows: Sequence[str]) -> Iterator[Line]:
    """The lines of some rows: whole models first, then by what they choose for C, lambda and Phi.

    Args:
        rows: names of methods, variants and references.
    """
    groups: dict[Importance | None, list[str]] = {None: [], **{each: [] for each in Importance}}
    for row in rows:
        method = method_of(row)
        groups[None if method is None else method.importance].append(row)
    colours = iter(COLOURS)
    for importance, members in groups.items():
        if not members:
            continue
        colour = "#7F7F7F" if importance is None else next(colours, DARK)
        yield Line(_WHOLE if importance is None else _IMPORTANCES[importance], None, colour)
        for row in sorted(members, key=_place):
            yield Line(_text(row), row, colour)


def _place(row: str) -> tuple[int, str, int]:
    method, policies = method_of(row), list(_COEFFICIENTS)
    if method is None:
        return 0, "", 0
    return policies.index(method.coefficients), method.transform, len(row)


def _text(row: str) -> str:
    method = method_of(row)
    if method is None:
        return shorten(row, _LENGTH)
    phi = "" if method.transform == "identity" else f", Φ {method.transform}"
    return shorten(f"{row} · {_COEFFICIENTS[method.coefficients]}{phi}", _LENGTH)


def plotly_rows(rows: Sequence[str], panels: Sequence[Panel]) -> go.Figure:
    """The figure for the page.

    Args:
        rows: names.
        panels: from left to right.
    """
    lines = list(lines_of(rows))
    figure = make_subplots(1, len(panels), shared_yaxes=True, horizontal_spacing=0.02)
    for column, panel in enumerate(panels, start=1):
        found = [(place, line) for place, line in enumerate(lines) if line.row in panel.values]
        numbers = [panel.values[line.row or ""] for _, line in found]
        spreads = scaled([spread or 0.0 for _, spread in numbers], panel.unit)
        figure.add_scatter(
            x=scaled([mean for mean, _ in numbers], panel.unit),
            y=[place for place, _ in found],
            mode="markers",
            marker={"size": 8, "color": [line.colour for _, line in found]},
            error_x={"array": spreads, "visible": any(spreads), "thickness": 1.2, "width": 3},
            text=[markup(line.row or "", _LENGTH) for _, line in found],
            hovertemplate=f"%{{text}}: %{{x:{digits(panel.unit)}}}<extra></extra>",
            row=1,
            col=column,
        )
        words = [markup(line) for line in panel.title.split("\n")] + [axis_label(panel.words, panel.unit)] * (
            column == 1
        )
        figure.update_xaxes(title_text="<br>".join(words), row=1, col=column)
    texts = [
        f"<b>{markup(line.text, _LENGTH)}</b>" if line.row is None else markup(line.text, _LENGTH) for line in lines
    ]
    figure.update_yaxes(range=[len(lines) - 0.4, -0.6], showgrid=True, zeroline=False)
    figure.update_yaxes(tickvals=list(range(len(lines))), ticktext=texts, row=1, col=1)
    return layout_(figure, height=120 + 22 * len(lines), legend=False).update_layout(margin={"l": 330})


def static_rows(rows: Sequence[str], panels: Sequence[Panel]) -> Figure:
    """The same for a file.

    Args:
        rows: names.
        panels: from left to right.
    """
    lines = list(lines_of(rows))
    with canvas():
        size = (min(18.0, 4.2 + 1.5 * len(panels)), 1.0 + 0.24 * len(lines))
        figure, grid = blank(1, len(panels), size=size, sharey=True, squeeze=False)
        for axes, panel in zip(grid[0], panels, strict=True):
            for place, line in enumerate(lines):
                if line.row not in panel.values:
                    continue
                mean, spread = panel.values[line.row or ""]
                (at,), (deviation,) = scaled([mean], panel.unit), scaled([spread or 0.0], panel.unit)
                axes.errorbar(at, place, xerr=deviation or None, fmt="o", color=line.colour, markersize=5, capsize=2)
            tidy_(axes, x="\n".join(shorten(line, 16) for line in panel.title.split("\n")))
        first = grid[0, 0]
        first.set_xlabel(f"{first.get_xlabel()}\n{axis_label(panels[0].words, panels[0].unit)}")
        first.set_yticks(range(len(lines)), [line.text for line in lines])
        first.set_ylim(len(lines) - 0.4, -0.6)
        for tick, line in zip(first.get_yticklabels(), lines, strict=True):
            tick.set_fontweight("bold" if line.row is None else "normal")
    return figure
