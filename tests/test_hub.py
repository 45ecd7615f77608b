"""`--push-to-hub`: an exported directory in a repository, against a stand-in of the Hub's API on loopback."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants

from tests.hub import Hub, running_hub
from tests.project import Project, cli_environment

TOKEN = "hush-4711-token"
MERGE = ("merge", "spec.yaml", "--coefficients", "red=0.3,blue=0.8", "--method", "gta", "--out", "merged")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A stand-in that this process takes for the Hub, and a token for it."""
    with running_hub(TOKEN) as server:
        # What huggingface_hub reads from the environment when it is imported.
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # uploads by plain HTTP
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def files_of(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.slow
def test_a_merge_is_pushed_whole_by_whoever_the_environment_says(project: Project):
    with running_hub(TOKEN) as hub:
        environment = cli_environment(HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1")
        environment.pop("HF_HUB_OFFLINE")
        command = [
            sys.executable,
            "-m",
            "dfmerge_studies",
            *MERGE,
            "--push-to-hub",
            "lab/colours",
            "--private",
            "--json",
        ]
        done = subprocess.run(command, cwd=project.folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["hub"] == f"{hub.url}/lab/colours"
    assert hub.private == {"lab/colours"}
    assert hub.tokens - {None} == {f"Bearer {TOKEN}"}  # transformers looks for some models without one
    assert TOKEN not in done.stdout + done.stderr
    local, pushed = files_of(project.folder / "merged"), hub.repositories["lab/colours"]
    assert local.keys() == pushed.keys()
    assert {name for name in local if local[name] != pushed[name]} <= {"dfmerge.json"}
    assert len(pushed["model.safetensors"]) > 1000


def test_paths_of_this_machine_stay_on_it(finished: Project, hub: Hub):
    project = finished
    project.write(base=str(project.folder / "base"), storage=f"sqlite:///{project.folder}/colours.db")
    project.cli("export", "spec.yaml", "--out", "merged", "--push-to-hub", "colours")
    pushed = hub.repositories["me/colours"]
    assert str(project.folder).encode() not in b"".join(pushed.values())
    provenance = json.loads(pushed["dfmerge.json"])
    assert provenance["base"]["reference"] == "base"
    assert provenance["spec"]["experts"]["red"]["model"] == "red"
    ModelCard(pushed["README.md"].decode())


def test_pushing_again_adds_a_commit_and_keeps_what_others_put_there(project: Project, hub: Hub):
    hub.repositories["lab/colours"] = {"notes.txt": b"mine"}
    done = project.cli(*MERGE, "--push-to-hub", "lab/colours")
    assert f"pushed to {hub.url}/lab/colours" in done.stdout
    assert hub.repositories["lab/colours"].keys() == {"notes.txt", *files_of(project.folder / "merged")}


@pytest.mark.parametrize("step", ["repos/create", "preupload", "commit/main"])
def test_a_refusal_is_one_message_without_the_token_and_the_directory_is_kept(project: Project, hub: Hub, step: str):
    hub.fail = step
    failed = project.cli(*MERGE, "--push-to-hub", "lab/colours", check=1)
    assert "cannot be pushed to lab/colours (403 Forbidden" in failed.stderr
    assert "the model is kept in merged" in failed.stderr
    assert len(failed.stderr.strip().splitlines()) <= 3
    assert TOKEN not in failed.stdout + failed.stderr
    assert (project.folder / "merged/dfmerge.json").is_file()


def test_a_hub_that_does_not_answer_is_one_message(project: Project, hub: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the port of the discard service
    failed = project.cli(*MERGE, "--push-to-hub", "lab/colours", check=1)
    assert "cannot be pushed to lab/colours" in failed.stderr
    assert (project.folder / "merged/config.json").is_file()


def test_a_wrong_token_is_said(project: Project, hub: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "another-token")
    failed = project.cli(*MERGE, "--push-to-hub", "lab/colours", check=1)
    assert "401" in failed.stderr
    assert "another-token" not in failed.stdout + failed.stderr


def test_what_is_to_be_private_is_not_pushed_where_everybody_reads(project: Project, hub: Hub):
    hub.repositories["lab/open"] = {}
    failed = project.cli(*MERGE, "--push-to-hub", "lab/open", "--private", check=1)
    assert "exists and is public" in failed.stderr
    assert hub.repositories["lab/open"] == {}


def test_what_cannot_be_pushed_is_refused_before_anything_is_merged(
    project: Project, hub: Hub, monkeypatch: pytest.MonkeyPatch
):
    cases = {"a/b/c": "no name of a repository", "-x": "no name of a repository"}
    for name, expected in cases.items():
        failed = project.cli(*MERGE, "--push-to-hub", name, check=2)
        assert expected in failed.stderr
    assert "--push-to-hub" in project.cli(*MERGE, "--private", check=2).stderr
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(project.folder / "no-token"))
    assert "hf auth login" in project.cli(*MERGE, "--push-to-hub", "lab/colours", check=2).stderr
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in project.cli(*MERGE, "--push-to-hub", "lab/colours", check=2).stderr
    assert not (project.folder / "merged").exists()
    assert hub.repositories == {}
