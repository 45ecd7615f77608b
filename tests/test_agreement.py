"""The objective that needs no labels, on data files that have none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dfmerge_studies import StudySpec
from dfmerge_studies.report.view import StudyView
from dfmerge_studies.study.session import stored_study
from tests.project import EXPERTS, Project
from tests.test_study import completed


def without_labels(project: Project, *splits: str) -> None:
    """Take the labels out of the data files of some splits."""
    for task in EXPERTS:
        for split in splits:
            file = project.folder / f"{task}.{split}.jsonl"
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            file.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "label"}) + "\n" for row in rows))


def classes(model: Any, tokenizer: Any, file: Path) -> list[int]:
    """What a classifier answers, one text at a time."""
    answers = []
    for line in file.read_text().splitlines():
        inputs = tokenizer(json.loads(line)["input"], return_tensors="pt", truncation=True, max_length=32)
        with torch.no_grad():
            answers.append(int(model(**inputs).logits.argmax()))
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", "gpt2", "bert"])
def test_a_study_without_validation_labels_is_scored_by_agreement_and_its_test_by_accuracy(project_of, family):
    project = project_of(family)
    without_labels(project, "validation")
    project.write(objective="agreement", search={"trials": 3, "startup_trials": 2, "max_drop": 40, "sampler": "gp"})
    printed = project.json("run", "spec.yaml")
    assert printed["metric"] == "agreement"
    assert printed["metrics"] == {"validation": "agreement", "test": "accuracy"}
    rows = {row["name"].split()[0]: row for row in printed["rows"]}
    assert rows["each"]["validation"]["tasks"] == {"red": 1.0, "blue": 1.0}
    assert rows["each"]["test"]["mean"] < 1.0
    best = printed["best"]
    assert best["value"] == pytest.approx(sum(best["tasks"].values()) / 2)
    assert best["drops"] == pytest.approx({task: 100 * (1 - score) for task, score in best["tasks"].items()}, abs=1e-3)
    assert "(agreement)" in project.cli("status", "spec.yaml").stdout
    view = StudyView.of(stored_study(StudySpec.from_yaml(project.file)))
    assert {split: view.metrics(split).text for split in ("validation", "test")} == printed["metrics"]

    project.json("export", "spec.yaml", "--out", "merged")
    card = ModelCard.load(project.folder / "merged/README.md")
    kinds = {(result.dataset_split, result.metric_type) for result in card.data.eval_results}
    assert kinds == {("validation", "agreement"), ("test", "accuracy")}
    assert "Validation: agreement in percent; test: accuracy in percent" in card.text
    scores = project.json("evaluate", "spec.yaml", "--model", "merged")["tasks"]
    assert {task: entry["score"] for task, entry in scores.items()} == best["tasks"]
    assert {entry["metric"] for entry in scores.values()} == {"agreement"}
    if family == "bert":
        assert best["tasks"] == pytest.approx(_agreement_of_classifiers(project))


def _agreement_of_classifiers(project: Project) -> dict[str, float]:
    tokenizer = AutoTokenizer.from_pretrained(project.folder / "base")
    shares = {}
    for task in EXPERTS:
        expert = AutoModelForSequenceClassification.from_pretrained(project.folder / task)
        merged = AutoModelForSequenceClassification.from_pretrained(
            project.folder / "merged", num_labels=expert.config.num_labels
        )
        merged.load_state_dict(load_file(project.folder / f"merged/heads/{task}.safetensors"), strict=False)
        file = project.folder / f"{task}.validation.jsonl"
        pairs = list(zip(classes(merged, tokenizer, file), classes(expert, tokenizer, file), strict=True))
        shares[task] = sum(one == other for one, other in pairs) / len(pairs)
    return shares


@pytest.mark.slow
def test_with_no_label_anywhere_a_study_runs_is_extended_and_equals_an_uncut_one(project):
    without_labels(project, "validation", "test")
    tasks = {name: {**task, "doc_to_target": None} for name, task in project.spec["tasks"].items()}
    project.write(objective="agreement", tasks=tasks, search={"startup_trials": 2, "sampler": "gp"})
    assert project.json("validate", "spec.yaml")["ok"]
    for total in ("2", "4"):
        printed = project.json("run", "spec.yaml", "--trials", total)
    assert printed["metrics"] == {"validation": "agreement", "test": "agreement"}
    assert StudyView.of(stored_study(StudySpec.from_yaml(project.file))).metrics("test").text == "agreement"
    assert 0 < printed["rows"][-1]["test"]["mean"] <= 1
    cut = completed(project)
    (project.folder / "colours.db").unlink()
    project.json("run", "spec.yaml", "--trials", "4", "--no-test")
    assert completed(project) == cut


@pytest.mark.slow
def test_labels_that_are_there_do_not_change_an_agreement_study(project):
    project.write(objective="agreement")
    labelled = project.json("run", "spec.yaml", "--trials", "2", "--no-test")["best"]
    without_labels(project, "validation")
    bare = project.json("run", "spec.yaml", "--trials", "2", "--no-test", "--set", "name=bare")["best"]
    assert bare["tasks"] == labelled["tasks"]
    assert "label" in project.cli("run", "spec.yaml", "--set", "objective=mean", "--set", "name=m", check=2).stderr
