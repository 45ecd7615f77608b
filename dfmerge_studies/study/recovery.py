"""Nothing lost, nothing repeated: trials of dead workers, and telling results to a storage that may be away.

A worker can die at any moment.  Until its trial's result is in the outbox (see `outbox.py`), the coefficients are put
back in the queue; from then on, the result itself is applied at the next start.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from dfmerge_studies.errors import RunError
from dfmerge_studies.search import DROPPED, PLACE, RETRY_OF, place_of
from dfmerge_studies.storage import STORAGE_FAILURES, is_damaged
from dfmerge_studies.study import attributes as at
from dfmerge_studies.study.owner import is_dead

GRACE_SECONDS = 180.0
_TELL_DELAYS = (0.2, 0.5, 1.0, 2.0, 4.0)


EventKind = Literal["started", "completed", "failed", "interrupted", "recovered", "applied", "superseded"]


@dataclass(frozen=True)
class Event:
    """Something that happened to a trial, for whoever draws progress.

    Attributes:
        kind: what happened; "recovered" is a dead worker's trial put back in the queue, "applied" a result from the
            outbox told to the study, "superseded" a result that came after the trial had been given to another.
        number: Optuna's number of the trial.
        place: the trial's place.
        coefficients: by name, as far as they are known.
        values: the objectives, when there are any.
        message: why, when it failed.
    """

    kind: EventKind
    number: int
    place: int
    coefficients: Mapping[str, float] = field(default_factory=dict)
    values: tuple[float, ...] | None = None
    message: str | None = None


OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Do nothing with an event.

    Args:
        event: what happened.
    """


class Superseded(Exception):
    """The trial has ended meanwhile, by another worker's hand: its result is not needed."""


def fail(study: optuna.Study, trial_id: int, marks: Mapping[str, Any]) -> bool:
    """End a trial as FAIL, its marks written first; False if it had ended already.

    Args:
        study: the trial's study.
        trial_id: the storage's id of the trial.
        marks: attributes that say why.
    """
    try:
        at.mark(study, trial_id, marks)
        return at.storage_of(study).set_trial_state_values(trial_id, TrialState.FAIL)
    except UpdateFinishedTrialError:
        return False


def requeue(study: optuna.Study, on_event: OnEvent | None = None) -> int:
    """Put the coefficients of every vacated trial that is owed a retry back in the queue, and drop duplicates.

    Ending a trial and queueing its successor are two steps; because this looks at the study and not at who died, a
    process killed between them leaves nothing behind that the next call would miss.

    Args:
        study: the study to look after.
        on_event: told "recovered" of every trial put back; None tells nobody.

    Returns:
        The number of trials put back.
    """
    trials = study.get_trials(deepcopy=False)
    back = at.owed(trials)
    for trial in back:
        point = at.point_of(trial) or {}
        study.enqueue_trial(
            point,
            user_attrs={PLACE: place_of(trial), RETRY_OF: trial.number, at.CRASHES: at.crashes_of(trial)},
        )
        if on_event is not None:
            on_event(Event("recovered", trial.number, place_of(trial), point))
    for trial in at.duplicates(study.get_trials(deepcopy=False) if back else trials):
        fail(study, at.id_of(trial), {DROPPED: True})
    return len(back)


def recover(study: optuna.Study, *, on_event: OnEvent = ignore) -> int:
    """Fail the running trials whose worker is gone, and put their coefficients back in the queue.

    A worker of this machine is looked up among its processes; of others, the heartbeat tells.

    Args:
        study: the study to look after.
        on_event: told of every trial that was put back.

    Returns:
        The number of trials put back.
    """
    for trial in orphans(study):
        marks: dict[str, Any] = {}
        if at.crashes_of(trial) > at.MAX_RETRIES:
            marks[at.ERROR] = f"its process died {at.crashes_of(trial)} times on these coefficients"
        fail(study, at.id_of(trial), marks)
    return requeue(study, on_event)


def orphans(study: optuna.Study) -> list[FrozenTrial]:
    """List the running trials whose worker is gone.

    Args:
        study: the study to look at.
    """
    silent = at.silent_ids(study)
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return [trial for trial in running if at.id_of(trial) in silent or _is_orphan(trial)]


def retry_failures(study: optuna.Study) -> int:
    """Put failed coefficients back in the queue, to be tried as if for the first time.

    Args:
        study: the study to look after.

    Returns:
        The number of trials put back.
    """
    back = [trial for trial in at.failures(study.get_trials(deepcopy=False)) if at.point_of(trial) is not None]
    for trial in back:
        study.enqueue_trial(
            at.point_of(trial) or {}, user_attrs={PLACE: place_of(trial), RETRY_OF: trial.number, at.CRASHES: 0}
        )
    return len(back)


def _is_orphan(trial: FrozenTrial) -> bool:
    owner = trial.user_attrs.get(at.OWNER)
    verdict = is_dead(owner) if owner is not None else None
    if verdict is not None:
        return verdict
    beat = trial.user_attrs.get(at.BEAT)
    if beat is not None:  # a storage without heartbeats of its own
        return time.time() - float(beat) > GRACE_SECONDS
    # The first heartbeat is recorded before the trial is marked as drawn, so one that is not drawn may have none.
    begun = trial.datetime_start
    early = PLACE in trial.user_attrs and at.DRAWN not in trial.user_attrs
    return early and begun is not None and (datetime.now() - begun).total_seconds() > GRACE_SECONDS


@dataclass(frozen=True)
class TrialResult:
    """What evaluating one point gave.

    Attributes:
        values: the objectives, in the order of the study's directions.
        attributes: what else to store on the trial; JSON values, no key of `attributes.RESERVED`.
        constraints: each at most 0 where it holds; every trial of a study has the same number of them.
    """

    values: tuple[float, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    constraints: tuple[float, ...] = ()


def tell(study: optuna.Study, trial_id: int, result: TrialResult) -> None:
    """Store a result on a running trial and complete it; try again for some seconds if the storage fails.

    Args:
        study: the trial's study, on a storage that takes results.
        trial_id: the storage's id of the trial.
        result: what to store; constraints that are stored already are left alone.

    Raises:
        Superseded: the trial has ended meanwhile.
        storage.STORAGE_FAILURES: the storage failed at every try.
    """
    storage = at.storage_of(study)
    for delay in (*_TELL_DELAYS, None):
        try:
            at.mark(study, trial_id, result.attributes)
            live = optuna.Trial(study, trial_id)
            stored = live.constraints
            for index, value in enumerate(result.constraints):
                # Zero-padded, so that the order of names is the order of constraints in every storage.
                if f"{index:03d}" not in stored:
                    live.set_constraint(f"{index:03d}", value)
            storage.set_trial_state_values(trial_id, TrialState.COMPLETE, result.values)
            return
        except UpdateFinishedTrialError:
            # Either another worker ended it, or an earlier try got through although its answer did not come back.
            if storage.get_trial(trial_id).state == TrialState.COMPLETE:
                return
            raise Superseded from None
        except STORAGE_FAILURES as error:
            if delay is None or is_damaged(error):
                raise
            time.sleep(delay)


def refuse_reserved(result: TrialResult) -> None:
    """Check that a result's attributes can be stored.

    Args:
        result: what evaluating gave.

    Raises:
        RunError: one has a reserved name.
    """
    clash = sorted(at.RESERVED & set(result.attributes))
    if clash:
        raise RunError(f"the trial's attributes use the reserved names {clash}")
