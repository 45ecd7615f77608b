"""Tasks of type multi-label-classification: several labels at once, through the whole program."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from dfmerge_studies.errors import InputError
from dfmerge_studies.tasks.label_sets import LabelSets, read_label_sets
from dfmerge_studies.tasks.metrics import METRICS, task_metrics
from tests.models import TEXTS
from tests.project import Project, perturbed

NAMES = ["toxic", "obscene", "threat"]

# Metrics

WANTED = [(1, 0, 0), (0, 0, 0), (1, 1, 0), (0, 1, 1)]
GIVEN = [[0.5, -1.0, -2.0], [-0.1, -3.0, 0.2], [1.0, 2.0, -0.5], [-1.0, -0.3, 0.7]]


def f1(pairs: list[tuple[int, int]]) -> float:
    right, wrong, missed = (pairs.count(each) for each in ((1, 1), (0, 1), (1, 0)))
    return 2 * right / (2 * right + wrong + missed)


def test_metrics_of_label_sets_are_what_their_definitions_say() -> None:
    taken = [tuple(int(z > 0) for z in scores) for scores in GIVEN]
    columns = [[(w[k], t[k]) for w, t in zip(WANTED, taken, strict=True)] for k in range(3)]
    expected = {
        "accuracy": sum(w == t for w, t in zip(WANTED, taken, strict=True)) / 4,
        "micro_f1": f1([pair for column in columns for pair in column]),
        "macro_f1": sum(map(f1, columns)) / 3,
        "log_likelihood": sum(
            math.log(1 / (1 + math.exp(-z)) if bit else 1 - 1 / (1 + math.exp(-z)))
            for scores, bits in zip(GIVEN, WANTED, strict=True)
            for z, bit in zip(scores, bits, strict=True)
        )
        / 4,
    }
    assert set(expected) == set(task_metrics("multi-label-classification"))
    answers = LabelSets(GIVEN, WANTED)
    assert {name: METRICS[name].score(answers) for name in expected} == pytest.approx(expected)
    assert METRICS["log_likelihood"].score(LabelSets([[900.0, -900.0]], [(0, 1)])) == pytest.approx(-1800)


def test_labels_that_neither_rows_nor_answers_have_do_not_count() -> None:
    answers = LabelSets([[1.0, -1.0, -1.0], [1.0, 1.0, -1.0]], [(1, 0, 0), (0, 1, 0)])
    assert METRICS["macro_f1"].score(answers) == pytest.approx((2 / 3 + 1) / 2)


def test_without_a_label_in_any_row_f1_would_be_the_same_for_all_models() -> None:
    for name in ("micro_f1", "macro_f1"):
        assert METRICS[name].pointless(LabelSets([], [(0, 0), (0, 0)])) == "no row has a label"
        assert METRICS[name].pointless(LabelSets([], [(0, 0), (0, 1)])) is None


# Data


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([["toxic"], [], ["threat", "toxic"]], ()),
        ([[0], [], [2, 0]], ()),
        ([[1, 0, 0], [0, 0, 0], [1, 0, 1]], ()),
        ([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [True, False, True]], ()),
        (["['toxic']", "[]", "['toxic', 'threat']"], ()),
        (["[1, 0, 0]", "[0, 0, 0]", "[1, 0, 1]"], ()),
        ([[1], [], [2, 1]], ["obscene", "toxic", "threat"]),
    ],
)
def test_labels_are_read_as_names_as_indices_or_as_a_bit_for_each(values: list[Any], names: list[str]) -> None:
    found, _ = read_label_sets(values, NAMES, 3, names=names, where="w", split="s")
    assert found == [(1, 0, 0), (0, 0, 0), (1, 0, 1)]


def test_labels_without_names_are_numbers() -> None:
    assert read_label_sets([[0], [2, 1]], (), 3, names=(), where="w", split="s")[0] == [(1, 0, 0), (0, 1, 1)]


@pytest.mark.parametrize(
    ("values", "number", "says"),
    [
        ([["toxic"], ["rude"]], 3, "row 1 of the split 's': label 'rude' is not among the choices"),
        ([["toxic"], "toxic"], 3, "row 1 of the split 's': 'toxic' is no list of labels"),
        ([["toxic"], None], 3, "row 1 of the split 's': there are no labels"),
        ([[0, 1], [1, 0]], 3, None),
        ([[0, 1], [0, 1, 1, 0]], 3, "row 1 of the split 's': [0, 1, 1, 0] has 4 numbers, 0 or 1, for 3 labels"),
        ([[0, 1, 1], [0, 5]], 3, "row 1 of the split 's': label 5 is not among the choices"),
        ([["toxic"], [1]], 3, "labels of the split 's' are mixed"),
        ([[1, 0]], None, "nothing says which labels there are"),
    ],
)
def test_what_is_no_set_of_the_labels_is_refused_by_row(
    values: list[Any], number: int | None, says: str | None
) -> None:
    if says is None:  # not a bit for each in every row, so they are indices
        assert read_label_sets(values, NAMES, number, names=(), where="w", split="s")[0] == [(1, 1, 0), (1, 1, 0)]
        return
    with pytest.raises(InputError) as caught:
        read_label_sets(values, NAMES, number, names=(), where="w", split="s")
    assert says in str(caught.value)


# Through the command line


@pytest.fixture
def labelled(project_of) -> Project:
    """A task of label sets, red, that its expert answers rightly, beside blue, a classifier's."""
    project: Project = project_of("bert")
    project.spec = copy.deepcopy(project.spec)
    expert = perturbed("bert", seed=1, labels=3)
    expert.config.problem_type = "multi_label_classification"
    expert.config.id2label, expert.config.label2id = dict(enumerate(NAMES)), {n: i for i, n in enumerate(NAMES)}
    expert.save_pretrained(project.folder / "red")
    tokenizer = AutoTokenizer.from_pretrained(project.folder / "red")
    for split, shift in (("validation", 0), ("test", 3)):
        lines = []
        for i in range(16):
            text = f"{TEXTS[(i + shift) % len(TEXTS)]} {i}"
            with torch.no_grad():
                z = expert(**tokenizer(text, return_tensors="pt")).logits[0]
            bits = (z > 0).int().tolist()
            names = [name for name, bit in zip(NAMES, bits, strict=True) if bit]
            lines.append(json.dumps({"input": text, "labels": names, **dict(zip(NAMES, bits, strict=True))}))
        (project.folder / f"red.{split}.jsonl").write_text("\n".join(lines))
    project.spec["tasks"]["red"] |= {"type": "multi-label-classification", "doc_to_target": "labels"}
    project.write()
    return project


