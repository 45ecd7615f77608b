"""What happens to a trial, what it gives, and how the storage is told."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from dfmerge_studies.errors import RunError
from dfmerge_studies.storage import STORAGE_FAILURES, TrialWrite, is_damaged, storage_of, write_trial
from dfmerge_studies.trials.marks import RESERVED, mark

TELL_DELAYS = (0.2, 0.5, 1.0, 2.0, 4.0)  # seconds between two tries


EventKind = Literal[
    "started", "completed", "pruned", "failed", "interrupted", "recovered", "applied", "superseded", "stopped"
]


@dataclass(frozen=True)
class Event:
    """Something that happened to a trial, for whoever draws progress.

    Attributes:
        kind: what happened; "pruned" is a trial that was stopped on a part of its rows, "recovered" a dead worker's
            trial put back in the queue, "applied" a result from the outbox told to the study, "superseded" a result
            that came after the trial had been given to another, "stopped" the whole study, before its total.
        number: Optuna's number of the trial.
        place: the trial's place.
        coefficients: by name, as far as they are known.
        values: the objectives, when there are any; of a pruned trial estimates.
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
    """Do nothing with an event."""


class Superseded(Exception):
    """The trial has ended meanwhile, by another worker's hand: its result is not needed."""


@dataclass(frozen=True)
class TrialResult:
    """What evaluating one point gave.

    Attributes:
        values: the objectives, in the order of the study's directions.
        attributes: what else to store on the trial; JSON values, no key of `attributes.RESERVED`.
        constraints: each at most 0 where it holds; every trial of a study has the same number of them.
        pruned: whether the trial was stopped on a part of its rows: its values are estimates then, and it has no
            constraints.
        intermediate: estimates of the objective after so many rows.
    """

    values: tuple[float, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    constraints: tuple[float, ...] = ()
    pruned: bool = False
    intermediate: Mapping[int, float] = field(default_factory=dict)


def tell(study: optuna.Study, trial_id: int, result: TrialResult) -> None:
    """Store a result on a running trial and end it; try again for some seconds if the storage fails.

    Args:
        study: the trial's study, on a storage that takes results.
        trial_id: the storage's id of the trial.
        result: what to store; constraints that are stored already are left alone.

    Raises:
        Superseded: the trial has ended meanwhile.
        storage.STORAGE_FAILURES: the storage failed at every try.
    """
    storage = storage_of(study)
    # Zero-padded, so that the order of names is the order of constraints in every storage.
    constraints = {f"{index:03d}": value for index, value in enumerate(result.constraints)}
    write = TrialWrite(
        attributes=result.attributes,
        constraints=constraints,
        values=result.values,
        pruned=result.pruned,
        intermediate=result.intermediate,
    )
    for delay in (*TELL_DELAYS, None):
        try:
            write_trial(study, trial_id, write)
            return
        except UpdateFinishedTrialError:
            # Either another worker ended it, or an earlier try got through although its answer did not come back.
            if storage.get_trial(trial_id).state == write.state:
                return
            raise Superseded from None
        except STORAGE_FAILURES as error:
            if delay is None or is_damaged(error):
                raise
            time.sleep(delay)


def fail(study: optuna.Study, trial_id: int, marks: Mapping[str, Any]) -> bool:
    """End a trial as FAIL, its marks written first; False if it had ended already.

    Args:
        study: the trial's study.
        trial_id: the storage's id of the trial.
        marks: attributes that say why.
    """
    try:
        mark(study, trial_id, marks)
        return storage_of(study).set_trial_state_values(trial_id, TrialState.FAIL)
    except UpdateFinishedTrialError:
        return False


def refuse_reserved(result: TrialResult) -> None:
    """Check that a result's attributes can be stored.

    Raises:
        RunError: one has a reserved name.
    """
    clash = sorted(RESERVED & set(result.attributes))
    if clash:
        raise RunError(f"the trial's attributes use the reserved names {clash}")
