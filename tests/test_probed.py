"""What probes found is read as values, and stored as earlier versions stored it."""

from __future__ import annotations

from typing import Any

import optuna
import pytest

from dfmerge_studies.study.probed import BestPlace, Rechosen, ScoredLines, ScoredPlace, ScoredPlane

LINES = {"lambdas": [0.0, 1.0], "scores": {"red": [{"t": 0.25}, {"t": 0.75}]}}
RATIOS = {
    "ratios": [0.5, 1.0],
    "split": "test",
    "chosen": [[3, 0], [0, 0]],
    "scores": {"0": 0.75, "3": 0.5},
    "trials": [0, 1, 3],
}
PLANE: dict[str, Any] = {
    "experts": ["a b", "c"],
    "tasks": ["t"],
    "lambdas": [0.0, 1.0],
    "corners": [[2.0, 0.0], [0.5, 1.5]],
    "methods": {"gta": {"0 0": [0.0, 0.0, 0.25], "1 0": [2.0, 0.0, 0.5]}},
}


@pytest.fixture
def study() -> optuna.Study:
    return optuna.create_study()


def test_lines_are_kept_as_they_were(study: optuna.Study) -> None:
    assert ScoredLines.of(study) is None
    study.set_user_attr("dfmerge:probe:interpolation", LINES)
    found = ScoredLines.of(study)
    assert found == ScoredLines([0.0, 1.0], {"red": [{"t": 0.25}, {"t": 0.75}]})
    found.keep(study)
    assert study.user_attrs == {"dfmerge:probe:interpolation": LINES}


def test_choices_are_kept_as_they_were(study: optuna.Study) -> None:
    assert Rechosen.of(study) is None
    study.set_user_attr("dfmerge:probe:ratios", RATIOS)
    found = Rechosen.of(study)
    assert found is not None
    assert found.scores == {0: 0.75, 3: 0.5}
    found.keep(study)
    assert study.user_attrs == {"dfmerge:probe:ratios": RATIOS}


@pytest.mark.parametrize("more", [{}, {"best": {"method": "gta", "number": 7, "place": [1.0, 0.5]}}])
def test_planes_are_kept_as_they_were(study: optuna.Study, more: dict[str, Any]) -> None:
    assert ScoredPlane.of(study, 2, 0) is None
    study.set_user_attr("dfmerge:probe:landscape:2:0", {**PLANE, **more})
    found = ScoredPlane.of(study, 2, 0)
    assert found is not None
    assert found.methods["gta"][1, 0] == ScoredPlace(x=2.0, y=0.0, score=0.5)
    assert found.best == (BestPlace("gta", 7, (1.0, 0.5)) if more else None)
    assert not found.whole  # two of four
    found.keep(study, 2, 0)
    assert study.user_attrs == {"dfmerge:probe:landscape:2:0": {**PLANE, **more}}
