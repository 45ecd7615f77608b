"""What a trial is worth, which constraints it keeps, and which trial is the best."""

from __future__ import annotations

import optuna
import pytest

from dfmerge_studies.spec import ObjectiveSettings
from dfmerge_studies.study.value import (
    best_trial,
    constraint_values,
    directions,
    objective_values,
)
from dfmerge_studies.tasks.metrics import Metrics
from dfmerge_studies.trials.reading import violation

SCORES = {"a": 0.9, "b": 0.4, "c": 0.5}
ACCURACY = Metrics.named(dict.fromkeys(SCORES, "accuracy"))


def objective(kind: str, **weights: float) -> ObjectiveSettings:
    return ObjectiveSettings(kind=kind, weights=weights or None)


def trial(number: int, values: list[float], constraints: list[float] | None = None) -> optuna.trial.FrozenTrial:
    """A completed trial as a real study keeps it."""
    study = optuna.create_study(directions=["maximize"] * len(values))
    for _ in range(number + 1):
        running = study.ask()
    for index, value in enumerate(constraints or []):
        running.set_constraint(f"c{index}", value)
    return study.tell(running, values)


def test_the_mean_objective_is_the_mean_of_the_task_scores():
    assert objective_values(objective("mean"), SCORES, ACCURACY) == (pytest.approx(0.6),)


def test_the_min_objective_is_the_worst_task():
    assert objective_values(objective("min"), SCORES, ACCURACY) == (0.4,)


def test_the_weighted_objective_divides_by_the_sum_of_weights_and_leaves_unnamed_tasks_out():
    values = objective_values(objective("weighted", a=3.0, b=1.0), SCORES, ACCURACY)
    assert values == (pytest.approx((3 * 0.9 + 0.4) / 4),)


def test_pareto_has_one_direction_and_one_value_per_task():
    assert objective_values(objective("pareto"), SCORES, ACCURACY) == (0.9, 0.4, 0.5)
    assert directions(objective("pareto"), list(SCORES)) == ["maximize"] * 3
    assert directions(objective("mean"), list(SCORES)) == ["maximize"]


def test_drops_are_points_lost_against_the_task_s_own_expert():
    assert ACCURACY.drops(SCORES, {"a": 0.95, "b": 0.3}) == {"a": pytest.approx(5.0), "b": pytest.approx(-10.0)}


def test_a_drop_of_exactly_max_drop_is_feasible():
    assert constraint_values({"a": 5.0 + 1e-12, "b": -1.0}, {"a": 5.0, "b": 5.0}) == (0.0, -6.0)
    assert constraint_values({"a": 5.0, "b": 2.0}, {"b": 1.0}) == (1.0,)
    assert constraint_values({"a": 5.0}, {}) == ()


def test_the_best_trial_is_the_feasible_one_with_the_highest_value():
    trials = [trial(0, [0.9], [1.0]), trial(1, [0.7], [-1.0]), trial(2, [0.8], [0.0])]
    assert best_trial(trials, objective("mean")).number == 2


def test_where_no_trial_is_feasible_the_one_that_misses_least_is_best():
    trials = [trial(0, [0.9], [4.0, -9.0]), trial(1, [0.7], [1.0, 1.0]), trial(2, [0.8], [3.0, 0.0])]
    assert best_trial(trials, objective("mean")).number == 1
    assert violation(trials[1]) == 2.0


def test_among_equals_the_earliest_is_best():
    assert best_trial([trial(0, [0.5]), trial(1, [0.8]), trial(2, [0.8])], objective("mean")).number == 1
    # 3 + 8 of 24 rows and 4 + 7 of them are the same mean, and not the same float
    same, larger = (3 / 12 + 8 / 12) / 2, (4 / 12 + 7 / 12) / 2
    assert larger > same
    assert best_trial([trial(0, [same]), trial(1, [larger])], objective("mean")).number == 0


def test_the_best_of_a_pareto_study_is_the_point_of_the_front_with_the_highest_mean_then_minimum():
    trials = [trial(0, [0.9, 0.1]), trial(1, [0.6, 0.6]), trial(2, [0.7, 0.5]), trial(3, [0.2, 0.2])]
    assert best_trial(trials, objective("pareto")).number == 1


def test_without_trials_there_is_no_best():
    assert best_trial([], objective("mean")) is None
