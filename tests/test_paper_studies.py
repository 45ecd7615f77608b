"""The specs of studies/paper on local data sets with the public ones' columns, and on tiny models."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dfmerge_studies.spec import StudySpec
from dfmerge_studies.tasks.data import load_rows
from scripts import finetune
from tests.models import FAMILIES, make_model
from tests.project import Project, perturbed, sharpened

PAPER = Path(__file__).resolve().parents[1] / "studies" / "paper"
ROWS = 12

# One row of each public data set, as its card describes it; the values are ours.
PLACES = ("river", "train", "station", "wall", "library", "bread", "salt", "water")  # words of the tiny vocabulary
COLUMNS: dict[str, Callable[[int], dict[str, Any]]] = {
    "google-research-datasets/paws": lambda i: {
        "id": i,
        "sentence1": f"train {i} left the station at noon",
        "sentence2": f"at noon the station left train {i}",
        "label": i % 2,
    },
    "allenai/qasc": lambda i: {
        "id": f"q{i}",
        "question": "What makes the river quiet?",
        "choices": {"text": list(PLACES), "label": list("ABCDEFGH")},
        "answerKey": "ABCDEFGH"[i % 8],
        "fact1": "",
        "fact2": "",
        "combinedfact": "",
        "formatted_question": "",
    },
    "allenai/quartz": lambda i: {
        "id": f"q{i}",
        "question": f"If there is more rain, the river is {i}",
        "choices": {"text": ["higher", "lower"], "label": ["A", "B"]},
        "answerKey": "AB"[i % 2],
        "para": "Rain fills rivers.",
        "para_id": "p",
    },
    "csv": lambda i: {
        "InputStoryid": f"s{i}",
        **{f"InputSentence{j}": f"We walked home along wall {j}." for j in range(1, 5)},
        "RandomFifthSentenceQuiz1": "Then it rained.",
        "RandomFifthSentenceQuiz2": "The library was a train.",
        "AnswerRightEnding": 1 + i % 2,
    },
    "microsoft/wiki_qa": lambda i: {
        "question_id": f"Q{i}",
        "question": "where is the library",
        "document_title": "Library",
        "answer": f"The library is in street {i}.",
        "label": i % 2,
    },
    "allenai/winogrande": lambda i: {
        "sentence": f"The boat left the train because the _ was late {i}.",
        "option1": "boat",
        "option2": "train",
        "answer": "12"[i % 2],
    },
    "sst2": lambda i: {"sentence": f"wonderful rain {i}", "label": i % 2, "idx": i},
    "cola": lambda i: {"sentence": f"rain wonderful {i}", "label": i % 2, "idx": i},
    "mrpc": lambda i: {"sentence1": f"salt {i}", "sentence2": f"bread {i}", "label": i % 2, "idx": i},
    "qnli": lambda i: {"question": f"where is {i}?", "sentence": "It is at home.", "label": i % 2, "idx": i},
    "qqp": lambda i: {"question1": f"where is {i}?", "question2": f"who is {i}?", "label": i % 2, "idx": i},
    "rte": lambda i: {"sentence1": f"the boats lay still {i}", "sentence2": "rain", "label": i % 2, "idx": i},
}


def local(folder: Path, file: str, family: str) -> Project:
    """A paper study with nothing changed but where its models and data are."""
    content = yaml.safe_load((PAPER / file).read_text())
    for name, task in content["tasks"].items():
        dataset = task["dataset"]
        row = COLUMNS[dataset["name"] if dataset["path"] == "nyu-mll/glue" else dataset["path"]]
        suffix = "csv" if dataset["path"] == "csv" else "jsonl"
        splits = dataset.get("data_files", ("train", "validation", "test"))
        files = {split: f"{name}.{split}.{suffix}" for split in splits}
        for shift, path in enumerate(files.values()):
            write(folder / path, [row(i + shift) for i in range(ROWS)])
        task["dataset"] = {"path": "csv" if suffix == "csv" else "json", "data_files": files}
        task["max_length"] = 64 if family == "t5" else 40  # the tiny tokenizers' limits
    base, tokenizer = sharpened(make_model(family)), FAMILIES[family].tokenizer()
    (base if family == "t5" else base.base_model).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for number, name in enumerate(content["experts"]):
        perturbed(family, seed=number, labels=2).save_pretrained(folder / name)
        content["experts"][name] = name
    content["base"] = "base"
    project = Project(folder, family, content)
    project.write()
    return project


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    with file.open("w", newline="") as stream:
        if file.suffix == ".jsonl":
            stream.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            table = csv.DictWriter(stream, list(rows[0]))
            table.writeheader()
            table.writerows(rows)


FILES = [("t5-base.yaml", "t5"), ("bert-base-glue.yaml", "bert")]  # t5-large.yaml asks what t5-base.yaml asks


@pytest.mark.slow
@pytest.mark.parametrize(("file", "family"), FILES)
def test_every_paper_study_runs_on_data_with_the_public_columns(tmp_path: Path, file: str, family: str) -> None:
    project = local(tmp_path, file, family)
    small = ("--set", "search.trials=2", "--set", "importance.samples=2")
    report = project.json("validate", project.file, *small)
    assert report["problems"] == []
    rows = project.json("run", project.file, *small)["rows"]
    assert set(rows[-1]["test"]["tasks"]) == set(project.spec["tasks"])


@pytest.mark.slow
@pytest.mark.parametrize(("file", "family"), FILES)
def test_the_experts_of_a_paper_study_can_be_trained_from_it(tmp_path: Path, file: str, family: str) -> None:
    project = local(tmp_path, file, family)
    for what in (["--task", next(iter(project.spec["tasks"]))], ["--multi-task"]):
        out = tmp_path / f"new{what[-1]}"
        finetune.main([str(project.file), *what, "--out", str(out), "--steps", "2", "--batch-size", "12"])
        assert json.loads((out / "training.json").read_text())["history"]


@pytest.mark.parametrize("name", ["qasc", "winogrande", "story-cloze"])
def test_halves_of_a_public_split_share_no_row_and_lose_none(tmp_path: Path, name: str) -> None:
    spec = StudySpec.from_yaml(local(tmp_path, "t5-base.yaml", "t5").file)
    task = spec.tasks[name]
    assert task.test_split is not None
    public = task.validation_split.partition("[")[0]
    read = [
        load_rows(name, task, split, root=spec.root, spec_file="spec.yaml")
        for split in (task.validation_split, task.test_split, public)
    ]
    first, second, whole = ([(row.text, row.label) for row in rows] for rows in read)
    assert first + second == whole
    assert len(first) == len(second) == ROWS // 2


def test_prompts_and_right_choices_are_those_of_the_rows(tmp_path: Path) -> None:
    spec = StudySpec.from_yaml(local(tmp_path, "t5-base.yaml", "t5").file)
    first = {n: load_rows(n, task, "train", root=spec.root, spec_file="")[0] for n, task in spec.tasks.items()}
    right = {name: row.choices[row.label] for name, row in first.items()}
    assert right == {
        "paws": "no",
        "qasc": "river",
        "quartz": "higher",
        "story-cloze": "Then it rained.",
        "wikiqa": "no",
        "winogrande": "boat",
    }
    assert first["winogrande"].text.endswith("was late 0.\nWhat does the _ stand for: boat or train?")
    assert first["qasc"].text.endswith("Possible answers: river, train, station, wall, library, bread, salt, water")


def test_large_and_base_ask_the_same() -> None:
    base, large = (StudySpec.from_yaml(PAPER / f"t5-{size}.yaml") for size in ("base", "large"))
    assert list(base.experts) == list(large.experts) == list(base.tasks)
    models = {"name", "base", "experts"}
    assert base.model_dump(exclude=models) == large.model_dump(exclude=models)


def test_old_public_bert_checkpoints_take_part_as_experts(tmp_path: Path) -> None:
    """Those of the Hub are pickles of plain weights, with a buffer that transformers no longer has."""
    project = local(tmp_path, "bert-base-glue.yaml", "bert")
    file = tmp_path / "rte" / "model.safetensors"
    weights = load_file(file)
    weights["bert.embeddings.position_ids"] = torch.arange(40)[None]
    torch.save(weights, tmp_path / "rte" / "pytorch_model.bin")
    file.unlink()
    assert project.json("validate", project.file, "--set", "importance.samples=2")["problems"] == []
