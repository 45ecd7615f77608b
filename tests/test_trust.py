"""A spec is something that people send each other: what it may run, and only with whose word."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from tests.project import EXPERTS, Project

AT = "red=0.3,blue=0.8"
MERGE = ("merge", "spec.yaml", "--method", "gta", "--coefficients", AT, "--out", "merged")

CODE = """
from pathlib import Path
from transformers import T5Config, T5ForConditionalGeneration, AutoTokenizer
Path(__file__).with_name("ran").write_text("")
Path({marker!r}).write_text("")


class OddConfig(T5Config):
    model_type = "odd"


class OddModel(T5ForConditionalGeneration):
    config_class = OddConfig
"""


@pytest.fixture
def marker(project: Project) -> Path:
    """A file that exists once the models' own code has run: all three bring some."""
    file = project.folder / "ran"
    for name in ("base", *EXPERTS):
        folder = project.folder / name
        (folder / "odd.py").write_text(CODE.format(marker=str(file)))
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "odd", "auto_map": {"AutoConfig": "odd.OddConfig"}}
        config["auto_map"]["AutoModelForSeq2SeqLM"] = "odd.OddModel"
        (folder / "config.json").write_text(json.dumps(config))
    return file


@pytest.mark.parametrize("command", [MERGE, ("run", "spec.yaml"), ("validate", "spec.yaml")], ids=lambda c: c[0])
@pytest.mark.parametrize("asked", [False, True])
def test_a_spec_alone_runs_no_code_of_a_checkpoint(project, marker, command, asked):
    project.write(trust_remote_code=asked)
    message = project.cli(*command, check=2).stderr
    assert "--trust-remote-code" in message
    assert not marker.exists()
    assert not (project.folder / "colours.db").exists()
    if not asked:  # the variable agrees with specs that ask, and asks for nothing itself
        project.cli(*command, check=2, DFMERGE_TRUST_REMOTE_CODE="1")
        assert not marker.exists()


@pytest.mark.parametrize("way", ["flag", "--set", "variable"])
def test_the_code_of_a_checkpoint_runs_where_the_user_says_so(project, marker, way):
    project.write(trust_remote_code=True if way == "variable" else None)
    flags = {"flag": ["--trust-remote-code"], "--set": ["--set", "trust_remote_code=true"], "variable": []}[way]
    project.cli(*MERGE, *flags, DFMERGE_TRUST_REMOTE_CODE="1" if way == "variable" else "")
    assert marker.exists()


@pytest.mark.slow
def test_what_comes_next_is_trusted_as_well(project):
    assert (
        "--set trust_remote_code=true" in project.cli("run", "spec.yaml", "--trials", "1", "--trust-remote-code").stdout
    )


@pytest.mark.slow
def test_workers_import_nothing_from_the_folder_that_they_are_started_in(project):
    for name in ("yaml", "torch", "datasets", "dfmerge_studies", "sitecustomize"):
        (project.folder / f"{name}.py").write_text(f"open({str(project.folder / 'ran')!r}, 'a').write({name!r})\n")
    project.cli("run", "spec.yaml", "--workers", "2", "--trials", "2", "--no-test")
    assert not (project.folder / "ran").exists()


def test_data_that_is_code_is_not_run(project):
    class Bomb:
        def __reduce__(self):
            return (open, (str(project.folder / "ran"), "w"))

    (project.folder / "rows.pkl").write_bytes(pickle.dumps(Bomb()))
    (project.folder / "rows.py").write_text(f"open({str(project.folder / 'ran')!r}, 'w')\n")
    (project.folder / "set").mkdir()
    (project.folder / "set/set.py").write_text(f"open({str(project.folder / 'ran')!r}, 'w')\n")
    for dataset in (
        "{path: pandas, data_files: rows.pkl}",
        "{path: json, data_files: rows.pkl}",
        "{path: rows.py}",
        "{path: set}",
        "{path: set, trust_remote_code: true}",
    ):
        for flags in ([], ["--trust-remote-code"]):
            project.cli("run", "spec.yaml", "--set", f"tasks.red.dataset={dataset}", *flags, check=2)
            assert not (project.folder / "ran").exists()


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_configuration_fetches_no_compiled_code(project, field):
    file = project.folder / "red/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: "somebody/kernel"}))
    message = project.cli(*MERGE, check=2).stderr
    assert field in message
    assert "somebody/kernel" in message
