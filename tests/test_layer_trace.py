"""Coefficients of layers from the trace of the Fisher information on random tokens, as a row and as a first point."""

from __future__ import annotations

import math
from statistics import fmean, pstdev

import pytest
import torch

from dfmerge_studies import StudySpec, load_problem, merge
from dfmerge_studies.errors import InputError
from dfmerge_studies.methods import METHODS
from dfmerge_studies.objective.layer_trace import SEQUENCES, coefficients_from, layer_coefficients_, random_inputs
from dfmerge_studies.objective.merger import Merger
from dfmerge_studies.study.session import stored_study
from dfmerge_studies.tasks.encoding import Kind
from dfmerge_studies.trials.marks import place_of
from tests.project import Project, load_parameters


def test_a_layer_with_a_larger_trace_and_a_larger_change_has_a_smaller_coefficient():
    found = coefficients_from({"a": 4.0, "b": 1.0, "c": 0.25}, {"a": 2.0, "b": 2.0, "c": 2.0})
    logs = [math.log(8.0), math.log(2.0), math.log(0.5)]
    expected = [1 - 1 / (1 + math.exp(-(x - fmean(logs)) / pstdev(logs))) for x in logs]
    assert list(found.values()) == pytest.approx(expected)
    assert found["a"] < found["b"] < found["c"]


def test_the_scale_of_trace_and_change_does_not_matter_and_layers_that_are_alike_get_one_half():
    traces, sizes = {"a": 4.0, "b": 1.0}, {"a": 2.0, "b": 7.0}
    scaled = coefficients_from({k: 9 * v for k, v in traces.items()}, {k: 0.1 * v for k, v in sizes.items()})
    assert scaled == pytest.approx(coefficients_from(traces, sizes))
    assert coefficients_from({"a": 3.0, "b": 3.0}, {"a": 1.0, "b": 1.0}) == {"a": 0.5, "b": 0.5}
    assert coefficients_from({"a": 3.0, "b": 3.0}, {"a": 0.0, "b": 0.0}) == {"a": 0.5, "b": 0.5}
    assert coefficients_from({"a": 3.0, "b": 9.0, "c": 1.0}, {"a": 1.0, "b": 0.0, "c": 1.0})["b"] == 0.5


def slow_traces(problem, task: str, groups) -> dict[str, float]:
    """One backward pass for each sequence (and class) through transformers' own losses."""
    resident = problem.resident
    resident.load_base_()
    resident.use_head_(task)
    model, kind = resident.model.requires_grad_(True), problem.kinds[task]
    parameters = dict(model.named_parameters())
    names = [name for members in groups.values() for name in members]
    total = {name: torch.zeros_like(parameters[name]) for name in names}
    for example in random_inputs(problem, kind):
        ids = torch.tensor([example.input_ids])
        if kind is Kind.CLASSIFICATION:
            probabilities = model(input_ids=ids).logits.softmax(-1)[0].detach()
            weighed = [
                (float(p), -model(input_ids=ids).logits.log_softmax(-1)[0, c]) for c, p in enumerate(probabilities)
            ]
        elif kind is Kind.TEXT_TO_TEXT:
            weighed = [(1.0, model(input_ids=ids, labels=torch.tensor([example.choices[0]])).loss)]
        else:
            whole = torch.tensor([example.input_ids + example.choices[0]])
            weighed = [(1.0, model(input_ids=whole, labels=whole).loss)]
        for weight, loss in weighed:
            for name, g in zip(names, torch.autograd.grad(loss, [parameters[n] for n in names]), strict=True):
                total[name] += weight * g.square() / SEQUENCES
    model.requires_grad_(False)
    return {group: sum(float(total[name].sum()) for name in members) for group, members in groups.items()}


@pytest.mark.parametrize("family", ["t5", "gpt2", "bert"])
def test_traces_are_those_of_one_backward_pass_a_sequence(project_of, family: str):
    problem = load_problem(StudySpec.from_yaml(project_of(family).file).derive(dtype="float64"))
    found = layer_coefficients_(problem, problem.layers)
    assert {"embeddings", "block1", "block2"} <= set(problem.layers)
    for vector in problem.resident.task_vectors:
        traces = slow_traces(problem, vector.expert, problem.layers)
        sizes = {g: sum(float(vector.deltas[n].square().sum()) for n in ns) for g, ns in problem.layers.items()}
        assert found[vector.expert] == pytest.approx(coefficients_from(traces, sizes), rel=1e-6)
    assert layer_coefficients_(problem, problem.layers) == found


