"""The model card says of a merge what its models' own cards say, and nothing of this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from dfmerge_studies.checkpoints.reference import Checkpoint
from dfmerge_studies.report.origins import license_lines, origin_of, shared_license
from tests.project import Project

AT = "red=0.3,blue=0.8"
MERGE = ("merge", "spec.yaml", "--coefficients", AT, "--method", "gta", "--out", "merged")


def card_of(project: Project) -> ModelCard:
    return ModelCard.load(project.folder / "merged/README.md")


def with_card(folder: Path, **fields: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(fields)}---\n# a model\n")


def test_license_and_base_come_from_the_models_own_cards(project: Project):
    with_card(project.folder / "base", license="apache-2.0")
    with_card(project.folder / "red", license="apache-2.0", base_model="google-t5/t5-small")
    with_card(project.folder / "blue", base_model=["google-t5/t5-small", "/home/me/secret"])
    project.cli(*MERGE)
    card = card_of(project)
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == ["google-t5/t5-small"]
    assert card.data.base_model_relation == "merge"
    assert "base: `apache-2.0`; red: `apache-2.0`; blue: none stated" in card.text
    assert "secret" not in str(card)


def test_without_cards_nothing_is_claimed(project: Project):
    project.cli(*MERGE)
    data = card_of(project).data.to_dict()
    assert not {"license", "base_model", "base_model_relation"} & data.keys()
    assert "state no license" in card_of(project).text


@pytest.mark.parametrize(
    ("family", "pipeline"),
    [("t5", "text2text-generation"), ("llama", "text-generation"), ("bert", "text-classification")],
)
def test_the_card_names_kind_library_and_tags(project_of, family, pipeline):
    project = project_of(family)
    project.cli(*MERGE)
    data = card_of(project).data
    assert (data.pipeline_tag, data.library_name) == (pipeline, "transformers")
    assert {"merge", "dfmerge"} <= set(data.tags)


def test_licenses_that_differ_are_all_named_and_none_is_claimed_for_the_whole(tmp_path):
    with_card(tmp_path / "base", license="mit")
    with_card(tmp_path / "red", license="other", license_name="llama", license_link="LICENSE")
    origins = {name: origin_of(Checkpoint(name, tmp_path / name), tmp_path) for name in ("base", "red")}
    assert shared_license(origins) == {"license": "other", "license_name": "several"}
    assert "base: `mit`; red: `llama`" in license_lines(origins)[0]


def test_models_of_the_hub_are_named_by_their_ids(tmp_path):
    snapshot = tmp_path / "models--org--small" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    origin = origin_of(Checkpoint("org/small@v2", snapshot), tmp_path)
    assert (origin.name, origin.models) == ("org/small@v2", ("org/small",))


def test_a_card_that_cannot_be_read_does_not_stop_an_export(project: Project):
    (project.folder / "red/README.md").write_bytes(b"---\nlicense: [\n---\n")
    (project.folder / "blue/README.md").write_bytes(b"\xff\xfe---")
    project.cli(*MERGE)


@pytest.mark.parametrize("relative", [True, False])
def test_no_folder_of_this_machine_is_in_the_card(project: Project, relative: bool):
    """Neither of models nor of data, nor what a model's own card says of the machine that it was trained on."""
    home = project.folder / "private"
    home.mkdir()
    for name in ("base", "red", "blue"):
        (project.folder / name).rename(home / name)
    with_card(home / "red", base_model=str(home / "base"))
    with_card(home / "blue", base_model="private/base")
    stem = "private/" if relative else f"{home}/"
    tasks = json.loads(json.dumps(project.spec["tasks"]))
    tasks["red"]["dataset"] = {
        "path": "json",
        "data_files": {k: str(project.folder / f"red.{k}.jsonl") for k in ("validation", "test")},
    }
    project.write(base=f"{stem}base", experts={"red": f"{stem}red", "blue": f"{stem}blue"}, tasks=tasks)
    project.cli(*MERGE)
    text = (project.folder / "merged/README.md").read_text()
    assert "private" not in text
    assert str(project.folder) not in text
    assert "| red | `red` | red |" in text
