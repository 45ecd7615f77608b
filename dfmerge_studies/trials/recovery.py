"""Trials of dead workers are found and put back in the queue.

A worker can die at any moment.  Until its trial's result is in the outbox (see `outbox.py`), the coefficients are put
back in the queue; from then on, the result itself is applied at the next start.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from dfmerge_studies.storage import id_of, stale_ids
from dfmerge_studies.trials.marks import BEAT, DRAWN, ERROR, OWNER, PLACE
from dfmerge_studies.trials.owner import is_dead
from dfmerge_studies.trials.queue import retry_vacated
from dfmerge_studies.trials.reading import MAX_RETRIES, crashes_of
from dfmerge_studies.trials.results import OnEvent, fail, ignore

GRACE_SECONDS = 180.0


def recover(study: optuna.Study, *, on_event: OnEvent = ignore) -> int:
    """Fail the running trials whose worker is gone, and put their coefficients back in the queue.

    A worker of this machine is looked up among its processes; of others, the heartbeat tells.

    Args:
        study: the study to look after.
        on_event: told of every trial that was put back.

    Returns:
        The number of trials put back.
    """
    return mend(study, study.get_trials(deepcopy=False), on_event)[0]


def mend(
    study: optuna.Study, trials: Sequence[FrozenTrial], on_event: OnEvent = ignore
) -> tuple[int, Sequence[FrozenTrial]]:
    """The same for who has read the trials just now.

    Args:
        study: the study to look after.
        trials: all of its trials.
        on_event: told of every trial that was put back.

    Returns:
        The number of trials put back, and all trials as they are then.
    """
    stale = stale_trials(study, trials)
    for trial in stale:
        marks: dict[str, Any] = {}
        if crashes_of(trial) > MAX_RETRIES:
            marks[ERROR] = f"its process died {crashes_of(trial)} times on these coefficients"
        fail(study, id_of(trial), marks)
    return retry_vacated(study, study.get_trials(deepcopy=False) if stale else trials, on_event)


def stale_trials(study: optuna.Study, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """List the running trials whose worker is gone.

    Args:
        study: their study.
        trials: all of its trials, as read just now.
    """
    running = [trial for trial in trials if trial.state == TrialState.RUNNING]
    silent = stale_ids(study) if running else set()
    return [trial for trial in running if id_of(trial) in silent or _is_stale(trial)]


def _is_stale(trial: FrozenTrial) -> bool:
    owner = trial.user_attrs.get(OWNER)
    verdict = is_dead(owner) if owner is not None else None
    if verdict is not None:
        return verdict
    beat = trial.user_attrs.get(BEAT)
    if beat is not None:  # a storage without heartbeats of its own
        return time.time() - float(beat) > GRACE_SECONDS
    # The first heartbeat is recorded before the trial is marked as drawn, so one that is not drawn may have none.
    begun = trial.datetime_start
    early = PLACE in trial.user_attrs and DRAWN not in trial.user_attrs
    return early and begun is not None and (datetime.now() - begun).total_seconds() > GRACE_SECONDS