def test_tokens_are_drawn_from_the_seed_and_are_none_of_the_task_s_and_no_padding(project):
    problem = load_problem(StudySpec.from_yaml(project.file))
    found = random_inputs(problem, Kind.TEXT_TO_TEXT)
    assert len(found) == 8
    assert len({example.input_ids for example in found}) == 8
    assert all(problem.pad_id not in example.input_ids for example in found)
    other = load_problem(problem.spec.derive(search={"seed": 1}))
    assert random_inputs(other, Kind.TEXT_TO_TEXT)[0] != found[0]


@pytest.mark.slow
def test_the_method_has_one_trial_that_is_exported_and_merged_again(project: Project):
    project.write(method="fim", search={"trials": 9})
    printed = project.json("run", "spec.yaml", "--no-test")
    assert printed["trials"]["complete"] == 1
    groups = printed["best"]["groups"]
    exported = project.json("export", "spec.yaml", "--out", "merged")
    assert exported["groups"] == groups
    card = (project.folder / "merged/README.md").read_text()
    assert "--method fim --set search.seed=0" in card
    assert project.json("merge", "spec.yaml", "--out", "again")["digest"] == exported["digest"]
    refused = project.cli("merge", "spec.yaml", "--out", "more", "--coefficients", "0.3", check=2).stderr
    assert "the method 'fim' has its own" in refused
    project.cli("report", "spec.yaml", "--out", "page")
    problem = load_problem(StudySpec.from_yaml(project.file))
    base, merged = (load_parameters(project.folder / name) for name in ("base", "merged"))
    experts = {name: load_parameters(project.folder / name) for name in ("red", "blue")}
    for group, names in problem.layers.items():
        for name in set(names) & set(base):
            steps = [groups[e][group] * (experts[e][name] - base[name]) for e in experts]
            torch.testing.assert_close(merged[name], base[name] + sum(steps), rtol=1e-4, atol=1e-5)


def test_its_coefficients_go_with_any_transform_and_importance(project):
    problem = load_problem(StudySpec.from_yaml(project.file))
    own = merge(problem, method="fim").tasks
    cell = "ties_fisher-at-scaled-expert_fisher-trace"
    assert merge(problem, method=cell).computed == 2
    with pytest.raises(InputError, match="has its own"):
        merge(problem, {"red": 1.0, "blue": 1.0}, method="fim")
    point = Merger(problem, METHODS["fim"], None).traced_point()
    assert merge(problem, method="identity_uniform_fisher-trace").tasks == own
    assert set(point.groups) == {"red", "blue"}


@pytest.mark.slow
def test_a_search_by_groups_tries_them_first_and_keeps_them(project):
    search = {"trials": 4, "startup_trials": 2, "sampler": "gp", "granularity": {"blocks": 2}}
    project.write(method="gta", search={**search, "enqueue": ["fisher-trace"]})
    project.json("run", "spec.yaml", "--no-test")
    spec = StudySpec.from_yaml(project.file)
    trial = next(t for t in stored_study(spec).trials if place_of(t) == 1)
    problem = load_problem(spec)
    expected = layer_coefficients_(problem, problem.groups)
    for expert, groups in expected.items():
        for group, value in groups.items():
            assert trial.params[f"{expert}.{group}"] == pytest.approx(value)
    before = len(stored_study(spec).trials)
    project.json("run", "spec.yaml", "--no-test")
    assert len(stored_study(spec).trials) == before
    project.write(method="gta", search={"enqueue": ["fisher-trace"]})
    refused = project.cli("validate", "spec.yaml", check=2).stderr
    assert "'fisher-trace' is a coefficient for each group of parameters" in refused
    project.write(method="gta", search={"enqueue": ["fisher-trac"]})
    assert "search.enqueue.0" in project.cli("validate", "spec.yaml", check=2).stderr
