"""What every figure is, and the looks that all share.

A figure is a frozen dataclass of plain numbers and names: it can be tested, written as JSON, and drawn twice.  Names
come from outside; `markup` makes them harmless where plotly reads its pseudo-HTML, and `canvas` turns matplotlib's
mathematics off.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import matplotlib
import plotly.graph_objects as go
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which stay apart for colour-blind readers; their yellow is too pale for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8C6D31")
DASHES = ("solid", "dash", "dot", "dashdot")
MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down")
_STATIC_DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
_STATIC_MARKERS = {
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "triangle-up": "^",
    "cross": "P",
    "x": "X",
    "star": "*",
    "triangle-down": "v",
}
BLUE, GREY, DARK = "#0072B2", "#767676", "#222222"
SCALE = "Viridis"
LABEL = 28  # characters of a name that a legend has room for


@dataclass(frozen=True)
class Drawing:
    """One figure.

    Attributes:
        name: file name without ending; letters, digits and dashes.
        title: heading.
        caption: what it shows and how it was computed.
    """

    name: str
    title: str
    caption: str

    def plotly(self) -> go.Figure:
        """The interactive figure."""
        raise NotImplementedError

    def static(self) -> Figure:
        """The figure for PNG and SVG files."""
        raise NotImplementedError

    def data(self) -> dict[str, Any]:
        """The numbers behind the figure, as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Missing:
    """A figure that this study does not have, and why not.

    Attributes:
        name: of the figure.
        title: heading.
        reason: a sentence.
    """

    name: str
    title: str
    reason: str


def shorten(name: str, length: int = LABEL) -> str:
    """A name cut to what a legend has room for."""
    return name if len(name) <= length else f"{name[: length - 1]}…"


def markup(name: str, length: int = LABEL) -> str:
    """A name as plotly should read it: its tags and entities are text.

    Args:
        name: any text.
        length: characters that are kept.
    """
    return html.escape(shorten(name, length), quote=False)


def colour(position: int) -> str:
    """Colour of the n-th line.

    Args:
        position: 0 for the first.
    """
    return COLOURS[position % len(COLOURS)]


def dash(position: int) -> str:
    """Dash of the n-th line: it changes when the colours begin again.

    Args:
        position: 0 for the first.
    """
    return DASHES[(position // len(COLOURS)) % len(DASHES)]


def marker(position: int) -> str:
    """Marker of the n-th line.

    Args:
        position: 0 for the first.
    """
    return MARKERS[position % len(MARKERS)]


def static_dash(name: str) -> str:
    """Matplotlib's word for plotly's dash."""
    return _STATIC_DASHES[name]


def static_marker(name: str) -> str:
    """Matplotlib's word for plotly's marker."""
    return _STATIC_MARKERS[name]


def scaled(values: Sequence[float], unit: str) -> list[float]:
    """Scores as a figure shows them.

    Args:
        values: scores.
        unit: of the shown numbers, from `Metric.unit`: "%" or nothing.
    """
    return [_factor(unit) * value for value in values]


def scaled_or_none(values: Sequence[float | None], unit: str) -> list[float | None]:
    """The same where some are missing."""
    return [None if value is None else _factor(unit) * value for value in values]


def _factor(unit: str) -> float:
    return 100.0 if unit == "%" else 1.0


def digits(unit: str, more: int = 0) -> str:
    """Format of a shown number, for plotly."""
    return f".{(1 if unit == '%' else 3) + more}f"


def whole_step(length: int, most: int = 12) -> int:
    """Distance of an axis's ticks that fall on whole numbers.

    Args:
        length: of the axis.
        most: ticks that have room.
    """
    steps = [factor * int(10**power) for power in range(9) for factor in (1, 2, 5)]
    return next(step for step in steps if length / step <= most)


def axis_label(words: str, unit: str) -> str:
    """Label of an axis: `accuracy, %`, or `log_likelihood` alone."""
    return f"{words}, {unit}" if unit else words


def layout_(figure: go.Figure, *, height: int, legend: bool = True) -> go.Figure:
    """Give a plotly figure the common looks; returns it.

    Args:
        figure: what to change.
        height: in pixels; the width is the page's.
        legend: whether it has one, at its right.
    """
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 70, "r": 30, "t": 30, "b": 55},
        showlegend=legend,
        font={"family": "system-ui, sans-serif", "size": 13, "color": DARK},
        hoverlabel={"font_size": 13},
        colorway=list(COLOURS),
    )
    return figure


@contextmanager
def canvas() -> Iterator[None]:
    """Matplotlib as the figures want it: no mathematics in names, the same SVG for the same data."""
    settings: Any = {"text.parse_math": False, "svg.hashsalt": "dfmerge", "font.size": 10, "axes.axisbelow": True}
    with matplotlib.rc_context(settings):
        yield


def blank(rows: int = 1, columns: int = 1, *, size: tuple[float, float], **more: Any) -> tuple[Figure, Any]:
    """An empty matplotlib figure, of no global state, and its axes."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, **more)


def tidy_(axes: Axes, *, x: str | None = None, y: str | None = None, grid: bool = True) -> None:
    """Labels, light grid lines, and no frame above and at the right."""
    if x is not None:
        axes.set_xlabel(x)
    if y is not None:
        axes.set_ylabel(y)
    if grid:
        axes.grid(color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def columns_(axes: Axes, names: Sequence[str], length: int = 18) -> None:
    """Names under groups of bars at 0, 1, ..., turned where they would run into each other.

    Args:
        axes: what to change.
        names: one per group.
        length: characters that are kept of each.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    labels = [shorten(name, length) for name in names]
    # Inches: a character takes about 0.085 at this size, legend and vertical axis about 3.
    turned = len(labels) * 0.085 * (max(map(len, labels)) + 1) > figure.get_figwidth() - 3
    axes.set_xticks(range(len(labels)), labels, rotation=30 if turned else 0, ha="right" if turned else "center")
    axes.set_xlim(-0.6, len(labels) - 0.4)
    axes.grid(visible=False, axis="x")


def label(name: str) -> str:
    """A name as matplotlib's legend should show it: it would hide one that starts with an underscore."""
    cut = shorten(name)
    return f" {cut}" if cut.startswith("_") else cut


def legend_(axes: Axes) -> None:
    """A legend at the right of the axes, if they have anything to name."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize="small")
