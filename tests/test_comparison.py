"""Comparisons: which studies they are made of, what they share, what they take over from earlier runs."""

from __future__ import annotations

import pytest

from dfmerge_studies import InputError, StudySpec, compare, load_problem
from dfmerge_studies.objective.derive import derive_problem


def test_a_problem_derived_for_another_seed_is_the_one_that_would_be_loaded(project):
    tasks = {name: {**task, "limit": 9} for name, task in project.spec["tasks"].items()}
    project.write(tasks=tasks, importance={"samples": 6, "indices": {"red": [1, 2, 3]}})
    spec = StudySpec.from_yaml(project.file)
    problem = load_problem(spec)
    problem.reference_scores["base", "validation"] = {"red": 0.5}
    problem.reference_scores["base", "test"] = {"red": 0.25}
    other = spec.derive(search={"seed": 1})
    derived, loaded = derive_problem(problem, other), load_problem(other)
    assert derived.fisher_indices() == loaded.fisher_indices() != problem.fisher_indices()
    assert derived.fisher_indices()["red"] == [1, 2, 3]
    assert derived.data_digests() == loaded.data_digests() != problem.data_digests()
    assert derived.data_digests("test") == problem.data_digests("test")
    assert derived.resident is problem.resident
    assert derived.reference_scores == {("base", "test"): {"red": 0.25}}  # of the rows that are still the same
    same_seed = derive_problem(problem, spec.derive(method="gta"))
    assert same_seed.reference_scores == problem.reference_scores
    stored = {"red": [5], "blue": [7, 8]}
    assert derive_problem(problem, other, indices=stored).fisher_indices() == stored


def test_a_problem_is_not_derived_for_other_models(project):
    spec = StudySpec.from_yaml(project.file)
    problem = load_problem(spec)
    for changes in ({"experts": {"red": "blue", "blue": "red"}}, {"dtype": "bfloat16"}, {"base": "red"}):
        with pytest.raises(InputError, match="those of another spec"):
            derive_problem(problem, spec.derive(**changes))


def test_studies_that_run_has_made_are_taken_as_they_are(project):
    project.write(baselines=["averaging", "task-arithmetic"])
    printed = project.json("run", "spec.yaml")
    run = {row["name"].split()[0]: row["test"]["tasks"] for row in printed["rows"]}
    before = project.files()
    found = compare(StudySpec.from_yaml(project.file), ["df-merge", "averaging", "task-arithmetic"])
    assert {entry.variant: entry.study for entry in found.entries} == {
        "df-merge": "colours",
        "averaging": "colours.averaging",
        "task-arithmetic": "colours.task-arithmetic",
    }
    assert {entry.variant: entry.scores["test"] for entry in found.entries} == {
        name: run[name] for name in run if name in found.variants
    }
    assert found.references["zero-shot"][0]["test"] == run["base,"]
    assert found.references["fine-tuned"][0]["test"] == run["each"]
    assert project.files() == before
