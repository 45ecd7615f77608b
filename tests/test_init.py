"""`dfmerge init`: a spec from folders and files, which `validate` accepts and `run` runs."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import yaml

from tests.project import Project
from tests.test_as_adapter import with_adapters

FILES = ("red.validation.jsonl", "blue.validation.jsonl", "red.test.jsonl", "blue.test.jsonl")
DATA = tuple(word for file in FILES for word in ("--data", file))


def made(project: Project, *arguments: str) -> dict[str, Any]:
    project.cli("init", *arguments, "--out", "made.yaml")
    return yaml.safe_load((project.folder / "made.yaml").read_text())


@pytest.mark.parametrize("family", ["t5", "gpt2", "bert"])
def test_what_it_writes_is_valid_and_reads_the_tasks_as_a_user_would(project_of, family):
    project = project_of(family)
    spec = made(project, "base", "red", "blue", *DATA)
    assert spec["base"] == "base"
    assert spec["experts"] == {"red": "red", "blue": "blue"}
    for name in ("red", "blue"):
        expected = {key: value for key, value in project.spec["tasks"][name].items() if key != "max_length"}
        if family != "bert":
            del expected["type"]
        task = spec["tasks"][name]
        assert {key: task[key] for key in expected} == expected
        assert 0 < task["max_length"] <= 64
    validated = project.json("validate", "made.yaml")
    assert validated["ok"], validated
    assert validated["estimate"]["truncated_inputs"] == {"red": 0, "blue": 0}
    text = (project.folder / "made.yaml").read_text()
    assert "# One row: {" in text
    assert text.startswith("# yaml-language-server: $schema=https://")


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_answers_that_are_texts_of_their_own_are_to_be_written(project_of, family, several):
    project = project_of(family)
    for name in FILES:
        rows = [{"question": f"what is {i}?", "answer": f"number {i}"} for i in range(24)]
        rows = [{**row, "answer": [row["answer"], "?"]} if several else row for row in rows]
        (project.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = made(project, "base", "red", "blue", *DATA)["tasks"]["red"]
    assert task["type"] == "generate"
    assert task["doc_to_target"] == "answer"
    assert task["generation_kwargs"]["max_gen_toks"] == 32
    validated = project.json("validate", "made.yaml")
    assert validated["ok"], validated


def test_it_runs(project: Project):
    made(project, "base", "red", "blue", *DATA)
    done = project.json("run", "made.yaml", "--trials", "1", "--set", "baselines=[]", "--set", "importance.samples=2")
    assert done["verdict"]["split"] == "test"


def test_adapters_name_their_base_and_files_of_a_pattern_are_data(project_of):
    project = project_of("llama")
    with_adapters(project)
    spec = made(project, "lora-red", "lora-blue", *DATA[:2], *FILES[1:])
    assert spec["base"] == "base"
    assert spec["experts"]["lora-red"] == {"model": "lora-red", "task": "red"}
    assert set(spec["tasks"]) == {"red", "blue"}
    assert project.json("validate", "made.yaml")["ok"]


def test_names_of_classes_come_from_the_head_or_from_the_labels(project_of):
    project = project_of("bert")
    file = project.folder / "red/config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "id2label": {"0": "yes", "1": "no", "2": "maybe"}}))
    rows = [json.loads(line) for line in (project.folder / "blue.validation.jsonl").read_text().splitlines()]
    for row in rows:
        row["label"] = ["cold", "warm"][row["label"]]
    (project.folder / "blue.validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = made(project, "base", "red", "blue", *DATA[:4])
    assert spec["tasks"]["red"]["doc_to_choice"] == ["yes", "no", "maybe"]
    assert spec["tasks"]["blue"]["doc_to_choice"] == ["cold", "warm"]
    assert project.json("validate", "made.yaml")["ok"]


def test_pairs_and_tables_are_understood(project_of):
    project = project_of("bert")
    lines = ["premise,hypothesis,label", *(f"it rains {number},it is wet {number},{number % 3}" for number in range(9))]
    (project.folder / "red-dev.csv").write_text("\n".join(lines))
    task = made(project, "base", "red", "--data", "red-dev.csv")["tasks"]["red"]
    assert (task["doc_to_text"], task["doc_to_text_pair"], task["dataset"]["path"]) == ("premise", "hypothesis", "csv")
    assert project.json("validate", "made.yaml")["ok"]


def test_checkpoints_of_a_training_have_the_name_of_the_folder_above(project: Project):
    (project.folder / "red").rename(project.folder / "moved")
    (project.folder / "red").mkdir()
    shutil.move(project.folder / "moved", project.folder / "red/checkpoint-500")
    spec = made(project, "base", "red/checkpoint-500", "--data", "red.validation.jsonl")
    assert spec["experts"] == {"red": "red/checkpoint-500"}


REFUSED = {
    "no base": (["red", "blue", *DATA], "--base"),
    "no data": (["base", "red", "blue"], "--data"),
    "no expert": (["base", "red", "blue", *DATA, "--data", "green.val.jsonl"], "no expert has the task green"),
    "no validation": (["base", "red", "--data", "red.test.jsonl"], "no validation file"),
    "no data file": (["base", "red", "--data", "red.xlsx"], "no data file by its ending"),
    "no model": (["base", "nowhere", "--data", "red.validation.jsonl"], "nowhere"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_found_out_is_said_and_nothing_is_written(project: Project, name):
    arguments, expected = REFUSED[name]
    shutil.copy(project.folder / "red.validation.jsonl", project.folder / "green.val.jsonl")
    failed = project.cli("init", *arguments, "--out", "made.yaml", check=2)
    assert expected in failed.stderr
    assert not (project.folder / "made.yaml").exists()


def test_a_spec_that_is_there_is_left_alone(project: Project):
    before = project.file.read_text()
    assert "spec.yaml exists already" in project.cli("init", "base", "red", *DATA[:2], check=2).stderr
    assert project.file.read_text() == before


def test_odd_names_are_written_so_that_they_read_back(project: Project):
    """A column that YAML would read as true, labels with signs of YAML."""
    rows = [{"yes": f"it rains {n}", "label": ["a: b", "no", "# c"][n % 3]} for n in range(6)]
    (project.folder / "red.val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = made(project, "base", "red", "--data", "red.val.jsonl")["tasks"]["red"]
    assert (task["doc_to_text"], task["doc_to_choice"]) == ("yes", ["# c", "a: b", "no"])
    assert project.json("validate", "made.yaml")["ok"]
