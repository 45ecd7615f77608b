"""`compute`: what products are computed in when models are scored; answers stay those of float32 but for near-ties."""

from __future__ import annotations

import pytest
import torch

from dfmerge_studies import InputError, StudySpec, load_problem
from dfmerge_studies.methods import METHODS
from dfmerge_studies.objective import computing
from dfmerge_studies.objective.merger import Merger
from dfmerge_studies.objective.problem import Problem
from dfmerge_studies.study.provenance import FINGERPRINT
from dfmerge_studies.study.session import open_study, stored_study
from dfmerge_studies.tasks import folding
from tests.project import Project

FAST = "dfmerge_studies.objective.computing.multiplies_bfloat16"
NEAR = 0.05  # of a loss: ten roundings to 8 bits, which these random models with their large weights add up


def losses(problem: Problem, compute: str) -> list[list[float]]:
    problem.spec = problem.spec.derive(compute=compute)
    merger = Merger(problem, METHODS["gta"], None)
    problem.resident.load_scaled_(0, 0.5)
    return [row for task in problem.tasks for row in merger.given(task, "validation")]


@pytest.mark.parametrize("family", ["t5", "bert", "llama"])
def test_in_bfloat16_a_model_takes_the_same_choices_but_for_near_ties(family, project_of) -> None:
    problem = load_problem(StudySpec.from_yaml(project_of(family).file))
    exact, rounded = losses(problem, "float32"), losses(problem, "bf16")
    assert exact != rounded  # it does something
    clear = [sorted(one)[1] - min(one) > NEAR * min(one) for one in exact]
    same = [one.index(min(one)) == other.index(min(other)) for one, other in zip(exact, rounded, strict=True)]
    assert sum(clear) > len(clear) / 4
    assert all(alike for alike, apart in zip(same, clear, strict=True) if apart)
    assert sum(same) > 0.8 * len(same)


def test_tf32_is_set_while_a_card_scores_and_not_after(project: Project, monkeypatch) -> None:
    spec = StudySpec.from_yaml(project.file, ["compute=tf32"])
    before = torch.get_float32_matmul_precision()
    with computing.computing(spec, torch.device("cuda")):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before
    with computing.computing(spec, torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize(("fast", "meant"), [(True, "bf16"), (False, "float32")])
def test_auto_is_what_the_hardware_multiplies_in_and_a_new_study_states_it(fast, meant, project, monkeypatch) -> None:
    monkeypatch.setattr(FAST, lambda device: fast)
    project.cli("run", "spec.yaml", "--trials", "1")
    assert stored_study(StudySpec.from_yaml(project.file)).user_attrs[FINGERPRINT]["compute"] == meant


def test_a_study_keeps_its_own_whatever_the_hardware_is(project: Project, monkeypatch) -> None:
    monkeypatch.setattr(FAST, lambda device: False)
    project.cli("run", "spec.yaml", "--trials", "1")
    monkeypatch.setattr(FAST, lambda device: True)  # another machine
    session = open_study(StudySpec.from_yaml(project.file))
    assert session.spec.compute == session.problem.spec.compute == "float32"
    refused = project.cli("run", "spec.yaml", "--set", "compute=bf16", check=2).stderr
    assert "compute: the study has 'float32', this run has 'bf16'" in refused


def test_a_study_of_before_is_one_of_float32(project: Project, monkeypatch) -> None:
    monkeypatch.setattr(FAST, lambda device: False)
    project.cli("run", "spec.yaml", "--trials", "1")
    study = stored_study(StudySpec.from_yaml(project.file))
    kept = dict(study.user_attrs[FINGERPRINT])
    del kept["compute"]
    study.set_user_attr(FINGERPRINT, kept)
    monkeypatch.setattr(FAST, lambda device: True)
    assert open_study(StudySpec.from_yaml(project.file)).spec.compute == "float32"
    assert "compute" in project.cli("run", "spec.yaml", "--set", "compute=bf16", check=2).stderr


def test_weights_of_another_type_are_computed_in_their_own(project: Project) -> None:
    with pytest.raises(InputError, match=r"compute: bf16 goes with dtype: float32"):
        StudySpec.from_yaml(project.file, ["dtype=bfloat16", "compute=bf16"])
    spec = StudySpec.from_yaml(project.file, ["dtype=bfloat16"])
    assert computing.with_compute(spec, torch.device("cpu")).compute == "auto"


def test_a_study_whose_weights_have_16_bits_asks_about_folding_when_it_loads_and_in_no_trial(
    project: Project, monkeypatch
) -> None:
    asked, ask = [], folding._ask
    monkeypatch.setattr(folding, "_ask", lambda *arguments: asked.append(1) or ask(*arguments))
    problem = load_problem(StudySpec.from_yaml(project.file, ["dtype=bfloat16"]))
    assert 1 <= len(asked) <= len(problem.tasks)
    before = len(asked)
    merger = Merger(problem, METHODS["gta"], None)
    for coefficient in (0.3, 0.7):
        merger.merge_(dict.fromkeys(problem.experts, coefficient))
        merger.scores("validation")
    assert len(asked) == before
