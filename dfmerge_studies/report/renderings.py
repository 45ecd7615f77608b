"""A comparison's table as text for the terminal, JSON, CSV and LaTeX, and as a section of a page."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from dfmerge_studies.report import sections
from dfmerge_studies.report.comparison import OURS, SIGNIFICANT, Cell, Standing, Standings
from dfmerge_studies.study.comparison import Comparison
from dfmerge_studies.tasks.metrics import MEAN

_STYLES = {1: "bold", 2: "underline"}
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
CSV_COLUMNS = (
    "split", "method", "merged", "task", "mean", "std", "seeds", "rank", "p", "star",
    "drop_points", "drop_task", "trials", "seconds", "fishers_computed", "fishers_cached", "error", "metric",
)  # fmt: skip


def standings_table(found: Standings, labels: Mapping[str, str], *, title: str) -> Table:
    """Scores for the terminal: the best of every column bold, the second underlined.

    The spread over seeds stands at the mean only, so that many tasks fit; the other forms have it for every task.

    Args:
        found: the numbers.
        labels: what to call a row instead of by its method's name.
        title: of the table.
    """
    spreads, starred = len(found.seeds) > 1, any(row.star for row in found.rows)
    columns = ["", *found.tasks, MEAN, *([""] if spreads else []), "largest drop", "trials", "seconds"]
    lines = []
    for row in found.rows:
        cells = [Text(_label(row, labels, len(found.seeds)), style="" if row.compete else "dim")]
        for column in (*found.tasks, MEAN):
            mean, std = _numbers(found, row, column) or ("-", "")
            cells.append(Text(mean, style=_STYLES.get(found.ranks[column].get(row.method, 0), "")))
        if spreads:
            cells.append(Text(f"± {std}" if std else "").append("*" if row.star else " " if starred else ""))
        drop = "-" if row.drop is None else f"{row.drop[1]:+.1f} {row.drop[0]}"
        drop = "failed" if row.errors and not row.cells else drop
        lines.append([*cells, Text(drop), Text(_trials(row)), Text(_seconds(row))])
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    for number, name in enumerate(columns):
        # Names fold where the terminal is narrow; numbers are never cut.
        width = max(len(name), *(len(line[number]) for line in lines)) if number else None
        table.add_column(name, justify="right" if number else "left", min_width=width, overflow="fold")
    for line in lines:
        table.add_row(*line)
    return table


def notes(found: Standings) -> list[str]:
    """What the table does not say by itself, one line each.

    Args:
        found: the numbers.
    """
    seeds = len(found.seeds)
    if seeds > 1:
        lines = [f"mean and standard deviation over {seeds} seeds, {found.seeds[0]} to {found.seeds[-1]}"]
    else:
        lines = [f"seed {found.seeds[0]} only: no spread and no test, which more --seeds give"]
    if any(row.p is not None for row in found.rows):
        test = f"paired one-sided t-test of the means over {seeds} seeds, p < {SIGNIFICANT}"
        starred = any(row.star for row in found.rows)
        lines.append(f"* {OURS} is better ({test})" if starred else f"{OURS} is better than no row ({test})")
    odd = any((metric.low, metric.high) != (0.0, 1.0) for metric in found.metrics.values())
    what = "points that the worst task loses against its own expert"
    lines.append(f"largest drop: {what}{', hundredths of the range of its metric' if odd else ''}")
    lines.append("trials and seconds: per seed; Fishers from the cache cost no time")
    return lines


def standings_json(found: Standings, comparison: Comparison) -> dict[str, Any]:
    """The table for `--json`; scores are never in percent.

    Args:
        found: the numbers.
        comparison: what they were made from.
    """
    return {
        "study": found.study,
        "split": found.split,
        "metric": found.metrics.text,
        "task_metrics": found.metrics.names,
        "seeds": list(found.seeds),
        "storage": comparison.storage,
        "interrupted": comparison.interrupted,
        "rows": [_row_json(found, row) for row in found.rows],
    }


def standings_csv(found: Standings) -> str:
    """One line per row and task, and one per row for the mean; scores are never in percent, in full precision.

    Args:
        found: the numbers.
    """
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in found.rows:
        for task in (*found.tasks, MEAN):
            cell = row.cells.get(task)
            writer.writerow(
                {
                    "split": found.split,
                    "method": row.method,
                    "merged": int(row.compete),
                    "task": task,
                    "mean": cell.mean if cell else None,
                    "std": cell.std if cell else None,
                    "seeds": _seeds(row),
                    "rank": found.ranks[task].get(row.method),
                    "p": row.p,
                    "star": int(row.star),
                    "drop_points": row.drop[1] if row.drop else None,
                    "drop_task": row.drop[0] if row.drop else None,
                    "trials": fmean(entry.trials for entry in row.entries) if row.entries else None,
                    "seconds": fmean(entry.seconds for entry in row.entries) if row.entries else None,
                    **{f"fishers_{kind}": count for kind, count in _fishers(row).items() if row.entries},
                    "error": " | ".join(row.errors),
                    "metric": found.metrics.of(task).name,
                }
            )
    return out.getvalue()


def standings_latex(found: Standings, labels: Mapping[str, str]) -> str:
    r"""A tabular for a paper: `\textbf` the best, `\underline` the second, a star as in the terminal's table.

    With several seeds, a score is two columns, so that the means stand under each other whatever their spread.

    Args:
        found: the numbers.
        labels: what to call a row instead of by its method's name.
    """
    spreads = len(found.seeds) > 1
    scores = (*found.tasks, MEAN)
    heads = [rf"\multicolumn{{2}}{{c}}{{{_escape(name)}}}" if spreads else _escape(name) for name in scores]
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
        cells = [_escape(_label(row, labels, len(found.seeds)))]
        cells += [_latex_score(found, row, column, spreads=spreads) for column in scores]
        cells.append("-- & " if row.drop is None else f"${row.drop[1]:+.1f}$ & {_escape(row.drop[0])}")
        cells.append(_trials(row).replace("-", "--"))
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def standings_section(found: Standings) -> sections.Section:
    """The table for the page of a study, with the spread of every cell.

    Args:
        found: the numbers.
    """
    rows = []
    for row in found.rows:
        cells = [sections.Cell(_label(row, {}, len(found.seeds)))]
        for column in (*found.tasks, MEAN):
            mean, std = _numbers(found, row, column) or ("-", "")
            rank = found.ranks[column].get(row.method)
            text = f"{mean} ± {std}" if std else mean
            star = "*" if column == MEAN and row.star else ""
            cells.append(sections.Cell(text + star, bold=rank == 1, underline=rank == 2))
        drop = "-" if row.drop is None else f"{row.drop[1]:+.1f} {row.drop[0]}"
        rows.append(
            sections.TableRow(
                [*cells, *map(sections.Cell, (drop, _trials(row), _seconds(row)))], reference=not row.compete
            )
        )
    return sections.Section(
        f"Methods over seeds: {found.split} {found.metrics.heading}",
        ["", *found.tasks, MEAN, "largest drop", "trials", "seconds"],
        rows,
        text=" ".join(f"{note[0].upper()}{note[1:]}." for note in notes(found)),
        numbers=True,
    )


def _row_json(found: Standings, row: Standing) -> dict[str, Any]:
    mean = row.cells.get(MEAN)
    return {
        "method": row.method,
        "merged": row.compete,
        "seeds": _seeds(row),
        "tasks": {task: _cell_json(row.cells[task]) for task in found.tasks if task in row.cells},
        "mean": mean.mean if mean else None,
        "std": mean.std if mean else None,
        "ranks": {column: ranks[row.method] for column, ranks in found.ranks.items() if row.method in ranks},
        "p": row.p,
        "star": row.star,
        "drop": {"task": row.drop[0], "points": row.drop[1]} if row.drop else None,
        "trials": fmean(entry.trials for entry in row.entries) if row.entries else None,
        "seconds": fmean(entry.seconds for entry in row.entries) if row.entries else None,
        "fishers": _fishers(row) if row.entries else None,
        "studies": [
            {
                "study": entry.study,
                "seed": entry.seed,
                "trial": entry.trial,
                "coefficients": dict(entry.coefficients),
                "tasks": dict(entry.scores[found.split]),
            }
            for entry in row.entries
        ],
        "errors": list(row.errors),
    }


def _cell_json(cell: Cell) -> dict[str, float | None]:
    return {"mean": cell.mean, "std": cell.std}


def _seeds(row: Standing) -> int:
    """How many seeds the numbers rest on."""
    return len(row.entries) if row.compete else len(row.by_seed)


def _fishers(row: Standing) -> dict[str, int]:
    return {kind: sum(entry.fishers[kind] for entry in row.entries) for kind in ("computed", "cached")}


def _label(row: Standing, labels: Mapping[str, str], seeds: int) -> str:
    name = labels.get(row.method, row.method)
    return f"{name} ({len(row.entries)} of {seeds} seeds)" if 0 < len(row.entries) < seeds else name


def _numbers(found: Standings, row: Standing, column: str) -> tuple[str, str] | None:
    """Mean and standard deviation as text; no deviation for what no seed can change."""
    cell = row.cells.get(column)
    if cell is None:
        return None
    spread = cell.std is not None and (row.compete or cell.std > 0)
    metric = found.metrics.of(column)
    return metric.shown(cell.mean), metric.shown(cell.std or 0) if spread else ""


def _latex_score(found: Standings, row: Standing, column: str, *, spreads: bool) -> str:
    """The mean, and in a column of its own the spread with the star."""
    mean, std = _numbers(found, row, column) or ("", "")
    value = _LATEX.get(found.ranks[column].get(row.method, 0), "%s") % mean if mean else "--"
    star = "$^{*}$" if column == MEAN and row.star else ""
    beside = (rf"{{\scriptsize$\pm$\,{std}}}" if std else "") + star
    return f"{value} & {beside}" if spreads else value + star


def _trials(row: Standing) -> str:
    counts = sorted({entry.trials for entry in row.entries})
    return "-".join(str(count) for count in (counts[:1] + counts[1:][-1:])) or "-"


def _seconds(row: Standing) -> str:
    return f"{fmean(entry.seconds for entry in row.entries):.1f}" if row.entries else "-"


def _escape(text: str) -> str:
    """A name as LaTeX prints it: `[` and `*` at the start of a row would be arguments of the line's end before it."""
    signs = re.compile(r"[\\~^<>|\[*_%#&${}]")
    return signs.sub(lambda found: _LATEX_SIGNS.get(found[0], rf"\{found[0]}"), " ".join(text.split()))
