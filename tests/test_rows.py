"""What a trial keeps of its validation rows."""

from __future__ import annotations

import random
from statistics import fmean
from typing import Any

import pytest

from dfmerge_studies.spec import StudySpec
from dfmerge_studies.study.probes import row_scores
from dfmerge_studies.study.rows import LONGEST, packed, rows_attribute, trial_rows, unpacked
from dfmerge_studies.study.session import open_study
from dfmerge_studies.trials.marks import ROWS
from tests.project import Project


def trial_rows_of(attribute: dict[str, Any]) -> dict[str, list[float]]:
    return unpacked(attribute[ROWS])


def test_rows_that_are_right_or_wrong_take_a_bit_each_and_come_back_exactly() -> None:
    scores = {"a": [float(random.Random(1).random() < 0.5) for _ in range(403)], "b": [1.0], "c": []}
    kept = packed(scores)
    assert unpacked(kept) == scores
    assert len(kept["a"]["bits"]) == 2 * 51


def test_other_rows_come_back_to_the_precision_of_a_float32() -> None:
    scores = {"a": [-0.1, -2.75, -1e-9, -80.0]}
    assert unpacked(packed(scores))["a"] == pytest.approx(scores["a"], rel=1e-7)


def test_rows_that_an_earlier_version_kept_in_double_precision_are_read() -> None:
    import numpy as np

    kept = {"a": {"rows": 2, "values": np.array([0.1, -3.0], dtype="<f8").tobytes().hex()}}
    assert unpacked(kept) == {"a": [0.1, -3.0]}


@pytest.mark.parametrize(("levels", "digits"), [(2, 1), (3, 1), (16, 1), (17, 2), (256, 2)])
def test_rows_of_few_numbers_take_a_digit_or_two_each_beside_the_numbers(levels: int, digits: int) -> None:
    numbers = [(level - 7) / 16 for level in range(levels)]  # exact in a float32
    scores = {"a": [*numbers, *random.Random(2).choices(numbers, k=2000)]}
    kept = packed(scores)
    assert unpacked(kept) == scores
    assert len(kept["a"]["levels"]) == 8 * levels
    assert len(kept["a"]["codes"]) == digits * (2000 + levels)


def test_rows_of_more_numbers_or_of_hardly_fewer_than_rows_are_kept_one_by_one() -> None:
    for count in (4, 257):
        numbers = [level / 16 - 7 for level in range(count)]
        scores = {"a": numbers * (1 if count == 4 else 9)}
        assert unpacked(packed(scores)) == scores
        assert packed(scores)["a"].keys() == {"rows", "floats"}


def test_rows_that_would_swell_the_study_are_not_kept_but_those_of_other_tasks_are() -> None:
    many = [float(row) for row in range(LONGEST // 8)]
    assert trial_rows_of(rows_attribute({"a": many})) == {"a": many}
    assert rows_attribute({"a": [*many, -1.0]}) == {}
    bits = [1.0, 0.0] * 9
    assert trial_rows_of(rows_attribute({"a": many, "b": bits, "c": [0.5]})) == {"b": bits, "c": [0.5]}
    assert rows_attribute({}) == {}


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["accuracy", "log_likelihood"])
def test_every_trial_keeps_its_rows_and_their_mean_is_its_score(project: Project, metric: str) -> None:
    tasks = {name: {**task, "metric": metric} for name, task in project.spec["tasks"].items()}
    project.write(tasks=tasks)
    project.cli("run", "spec.yaml", "--set", "search.trials=2", "--no-test")
    session = open_study(StudySpec.from_yaml(project.file))
    for trial in session.study.trials:
        rows = trial_rows(trial)
        assert {task: len(row) for task, row in rows.items()} == {"red": 24, "blue": 24}
        means = {task: sum(row) / len(row) for task, row in rows.items()}
        assert means == pytest.approx(trial.user_attrs["tasks"], rel=1e-6)
        assert row_scores(session, trial) == rows


@pytest.mark.slow
def test_a_score_that_is_no_mean_over_rows_keeps_what_each_row_makes_of_it(project_of: object) -> None:
    project = project_of("bert")  # type: ignore[operator]
    tasks = {name: dict(task) for name, task in project.spec["tasks"].items()}
    tasks["red"]["metric"] = "mcc"
    project.write(tasks=tasks)
    project.cli("run", "spec.yaml", "--set", "search.trials=1", "--no-test")
    (trial,) = open_study(StudySpec.from_yaml(project.file)).study.trials
    assert list(trial.user_attrs[ROWS]) == ["red", "blue"]
    assert fmean(trial_rows(trial)["red"]) == pytest.approx(trial.user_attrs["tasks"]["red"], abs=1e-6)
