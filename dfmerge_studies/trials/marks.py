"""Names of a trial's attributes.

What the loop writes beside the result, which may not use these names:

    place         ordinal of the trial's coefficients in the study; a retry keeps it
    owner         which process runs the trial (see `owner.py`)
    drawn         every coefficient has been stored: the trial can be repeated from the storage alone
    retry_of      number of the trial that this one repeats
    crashes       processes that died on these coefficients before this trial
    interrupted   the trial was stopped on purpose and put back in the queue
    dropped       the trial was given back without a result: its place was not needed
    error         why the trial failed for good
    beat          last sign of life, seconds since 1970, on storages that have no heartbeat of their own
    proposal      what the sampler expected of the point, and where it looked; a retry keeps it

What a result has; each of its method's parameters is another, under the parameter's own name:

    coefficients  lambda per expert
    groups        lambda per expert and group of parameters, where they have one each; `coefficients` has their means
    tasks         score per task
    seconds       wall-clock time per phase
    fishers       how many were computed, how many came from the cache
    drops         points that each task loses against its expert
    rows          score of each validation row per task, packed (see `study/rows.py`)

What a trial of a raced study has besides (see `racing.py`); one that was pruned has no tasks, drops and rows:

    raced         against which trial, on how many rows; of a pruned one estimates of the value and of task scores

What a trial has besides whose study descends (see `descent.py`):

    gradient      the loss of some validation rows, and its slope along each coefficient
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from dfmerge_studies.storage import TrialWrite, write_trial

PLACE = "place"
OWNER = "owner"
DRAWN = "drawn"
RETRY_OF = "retry_of"
CRASHES = "crashes"
INTERRUPTED = "interrupted"
DISCARDED = "dropped"
ERROR = "error"
BEAT = "beat"
PROPOSAL = "proposal"
RESERVED = frozenset({PLACE, OWNER, DRAWN, RETRY_OF, CRASHES, INTERRUPTED, DISCARDED, ERROR, BEAT, PROPOSAL})
COEFFICIENTS = "coefficients"
TASKS = "tasks"
SECONDS = "seconds"
FISHERS = "fishers"
DROPS = "drops"
ROWS = "rows"
RACED = "raced"
GRADIENT = "gradient"
FIXED = "fixed_params"  # Optuna's own system attribute of a trial that was enqueued


def place_of(trial: FrozenTrial) -> int:
    """Return the place of a trial; a trial that other software added stands at its number."""
    return int(trial.user_attrs.get(PLACE, trial.number))


def mark(study: optuna.Study, trial_id: int, marks: Mapping[str, Any]) -> None:
    """Write attributes on a trial that has not finished.

    Args:
        study: the trial's study.
        trial_id: the storage's id of the trial (see `id_of`).
        marks: attributes by name; JSON values.

    Raises:
        optuna.exceptions.UpdateFinishedTrialError: it has.
    """
    if marks:
        write_trial(study, trial_id, TrialWrite(attributes=marks))
