"""Claiming trials: a study's total is exact over any number of workers and restarts.

Before a worker takes a place it counts what has a result, runs or waits; afterwards it looks again, and gives the place
back if others were as quick.  It need not look where its new trial's number tells that nobody has made one meanwhile.
A new trial has the highest number, so it yields to lower ones; a trial from the queue yields whenever there are too
many.  The last to arrive therefore always sees the others, and yields.

A worker that finds every place taken waits until the others are done: should one of them die, its trial is taken up.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from dfmerge_studies.storage import begin_trial, id_of, storage_of, take_trial
from dfmerge_studies.trials.guards import Interrupts
from dfmerge_studies.trials.marks import DISCARDED, OWNER, PLACE, place_of
from dfmerge_studies.trials.queue import put_back
from dfmerge_studies.trials.reading import free_place, holders, settled, started
from dfmerge_studies.trials.recovery import mend
from dfmerge_studies.trials.results import OnEvent, fail

_WAITS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)  # seconds between two looks at the trials of others; the last one repeats
_GLANCE = 0.2  # seconds after which a waiting worker notices a signal


@dataclass(frozen=True)
class Stop:
    """Why a study stops before its total.

    Attributes:
        after: how many results it follows from.
        why: in a few words.
    """

    after: int
    why: str


Enough = Callable[[Sequence[FrozenTrial]], Stop | None]  # from `reading.settled` trials to why they are enough


class Claims:
    """Takes trials for one worker until the study has its total.

    Args:
        study: whose trials.
        target: the total of results.
        raised: asked, once the target is reached, whether it has become larger meanwhile.
        interrupts: a signal ends the waiting.
        on_event: told of the trials of dead workers that were put back.
        read: reads the study's trials.
        answered: told the study's trials whenever the storage has answered.
        enough: asked before each trial whether the study stops here.

    Attributes:
        target: the total, which may rise.
        seen: the study's trials as they were read last, the claimed one among them.
        stopped: why the study has stopped before its total.
    """

    def __init__(
        self,
        study: optuna.Study,
        target: int,
        raised: Callable[[], int] | None,
        interrupts: Interrupts,
        on_event: OnEvent,
        read: Callable[[], Sequence[FrozenTrial]],
        answered: Callable[[Sequence[FrozenTrial]], None],
        enough: Enough | None = None,
    ) -> None:
        self.target = target
        self.stopped: Stop | None = None
        self._enough = enough
        self.seen: Sequence[FrozenTrial] = ()
        self._study = study
        self._storage = storage_of(study)
        self._raised = raised
        self._interrupts = interrupts
        self._on_event = on_event
        self._ask = read
        self._answered = answered

    def claim(self, owner: Mapping[str, Any]) -> FrozenTrial | None:
        """Take the next waiting trial or a new one; None when the study has its total, or a signal came."""
        waits = itertools.chain(_WAITS, itertools.repeat(_WAITS[-1]))
        while not self._interrupts.requested:
            _, self.seen = mend(self._study, self._read(), self._on_event)
            kept = holders(self.seen)
            self._answered(self.seen)
            begun = started(kept)
            waiting = sorted((t for t in kept if t.state == TrialState.WAITING), key=lambda t: (place_of(t), t.number))
            if len(begun) >= self.target:
                self.target = max(self.target, self._raised() if self._raised is not None else 0)
                if len(begun) < self.target:
                    continue
                if self._ended(begun, next(waits)):
                    return None
                continue
            self.stopped = self._enough(settled(kept)) if self._enough is not None else None
            if self.stopped is not None:
                if self._ended(begun, next(waits)):
                    return None
                continue
            trial = self._take(waiting[0], owner) if waiting else self._create(free_place(kept), owner)
            if trial is not None:
                return trial
            time.sleep(random.uniform(0.01, 0.1))  # jitter only, so that two workers do not stay in step
        return None

    def _ended(self, begun: Sequence[FrozenTrial], seconds: float) -> bool:
        """Whether nobody runs a trial any more; wait a moment otherwise."""
        if not any(trial.state == TrialState.RUNNING and OWNER in trial.user_attrs for trial in begun):
            return True
        self._pause(seconds)
        return False

    def _read(self) -> Sequence[FrozenTrial]:
        self.seen = self._ask()
        return self.seen

    def _seen(self, trial_id: int) -> FrozenTrial:
        """A trial among those that were read last; by itself if a storage shows it later than it says so."""
        return next((t for t in self.seen if id_of(t) == trial_id), None) or self._storage.get_trial(trial_id)

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._interrupts.requested and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, _GLANCE))

    def _take(self, waiting: FrozenTrial, owner: Mapping[str, Any]) -> FrozenTrial | None:
        trial_id = id_of(waiting)
        try:
            # In one step: of two workers that want it, the one that gets it must be the one that stands on it.
            if not take_trial(self._study, trial_id, {OWNER: owner, PLACE: place_of(waiting)}):
                return None
        except UpdateFinishedTrialError:
            return None
        if len(started(self._read())) > self.target:
            put_back(self._study, trial_id)
            return None
        return self._seen(trial_id)

    def _create(self, place: int, owner: Mapping[str, Any]) -> FrozenTrial | None:
        # Owner and place are part of the row from its first moment.
        trial = begin_trial(self._study, {PLACE: place, OWNER: owner})
        if trial.number == len(self.seen):  # nobody has made a trial since: what was seen still decides
            self.seen = [*self.seen, trial]
            return trial
        trial_id = id_of(trial)
        self._read()
        lower = [t for t in holders(self.seen) if t.number < trial.number]
        live = [t for t in lower if t.state != TrialState.FAIL]
        if len(live) >= self.target or any(place_of(t) == place for t in lower):
            fail(self._study, trial_id, {DISCARDED: True})
            return None
        return trial
