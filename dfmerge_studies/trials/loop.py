"""The loop of one worker: claim a place, evaluate its coefficients, store the result, until the study has its total.

A trial is claimed (`claims.py`), drawn in its turn (`turns.py`), evaluated under signs of life and signals
(`guards.py`), kept in the outbox and told (`results.py`).  A worker that loses its storage goes on as a new one: what
it left is mended like what a dead worker leaves.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from dfmerge_studies.errors import DFMergeError, InputError, RunError, first_line, out_of_memory
from dfmerge_studies.storage import (
    DATABASE_ERRORS,
    STORAGE_FAILURES,
    DrawnStorage,
    TrialWrite,
    drawn_from,
    id_of,
    may_pass,
    root_text,
    storage_errors,
    write_trial,
)
from dfmerge_studies.trials.claims import Claims, Enough, Stop
from dfmerge_studies.trials.guards import Interrupts, signs_of_life
from dfmerge_studies.trials.keeping import Keeper, StorageLost
from dfmerge_studies.trials.marks import DISCARDED, DRAWN, ERROR, INTERRUPTED, OWNER, place_of
from dfmerge_studies.trials.outbox import Outbox
from dfmerge_studies.trials.owner import working
from dfmerge_studies.trials.queue import put_back
from dfmerge_studies.trials.reading import counts, ended
from dfmerge_studies.trials.recovery import recover
from dfmerge_studies.trials.results import (
    Event,
    EventKind,
    OnEvent,
    Superseded,
    TrialResult,
    fail,
    ignore,
    refuse_reserved,
    tell,
)
from dfmerge_studies.trials.space import GridExhausted, Space
from dfmerge_studies.trials.turns import Turns

logger = logging.getLogger(__name__)

MAX_FAILURES_IN_A_ROW = 3
PATIENCE_SECONDS = 120.0  # how long a worker waits for a storage that does not answer

Evaluate = Callable[[dict[str, float], int], TrialResult]


@dataclass(frozen=True)
class Summary:
    """How a call of `work` ended.

    Attributes:
        completed: trials that this call ended with a result, of all rows or pruned, those found in the outbox included.
        failed: trials that failed for good in this call.
        interrupted: whether a signal came: whoever called is to end too, though the total may have been reached.
        exhausted: whether the sampler had no more points.
        counts: the study's trials by state, as `counts` gives them.
        stopped: why the study has stopped before its total, None if it has not.
    """

    completed: int
    failed: int
    interrupted: bool
    exhausted: bool
    counts: dict[str, int]
    stopped: Stop | None = None


def work(
    study: optuna.Study,
    space: Space,
    evaluate: Evaluate,
    *,
    target: int,
    outbox: Path | None = None,
    on_event: OnEvent = ignore,
    raised: Callable[[], int] | None = None,
    keeper: Keeper | None = None,
    enough: Enough | None = None,
) -> Summary:
    """Run trials until the study has `target` results, counting those of other workers and of earlier runs.

    Where the last of them run elsewhere, their end is waited for.

    Args:
        study: the study, with a sampler from `search.make_sampler`.
        space: what it searches.
        evaluate: from the coefficients and the trial's place to its result.  A RunError or MemoryError fails the trial
            and the loop goes on; any other exception puts the trial back in the queue and is passed on.
        target: the total of results that the study should reach.
        outbox: a local folder for results that the storage has not taken yet.
        on_event: told of everything that happens to a trial.
        raised: asked, once the target is reached, whether it has become larger meanwhile.
        keeper: looks after what is told, for who wants to ask it again later.
        enough: asked before each trial whether the study stops before its total.

    Returns:
        What was done, and whether a signal came.

    Raises:
        RunError: three trials in a row failed, or the storage was away for longer than two minutes.
        StorageLost: the storage's file was deleted, replaced or damaged.
    """
    with Interrupts() as interrupts, storage_errors():
        box, keeper = Outbox(outbox, study), keeper or Keeper(study)
        worker = _Worker(study, space, evaluate, target, box, keeper, on_event, interrupts, raised, enough)
        while True:
            with working() as owner:
                try:
                    worker.run(owner)
                    keeper.check()
                    break
                except StorageLost:
                    raise
                except Exception as error:
                    if (lost := keeper.lost()) is not None:  # whatever a storage raises whose file is another
                        raise lost from None
                    if not isinstance(error, _LOST):
                        raise
                    if not worker.waits_after(error):
                        if worker.undelivered is not None:
                            raise worker.undelivered from None
                        raise
        now = counts(study)
        stopped = worker.claims.stopped
        missing = ended(now) < worker.claims.target and not worker.exhausted
        early = interrupts.requested and missing and (stopped is None or now["running"] > 0)
        stopped = None if early else stopped
        return Summary(worker.completed, worker.failed, interrupts.requested, worker.exhausted, now, stopped)


class _Undelivered(RunError):
    """The storage did not take a result."""

    passing = False  # whether the reason may be over in a moment


_LOST: tuple[type[Exception], ...] = (*DATABASE_ERRORS, _Undelivered)


class _Worker:
    def __init__(
        self,
        study: optuna.Study,
        space: Space,
        evaluate: Evaluate,
        target: int,
        outbox: Outbox,
        keeper: Keeper,
        on_event: OnEvent,
        interrupts: Interrupts,
        raised: Callable[[], int] | None,
        enough: Enough | None,
    ) -> None:
        self.study = study
        self.space = space
        self.evaluate = evaluate
        self.outbox = outbox
        self.keeper = keeper
        self.on_event = on_event
        self.owner: dict[str, Any] = {}
        self.former: set[str] = set()  # what this worker was called before it lost the storage
        self.away_since: float | None = None
        self.undelivered: _Undelivered | None = None  # the result that the storage has not taken yet
        self.interrupts = interrupts
        self.claims = Claims(study, target, raised, interrupts, on_event, keeper.read, self._answered, enough)
        self.turns = Turns(study, interrupts)
        self.objectives = len(study.directions)
        self.constraints: int | None = None  # how many the study's trials have, once one is complete
        self.completed = 0
        self.failed = 0
        self.exhausted = False
        self.failures: list[str] = []  # in a row

    def run(self, owner: dict[str, Any]) -> None:
        self.owner = owner
        self.completed += self.outbox.apply(self.on_event)
        for left in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if left.user_attrs.get(OWNER, {}).get("worker") in self.former:
                fail(self.study, id_of(left), {INTERRUPTED: True})
        recover(self.study, on_event=self.on_event)
        self.completed += self.outbox.apply(self.on_event)
        while not self.interrupts.requested and not self.exhausted:
            trial = self.claims.claim(self.owner)
            if trial is None:
                return
            self.keeper.check_place()  # else the result of a trial that no copy of a lost file has would stay outside
            self._run(trial)
            if len(self.failures) == MAX_FAILURES_IN_A_ROW:
                raise RunError(
                    f"{MAX_FAILURES_IN_A_ROW} trials in a row failed: {'; '.join(self.failures)}",
                    where=self.study.study_name,
                    hint="Mend the cause and run again: the study goes on with new coefficients",
                )

    def waits_after(self, error: Exception) -> bool:
        """Wait a moment for a storage that failed; False if that is hopeless or long enough, or a signal came."""
        passing = error.passing if isinstance(error, _Undelivered) else may_pass(error)
        now = time.monotonic()
        if self.away_since is None:
            self.away_since = now
        if isinstance(error, _Undelivered):
            self.undelivered = error
        if not passing or self.interrupts.requested or now - self.away_since >= PATIENCE_SECONDS:
            return False
        logger.warning("the study's storage does not answer; trying again (%s)", root_text(error))
        self.former.add(self.owner["worker"])
        time.sleep(random.uniform(0.5, 1.5))  # so that many workers do not come back at one moment
        return True

    def _answered(self, trials: Sequence[FrozenTrial]) -> None:
        self.away_since = self.undelivered = None
        self.keeper.check(trials)

    # Running a trial

    def _run(self, trial: FrozenTrial) -> None:
        with signs_of_life(self.study, id_of(trial)):
            try:
                seen = self.turns.wait(trial, self.claims.seen)
                coefficients = self._suggest(trial, seen)
                self._event("started", trial, coefficients)
                result = self._evaluate(trial, coefficients)
                if result is not None:
                    self._deliver(trial, coefficients, result)
            except GridExhausted:
                fail(self.study, id_of(trial), {DISCARDED: True})
                self.exhausted = True
            except (Superseded, UpdateFinishedTrialError):
                self._event("superseded", trial, {}, message="another worker has taken this trial meanwhile")

    def _evaluate(self, trial: FrozenTrial, coefficients: dict[str, float]) -> TrialResult | None:
        """Evaluate a trial; None if it failed, or was interrupted and is back in the queue."""
        try:
            self.space.check(coefficients)
        except InputError as error:  # other software queued the point
            self._failed(trial, coefficients, error)
            return None
        if self.constraints is None:
            earlier = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            self.constraints = len(earlier[0].constraints) if earlier else None
        try:
            with self.interrupts.allowed():
                result = self.evaluate(dict(coefficients), place_of(trial))
            self._check(result, self.constraints)
        except (RunError, MemoryError) as error:
            self._failed(trial, coefficients, error)
            return None
        except KeyboardInterrupt:
            put_back(self.study, id_of(trial))
            self._event("interrupted", trial, coefficients)
            if not self.interrupts.requested:
                raise  # not of our handler's making: whoever made it decides what it means
            return None
        except BaseException:
            put_back(self.study, id_of(trial))
            raise
        return result

    def _deliver(self, trial: FrozenTrial, coefficients: dict[str, float], result: TrialResult) -> None:
        ranges = self.space.distributions()
        point = {name: (value, ranges[name]) for name, value in coefficients.items()}
        kept = self.outbox.write(trial.number, self.owner, result, point)
        try:
            tell(self.study, id_of(trial), result)
        except Superseded:
            if kept is not None:
                kept.unlink(missing_ok=True)
            raise
        except STORAGE_FAILURES as error:
            undelivered = _Undelivered(
                f"the storage did not take the result of trial {trial.number}: {root_text(error)}",
                where=self.study.study_name,
                hint=f"It is kept in {kept}: run again to apply it" if kept else "Run again to repeat the trial",
            )
            undelivered.passing = may_pass(error)
            raise undelivered from None
        self.keeper.told(trial.number, kept)
        self.completed += 1
        self.failures.clear()
        self._event("pruned" if result.pruned else "completed", trial, coefficients, result.values)

    def _suggest(self, trial: FrozenTrial, seen: Sequence[FrozenTrial]) -> dict[str, float]:
        trial_id = id_of(trial)
        drawing = DrawnStorage(self.study, seen)
        live = optuna.Trial(drawn_from(self.study, drawing), trial_id)
        ranges = self.space.distributions().items()
        coefficients = {name: live.suggest_float(name, each.low, each.high, step=each.step) for name, each in ranges}
        # The owner once more: on storages that are no database, a rival that lost the race for a waiting trial may have
        # written its own name last.
        marks = {OWNER: self.owner, DRAWN: True}
        write_trial(self.study, trial_id, TrialWrite(marks, drawing.params, early=drawing.attributes))
        marks = {**drawing.attributes, **marks}
        self.keeper.learn([_drawn(t, coefficients, self.space, marks) if id_of(t) == trial_id else t for t in seen])
        return coefficients

    def _check(self, result: TrialResult, constraints: int | None) -> None:
        """Refuse what Optuna would store and then trip over.

        The storage is not asked: should it have gone away, the result must still reach the outbox.
        """
        if len(result.values) != self.objectives:
            raise ValueError(f"the trial gave {len(result.values)} values for {self.objectives} objectives")
        if not all(math.isfinite(value) for value in (*result.values, *result.constraints)):
            raise RunError(
                f"the trial's values {list(result.values)} or constraints {list(result.constraints)} are not finite"
            )
        refuse_reserved(result)
        json.dumps(dict(result.attributes))
        if constraints is not None and not result.pruned and len(result.constraints) != constraints:
            raise RunError(f"the trial has {len(result.constraints)} constraints, earlier ones {constraints}")

    def _failed(self, trial: FrozenTrial, coefficients: Mapping[str, float], error: Exception) -> None:
        known = out_of_memory(error) or error
        message = str(known) if isinstance(known, DFMergeError) else first_line(known)
        fail(self.study, id_of(trial), {ERROR: message})
        self.failed += 1
        self.failures.append(f"trial {trial.number}: {message}")
        self._event("failed", trial, coefficients, message=message)

    def _event(
        self,
        kind: EventKind,
        trial: FrozenTrial,
        coefficients: Mapping[str, float],
        values: tuple[float, ...] | None = None,
        message: str | None = None,
    ) -> None:
        self.on_event(Event(kind, trial.number, place_of(trial), coefficients, values, message))


def _drawn(
    trial: FrozenTrial, coefficients: Mapping[str, float], space: Space, marks: Mapping[str, Any]
) -> FrozenTrial:
    """A trial as it is stored once it has been drawn."""
    drawn = copy.copy(trial)
    drawn.distributions = dict(space.distributions())
    drawn.params = dict(coefficients)
    drawn.user_attrs = {**trial.user_attrs, **marks}
    return drawn
