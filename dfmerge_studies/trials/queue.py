"""Points that wait for a worker: those that a study tries first, and those that are tried again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from dfmerge_studies.storage import id_of, storage_errors
from dfmerge_studies.trials.marks import CRASHES, DISCARDED, INTERRUPTED, PLACE, PROPOSAL, RETRY_OF, place_of
from dfmerge_studies.trials.reading import crashes_of, duplicates, failures, free_place, pending_retries, point_of
from dfmerge_studies.trials.results import Event, OnEvent, fail
from dfmerge_studies.trials.space import Space


def enqueue(study: optuna.Study, space: Space, points: Sequence[Mapping[str, float]]) -> int:
    """Queue known points, to be evaluated before the sampler's own; safe to repeat at every start.

    Args:
        study: the study.
        space: what it searches.
        points: coefficients by name.

    Returns:
        The number of points that the study did not have yet.

    Raises:
        InputError: a point lies outside the space; none has been queued then.
    """
    for point in points:
        space.check(point)
    added = 0
    with storage_errors():
        for point in points:
            wanted = {name: float(point[name]) for name in space.names}
            trials = study.get_trials(deepcopy=False)
            if any(DISCARDED not in trial.user_attrs and point_of(trial) == wanted for trial in trials):
                continue
            study.enqueue_trial(wanted, user_attrs={PLACE: free_place(trials)})
            added += 1
    return added


def retry_vacated(
    study: optuna.Study, trials: Sequence[FrozenTrial], on_event: OnEvent | None = None
) -> tuple[int, Sequence[FrozenTrial]]:
    """Put the coefficients of every vacated trial that is owed a retry back in the queue, and drop duplicates.

    Ending a trial and queueing its successor are two steps; because this looks at the study and not at who died, a
    process killed between them leaves nothing behind that the next call would miss.

    Args:
        study: the study to look after.
        trials: all of its trials, as read just now.
        on_event: told "recovered" of every trial put back; None tells nobody.

    Returns:
        The number of trials put back, and all trials as they are then.
    """
    back = pending_retries(trials)
    for trial in back:
        point = point_of(trial) or {}
        study.enqueue_trial(point, user_attrs=_again(trial, crashes_of(trial)))
        if on_event is not None:
            on_event(Event("recovered", trial.number, place_of(trial), point))
    trials = study.get_trials(deepcopy=False) if back else trials
    extra = duplicates(trials)
    for trial in extra:
        fail(study, id_of(trial), {DISCARDED: True})
    return len(back), study.get_trials(deepcopy=False) if extra else trials


def _again(trial: FrozenTrial, crashes: int) -> dict[str, Any]:
    """Attributes of the trial that repeats another one."""
    kept = {PROPOSAL: trial.user_attrs[PROPOSAL]} if PROPOSAL in trial.user_attrs else {}
    return {PLACE: place_of(trial), RETRY_OF: trial.number, CRASHES: crashes, **kept}


def put_back(study: optuna.Study, trial_id: int) -> None:
    """End a running trial that is not at fault, and put its coefficients back in the queue."""
    fail(study, trial_id, {INTERRUPTED: True})
    retry_vacated(study, study.get_trials(deepcopy=False))


def retry_failures(study: optuna.Study) -> int:
    """Put failed coefficients back in the queue, to be tried as if for the first time.

    Args:
        study: the study to look after.

    Returns:
        The number of trials put back.
    """
    back = [trial for trial in failures(study.get_trials(deepcopy=False)) if point_of(trial) is not None]
    for trial in back:
        study.enqueue_trial(point_of(trial) or {}, user_attrs=_again(trial, 0))
    return len(back)
