"""Turns: trials are drawn in the order of their numbers, also by several workers at once."""

from __future__ import annotations

import time
from collections.abc import Sequence

import optuna
from optuna.trial import FrozenTrial, TrialState

from dfmerge_studies.trials.guards import Interrupts
from dfmerge_studies.trials.marks import OWNER
from dfmerge_studies.trials.owner import is_dead
from dfmerge_studies.trials.reading import point_of

_TURN = 0.05  # seconds between two looks at whether those before have drawn
_TURN_SECONDS = 10.0  # after which a worker draws out of turn: a machine before it has died, or many are before it


class Turns:
    """Lets the trials with lower numbers be drawn first.

    A model that does not know what is being drawn elsewhere at the same moment would propose that point once more.

    Args:
        study: whose trials.
        interrupts: a signal ends the waiting.
    """

    def __init__(self, study: optuna.Study, interrupts: Interrupts) -> None:
        self._study = study
        self._interrupts = interrupts
        self._overdue: set[int] = set()  # numbers of trials whose turn has been waited for long enough

    def wait(self, trial: FrozenTrial, seen: Sequence[FrozenTrial]) -> Sequence[FrozenTrial]:
        """Wait until it is a trial's turn, or for as long as that is worth; not at all if its point is given.

        Args:
            trial: the trial.
            seen: the study's trials as read just now.

        Returns:
            The study's trials as they were read last.
        """
        if point_of(trial) is not None:
            return seen
        until = time.monotonic() + _TURN_SECONDS
        while not self._interrupts.requested:
            running = [t for t in seen if t.state == TrialState.RUNNING]
            drawing = {t.number for t in running if t.number < trial.number and _draws(t)} - self._overdue
            if not drawing:
                return seen
            if time.monotonic() >= until:
                self._overdue |= drawing
                return seen
            time.sleep(_TURN)
            seen = self._study.get_trials(deepcopy=False)
        return seen


def _draws(trial: FrozenTrial) -> bool:
    """Tell whether the worker of a running trial may be about to store its coefficients."""
    owner = trial.user_attrs.get(OWNER)
    return owner is not None and point_of(trial) is None and not is_dead(owner)