def with_red(project: Project, **fields: Any) -> None:
    project.write(tasks={**project.spec["tasks"], "red": {**project.spec["tasks"]["red"], **fields}})


@pytest.mark.parametrize("metric", ["micro_f1", "macro_f1", "accuracy"])
def test_an_expert_has_all_labels_right_that_it_gave_itself(labelled: Project, metric: str) -> None:
    with_red(labelled, metric=metric)
    scored = labelled.json("evaluate", "spec.yaml", "--model", "red", "--split", "test")["tasks"]["red"]
    assert (scored["metric"], scored["score"], scored["n"]) == (metric, 1.0, 16)


def test_columns_of_bits_and_names_in_another_order_are_the_head_s_labels(labelled: Project) -> None:
    other = ["threat", "toxic", "obscene"]
    for fields in (
        {"doc_to_choice": other},
        {"doc_to_choice": other, "doc_to_target": "{{ [threat, toxic, obscene] }}"},
        {"doc_to_target": "{{ [toxic, obscene, threat] }}"},
    ):
        with_red(labelled, metric="accuracy", **fields)
        assert labelled.json("evaluate", "spec.yaml", "--model", "red")["tasks"]["red"]["score"] == 1.0


@pytest.mark.slow
def test_a_study_of_label_sets_beside_classes_finds_a_merge_and_exports_it(labelled: Project) -> None:
    printed = labelled.json("run", "spec.yaml", "--set", "method=df-merge")
    assert printed["task_metrics"] == {"red": "micro_f1", "blue": "accuracy"}
    rows = {each["name"]: each["validation"]["tasks"] for each in printed["rows"]}
    assert rows["each task's own expert"]["red"] == 1.0
    labelled.cli("export", "spec.yaml", "--out", "merged", "--split-heads")
    again = labelled.json("evaluate", "spec.yaml", "--model", "merged")["tasks"]
    assert {task: entry["score"] for task, entry in again.items()} == pytest.approx(printed["best"]["tasks"])
    folder = labelled.folder / "merged/red"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.problem_type == "multi_label_classification"
    classify = pipeline("text-classification", str(folder), top_k=None)
    lines = [json.loads(line) for line in (labelled.folder / "red.validation.jsonl").read_text().splitlines()]
    given = []
    for line in lines:
        found = {each["label"]: each["score"] for each in classify([line["input"]])[0]}
        given.append([found[name] - 0.5 for name in NAMES])
    wanted = [tuple(line[name] for name in NAMES) for line in lines]
    assert METRICS["micro_f1"].score(LabelSets(given, wanted)) == pytest.approx(printed["best"]["tasks"]["red"])
    shown = labelled.cli("validate", "spec.yaml", "--show", "red").stdout
    assert all(f"{'*' if lines[0][name] else ' '} '{name}'" in shown for name in NAMES)


