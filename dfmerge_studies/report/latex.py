"""A comparison's table as LaTeX."""

from __future__ import annotations

import re
from collections.abc import Mapping

from dfmerge_studies.report.renderings import footer, headings, label, notes, shown, trials_text
from dfmerge_studies.report.standings import Standing, Standings
from dfmerge_studies.tasks.metrics import MEAN

_LATEX = {1: r"\textbf{%s}", 2: r"\underline{%s}"}
_LATEX_SIGNS = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "[": "{[}",
    "*": "{*}",
}
_TWO = r"r@{\,}l"  # a number and what belongs to it


def standings_latex(found: Standings, labels: Mapping[str, str]) -> str:
    r"""A tabular for a paper: `\textbf` the best, `\underline` the second, a star as in the terminal's table.

    With several seeds, a score is two columns, so that the means stand under each other whatever their spread.

    Args:
        found: the numbers.
        labels: what to call a row instead of by its method's name.
    """
    spreads = len(found.seeds) > 1
    scores = found.columns
    heads = [rf"\multicolumn{{2}}{{c}}{{{_escape(name)}}}" if spreads else _escape(name) for name in headings(found)]
    lines = [
        f"% {found.split} {found.metrics.heading}",
        r"% needs \usepackage{booktabs}",
        r"% if it is too wide: \usepackage{graphicx} and \resizebox{\linewidth}{!}{...} around it",
        *(f"% {note}" for note in notes(found)),
        rf"\begin{{tabular}}{{l{(_TWO if spreads else 'r') * len(scores)}r@{{ }}lr}}",
        r"\toprule",
        " & ".join(["", *heads, r"\multicolumn{2}{c}{largest drop}", "trials"]) + r" \\",
        r"\midrule",
    ]
    for before, row in zip([None, *found.rows], found.rows, strict=False):
        if before is not None and row.compete != before.compete:
            lines.append(r"\midrule")
        cells = [_escape(label(row, labels, len(found.seeds)))]
        cells += [_latex_score(found, row, column, spreads=spreads) for column in scores]
        cells.append("-- & " if row.drop is None else f"${row.drop[1]:+.1f}$ & {_escape(row.drop[0])}")
        cells.append(trials_text(row).replace("-", "--"))
        lines.append(" & ".join(cells) + r" \\")
    for number, (name, texts) in enumerate(footer(found, labels)):
        cells = [
            _escape(name),
            *(f"{_escape(texts.get(column, ''))}{' & ' if spreads else ''}" for column in scores),
            " & ",
            "",
        ]
        lines += [*([] if number else [r"\midrule"]), " & ".join(cells) + r" \\"]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _latex_score(found: Standings, row: Standing, column: str, *, spreads: bool) -> str:
    """The mean, and in a column of its own the spread with the star."""
    mean, std = shown(found, row, column) or ("", "")
    value = _LATEX.get(found.marks[column].get(row.method, 0), "%s") % mean if mean else "--"
    star = "$^{*}$" if column == MEAN and row.star else ""
    beside = (rf"{{\scriptsize$\pm$\,{std}}}" if std else "") + star
    return f"{value} & {beside}" if spreads else value + star


def _escape(text: str) -> str:
    """A name as LaTeX prints it: `[` and `*` at the start of a row would be arguments of the line's end before it."""
    signs = re.compile(r"[\\~^<>|\[*_%#&${}]")
    return signs.sub(lambda found: _LATEX_SIGNS.get(found[0], rf"\{found[0]}"), " ".join(text.split()))
