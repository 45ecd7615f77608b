"""Any cell of the method table, spelled by its choices, in specs, commands, studies and merges."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import jsonschema
import pytest
import torch

from dfmerge_studies import StudySpec, load_problem, merge, merge_models, optimize_merge
from dfmerge_studies.errors import InputError
from dfmerge_studies.importance.cache import open_cache
from dfmerge_studies.methods import METHODS, SHARED, Coefficients, cell_of, find_method, with_coefficients
from dfmerge_studies.objective.merger import Merger
from dfmerge_studies.spec.schema import spec_schema
from dfmerge_studies.study.fingerprint import stated_fingerprint
from dfmerge_studies.study.plan import Plan
from dfmerge_studies.study.session import stored_study
from dfmerge_studies.tasks.sampling import torch_generator
from dfmerge_studies.transforms import TRANSFORMS, Moved, start_of

TIES_FISHER = {"transform": "ties", "importance": "fisher-at-scaled-expert", "coefficients": "per-expert"}
NAME = "ties_fisher-at-scaled-expert_per-expert"
OWN = {"dare": {"drop_rate": 0.5}, "della": {"drop_rate": 0.5}}  # of methods that try several


@pytest.mark.parametrize("row", [row for row in METHODS.values() if not (row.estimator or row.scale)], ids=str)
def test_a_cell_that_a_row_is_has_the_row_s_name(row):
    words = {"importance": row.importance.word, "coefficients": row.coefficients.word}
    assert cell_of({"transform": row.transform, **words}) is row
    if row.transform != "identity":
        assert cell_of({"transform": row.name, **words}) is row


def test_a_cell_that_no_row_is_has_a_name_that_means_it():
    found = cell_of(TIES_FISHER)
    assert found.name == NAME
    assert found == find_method(NAME)
    assert (found.transform, found.paper) == (METHODS["ties"].transform, METHODS["ties"].paper)
    assert find_method("ties_fisher-at-scaled-expert_often") is None
    assert find_method("tie") is None


def test_grids_of_parameters_become_ranges_where_coefficients_are_searched():
    searched = with_coefficients(METHODS["dare"], Coefficients.PER_EXPERT)
    assert searched.space(["a"], (0.0, 1.0), None).own == {"drop_rate": (0.1, 0.9)}
    assert searched.complete({}) == {"drop_rate": 0.5}
    assert with_coefficients(METHODS["gta"], Coefficients.SHARED_GRID) is METHODS["task-arithmetic"]
    shared = cell_of({**TIES_FISHER, "coefficients": "shared"})
    assert shared.grid == {SHARED: METHODS["ties"].shared}
    assert cell_of({"importance": "fisher-at-expert", "coefficients": "shared"}).grid == METHODS["task-arithmetic"].grid


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({"transform": "tie"}, ["method", "there is no transform 'tie'", "Did you mean 'ties'?"]),
        ({"importance": "fisher"}, ["there is no importance 'fisher'", "fisher-at-expert"]),
        ({"coefficients": "one"}, ["there is no coefficients 'one'", "fixed, shared, per-expert"]),
        ({"coefficient": "fixed"}, ["a method has no 'coefficient'", "Did you mean 'coefficients'?"]),
        ({"transform": ["ties"]}, ["there is no transform ['ties']"]),
        ("df-marge", ["found 'df-marge'", "did you mean 'df-merge'?"]),
        ("gta_fisher_fixed", ["found 'gta_fisher_fixed'"]),
        ([], ["method"]),
        (7, ["method", "found 7"]),
    ],
)
def test_what_is_no_cell_is_refused_by_name(project, method: Any, words: list[str]):
    project.write(method=method)
    with pytest.raises(InputError) as caught:
        StudySpec.from_yaml(project.file)
    for word in words:
        assert word in str(caught.value)


def test_a_cell_of_one_trial_needs_a_value_of_what_would_be_tried(project):
    project.write(method={"transform": "dare", "coefficients": "fixed"})
    refused = project.cli("run", "spec.yaml", "--no-test", check=2).stderr
    assert "has one trial and no value of the drop rate" in refused
    assert "{dare_uniform_fixed: {drop_rate: 0.5}}" in refused
    spec = StudySpec.from_yaml(project.write(method={"transform": "dare", "coefficients": "fixed"}, parameters=OWN))
    assert Plan.of(spec).trials == 1
    assert spec.row.complete({}) == {"drop_rate": 0.5}


def test_a_cell_has_the_parameters_of_its_transform_s_row_and_its_own_before_them(project):
    given = {"ties": {"density": 0.3}}
    project.write(method=TIES_FISHER, parameters=given)
    assert StudySpec.from_yaml(project.file).row.complete({}) == {"density": 0.3}
    project.write(method=TIES_FISHER, parameters={**given, NAME: {"density": [0.4, 0.8]}})
    spec = StudySpec.from_yaml(project.file)
    assert spec.row.space(["a"], (0.0, 1.0), None).own == {"density": (0.4, 0.8)}
    assert stated_fingerprint(spec)["parameters"] == {"density": [0.4, 0.8]}
    project.write(method=TIES_FISHER, parameters={"ties": {"density": [0.1, 0.2, 0.3]}})
    with pytest.raises(InputError, match=r"parameters.ties: .* the two ends of a range"):
        StudySpec.from_yaml(project.file)


def test_search_per_expert_searches_where_a_method_has_one_shared_value(project):
    spec = StudySpec.from_yaml(project.write(method="ties", search="per-expert"))
    assert Plan.of(spec).space.names == ("red", "blue")
    assert Plan.of(spec).trials == spec.search.trials
    stated = stated_fingerprint(spec)
    usual = stated_fingerprint(spec.derive(search={"coefficients": "method"}))
    assert (stated["method"], usual["method"]) == ("ties_uniform_per-expert", "ties")
    assert spec.derive(method="averaging").row is METHODS["averaging"]
    assert spec.derive(method="task-arithmetic").row is METHODS["gta"]
    with pytest.raises(InputError, match="is the method itself"):
        StudySpec.from_yaml(project.write(method="gta", search="per-expert", baselines=["task-arithmetic"]))


@pytest.mark.parametrize("importance", ["uniform", "fisher-at-expert", "fisher-at-scaled-expert"])
@pytest.mark.parametrize("transform", ["dare", "ties", "breadcrumbs", "della", "lore"])
def test_every_transform_is_merged_under_every_importance_by_the_equation(project, transform: str, importance: str):
    """theta_pre + M (sum C)^-1 sum C lam Phi(tau); C is at theta_pre + lam tau, of the expert, not of its transform."""
    problem = load_problem(StudySpec.from_yaml(project.file).derive(dtype="float64", parameters=OWN))
    cell = cell_of({"transform": transform, "importance": importance})
    lam = {"red": 0.4, "blue": 0.9}
    row = problem.spec.row_of(cell.name)
    fishers = []
    for index, expert in enumerate(problem.experts):
        at = lam[expert] if importance.endswith("scaled-expert") else 1.0
        fishers.append(Merger(problem, METHODS["df-merge"], None).importance(index, at)[0])
    vectors = problem.resident.task_vectors
    drawn = partial(torch_generator, problem.spec.search.seed)
    phi = TRANSFORMS[row.transform].prepare(vectors, drawn)(row.complete({}))
    start = {name: value.clone() for name, value in start_of(phi, problem.resident.base).items()}
    assert isinstance(phi, Moved) == (transform == "lore")
    merge(problem, lam, method=cell.name)
    merged = dict(problem.resident.model.named_parameters())
    for name in problem.resident.base:
        if importance == "uniform":
            weights = [torch.ones_like(start[name])] * 2
        else:
            weights = [fisher[name].double() + problem.spec.importance.floor for fisher in fishers]
        steps = [w * lam[v.expert] * v.deltas[name] for w, v in zip(weights, phi, strict=True) if name in v.deltas]
        step = sum(steps) * 2 / sum(weights)
        # Fishers are float32, and a transform keeps its own precision.
        torch.testing.assert_close(merged[name].detach(), start[name] + step, rtol=1e-6, atol=1e-7)


def test_cells_that_differ_in_the_transform_alone_share_their_fishers(project, tmp_path):
    problem, cache = load_problem(StudySpec.from_yaml(project.file)), open_cache(str(tmp_path / "fishers"), tmp_path)
    point = {"red": 0.4, "blue": 0.9}
    first = merge(problem, point, method="df-merge", cache=cache)
    other = merge(problem, point, method=NAME, cache=cache)
    assert (first.computed, other.computed, other.cached) == (2, 0, 2)


@pytest.mark.slow
def test_a_study_of_a_cell_is_run_resumed_shown_exported_and_merged_again(project):
    project.write(method=TIES_FISHER, parameters={"ties": {"density": [0.3, 0.9]}}, search={"trials": 3})
    printed = project.json("run", "spec.yaml", "--no-test")
    assert printed["method"] == NAME
    assert printed["rows"][-1]["density"] == printed["best"]["density"]
    study = stored_study(StudySpec.from_yaml(project.file))
    assert {"red", "blue", "density"} == set(study.trials[0].params)
    assert NAME in project.cli("status", "spec.yaml").stdout
    exported = project.json("export", "spec.yaml", "--out", "merged")
    lam = ",".join(f"{name}={value!r}" for name, value in exported["coefficients"].items())
    assert f"--method {NAME}" in (project.folder / "merged/README.md").read_text()
    again = ["merge", "spec.yaml", "--out", "again", "--method", NAME, "--coefficients", lam]
    assert project.json(*again, "--density", exported["density"])["digest"] == exported["digest"]
    refused = project.cli("run", "spec.yaml", "--set", "method=df-merge", check=2).stderr
    assert f"method: the study has '{NAME}', this run has 'df-merge'" in refused


def test_cells_are_baselines_and_are_compared(project):
    cell = {"transform": "breadcrumbs", "importance": "fisher-at-expert", "coefficients": "fixed"}
    name = "breadcrumbs_fisher-at-expert_fixed"
    project.write(method="averaging", baselines=[cell])
    shown = {row["name"].split()[0] for row in project.json("run", "spec.yaml", "--no-test")["rows"]}
    assert name in shown
    table = project.json("compare", "spec.yaml", "--methods", f"averaging,{name}", "--split", "validation")
    assert [row["method"] for row in table["rows"] if row["merged"]] == ["averaging", name]
    assert "unknown method" in project.cli("compare", "spec.yaml", "--methods", "lore_fisher", check=2).stderr


def test_models_in_memory_are_searched_per_expert_and_merged_by_cells():
    base, a, b = (torch.nn.Linear(3, 2) for _ in range(3))
    experts = {"a": a, "b": b}

    def score(model: torch.nn.Linear) -> float:
        return -float(model.weight.detach().sum() ** 2)

    found = optimize_merge(base, experts, score, method="ties", trials=3, coefficients="per-expert", sampler="random")
    assert set(found.study.trials[0].params) == {"a", "b"}
    cell = merge_models(base, experts, {"a": 0.3, "b": 1.1}, method="ties_uniform_per-expert")
    ties = merge_models(base, experts, {"a": 0.3, "b": 1.1}, method="ties")
    assert torch.equal(cell.weight, ties.weight)
    with pytest.raises(InputError, match="random tokens need the models of a spec"):
        optimize_merge(base, experts, score, method="gta", trials=3, enqueue=["fisher-trace"])


def test_editors_know_the_words_of_a_cell():
    schema = jsonschema.Draft202012Validator(spec_schema()["properties"]["method"])
    for sound in ("df-merge", NAME, TIES_FISHER, {"transform": "lore"}):
        assert schema.is_valid(sound), sound
    for odd in ("df-marge", {"transform": "tie"}, {"importanc": "uniform"}, 7):
        assert not schema.is_valid(odd), odd
    assert json.dumps(spec_schema())