def test_one_head_taken_for_sets_and_for_classes_has_two_importances(labelled: Project) -> None:
    config = labelled.folder / "red/config.json"
    config.write_text(config.read_text().replace('"multi_label_classification"', "null"))
    fisher, keys = ("fisher", "spec.yaml", "--expert", "red", "--force", "--out", "red.safetensors"), []
    for fields in ({}, {"type": "classification", "doc_to_target": "{{ 'toxic' if toxic else 'threat' }}"}):
        with_red(labelled, **fields)
        keys.append(labelled.json(*fisher)["key"])
    assert keys[0] != keys[1]


def test_agreement_is_the_share_of_inputs_with_the_very_labels_of_the_expert(labelled: Project) -> None:
    printed = labelled.json("run", "spec.yaml", "--set", "objective=agreement", "--set", "method=gta", "--no-test")
    rows = {each["name"]: each["validation"]["tasks"] for each in printed["rows"]}
    assert rows["each task's own expert"] == {"red": 1.0, "blue": 1.0}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"metric": "mcc"},
            "the metrics of type: multi-label-classification are accuracy, macro_f1",
        ),
        ({"type": "classification"}, "a multi-label head (problem_type 'multi_label_classification')"),
        ({"doc_to_choice": ["a", "b", "c"]}, "is not among the choices"),
        ({"doc_to_target": "input"}, "is no list of labels"),
    ],
)
def test_what_does_not_fit_a_task_of_sets_is_refused(labelled: Project, fields: dict[str, Any], says: str) -> None:
    with_red(labelled, **fields)
    assert says in labelled.cli("validate", "spec.yaml", check=2).stderr


@pytest.mark.parametrize("columns", [True, False])
def test_init_writes_such_a_task_from_the_head_of_the_expert(labelled: Project, columns: bool) -> None:
    if not columns:
        file = labelled.folder / "red.validation.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("\n".join(json.dumps({"input": row["input"], "labels": row["labels"]}) for row in rows))
    files = ["--data", "red.validation.jsonl", "--data", "blue.validation.jsonl"]
    labelled.cli("init", "base", "red", "blue", *files, "--out", "made.yaml")
    text = (labelled.folder / "made.yaml").read_text()
    assert "    type: multi-label-classification\n" in text
    assert ("{{ [toxic, obscene, threat] }}" in text) == columns
    assert labelled.json("validate", "made.yaml")["ok"]
