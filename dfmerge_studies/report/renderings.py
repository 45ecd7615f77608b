"""Tables of scores as text for the terminal, JSON, CSV, sections of a page and Markdown; `latex.py` has LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from statistics import fmean
from types import MappingProxyType
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from dfmerge_studies.report import sections
from dfmerge_studies.report.standings import OURS, SIGNIFICANT, Cell, Standing, Standings
from dfmerge_studies.report.tables import sentence
from dfmerge_studies.study.comparison import Comparison
from dfmerge_studies.tasks.metrics import MEAN
from dfmerge_studies.tasks.splits import Split

_OF_STUDIES = ("largest drop", "trials", "seconds")  # columns that only rows of a comparison have
BROKEN = "!"  # behind a score that loses more against the base than a guard allows
_STYLES = {1: "bold", 2: "underline"}
CSV_COLUMNS = (
    "split", "method", "merged", "task", "mean", "std", "seeds", "rank", "p", "star",
    "drop_points", "drop_task", "trials", "seconds", "fishers_computed", "fishers_cached", "error", "metric",
    "rows", "standard_error", "guard_drop", "guard_allowed",
)  # fmt: skip


def standings_table(found: Standings, *, title: str, labels: Mapping[str, str] = MappingProxyType({})) -> Table:
    """Scores for the terminal: the best of every column bold, the second underlined, where the data tells them apart.

    Below them stand how many rows of data the scores rest on, and the standard errors of the last merge.

    The spread over seeds stands at the mean only, so that many tasks fit; the other forms have it for every task.

    Args:
        found: the numbers.
        title: of the table.
        labels: what to call a row instead of by its method's name.
    """
    spreads, starred = len(found.seeds) > 1, any(row.star for row in found.rows)
    columns = ["", *headings(found), *([""] if spreads else []), *(_OF_STUDIES if found.compared else [])]
    lines = []
    for row in found.rows:
        cells = [Text(label(row, labels, len(found.seeds)), style="" if row.compete else "dim")]
        for column in found.columns:
            mean, std = shown(found, row, column) or ("-", "")
            broken = mean.endswith(BROKEN)
            cells.append(Text(mean, style="red" if broken else _STYLES.get(found.marks[column].get(row.method, 0), "")))
        if spreads:
            cells.append(Text(f"± {std}" if std else "").append("*" if row.star else " " if starred else ""))
        lines.append([*cells, *(map(Text, _of_studies(row)) if found.compared else [])])
    for name, texts in footer(found, labels):
        blank = [""] * (len(columns) - 1 - len(found.columns))
        below = (name, *(texts.get(column, "") for column in found.columns), *blank)
        lines.append([Text(cell, style="dim") for cell in below])
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    for number, name in enumerate(columns):
        # Names fold where the terminal is narrow; numbers are never cut.
        width = max(len(name), *(len(line[number]) for line in lines)) if number else None
        table.add_column(name, justify="right" if number else "left", min_width=width, overflow="fold")
    for line in lines:
        table.add_row(*line)
    return table


def footer(found: Standings, labels: Mapping[str, str] = MappingProxyType({})) -> list[tuple[str, dict[str, str]]]:
    """Lines below a table: what guards allow, rows of data and standard errors, by column, as far as they are known.

    Args:
        found: the numbers.
        labels: what to call a row instead of by its method's name.
    """
    lines, rows, errors = [], found.rows_by_column, found.errors
    if bounds := found.bounds:
        signs = {task: ">=" if found.metrics[task].higher_is_better else "<=" for task in bounds}
        shown = {task: f"{signs[task]} {found.metrics[task].shown(bound)}" for task, bound in bounds.items()}
        lines.append(("guards allow", shown))
    if errors is not None:
        method, by_column = errors
        shown = {column: found.metrics.of(column).shown(error) for column, error in by_column.items()}
        last = found.rows[-1].method == method  # the line stands right below it
        lines.append((f"± standard error{'' if last else f' of {labels.get(method, method)}'}", shown))
    if rows:
        lines.append(("rows", {column: str(number) for column, number in rows.items()}))
    return lines


def notes(found: Standings) -> list[str]:
    """What the table does not say by itself, one line each."""
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
    if found.metrics.guards:
        names = ", ".join(found.metrics.guards)
        lines.append(f"guards ({names}): not in the mean; {BROKEN} loses more against the base than max_drop allows")
    lines.append("trials and seconds: per seed; Fishers from the cache cost no time")
    if found.errors is not None:
        lines.append("± standard error: over the rows of data, of all seeds together")
    if found.undecided:
        where = "" if len(found.undecided) == len(found.columns) else f" of {', '.join(found.undecided)}"
        lines.append(f"the rows{where} do not tell the best from all others: none is marked there")
    return lines


def standings_json(found: Standings, comparison: Comparison) -> dict[str, Any]:
    """The table for `--json`; scores are never in percent."""
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
    """One line per row and task, and one per row for the mean; scores are never in percent, in full precision."""
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in found.rows:
        for task in found.columns:
            cell, guard = row.cells.get(task), found.guards_of(row).get(task)
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
                    "rows": (cell.n or None) if cell else None,
                    "standard_error": cell.error if cell else None,
                    "guard_drop": guard.drop if guard else None,
                    "guard_allowed": guard.allowed if guard else None,
                }
            )
    return out.getvalue()


def standings_section(found: Standings, title: str) -> sections.Section:
    """The table for the page of a study, with the spread of every cell; of a comparison, with notes."""
    rows = []
    for row in found.rows:
        cells = [sections.PageCell(label(row, {}, len(found.seeds)))]
        for column in found.columns:
            mean, std = shown(found, row, column) or ("-", "")
            rank = found.marks[column].get(row.method)
            text = f"{mean} ± {std}" if std else mean
            star = "*" if column == MEAN and row.star else ""
            cells.append(sections.PageCell(text + star, bold=rank == 1, underline=rank == 2))
        cells += map(sections.PageCell, _of_studies(row) if found.compared else [])
        rows.append(sections.TableRow(cells, reference=not row.compete))
    for name, texts in footer(found):
        cells = [sections.PageCell(text) for text in (name, *(texts.get(column, "") for column in found.columns))]
        rows.append(sections.TableRow(cells, reference=True))
    return sections.Section(
        title,
        ["", *headings(found), *(_OF_STUDIES if found.compared else [])],
        rows,
        text=" ".join(map(sentence, notes(found))) if found.compared else "",
        numbers=True,
    )


def rows_json(tables: Mapping[Split, Standings]) -> list[dict[str, Any]]:
    """The rows of a study's tables for `--json`; scores are never in percent.

    Args:
        tables: by split, from `side_by_side`.
    """
    rows: dict[str, dict[str, Any]] = {}
    for split, table in tables.items():
        for row in table.rows:
            means = {column: cell.mean for column, cell in row.cells.items()}
            scores = {task: means[task] for task in table.tasks if task in means}
            entry = rows.setdefault(row.method, {"name": row.method, "coefficients": None, **row.detail})
            entry[split] = {
                "tasks": scores,
                "mean": means.get(MEAN),
                **_of_guards(table, row),
                **_of_rows(row, list(scores)),
            }
    return list(rows.values())


def _of_guards(table: Standings, row: Standing) -> dict[str, Any]:
    """How a row stands to the guards, where there are any."""
    found = table.guards_of(row)
    return {"guards": {task: each.described() for task, each in found.items()}} if found else {}


def headings(found: Standings) -> list[str]:
    """Heads of the columns with scores: the tasks, of which guards are called so, and their mean."""
    return [f"{column} (guard)" if column in found.metrics.guards else column for column in found.columns]


def _of_rows(row: Standing, tasks: list[str]) -> dict[str, Any]:
    """Numbers of data's rows and standard errors, where they are known."""
    if not all(row.cells[task].n for task in tasks):
        return {}
    return {
        "n": {task: row.cells[task].n for task in tasks},
        "standard_errors": {task: row.cells[task].error for task in tasks},
        "standard_error": row.cells[MEAN].error if MEAN in row.cells else None,
    }


