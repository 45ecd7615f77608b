"""Names of classes in data, spec and heads, through the command line.

Labels are what the expert itself answers, by name: `config.id2label` of the largest logit in transformers' own forward
pass. So a score of 1 says that data, spec and head are read alike.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.project import Project, make_project

HEAD = ["NEUTRAL", "positive", "Negative"]  # the expert's order
NAMES = ["negative", "neutral", "positive"]  # the data's


def set_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    content = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def name_classes(folder: Path, names: list[str]) -> None:
    set_config(folder, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})


def own_answers(folder: Path, texts: list[str]) -> list[str]:
    """What a classifier answers, by transformers alone."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
    return [model.config.id2label[int(each.argmax())] for each in logits]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A project whose expert `red` has names of its classes."""
    project = make_project(tmp_path / "project", "bert", rows=12, trials=1)
    name_classes(project.folder / "red", HEAD)
    return project


def answered(project: Project) -> tuple[list[str], list[str]]:
    """Texts of red's validation rows, and what red answers, in the data's words."""
    lines = (project.folder / "red.validation.jsonl").read_text().splitlines()
    texts = [json.loads(line)["input"] for line in lines]
    answers = [name.lower() for name in own_answers(project.folder / "red", texts)]
    assert len(set(answers)) > 1
    return texts, answers


def write_parquet(project: Project, texts: list[str], answers: list[str]) -> dict[str, Any]:
    features = datasets.Features({"input": datasets.Value("string"), "label": datasets.ClassLabel(names=NAMES)})
    rows = {"input": texts, "label": [NAMES.index(name) for name in answers]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(project.folder / "red.parquet")
    return {"path": "parquet", "data_files": {"validation": "red.parquet", "test": "red.parquet"}}


def write_json(project: Project, texts: list[str], labels: list[Any]) -> dict[str, Any]:
    lines = [json.dumps({"input": text, "label": label}) for text, label in zip(texts, labels, strict=True)]
    (project.folder / "named.jsonl").write_text("\n".join(lines))
    return {"path": "json", "data_files": {"validation": "named.jsonl", "test": "named.jsonl"}}


def use(project: Project, **task: Any) -> None:
    tasks = {**project.spec["tasks"], "red": {**project.spec["tasks"]["red"], **task}}
    project.write(tasks=tasks)


def score(project: Project, model: str = "red") -> float:
    return float(project.json("evaluate", project.file, "--model", model)["tasks"]["red"]["score"])


def test_numbers_of_named_classes_are_classes_of_the_head(project: Project) -> None:
    texts, answers = answered(project)
    dataset = write_parquet(project, texts, answers)
    for names in (None, NAMES, ["positive", "neutral", "negative"]):
        use(project, dataset=dataset, doc_to_choice=names)
        assert score(project) == 1.0


def test_names_in_the_spec_and_texts_in_the_data_are_classes_of_the_head(project: Project) -> None:
    texts, answers = answered(project)
    numbers, own = [NAMES.index(name) for name in answers], own_answers(project.folder / "red", texts)
    for labels, names in ((numbers, NAMES), (answers, NAMES), (own, None)):
        use(project, dataset=write_json(project, texts, labels), doc_to_choice=names)
        assert score(project) == 1.0


def test_a_study_scores_each_expert_by_its_own_names_and_so_does_its_export(project: Project) -> None:
    texts, answers = answered(project)
    use(project, dataset=write_parquet(project, texts, answers), doc_to_choice=["positive", "neutral", "negative"])
    rows = {row["name"]: row for row in project.json("run", project.file)["rows"]}
    assert rows["each task's own expert"]["validation"]["tasks"]["red"] == 1.0
    project.cli("merge", project.file, "--coefficients", "red=1,blue=0", "--method", "gta", "--out", "merged")
    merged = score(project, "merged")
    set_config(project.folder / "red", id2label=dict(enumerate("abc")), label2id={"a": 0, "b": 1, "c": 2})
    use(project, dataset=write_parquet(project, texts, answers), doc_to_choice=NAMES)
    assert score(project, "merged") == merged  # its heads bring the names of their classes


def test_the_class_that_f1_counts_is_found_by_name(project: Project) -> None:
    texts, answers = answered(project)
    dataset = write_json(project, texts, answers)
    for positive in (answers[0], NAMES.index(answers[0])):
        use(project, dataset=dataset, doc_to_choice=NAMES, metric="f1", positive=positive)
        assert score(project) == 1.0
    use(project, dataset=write_parquet(project, texts, answers), doc_to_choice=None, metric="f1", positive=0)
    message = project.cli("validate", project.file, check=2).stderr
    assert "tasks.red.positive: class 0 is 'negative' in the data and 'NEUTRAL' in the expert's head" in message


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"problem_type": "multi_label_classification"}, "a multi-label head"),
        ({"problem_type": "regression"}, "a regression head"),
        ({"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}, "a regression head (one label)"),
    ],
)
def test_heads_that_pick_no_class_are_refused_by_that_name(project: Project, fields: dict[str, Any], says: str) -> None:
    set_config(project.folder / "red", **fields)
    for command in ("validate", "run"):
        message = project.cli(command, project.file, check=2).stderr
        assert says in message
        assert str(project.folder / "red" / "config.json") in message


def test_another_number_of_classes_than_the_heads_is_refused(project: Project) -> None:
    name_classes(project.folder / "red", ["LABEL_0", "LABEL_1", "LABEL_2"])
    use(project, doc_to_choice=["bad", "good", "ugly", "none"])
    message = project.cli("validate", project.file, check=2).stderr
    assert "tasks.red.doc_to_choice: 4 classes ['bad', 'good', 'ugly', 'none']" in message
    assert "but the expert's head has 3" in message


def test_validate_says_how_labels_are_read_that_can_be_read_otherwise(project: Project) -> None:
    texts, _ = answered(project)
    name_classes(project.folder / "red", ["LABEL_0", "LABEL_1", "LABEL_2"])
    use(project, dataset=write_json(project, texts, [1 + i % 2 for i in range(12)]), doc_to_choice=["1", "2", "3"])
    notes = project.json("validate", project.file)["notes"]
    assert [note["where"].rpartition("spec.yaml: ")[2] for note in notes] == [
        "tasks.red.doc_to_target (validation)",
        "tasks.red.doc_to_target (test)",
    ]
    assert "1 of row 0 is the choice '1'; as an index it would be '2'" in notes[0]["what"]
    assert "note: " in project.cli("validate", project.file).stderr
