"""`search.patience` and `search.stop`: when a search has found what it will find, above the noise of its scores.

    v_i     what trial i is worth, in the order of the trials' places
    sigma   standard error of the best trial's value, from the rows that it was scored on
    g_i     largest gain that was expected anywhere when trial i was proposed
    gain    v_i - max(v_1, ..., v_i-1) > FOUND * sigma, found; g_i > EXPECTED * sigma, expected

All trials are scored on the same rows, so differences between them are much less noisy than scores are: a gain counts
from a quarter of the standard error on.  An expectation averages over gains and losses of nothing, and is smaller than
the gains that it stands for.  Whether a study stops follows from its stored trials alone, as far as every
place before them has ended: so all workers, and a run that was cut and goes on, decide the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from dfmerge_studies.spec import ObjectiveSettings, SearchSettings
from dfmerge_studies.study.rows import trial_rows
from dfmerge_studies.study.totals import STOPPED, Asked, go_on
from dfmerge_studies.study.value import best_trial, task_weights
from dfmerge_studies.tasks.metrics import Metrics
from dfmerge_studies.trials.claims import Stop
from dfmerge_studies.trials.marks import PROPOSAL, TASKS
from dfmerge_studies.trials.reading import results_of, settled, violation

FOUND = 0.25  # of the standard error, that a gain must be larger than
EXPECTED = 0.1  # of the standard error, that an expected gain must be larger than
IN_A_ROW = 3  # proposals that must all expect no gain: one fit may be off


@dataclass(frozen=True)
class Noise:
    """How noisy the value of a trial is.

    Attributes:
        objective: how task scores become it.
        metrics: what the scores are.
        rows: how many each task is scored on; a task that is not named counts as exact.
    """

    objective: ObjectiveSettings
    metrics: Metrics
    rows: Mapping[str, int]

    def errors(self, trial: FrozenTrial) -> dict[str, float]:
        """Standard error of each task's score: of the mean over its rows, or of a share that is as large."""
        kept = trial_rows(trial)
        found = {}
        for task, score in trial.user_attrs[TASKS].items():
            count = len(kept[task]) if task in kept else self.rows.get(task, 0)
            if task in kept:
                spread = float(np.std(kept[task]))
            else:
                metric = self.metrics.get(task)
                low, high = (metric.low, metric.high) if metric is not None else (-math.inf, math.inf)
                finite = math.isfinite(high - low)
                spread = math.sqrt(max(0.0, (score - low) * (high - score))) if finite else 0.0
            found[task] = spread / math.sqrt(count) if count else 0.0
        return found

    def of(self, trial: FrozenTrial) -> list[float]:
        """Standard error of each of a trial's values."""
        errors = self.errors(trial)
        scores = self.metrics.worths_of_aims(trial.user_attrs[TASKS]) if self.metrics else trial.user_attrs[TASKS]
        if self.objective.kind == "pareto":
            return [errors[task] for task in scores]
        return [math.hypot(*(weight * errors[t] for t, weight in task_weights(self.objective, scores).items()))]