def task_lines(tables: Mapping[Split, Standings]) -> list[str]:
    """Tables turned around for a card, as lines of Markdown: a line per task, a column per split and row."""
    columns = [
        (f"{table.split}: {row.method}", _scores_of(table, row)) for table in tables.values() for row in table.rows
    ]
    for table in tables.values():
        columns += [(f"{table.split}: {name}", texts) for name, texts in footer(table)]
    lines = [f"| task | {' | '.join(head for head, _ in columns)} |", "|---" * (1 + len(columns)) + "|"]
    first = next(iter(tables.values()))
    for task, name in zip(first.tasks, headings(first), strict=False):  # the mean has no line
        lines.append(f"| {name} | {' | '.join(texts.get(task, '-') for _, texts in columns)} |")
    return lines


def _scores_of(table: Standings, row: Standing) -> dict[str, str]:
    """A row's scores as text, by task."""
    return {task: found[0] for task in table.tasks if (found := shown(table, row, task)) is not None}


def beside_experts(found: Standings) -> list[list[str]]:
    """Cells of a line per task: the task, its metric, a merge, the task's own expert, how much higher the merge is.

    Args:
        found: the row of a merge and, where there are scores of them, that of the experts.
    """
    merged, *experts = found.rows
    lines = []
    for task, metric in found.metrics.items():
        own = experts[0].cells.get(task) if experts else None
        difference = "-" if own is None else metric.shown(merged.cells[task].mean - own.mean)
        lines.append(
            [
                task,
                f"{metric.name}, {metric.unit}" if metric.unit else metric.name,
                *(cell[0] if (cell := shown(found, row, task)) else "-" for row in found.rows),
                *(["-"] if not experts else []),
                difference if difference.startswith("-") else f"+{difference}",
            ]
        )
    return lines


