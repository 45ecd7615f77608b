"""`--split-heads`: a folder per task that transformers opens without us, beside the shared encoder with its heads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from tests.project import Project

MERGE = ("merge", "spec.yaml", "--coefficients", "red=0.3,blue=0.8", "--method", "gta", "--split-heads")
TEXT = "the river was quiet"


@pytest.fixture
def bert(project_of) -> Project:
    return project_of("bert")


def named(project: Project) -> None:
    """Let the head of red name its classes, and the data of blue its own."""
    file = project.folder / "red/config.json"
    config = json.loads(file.read_text())
    names = ["warm", "cold", "neither"]
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    file.write_text(json.dumps(config))
    tasks = json.loads(json.dumps(project.spec["tasks"]))
    tasks["blue"]["doc_to_choice"] = ["no", "yes"]
    project.write(tasks=tasks)


def test_each_folder_is_a_classifier_with_the_merged_encoder_and_the_task_s_own_head(bert: Project):
    named(bert)
    bert.cli(*MERGE, "--out", "merged")
    out = bert.folder / "merged"
    encoder = load_file(out / "model.safetensors")
    for task, labels in (("red", ["warm", "cold", "neither"]), ("blue", ["no", "yes"])):
        model = AutoModelForSequenceClassification.from_pretrained(out / task)
        assert model.config.id2label == dict(enumerate(labels))
        assert model.config.label2id == {label: number for number, label in enumerate(labels)}
        head = load_file(out / f"heads/{task}.safetensors")
        assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in head.items())
        shared = {f"bert.{name}": tensor for name, tensor in encoder.items() if f"bert.{name}" not in head}
        assert shared
        assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in shared.items())
        found = pipeline("text-classification", str(out / task))(TEXT)[0]
        ids = AutoTokenizer.from_pretrained(out / task)(TEXT, return_tensors="pt")
        assert found["label"] == labels[int(model(**ids).logits.argmax())]


def test_nothing_is_shared_by_link_so_any_folder_can_be_moved_alone(bert: Project, tmp_path: Path):
    bert.cli(*MERGE, "--out", "merged")
    files = [file for file in (bert.folder / "merged").rglob("*") if file.is_file()]
    assert all(file.stat().st_nlink == 1 and not file.is_symlink() for file in files)
    moved = (bert.folder / "merged/blue").rename(tmp_path / "alone")
    assert pipeline("text-classification", str(moved))(TEXT)[0]["label"] in ("LABEL_0", "LABEL_1")
    card = ModelCard.load(moved / "README.md")
    assert card.data.pipeline_tag == "text-classification"
    names: dict[str, object] = {}
    exec(card.text.split("```python")[1].split("```")[0].replace("DIR", str(moved)), names)


def test_the_scores_of_the_folders_are_those_of_the_shared_form(bert: Project):
    bert.cli(*MERGE, "--out", "merged")
    shared = bert.json("evaluate", "spec.yaml", "--model", "merged")["tasks"]
    for task in ("red", "blue"):
        classify = pipeline("text-classification", str(bert.folder / "merged" / task))
        rows = [json.loads(line) for line in (bert.folder / f"{task}.validation.jsonl").read_text().splitlines()]
        right = [classify(row["input"])[0]["label"] == f"LABEL_{row['label']}" for row in rows]
        assert sum(right) / len(right) == pytest.approx(shared[task]["score"])


def test_folders_are_replaced_as_a_whole_and_only_where_nothing_foreign_is_in_them(bert: Project):
    bert.cli(*MERGE, "--out", "merged")
    assert "--force" in bert.cli(*MERGE, "--out", "merged", check=2).stderr
    bert.cli(*MERGE, "--out", "merged", "--force")
    (bert.folder / "merged/red/notes.txt").write_text("mine")
    assert "red/notes.txt" in bert.cli(*MERGE, "--out", "merged", "--force", check=2).stderr
    (bert.folder / "merged/red/notes.txt").unlink()
    bert.cli(*MERGE[:-1], "--out", "merged", "--force")
    assert not (bert.folder / "merged/red").exists()


def test_the_type_of_the_weights_is_that_of_all_folders(bert: Project):
    bert.cli(*MERGE, "--out", "merged", "--dtype", "bfloat16")
    for task in ("red", "blue"):
        assert AutoModelForSequenceClassification.from_pretrained(bert.folder / "merged" / task).dtype == torch.bfloat16


def test_models_without_heads_are_refused_before_anything_is_loaded(project: Project):
    failed = project.cli(*MERGE, "--out", "merged", check=2)
    assert "--split-heads" in failed.stderr
    assert "red" in failed.stderr
    assert not (project.folder / "merged").exists()
