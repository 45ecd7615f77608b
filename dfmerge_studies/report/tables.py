"""A study's state, and the studies of a storage, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta
from typing import Any

from rich import box
from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text

from dfmerge_studies.methods import STRENGTH, label, method_named
from dfmerge_studies.report.expectations import descent_text, gain_text
from dfmerge_studies.report.races import races_text
from dfmerge_studies.study.warm_start import origin_text
from dfmerge_studies.tasks.metrics import Metrics


def coefficients_text(coefficients: Mapping[str, float]) -> str:
    """Coefficients on one line, such as `a=0.41 b=0.9`.

    Args:
        coefficients: by name; shown with three significant digits.
    """
    return " ".join(f"{name}={value:.3g}" for name, value in coefficients.items())


def sentence(text: str) -> str:
    """Words without an end as a sentence of running text."""
    return f"{text[0].upper()}{text[1:]}."


def selection_text(selection: Mapping[str, Any], metrics: Metrics) -> str:
    """How a winner was named, in one sentence without a full stop.

    Args:
        selection: of `best` in a summary.
        metrics: what the scores are.
    """
    tied, scored = len(selection["tied"]), list(selection["scored"])
    if not scored:
        if tied == 1:
            return "no other trial is within the noise of these rows"
        return f"{tied - 1} other{'s' * (tied > 2)} cannot be told from it on these rows"
    value = metrics.value_text([selection["value"]])
    rows, new = _rows_text(selection["rows"]), _rows_text(selection["further_rows"])
    return (
        f"{value} on {rows} ({new} new to the search), the best there of trials {', '.join(scored)}; {tied} trials "
        "cannot be told apart on the search's rows"
    )


def _rows_text(rows: Mapping[str, int]) -> str:
    """Numbers of rows by task: `160 rows a task`, or `160 rows of a and 120 rows of b`."""
    if len(set(rows.values())) == 1:
        return f"{next(iter(rows.values()))} rows a task"
    return " and ".join(f"{count} rows of {task}" for task, count in rows.items())


def method_parameters(method: str, described: Mapping[str, Any]) -> dict[str, float]:
    """The method's own parameters out of what a summary says of a trial."""
    return {
        each.name: described[each.name]
        for each in (*method_named(method).parameters, STRENGTH)
        if each.name in described
    }


_STARTUPS = {"uniform": "uniform draws, then ", "descent": "steps down the loss, then "}
_SAMPLERS = {
    "auto": "one Gaussian process per task in a trust region",
    "gp": "Optuna's Gaussian process of the objective",
    "random": "uniform draws",
    "gradient": "steps down the loss",
}


def search_text(search: Mapping[str, Any]) -> str:
    """How trials are proposed, in a few words.

    Args:
        search: from `Plan.search`.
    """
    sampler, acquisition = search["sampler"], search["acquisition"]
    how = _STARTUPS.get(search["startup"], "") + ", ".join(filter(None, (_SAMPLERS.get(sampler), acquisition)))
    return f"{sampler} ({how})" if how else sampler


def bounds_text(allowed: Mapping[str, float], guards: Collection[str]) -> str:
    """What tasks may lose, in a few words: `5 points of its own expert, the guard wiki within 2 points of the base`.

    Args:
        allowed: points, of the tasks that have a bound.
        guards: those that are compared with the base.
    """
    of_experts = {task: points for task, points in allowed.items() if task not in guards}
    shared = {f"{points:g} points of its own expert" for points in of_experts.values()}
    own = [f"{points:g} points of its own expert ({task})" for task, points in of_experts.items()]
    parts = sorted(shared) if len(shared) == 1 else own
    parts += [f"{allowed[task]:g} points of the base (guard {task})" for task in guards if task in allowed]
    return ", ".join(parts)


def progress_text(summary: Mapping[str, Any]) -> str:
    """How far a study is, and why it has stopped if it has.

    Args:
        summary: from `study_summary`.
    """
    trials, stopped = summary["trials"], summary["stopped"]
    if stopped is None:
        return f"{trials['complete']} of {trials['target']} trials complete{_pruned(trials)}"
    return f"{trials['complete']} trials complete{_pruned(trials)}, {stop_text(stopped)}"


def _pruned(trials: Mapping[str, int]) -> str:
    return f", {trials['pruned']} pruned" if trials["pruned"] else ""


def stop_text(stopped: Mapping[str, Any]) -> str:
    """Where and why a study has stopped before its total.

    Args:
        stopped: from `totals.stop_of`.
    """
    return f"stopped after {stopped['after']} of {stopped['of']}: {stopped['why']}"


