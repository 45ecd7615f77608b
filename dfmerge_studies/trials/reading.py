"""How to read a study's trials through what the loop writes on them (see `marks.py`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

import optuna
from optuna.trial import FrozenTrial, TrialState

from dfmerge_studies.storage import last_heartbeat
from dfmerge_studies.trials.marks import (
    BEAT,
    CRASHES,
    DISCARDED,
    DRAWN,
    ERROR,
    FIXED,
    INTERRUPTED,
    PLACE,
    RACED,
    RETRY_OF,
    place_of,
)

MAX_RETRIES = 3

WITH_RESULT = (TrialState.COMPLETE, TrialState.PRUNED)  # on all rows, or estimated on a part of them
_STARTED = (*WITH_RESULT, TrialState.RUNNING)


def point_of(trial: FrozenTrial) -> dict[str, float] | None:
    """Return the coefficients of a trial, or None while not all of them are stored."""
    if FIXED in trial.system_attrs:
        return dict(trial.system_attrs[FIXED])
    if trial.user_attrs.get(DRAWN) or trial.state == TrialState.COMPLETE:
        return dict(trial.params)
    return None


def crashes_of(trial: FrozenTrial) -> int:
    """Count the processes that have died on a vacated trial's coefficients, the trial's own included.

    Args:
        trial: a trial that is vacated, or about to be.
    """
    return int(trial.user_attrs.get(CRASHES, 0)) + (0 if INTERRUPTED in trial.user_attrs else 1)


def is_failure(trial: FrozenTrial) -> bool:
    """Tell whether a trial failed for good: it keeps its place and is not repeated."""
    if trial.state != TrialState.FAIL or DISCARDED in trial.user_attrs:
        return False
    return ERROR in trial.user_attrs or (PLACE in trial.user_attrs and crashes_of(trial) > MAX_RETRIES)


def is_vacated(trial: FrozenTrial) -> bool:
    """Tell whether a trial ended without a result and without a failure."""
    return trial.state == TrialState.FAIL and not is_failure(trial)


def duplicates(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """List the waiting trials whose given coefficients an earlier trial already holds.

    Several processes that start at once each enqueue the same points, and may each put the same dead trial back.

    Args:
        trials: trials of one study, in the order of their numbers.
    """
    seen: set[tuple[tuple[str, float], ...]] = set()
    found, trials = [], list(trials)
    repeated = _repeated(trials)
    for trial in trials:
        point = None if is_vacated(trial) or trial.number in repeated else point_of(trial)
        if point is None:
            continue
        key = tuple(sorted(point.items()))
        if trial.state == TrialState.WAITING and key in seen:
            found.append(trial)
        seen.add(key)
    return found


def holders(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """List the trials that hold a place: those with a result, a failure, or the prospect of either.

    Args:
        trials: all trials of a study, in the order of their numbers.
    """
    trials = list(trials)
    repeated = _repeated(trials)
    kept = [trial for trial in trials if not is_vacated(trial) and trial.number not in repeated]
    extra = {trial.number for trial in duplicates(kept)}
    return [trial for trial in kept if trial.number not in extra]


def failures(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """List the failures that nobody has put back in the queue."""
    trials = list(trials)
    repeated = _repeated(trials)
    return [trial for trial in trials if is_failure(trial) and trial.number not in repeated]


def _repeated(trials: Iterable[FrozenTrial]) -> set[int]:
    """Numbers of the trials that another one stands for now."""
    return {trial.user_attrs[RETRY_OF] for trial in trials if RETRY_OF in trial.user_attrs and not _dropped(trial)}


def _dropped(trial: FrozenTrial) -> bool:
    return DISCARDED in trial.user_attrs


def free_place(trials: Iterable[FrozenTrial]) -> int:
    """Return the smallest place that no trial holds.

    Args:
        trials: all trials of a study, in the order of their numbers.
    """
    taken = {place_of(trial) for trial in holders(trials)}
    return next(place for place in range(len(taken) + 1) if place not in taken)


def pending_retries(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """List the vacated trials whose coefficients must still be put back in the queue."""
    trials = list(trials)
    repeated = {trial.user_attrs[RETRY_OF] for trial in trials if RETRY_OF in trial.user_attrs}
    return [
        trial
        for trial in trials
        if is_vacated(trial)
        and PLACE in trial.user_attrs
        and DISCARDED not in trial.user_attrs
        and trial.number not in repeated
        and point_of(trial) is not None
    ]


def started(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """List the trials that count towards a study's total: those with a result, and those running."""
    return [trial for trial in trials if trial.state in _STARTED]


def counts(study: optuna.Study) -> dict[str, int]:
    """Count a study's trials; those merely put back in the queue, or given back, are not failures."""
    return counts_of(study.get_trials(deepcopy=False))


def counts_of(trials: Sequence[FrozenTrial]) -> dict[str, int]:
    """Count trials, as `counts` does.

    Args:
        trials: all trials of a study, in the order of their numbers.
    """
    kept = holders(trials)

    def count(state: TrialState) -> int:
        return sum(trial.state == state for trial in kept)

    return {
        "complete": count(TrialState.COMPLETE),
        "running": count(TrialState.RUNNING),
        "waiting": count(TrialState.WAITING) + len(pending_retries(trials)),
        "failed": count(TrialState.FAIL),
        "pruned": count(TrialState.PRUNED),
    }


def ended(counted: Mapping[str, int]) -> int:
    """How many trials count as done towards a study's total: those with a result on all rows, and pruned ones.

    Args:
        counted: from `counts`.
    """
    return counted["complete"] + counted["pruned"]


def results(study: optuna.Study) -> list[FrozenTrial]:
    """List the completed trials in the order of their places, which is that of an uninterrupted run."""
    return results_of(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))


def results_of(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Pick the completed trials, in the order of their places."""
    return sorted((trial for trial in trials if trial.state == TrialState.COMPLETE), key=place_of)


def pruned_of(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Pick the trials that were stopped on a part of their rows, in the order of their places."""
    found = [trial for trial in trials if trial.state == TrialState.PRUNED and RACED in trial.user_attrs]
    return sorted(found, key=place_of)


def settled(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Pick the completed and pruned trials before the first place whose trial has not ended, in the order of places.

    Whatever ends later stands behind them: what follows from them, follows for good and for every worker.

    Args:
        trials: all trials of a study, in the order of their numbers.
    """
    found: list[FrozenTrial] = []
    for place, trial in enumerate(sorted(holders(trials), key=place_of)):
        if place_of(trial) > place or trial.state in (TrialState.RUNNING, TrialState.WAITING):
            break
        if trial.state in WITH_RESULT:
            found.append(trial)
    return found


def last_sign(study: optuna.Study, trial: FrozenTrial) -> datetime | None:
    """When a running trial last gave a sign of life, None if that is not known; in the local time of the storage."""
    if BEAT in trial.user_attrs:
        return datetime.fromtimestamp(float(trial.user_attrs[BEAT]))
    return last_heartbeat(study, trial) or trial.datetime_start


def violation(trial: FrozenTrial) -> float:
    """Points by which a trial misses its constraints, summed; 0 where it keeps them all."""
    return missed(trial.constraints.values())


def missed(constraints: Iterable[float]) -> float:
    """Points by which constraints, each at most 0 where it holds, are missed, summed."""
    return sum(max(0.0, value) for value in constraints)