@dataclass(frozen=True)
class Rule:
    """When a search stops before its total.

    Attributes:
        patience: trials without a gain; None for never.
        gain: whether it stops when no gain is expected.
        startup: trials before the first one that counts for `patience`.
        noise: of the trials' values.
    """

    patience: int | None
    gain: bool
    startup: int
    noise: Noise

    @classmethod
    def of(cls, search: SearchSettings, noise: Noise) -> Rule | None:
        """The rule of a search, None where it has none."""
        if search.patience is None and search.stop == "none":
            return None
        startup = 1 if search.sampler == "gradient" else max(1, search.startup_trials)
        return cls(search.patience, search.stop == "gain", startup, noise)

    def stop(self, trials: Sequence[FrozenTrial], first: int) -> Stop | None:
        """Where the search stops, or would have stopped: after the first trial after which the rule holds.

        Args:
            trials: completed or pruned, in the order of their places.
            first: how many of them to look at first, at least 1; so many were asked for whatever the rule says.
        """
        for count in range(first, len(trials) + 1):
            why = self._no_gain_found(trials[:count]) or self._no_gain_expected(trials[:count])
            if why is not None:
                return Stop(count, why)
        return None

    def _no_gain_found(self, trials: Sequence[FrozenTrial]) -> str | None:
        if self.patience is None or len(trials) < self.startup + self.patience:
            return None
        before, since = trials[: -self.patience], trials[-self.patience :]
        best = best_trial(results_of(before), self.noise.objective)
        if best is None:
            return None
        noise = [FOUND * error for error in self.noise.of(best)]
        if any(_is_gain(trial, before, noise) for trial in since):
            return None
        return f"no gain above the noise in {self.patience} trials"

    def _no_gain_expected(self, trials: Sequence[FrozenTrial]) -> str | None:
        if not self.gain or len(trials) < IN_A_ROW:
            return None
        expected = [trial.user_attrs.get(PROPOSAL, {}).get("gain") for trial in trials[-IN_A_ROW:]]
        best = best_trial(results_of(trials), self.noise.objective)
        if best is None:
            return None
        (error,) = self.noise.of(best)
        if any(gain is None or gain > EXPECTED * error for gain in expected):
            return None
        return "no gain above the noise is expected any more"


def _is_gain(trial: FrozenTrial, before: Sequence[FrozenTrial], noise: Sequence[float]) -> bool:
    """Whether a trial is better than all before it, by more than the noise in some value that counts; no pruned one is.

    A trial that breaks constraints less is better than one that breaks them more, whatever its values.
    """
    if trial.state != TrialState.COMPLETE:
        return False
    before = results_of(before)
    least = min(violation(other) for other in before)
    if violation(trial) != least:
        return violation(trial) < least
    rivals = [other for other in before if violation(other) == least]
    return not any(
        all(ours <= theirs + by for ours, theirs, by in zip(trial.values, rival.values, noise, strict=True))
        for rival in rivals
    )


class StopWatch:
    """Tells the workers of one study when it stops, and the study that it has.

    Args:
        study: the study.
        rule: when.
        by: the settings that the rule is from: `SearchSettings.stops`.
    """

    def __init__(self, study: optuna.Study, rule: Rule, by: Mapping[str, Any]) -> None:
        self._study = study
        self._rule = rule
        self._by = by
        self._asked = Asked.of(study)
        self._looked_at = 0  # of the results: what was said of so many of them stands

    def enough(self, trials: Sequence[FrozenTrial]) -> Stop | None:
        """Where the study stops, if it does.

        Args:
            trials: those that `reading.settled` gives.
        """
        self._asked = Asked.of(self._study)
        stop = self._rule.stop(trials, max(self._asked.owed, self._looked_at + 1))
        self._looked_at = len(trials) if stop is None else self._looked_at
        return stop

    def keep(self, stop: Stop, count: int) -> None:
        """Note in the study that it has stopped, or that another worker had a trial at work when that was noted.

        Args:
            stop: from `enough`.
            count: of its trials with a result.
        """
        known = self._asked.stopped
        if known is None:
            details = {"after": stop.after, "of": self._asked.total, "why": stop.why, "by": dict(self._by)}
            self._asked.stop(self._study, count, **details)
        elif known["added"] == self._asked.added and count > known["count"]:
            self._study.set_user_attr(STOPPED, {**known, "count": count})


def reconsider(study: optuna.Study, rule: Rule | None) -> None:
    """Let a study that has stopped go on where the rule of today would not have stopped it."""
    asked = Asked.of(study)
    if asked.stopped is None:
        return
    trials = settled(study.get_trials(deepcopy=False))
    if rule is None or rule.stop(trials, int(asked.stopped["after"])) is None:
        go_on(study)
