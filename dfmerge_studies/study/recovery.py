"""Nothing lost, nothing repeated: trials of dead workers, and results that did not reach the storage.

A worker can die at any moment.  Until its trial's result is in the outbox, the coefficients are put back in the queue;
from then on, the result itself is applied at the next start.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from dfmerge_studies.errors import RunError
from dfmerge_studies.search import DROPPED, PLACE, RETRY_OF, place_of
from dfmerge_studies.storage import is_damaged
from dfmerge_studies.study import attributes as at
from dfmerge_studies.study.owner import is_dead

GRACE_SECONDS = 180.0
STORAGE_FAILURES = (SQLAlchemyError, StorageInternalError, OSError)
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
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if _is_orphan(study, trial):
            marks: dict[str, Any] = {}
            if at.crashes_of(trial) > at.MAX_RETRIES:
                marks[at.ERROR] = f"its process died {at.crashes_of(trial)} times on these coefficients"
            fail(study, at.id_of(trial), marks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)
    return requeue(study, on_event)


def _is_orphan(study: optuna.Study, trial: FrozenTrial) -> bool:
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
        SQLAlchemyError, StorageInternalError, OSError: the storage failed at every try.
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


class Outbox:
    """A folder that keeps results from the moment they exist until the storage has them.

    Args:
        folder: created when the first result is written; None keeps nothing.
        study: whose results; several studies may share the folder.
    """

    def __init__(self, folder: Path | None, study: optuna.Study) -> None:
        self._folder = folder
        self._study = study
        self._prefix = hashlib.sha256(study.study_name.encode()).hexdigest()[:16]

    def write(self, number: int, owner: Mapping[str, Any], result: TrialResult) -> Path | None:
        """Keep a result.

        Args:
            number: Optuna's number of the trial.
            owner: the process that ran it, as stored on the trial; its "worker" is part of the file's name.
            result: what evaluating gave.

        Returns:
            Its file; None without a folder, or if it cannot be written (the storage may still take the result).
        """
        if self._folder is None:
            return None
        record = {
            "number": number,
            "owner": dict(owner),
            "values": list(result.values),
            "constraints": list(result.constraints),
            "attributes": dict(result.attributes),
        }
        path = self._folder / f"{self._prefix}-{number}-{owner['worker']}.json"
        temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(record, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            return None
        return path

    def apply(self, on_event: OnEvent = ignore) -> int:
        """Tell the study the results that earlier workers could not.

        Args:
            on_event: told "applied" of every result that the study took.

        Returns:
            The number of results that it took.

        Raises:
            SQLAlchemyError, StorageInternalError, OSError: the storage failed.
        """
        if self._folder is None or not self._folder.is_dir():
            return 0
        return sum(self._apply(path, on_event) for path in sorted(self._folder.glob(f"{self._prefix}-*.json")))

    def _apply(self, path: Path, on_event: OnEvent) -> bool:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            number, owner = int(record["number"]), record["owner"]
            result = TrialResult(tuple(record["values"]), record["attributes"], tuple(record["constraints"]))
        except FileNotFoundError:
            return False  # another worker has just applied it
        except (ValueError, KeyError, TypeError):
            path.replace(path.with_suffix(".damaged"))
            return False
        trials = self._study.get_trials(deepcopy=False)
        known = number < len(trials) and trials[number].user_attrs.get(at.OWNER, {}).get("worker") == owner["worker"]
        if not known or is_dead(owner) is False:
            return False  # of another database with a study of this name, or its worker is about to tell it
        trial = _latest(trials, trials[number])
        if trial.state == TrialState.FAIL and at.owed([*trials]):
            return False  # its successor is not in the queue yet: `requeue` comes first
        if trial.state == TrialState.WAITING and not self._start(trial, owner):
            return False  # another worker was faster
        mine = at.storage_of(self._study).get_trial(at.id_of(trial))
        ours = mine.state == TrialState.RUNNING and mine.user_attrs[at.OWNER]["worker"] == owner["worker"]
        if ours:
            try:
                tell(self._study, at.id_of(trial), result)
            except Superseded:
                return False  # put back in the queue a moment ago: the next start applies the result to the retry
        path.unlink(missing_ok=True)
        if ours:
            on_event(Event("applied", trial.number, place_of(trial), at.point_of(trial) or {}, result.values))
        return ours

    def _start(self, trial: FrozenTrial, owner: Mapping[str, Any]) -> bool:
        """Take a waiting retry for the result at hand, and store its coefficients; False if it has been taken."""
        storage, trial_id = at.storage_of(self._study), at.id_of(trial)
        try:
            at.mark(self._study, trial_id, {at.OWNER: dict(owner)})
            if not storage.set_trial_state_values(trial_id, TrialState.RUNNING):
                return False
            self._suggest(trial, trial_id)
        except UpdateFinishedTrialError:
            return False
        return True

    def _suggest(self, trial: FrozenTrial, trial_id: int) -> None:
        live = optuna.Trial(self._study, trial_id)
        earlier = self._study.get_trials(deepcopy=False)[int(trial.user_attrs[RETRY_OF])]
        for name, distribution in earlier.distributions.items():
            if isinstance(distribution, optuna.distributions.FloatDistribution):
                live.suggest_float(name, distribution.low, distribution.high, step=distribution.step)


def _latest(trials: Sequence[FrozenTrial], trial: FrozenTrial) -> FrozenTrial:
    """Follow the retries of a trial to the last one."""
    after = {t.user_attrs[RETRY_OF]: t for t in trials if RETRY_OF in t.user_attrs and DROPPED not in t.user_attrs}
    while trial.number in after:
        trial = after[trial.number]
    return trial


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