def status_table(summary: Mapping[str, Any]) -> Table:
    """A study at a glance.

    Args:
        summary: from `study_summary`.
    """
    table = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    trials, best = summary["trials"], summary["best"]
    metrics = Metrics.named(summary["task_metrics"], summary["guards"])
    for line in verdict_lines(summary):
        table.add_row("verdict", Text(line))
    table.add_row("study", f"{summary['study']} ({summary['method']})")
    others = ", ".join(f"{trials[k]} {k}" for k in ("running", "waiting", "failed", "pruned") if trials[k])
    table.add_row("trials", f"{trials['complete']} of {trials['target']} complete{', ' + others if others else ''}")
    if summary["stopped"] is not None:
        table.add_row("", stop_text(summary["stopped"]))
    if summary["racing"] is not None:
        table.add_row("racing", races_text(summary["racing"]))
    if summary["search"] is not None:
        table.add_row("search", search_text(summary["search"]))
    if summary["warm_start"] is not None:
        table.add_row("first tried", Text(origin_text(summary["warm_start"])))
    for worker in summary["workers_alive"]:
        now = f"at trial {worker['current']}" if worker["current"] is not None else "between trials"
        text = f"process {worker['pid']} on {worker['host']} since {worker['since'].replace('T', ' ')}"
        table.add_row("worker", Text(f"{text}: {worker['trials']} done, {now}"))
    if summary["trials_per_hour"]["overall"] is not None:
        table.add_row("speed", pace_text(summary))
    if best is not None:
        table.add_row("best", f"trial {best['number']}: {metrics.value_text([best['value']])} ({summary['metric']})")
        if best["selection"] is not None:
            table.add_row("named", selection_text(best["selection"], metrics))
        means = "mean " * ("groups" in best)
        table.add_row(f"{means}coefficients", coefficients_text(best["coefficients"]))
        for expert, groups in best.get("groups", {}).items():
            table.add_row(Text(f"  {expert}"), coefficients_text(groups))
        for name, value in method_parameters(summary["method"], best).items():
            table.add_row(label(name), f"{value:g}")
        table.add_row(
            "tasks", "  ".join(f"{task} {metrics[task].shown(score)}" for task, score in best["tasks"].items())
        )
        if "drops" in best:
            within = f"  ({'within' if best['feasible'] else 'NOT within'} max_drop)"
            for name, tasks in (("drop vs expert", metrics.aims), ("drop vs base", metrics.guards)):
                drops = [f"{task} {drop:+.1f}" for task, drop in best["drops"].items() if task in tasks]
                if drops:
                    table.add_row(name, f"{'  '.join(drops)}{within}")
    if (gain := _gain_to_come(summary, metrics)) is not None:
        table.add_row("gain to come", gain)
    if summary["descent"] is not None:
        table.add_row("loss", descent_text(summary["descent"]))
    if summary["seconds_per_trial"]:
        phases = "  ".join(f"{phase} {seconds:.2f}" for phase, seconds in summary["seconds_per_trial"].items())
        table.add_row("seconds per trial", phases)
        table.add_row(
            "Fishers", f"{summary['fishers']['computed']} computed, {summary['fishers']['cached']} from the cache"
        )
    table.add_row("storage", summary["storage"])
    return table


def _gain_to_come(summary: Mapping[str, Any], metrics: Metrics) -> str | None:
    """How much improvement is still expected; None where the search expects nothing in one value."""
    if summary["expected_gain"] is not None:
        return gain_text(summary["expected_gain"], metrics)
    search, best, complete = summary["search"], summary["best"], summary["trials"]["complete"]
    if search is None or search["sampler"] not in ("auto", "gp") or best is None or "values" in best:
        return None
    startup = search["startup_trials"]
    return f"known once a trial is proposed, after {startup} trials" if complete < startup else None


def verdict_lines(summary: Mapping[str, Any]) -> list[str]:
    """What a study has come to, a line each; nothing before its first result.

    Args:
        summary: from `study_summary`.
    """
    verdict = summary["verdict"]
    return [] if verdict is None else [verdict["text"], *verdict["notes"]]


def pace_text(summary: Mapping[str, Any]) -> str:
    """Speed and time left in a few words.

    Args:
        summary: from `study_summary`, of a study with a completed trial.
    """
    rates, left = summary["trials_per_hour"], summary["seconds_left"]
    text = f"{_rate_text(rates['recent'])} trials per hour, {_rate_text(rates['overall'])} overall"
    return f"{text}, about {timedelta(seconds=round(left))} left" if left else text


def _rate_text(rate: float) -> str:
    """Three significant digits, and all that stand before the point."""
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"


def status_line(summary: Mapping[str, Any]) -> str:
    """A study's state in one line.

    Args:
        summary: from `study_summary`.
    """
    trials, best = summary["trials"], summary["best"]
    parts = [f"{trials['complete']} of {trials['target']} complete"]
    parts += [f"{trials[state]} {state}" for state in ("running", "waiting", "failed", "pruned") if trials[state]]
    parts += [stop_text(summary["stopped"])] if summary["stopped"] is not None else []
    parts += [f"{len(summary['workers_alive'])} workers"] if summary["workers_alive"] else []
    if best is not None:
        metrics = Metrics.named(summary["task_metrics"], summary["guards"])
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
        justify: JustifyMethod = "right" if name in ("complete", "total", "best") else "left"
        table.add_column(name, justify=justify, overflow="fold")  # a name that does not fit is not cut
    for entry in entries:
        best, metrics = entry["best_value"], Metrics.named(entry["task_metrics"] or {}, entry["guards"] or {})
        table.add_row(
            Text(entry["study"]),
            "cannot be read" if "problem" in entry else entry["method"] or "-",
            "-" if entry["trials"]["complete"] is None else str(entry["trials"]["complete"]),
            str(entry["trials"]["target"] or "-"),
            "-" if best is None else metrics.value_text([best]),
            Text(entry["metric"] or "-"),
        )
    return table
