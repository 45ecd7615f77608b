"""Charts: whole numbers of trials, and a best so far that keeps the constraints."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest

from dfmerge_studies.report.figures.base import whole_step
from dfmerge_studies.report.figures.trajectory import Trajectory, trajectory
from dfmerge_studies.report.view import StudyView
from dfmerge_studies.study.provenance import FINGERPRINT, SPEC


def drawn(folder: Path, trials: list[tuple[float, float]]) -> Trajectory:
    """The trajectory of trials with these scores, each missing its constraint by so much."""
    study = optuna.create_study(storage=f"sqlite:///{folder}/s.db", study_name="s", direction="maximize")
    fingerprint = {
        "method": "gta", "experts": [["a", "a"]], "tasks": ["a"], "metrics": {"a": "accuracy"},
        "objective": {"kind": "mean"}, "search.seed": 0, "search.sampler": "gp", "search.startup_trials": 1,
        "search.max_drop": 3.0,
    }  # fmt: skip
    study.set_user_attr(FINGERPRINT, fingerprint)
    study.set_user_attr(SPEC, {"base": "base"})
    for number, (score, missed) in enumerate(trials):
        trial = study.ask()
        trial.suggest_float("a", 0, 1)
        trial.set_constraint("000", missed)
        for name, value in {"tasks": {"a": score}, "coefficients": {"a": 0.5}, "place": number}.items():
            trial.set_user_attr(name, value)
        study.tell(trial, score)
    found = trajectory(StudyView.of(study))
    assert isinstance(found, Trajectory)
    return found


def test_the_best_so_far_is_one_that_keeps_the_constraints(tmp_path):
    found = drawn(tmp_path, [(0.9, 2.0), (0.5, -1.0), (0.8, 1.0), (0.6, 0.0)])
    assert found.feasible == [False, True, False, True]
    assert found.best == [None, 0.5, 0.5, 0.6]
    assert found.plotly().data[0].y == (None, 50.0, 50.0, 60.0)
    found.static()


def test_ticks_of_trials_are_whole_numbers(tmp_path):
    figure = drawn(tmp_path, [(0.1 * number, 0.0) for number in range(4)]).plotly()
    assert (figure.layout.xaxis.dtick, figure.layout.xaxis2.dtick) == (1, 1)
    assert [whole_step(length) for length in (1, 12, 13, 60, 100, 999)] == [1, 1, 2, 5, 10, 100]


def test_whole_steps_leave_few_ticks():
    assert all(length / whole_step(length) <= 12 for length in range(1, 5000, 7))
    assert whole_step(59) == pytest.approx(5)
