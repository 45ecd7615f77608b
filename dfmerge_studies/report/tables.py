"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from dfmerge_studies.tasks.metrics import MEAN, Metrics


@dataclass(frozen=True)
class Row:
    """One line of a comparison.

    Attributes:
        name: what was scored.
        scores: per split, per task; the experts' row has each task's own expert.
        compete: whether it may be the best of its column.
        detail: coefficients, or nothing.
        drop_rate: of `dare`.
    """

    name: str
    scores: Mapping[str, Mapping[str, float]]
    compete: bool = True
    detail: Mapping[str, float] = field(default_factory=dict)
    drop_rate: float | None = None


def comparison_table(rows: Sequence[Row], metrics: Metrics, split: str, *, title: str) -> Table:
    """Scores of one split, one row each, the best of every column bold.

    Args:
        rows: what to show.
        metrics: what the scores are; their tasks are the columns before the mean.
        split: whose scores.
        title: of the table.
    """
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    table.add_column("", no_wrap=True)
    columns = [*metrics, MEAN]
    for column in columns:
        table.add_column(column, justify="right", min_width=5)
    best: dict[str, float] = {}
    for row in rows:
        for column in columns:
            value = _value(row, metrics, split, column)
            if row.compete and value is not None:
                worth = metrics.of(column).worth(value)
                best[column] = max(worth, best.get(column, worth))
    for row in rows:
        cells = []
        for column in columns:
            value, metric = _value(row, metrics, split, column), metrics.of(column)
            wins = row.compete and value is not None and metric.worth(value) == best[column]
            cells.append(Text("-" if value is None else metric.shown(value), style="bold" if wins else ""))
        table.add_row(Text(row.name, style="" if row.compete else "dim"), *cells)
    return table


def rows_as_json(rows: Sequence[Row], metrics: Mapping[str, Metrics]) -> list[dict[str, Any]]:
    """The same rows for `--json`.

    Args:
        rows: what to show; scores are never in percent, a row without coefficients has null for them.
        metrics: what the scores are, by split.
    """
    return [
        {
            "name": row.name,
            "coefficients": dict(row.detail) or None,
            **({"drop_rate": row.drop_rate} if row.drop_rate is not None else {}),
            **{
                split: {"tasks": dict(scores), "mean": metrics[split].mean_of(scores)}
                for split, scores in row.scores.items()
            },
        }
        for row in rows
    ]


def coefficients_text(coefficients: Mapping[str, float]) -> str:
    """Coefficients on one line, such as `a=0.41 b=0.9`.

    Args:
        coefficients: by name; shown with three significant digits.
    """
    return " ".join(f"{name}={value:.3g}" for name, value in coefficients.items())


def status_table(summary: Mapping[str, Any]) -> Table:
    """A study at a glance.

    Args:
        summary: from `study_summary`.
    """
    table = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    trials, best = summary["trials"], summary["best"]
    metrics = Metrics.named(summary["task_metrics"])
    table.add_row("study", f"{summary['study']} ({summary['method']})")
    others = ", ".join(f"{trials[k]} {k}" for k in ("running", "waiting", "failed", "pruned") if trials[k])
    table.add_row("trials", f"{trials['complete']} of {trials['target']} complete{', ' + others if others else ''}")
    for worker in summary["workers_alive"]:
        now = f"at trial {worker['current']}" if worker["current"] is not None else "between trials"
        text = f"process {worker['pid']} on {worker['host']} since {worker['since'].replace('T', ' ')}"
        table.add_row("worker", Text(f"{text}: {worker['trials']} done, {now}"))
    if summary["trials_per_hour"]["overall"] is not None:
        table.add_row("speed", pace_text(summary))
    if best is not None:
        table.add_row("best", f"trial {best['number']}: {metrics.value_text([best['value']])} ({summary['metric']})")
        table.add_row("coefficients", coefficients_text(best["coefficients"]))
        if "drop_rate" in best:
            table.add_row("drop rate", f"{best['drop_rate']:g}")
        table.add_row(
            "tasks", "  ".join(f"{task} {metrics[task].shown(score)}" for task, score in best["tasks"].items())
        )
        if "drops" in best:
            text = "  ".join(f"{task} {drop:+.1f}" for task, drop in best["drops"].items())
            table.add_row("drop vs expert", f"{text}  ({'within' if best['feasible'] else 'NOT within'} max_drop)")
    if summary["seconds_per_trial"]:
        phases = "  ".join(f"{phase} {seconds:.2f}" for phase, seconds in summary["seconds_per_trial"].items())
        table.add_row("seconds per trial", phases)
        table.add_row(
            "Fishers", f"{summary['fishers']['computed']} computed, {summary['fishers']['cached']} from the cache"
        )
    table.add_row("storage", summary["storage"])
    return table


def pace_text(summary: Mapping[str, Any]) -> str:
    """Speed and time left in a few words.

    Args:
        summary: from `study_summary`, of a study with a completed trial.
    """
    rates, left = summary["trials_per_hour"], summary["seconds_left"]
    text = f"{rates['recent']:.3g} trials per hour, {rates['overall']:.3g} overall"
    return f"{text}, about {timedelta(seconds=round(left))} left" if left else text


def status_line(summary: Mapping[str, Any]) -> str:
    """A study's state in one line.

    Args:
        summary: from `study_summary`.
    """
    trials, best = summary["trials"], summary["best"]
    parts = [f"{trials['complete']} of {trials['target']} complete"]
    parts += [f"{trials[state]} {state}" for state in ("running", "waiting", "failed") if trials[state]]
    parts += [f"{len(summary['workers_alive'])} workers"] if summary["workers_alive"] else []
    if best is not None:
        metrics = Metrics.named(summary["task_metrics"])
        parts.append(f"best {metrics.value_text([best['value']])} {summary['metric']} (trial {best['number']})")
    parts += [pace_text(summary)] if summary["trials_per_hour"]["overall"] is not None else []
    return f"{summary['study']}: {', '.join(parts)}"


def studies_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    """All studies of a storage.

    Args:
        entries: from `storage_summary`.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("study", "method", "complete", "total", "best", "metric"):
        table.add_column(name, justify="right" if name in ("complete", "total", "best") else "left")
    for entry in entries:
        best, metrics = entry["best_value"], Metrics.named(entry["task_metrics"] or {})
        table.add_row(
            Text(entry["study"]),
            entry["method"] or "-",
            str(entry["trials"]["complete"]),
            str(entry["trials"]["target"] or "-"),
            "-" if best is None else metrics.value_text([best]),
            Text(entry["metric"] or "-"),
        )
    return table


def _value(row: Row, metrics: Metrics, split: str, column: str) -> float | None:
    scores = row.scores.get(split, {})
    return (metrics.mean_of(scores) if scores else None) if column == MEAN else scores.get(column)
