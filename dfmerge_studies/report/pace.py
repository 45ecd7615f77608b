"""Who works on a study, how fast it goes, and how long it will take; from its trials alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from dfmerge_studies.trials.marks import OWNER
from dfmerge_studies.trials.owner import is_dead
from dfmerge_studies.trials.reading import WITH_RESULT

_RECENT = 10  # ended trials that the recent rate is taken from; more where more workers than that are at work


def workers_alive(trials: Sequence[FrozenTrial], *, complete: bool) -> list[dict[str, Any]]:
    """The workers that run a trial, and those of this machine that live and are between two trials.

    Args:
        trials: all trials of a study, after `recover`.
        complete: whether the study has its total, so that nobody is between two trials.

    Returns:
        Of each its `host` and `pid`, `since` (when its process, or its first trial here, began), `trials` that it
        completed in this study, and the number of its `current` trial, null between two.
    """
    by_worker: dict[str, list[FrozenTrial]] = {}
    for trial in trials:
        owner = trial.user_attrs.get(OWNER)
        if owner is not None and trial.state in (TrialState.RUNNING, *WITH_RESULT):
            by_worker.setdefault(owner["worker"], []).append(trial)
    alive = []
    for own in by_worker.values():
        owner = own[-1].user_attrs[OWNER]
        running = [trial for trial in own if trial.state == TrialState.RUNNING]
        if not running and (complete or is_dead(owner) is not False):
            continue
        first = min(trial.datetime_start for trial in own if trial.datetime_start is not None)
        alive.append(
            {
                "host": str(owner["host"]),
                "pid": int(owner["pid"]),
                "since": owner.get("since") or first.isoformat(timespec="seconds"),
                "trials": len(own) - len(running),
                "current": running[0].number if running else None,
            }
        )
    return sorted(alive, key=lambda worker: (worker["host"], worker["pid"]))


def pace(trials: Sequence[FrozenTrial], *, target: int, workers: int) -> dict[str, Any]:
    """Trials per hour of the time in which any trial ran, and the time left at the recent rate.

    Pauses do not count: a study that lay still for a month is not slow.

    Args:
        trials: all trials of a study.
        target: the total that it should reach.
        workers: how many are alive; without one, no end is in sight.

    Returns:
        `trials_per_hour`, overall and `recent`, null before the first result; `seconds_left`, null where it cannot be
        told.
    """
    done = [t for t in trials if t.state in WITH_RESULT and t.datetime_start and t.datetime_complete]
    done.sort(key=lambda trial: trial.datetime_complete or datetime.min)
    recent = _per_hour(done[-max(_RECENT, 2 * workers) :])
    left: float | None = None
    if len(done) >= target:
        left = 0.0
    elif workers and recent:
        left = round((target - len(done)) / recent * 3600, 1)
    return {"trials_per_hour": {"overall": _per_hour(done), "recent": recent}, "seconds_left": left}


def _per_hour(done: Sequence[FrozenTrial]) -> float | None:
    seconds = _busy_seconds((t.datetime_start, t.datetime_complete) for t in done)
    return round(3600 * len(done) / seconds, 3) if seconds > 0 else None


def _busy_seconds(spans: Iterable[tuple[datetime | None, datetime | None]]) -> float:
    """Length of the union of some spans of time."""
    total, until = 0.0, datetime.min
    for begin, end in sorted((b, e) for b, e in spans if b is not None and e is not None):
        total += max(0.0, (end - max(begin, until)).total_seconds())
        until = max(until, end)
    return total
