"""Which architectures work, against transformers' own forward and a loop in float64, and which are refused by name."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from dfmerge_studies.importance.task_fisher import task_fisher
from dfmerge_studies.tasks.encoding import Encoded, Kind
from dfmerge_studies.tasks.evaluate import choice_losses
from tests.models import FAMILIES, make_examples, make_model
from tests.project import make_project
from tests.test_fisher import loop_fisher, loop_losses
from tests.zoo import REFUSED, SUPPORTED, UNUSED, ZOO, family_of


@pytest.fixture
def animal(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an architecture, which is a family of `models` for the time of a test."""
    name = str(request.param)
    monkeypatch.setitem(FAMILIES, name, family_of(name))
    return name


def made(name: str) -> tuple[PreTrainedModel, list[Encoded]]:
    model = make_model(name, torch.float64)
    if hasattr(model.config, "_experts_implementation"):
        model.set_experts_implementation("eager")  # the others know no float64
    examples = make_examples(name)
    if FAMILIES[name].kind is Kind.TEXT_TO_TEXT:  # BART and its kin look for the end
        examples = [replace(e, choices=tuple(c if c[-1] == 1 else (*c, 1) for c in e.choices)) for e in examples]
    return model, examples


@pytest.mark.parametrize("animal", SUPPORTED, indirect=True)
def test_scores_are_those_of_the_models_own_forward_however_inputs_share_batches(animal: str) -> None:
    family, (model, examples) = FAMILIES[animal], made(animal)
    with torch.no_grad():
        expected = [loop_losses(model, family.kind, example).tolist() for example in examples]
    for budget in (1, 100_000):
        found = choice_losses(model, family.kind, examples, pad_id=family.pad_id, token_budget=budget)
        for left, right in zip(found, expected, strict=True):  # some compute positions or states in float32
            assert left == pytest.approx(right, rel=1e-5, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("animal", SUPPORTED, indirect=True)
def test_importance_is_that_of_a_loop_over_single_rows(animal: str, caplog: pytest.LogCaptureFixture) -> None:
    family, (model, examples) = FAMILIES[animal], made(animal)
    examples = examples[:4]
    out = UNUSED.get(animal, ())
    names = [name for name, _ in model.named_parameters() if not any(part in name for part in out)]
    found = task_fisher(model, family.kind, examples, pad_id=family.pad_id, names=names).values
    expected = loop_fisher(model, family.kind, examples, names=names)
    whole = torch.stack([value.norm() for value in expected.values()]).norm()
    for name, value in expected.items():
        error = (found[name] - value).norm()
        assert error <= 1e-5 * value.norm() + 1e-9 * whole, f"{name}: {float(error / value.norm()):.1e}"
    slow = any("one row at a time" in record.getMessage() for record in caplog.records)
    assert slow is ZOO[animal].slow


@pytest.mark.slow
@pytest.mark.parametrize("animal", ["opt", "mixtral", "bart", "deberta-v2", "mpnet"], indirect=True)
def test_what_validate_passes_runs(animal: str, tmp_path: Path) -> None:
    project = make_project(tmp_path / "project", animal, rows=6, samples=2, trials=1)
    assert project.json("validate", "spec.yaml")["ok"] is True
    assert project.json("run", "spec.yaml")["trials"]["complete"] == 1


@pytest.mark.parametrize("animal", REFUSED, indirect=True)
def test_what_cannot_be_scored_is_refused_by_name_before_anything_is_stored(animal: str, tmp_path: Path) -> None:
    project = make_project(tmp_path / "project", animal, rows=6, samples=2, trials=1)
    problems = project.cli("validate", "spec.yaml", "--json", check=2).stdout
    assert re.search(ZOO[animal].refused or "", problems), problems
    for command in (
        ("run", "spec.yaml"),
        ("merge", "spec.yaml", "--coefficients", "0.5", "--out", "out"),
        ("fisher", "spec.yaml", "--expert", "red", "--out", "out"),
    ):
        refused = project.cli(*command, check=2).stderr
        assert re.search(ZOO[animal].refused or "", refused), refused
    assert not list(project.folder.rglob("*.db"))
    assert not (project.folder / "out").exists()


@pytest.mark.parametrize("animal", ["fnet"], indirect=True)
def test_a_merge_without_importance_asks_nothing_of_models_that_cannot_be_scored(animal: str, tmp_path: Path) -> None:
    project = make_project(tmp_path / "project", animal, rows=6, samples=2, trials=1)
    project.cli("merge", "spec.yaml", "--method", "averaging", "--out", "out")
    assert (project.folder / "out" / "config.json").is_file()
