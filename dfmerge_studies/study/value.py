"""From task scores to what Optuna maximises, and from trials to the best one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial

from dfmerge_studies.points import Point
from dfmerge_studies.spec import ObjectiveSettings
from dfmerge_studies.tasks.metrics import Metrics
from dfmerge_studies.trials.marks import DROPS, TASKS
from dfmerge_studies.trials.reading import missed
from dfmerge_studies.trials.results import TrialResult

DIGITS = 9  # of a score that count: sums of the same rows in another order differ by less


def directions(objective: ObjectiveSettings, tasks: Sequence[str]) -> list[str]:
    """Optuna directions: one, or one per task for `pareto`; guards are not among the tasks."""
    return ["maximize"] * (len(tasks) if objective.kind == "pareto" else 1)


def metric_names(objective: ObjectiveSettings, tasks: Sequence[str]) -> list[str]:
    """What the values of a trial are called in Optuna."""
    return list(tasks) if objective.kind == "pareto" else [f"{objective.kind} score"]


def objective_values(objective: ObjectiveSettings, scores: Mapping[str, float], metrics: Metrics) -> tuple[float, ...]:
    """What a trial is worth: the higher the better, so that a metric whose lower scores are better enters negated.

    Args:
        objective: the spec's objective.
        scores: per task; those of guards do not count.
        metrics: what the scores are.

    Returns:
        One value, or for `pareto` one per task in the order of `scores`.
    """
    worths = metrics.worths_of_aims(scores)
    if objective.kind == "pareto":
        return tuple(worths.values())
    if objective.kind == "min":
        return (min(worths.values()),)
    if objective.kind == "weighted":
        assert objective.weights is not None
        total = sum(objective.weights.values())
        return (sum(objective.weights.get(task, 0.0) * worth for task, worth in worths.items()) / total,)
    return (_mean(list(worths.values())),)


def one_value(values: Sequence[float]) -> float:
    """A trial's values as one number: its only one, or for `pareto` their mean.

    Args:
        values: from `objective_values`.
    """
    return values[0] if len(values) == 1 else _mean(values)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def constraint_values(task_drops: Mapping[str, float], allowed: Mapping[str, float]) -> tuple[float, ...]:
    """Optuna constraints, feasible where <= 0: of each task that has a bound, its drop minus what is allowed.

    Args:
        task_drops: from `drops`.
        allowed: points, by task.
    """
    # A hair's breadth of rounding must not make a drop of exactly max_drop infeasible.
    return tuple(round(drop - allowed[task], DIGITS) for task, drop in task_drops.items() if task in allowed)


def trial_result(
    point: Point,
    scores: Mapping[str, float],
    metrics: Metrics,
    *,
    objective: ObjectiveSettings,
    references: Mapping[str, float],
    allowed: Mapping[str, float],
    attributes: Mapping[str, Any],
) -> TrialResult:
    """What a trial gave, as it is stored.

    Args:
        point: what was merged.
        scores: per task.
        metrics: what they are.
        objective: how they become the trial's values.
        references: of each task's own expert, as far as they are known; of a guard, of the base.
        allowed: points that a task may lose against them, of those that have a bound.
        attributes: what else is stored.
    """
    task_drops = metrics.drops(scores, references)
    return TrialResult(
        values=objective_values(objective, scores, metrics),
        attributes={
            **point.described(),
            TASKS: dict(scores),
            **attributes,
            DROPS: {task: round(drop, 4) for task, drop in task_drops.items()},
        },
        constraints=constraint_values(task_drops, allowed),
    )


def rounded_seconds(seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds by phase, as they are stored."""
    return {phase: round(value, 4) for phase, value in seconds.items()}


def trial_value(trial: FrozenTrial) -> float:
    """What a completed trial is worth as one number."""
    return float(one_value(trial.values))


def best_trial(trials: Sequence[FrozenTrial], objective: ObjectiveSettings) -> FrozenTrial | None:
    """The one trial to export.

    Among the trials that keep all constraints (or, where none does, those that miss them least) the one of the
    highest value; for `pareto` the member of the front with the highest mean score, then the highest minimum.  Among
    equals the earliest.
    """
    return max(trials, key=lambda trial: standing(trial.values, trial.constraints.values(), objective), default=None)


def best_first(trials: Sequence[FrozenTrial], objective: ObjectiveSettings) -> list[FrozenTrial]:
    """Trials in the order in which `best_trial` would take them; among equals the earliest first."""
    return sorted(trials, key=lambda trial: standing(trial.values, trial.constraints.values(), objective), reverse=True)


def task_weights(objective: ObjectiveSettings, worths: Mapping[str, float]) -> dict[str, float]:
    """Of every task in what a model is worth: of `min` its worst task has all, of `pareto` each has the same.

    Args:
        objective: how task scores become one value.
        worths: scores per task, such that higher is better.
    """
    if objective.kind == "min":
        return {min(worths, key=worths.__getitem__): 1.0}
    weights = objective.weights or dict.fromkeys(worths, 1.0)
    total = sum(weights.values())
    return {task: weights.get(task, 0.0) / total for task in worths}


def counted_weights(objective: ObjectiveSettings, tasks: Iterable[str]) -> dict[str, float]:
    """The same before any score is known, of those tasks that count: of `min`, where any task can decide, 1.

    Args:
        objective: how task scores become one value.
        tasks: that it is about.
    """
    if objective.kind == "min":
        return dict.fromkeys(tasks, 1.0)
    weights = task_weights(objective, dict.fromkeys(tasks, 0.0))
    return {task: weight for task, weight in weights.items() if weight > 0}


def standing(values: Sequence[float], constraints: Iterable[float], objective: ObjectiveSettings) -> tuple[float, ...]:
    """What trials are compared by, the larger the better: points by which constraints are missed, then the worth.

    Args:
        values: of the trial.
        constraints: each at most 0 where it holds.
        objective: the spec's.
    """
    # For pareto: the trial with the highest mean is never dominated, so it is on the front.
    worth = (sum(values), min(values)) if objective.kind == "pareto" else (values[0],)
    return (-missed(constraints), *(round(value, DIGITS) for value in worth))