def _row_json(found: Standings, row: Standing) -> dict[str, Any]:
    mean = row.cells.get(MEAN)
    return {
        "method": row.method,
        "merged": row.compete,
        "seeds": _seeds(row),
        "tasks": {task: _cell_json(row.cells[task]) for task in found.tasks if task in row.cells},
        "mean": mean.mean if mean else None,
        "std": mean.std if mean else None,
        "standard_error": mean.error if mean else None,
        "ranks": {column: ranks[row.method] for column, ranks in found.ranks.items() if row.method in ranks},
        "marks": {column: marks[row.method] for column, marks in found.marks.items() if row.method in marks},
        "p": row.p,
        "star": row.star,
        "drop": {"task": row.drop[0], "points": row.drop[1]} if row.drop else None,
        **_of_guards(found, row),
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
                "selection": entry.selection.described() if entry.selection is not None else None,
            }
            for entry in row.entries
        ],
        "errors": list(row.errors),
    }


def _cell_json(cell: Cell) -> dict[str, float | None]:
    return {"mean": cell.mean, "std": cell.std, "standard_error": cell.error, "n": cell.n or None}


def _seeds(row: Standing) -> int:
    """How many seeds the numbers rest on."""
    return len(row.entries) if row.compete else len(row.by_seed)


def _fishers(row: Standing) -> dict[str, int]:
    return {kind: sum(entry.fishers[kind] for entry in row.entries) for kind in ("computed", "cached")}


def label(row: Standing, labels: Mapping[str, str], seeds: int) -> str:
    """What to call a row, with the number of its seeds where some failed."""
    name = labels.get(row.method, row.method)
    return f"{name} ({len(row.entries)} of {seeds} seeds)" if 0 < len(row.entries) < seeds else name


def shown(found: Standings, row: Standing, column: str) -> tuple[str, str] | None:
    """Mean and standard deviation as text; no deviation for what no seed can change. A broken guard is marked.

    Args:
        found: the table.
        row: one of its rows.
        column: a task, or "mean".

    Returns:
        None where there is no score.
    """
    cell = row.cells.get(column)
    if cell is None:
        return None
    spread = cell.std is not None and (row.compete or cell.std > 0)
    metric, guard = found.metrics.of(column), found.guards_of(row).get(column)
    broken = BROKEN if guard is not None and not guard.kept else ""
    return metric.shown(cell.mean) + broken, metric.shown(cell.std or 0) if spread else ""


def trials_text(row: Standing) -> str:
    """How many trials each study had: one number, or the least and the most."""
    counts = sorted({entry.trials for entry in row.entries})
    return "-".join(str(count) for count in (counts[:1] + counts[1:][-1:])) or "-"


def _seconds(row: Standing) -> str:
    return f"{fmean(entry.seconds for entry in row.entries):.1f}" if row.entries else "-"


def _of_studies(row: Standing) -> list[str]:
    """Cells of `_OF_STUDIES`."""
    drop = "-" if row.drop is None else f"{row.drop[1]:+.1f} {row.drop[0]}"
    return ["failed" if row.errors and not row.cells else drop, trials_text(row), _seconds(row)]
