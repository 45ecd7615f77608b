"""The sampler `auto`: `surrogate`'s proposals for an Optuna study whose trials keep their task scores.

It keeps nothing between two trials: the region, the processes and the draws derive from the stored trials, in the order
of their places, and from the trial's own seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from dfmerge_studies.joint import JointSampler
from dfmerge_studies.trials.marks import DROPS, RACED, TASKS, place_of
from dfmerge_studies.trials.reading import violation
from dfmerge_studies.trials.space import Space

if TYPE_CHECKING:
    from optuna.study import Study
    from torch import Tensor


@dataclass(frozen=True)
class Goal:
    """What task scores are worth together, as the surrogate must know it.

    Attributes:
        kind: "mean" (of `weights`, or plain), "min" or "pareto".
        weights: per task, None for equal ones.
        points: score of one point (a hundredth of the metric's range) per task, negative where lower is better; tasks
            that are not named have accuracy's 0.01.
        allowed: points that tasks may lose, of those that have such a bound.
        guards: tasks that have a bound and are worth nothing.
    """

    kind: str = "mean"
    weights: Mapping[str, float] | None = None
    points: Mapping[str, float] = field(default_factory=dict)
    allowed: Mapping[str, float] = field(default_factory=dict)
    guards: frozenset[str] = frozenset()

    def point(self, task: str) -> float:
        """Score of one point of a task."""
        return self.points.get(task, 0.01)

    def worth(self, trial: FrozenTrial, task: str) -> float:
        """A task's score in a trial, such that higher is better."""
        return math.copysign(1.0, self.point(task)) * float(trial.user_attrs[TASKS][task])


PLAIN_MEAN = Goal()


def at_least(startup_trials: int) -> int:
    """Trials that must have completed before the processes can propose.

    Args:
        startup_trials: how many were asked for.
    """
    return max(2, startup_trials)


class TrustRegionSampler(JointSampler):
    """Proposes one trial where the per-task processes expect most; nothing is proposed in the startup trials.

    Args:
        space: what is searched.
        goal: what task scores are worth together.
        startup_trials: completed trials before it proposes; `at_least` has the fewest.
        seed: of the draws.

    Attributes:
        expected: what it expects of the point that it has proposed, as the trial keeps it; None before.
    """

    def __init__(self, *, space: Space, goal: Goal, startup_trials: int, seed: int) -> None:
        self._space = space
        self._goal = goal
        self._startup_trials = at_least(startup_trials)
        self._seed = seed
        self.expected: dict[str, Any] | None = None

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Propose all coefficients together; empty in the startup trials.

        Args:
            study: whose completed and running trials count, in whatever order.
            trial: the trial to be drawn.
            search_space: ranges by name.
        """
        trials = study.get_trials(deepcopy=False)
        names = self._space.names
        known = [t for t in trials if (_is_scored(t) or _is_estimated(t)) and _has(t, names)]
        known.sort(key=place_of)
        if len(known) < self._startup_trials or not any(map(_is_scored, known)):
            return {}
        running = [t for t in trials if t.state == TrialState.RUNNING and t.number != trial.number and _has(t, names)]
        point, self.expected = _next_point(
            known, running, self._space, self._goal, startup=self._startup_trials, seed=self._seed
        )
        return point


def _is_scored(trial: FrozenTrial) -> bool:
    """Whether a trial has a score of every task on all rows."""
    return trial.state == TrialState.COMPLETE and bool(trial.user_attrs.get(TASKS))


def _is_estimated(trial: FrozenTrial) -> bool:
    """Whether a trial was stopped on a part of its rows."""
    return trial.state == TrialState.PRUNED and bool(trial.user_attrs.get(RACED, {}).get(TASKS))


def _has(trial: FrozenTrial, names: Sequence[str]) -> bool:
    return all(name in trial.params for name in names)


def _next_point(
    known: Sequence[FrozenTrial],
    running: Sequence[FrozenTrial],
    space: Space,
    goal: Goal,
    *,
    startup: int,
    seed: int,
) -> tuple[dict[str, float], dict[str, Any]]:
    """The proposal after a history of trials, and what is expected of it.

    Args:
        known: complete ones and those stopped on a part of their rows, in the order of their places.
        running: those whose points are known.
        space: what is searched.
        goal: what task scores are worth together.
        startup: how many came before the first region.
        seed: of the draws.
    """
    import torch

    from dfmerge_studies import surrogate
    from dfmerge_studies.lattice import Steps

    complete = [trial for trial in known if _is_scored(trial)]
    tasks = list(complete[0].user_attrs[TASKS])
    s, errors = _scores(known, tasks, goal)
    history = surrogate.History(
        torch.tensor([_unit(trial, space) for trial in known], dtype=torch.float64),
        s,
        torch.tensor(sorted(_unit(trial, space) for trial in running), dtype=torch.float64) if running else None,
        _thresholds(complete[-1], tasks, goal),
        errors,
    )
    aims = [place for place, task in enumerate(tasks) if task not in goal.guards]
    if goal.kind == "pareto":
        worth, region = surrogate.of_some(surrogate.scalarisation(history.whole[:, aims], seed), aims), surrogate.WHOLE
    else:
        weights = None if goal.weights is None else [goal.weights.get(tasks[place], 0.0) for place in aims]
        worth = surrogate.of_some(surrogate.utility(goal.kind, weights), aims)
        # A trial that was stopped is below every whole one, and among its like where its estimate puts it.
        missed = [-violation(trial) if _is_scored(trial) else -math.inf for trial in known]
        merits = list(zip(missed, worth(history.s).tolist(), strict=True))
        region = surrogate.region_after([tuple(row) for row in history.x.tolist()], merits, startup)
    width = space.high - space.low
    steps = Steps(0.0, space.step / width, 1 + round(width / space.step)) if space.step else None
    found = surrogate.proposal(history, worth, region=region, steps=steps, seed=seed)
    expected: dict[str, Any] = {
        "tasks": {
            task: [_signed(mean, task, goal), deviation]
            for task, (mean, deviation) in zip(tasks, found.tasks.tolist(), strict=True)
        }
    }
    if goal.kind != "pareto":  # there the utility is another one in every trial
        expected |= {
            "mean": found.mean,
            "deviation": found.deviation,
            "gain": found.gain,
            "region": {
                "number": len(region.ended) + 1,
                "centre": None if region.centre is None else _point(region.centre, space),
                "half_width": region.half_width,
            },
        }
    return _point(found.point.tolist(), space), expected


def _scores(trials: Sequence[FrozenTrial], tasks: Sequence[str], goal: Goal) -> tuple[Tensor, Tensor | None]:
    """What every task's score is worth in every trial (n, T), and the standard errors of those that are estimates.

    Of a task that a stopped trial was not scored on (a guard, say) nothing is known: the mean of the others stands
    there, with an infinite error.
    """
    import torch

    nothing = [math.nan, math.inf]
    rows = [
        [[float(trial.user_attrs[TASKS][task]), 0.0] for task in tasks]
        if _is_scored(trial)
        else [trial.user_attrs[RACED][TASKS].get(task, nothing) for task in tasks]
        for trial in trials
    ]
    found = torch.tensor(rows, dtype=torch.float64)
    signs = torch.tensor([math.copysign(1.0, goal.point(task)) for task in tasks], dtype=torch.float64)
    s, errors = found[..., 0] * signs, found[..., 1]
    s = torch.where(s.isnan(), s.nanmean(0), s)
    return s, errors if bool((errors > 0).any()) else None


def _point(unit: Sequence[float], space: Space) -> dict[str, float]:
    """A point of the unit cube in the space."""
    ranges = {name: space.range_of(name) for name in space.names}
    return {name: low + (high - low) * value for (name, (low, high)), value in zip(ranges.items(), unit, strict=True)}


def _signed(worth: float, task: str, goal: Goal) -> float:
    """A task's score from what it is worth."""
    return math.copysign(1.0, goal.point(task)) * worth


def _unit(trial: FrozenTrial, space: Space) -> list[float]:
    """A trial's point in the unit cube."""
    ranges = {name: space.range_of(name) for name in space.names}
    return [(float(trial.params[name]) - low) / (high - low) for name, (low, high) in ranges.items()]


def _thresholds(trial: FrozenTrial, tasks: Sequence[str], goal: Goal) -> Tensor | None:
    """The score that every task must keep, from any trial with constraints.

    A constraint is the drop against the expert (of a guard, against the base) in points, minus what is allowed:
    (e_t - s_t) / point_t - allowed_t.
    """
    import torch

    drops = [task for task in trial.user_attrs.get(DROPS, {}) if task in goal.allowed]
    if not trial.constraints or len(drops) != len(trial.constraints):
        return None
    limits = dict(zip(drops, (trial.constraints[name] for name in sorted(trial.constraints)), strict=True))
    kept = [
        goal.worth(trial, task) + limits[task] * abs(goal.point(task)) if task in limits else -math.inf
        for task in tasks
    ]
    return torch.tensor(kept, dtype=torch.float64)
