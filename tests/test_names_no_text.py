"""Paths whose bytes are no text: refused by the flag that has them, before anything is computed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.project import Project, cli_environment
from tests.test_plain_output import ASCII

NO_TEXT = os.fsdecode(b"caf\xe9")
LINES = {
    "merge spec.yaml --method gta --coefficients 0.3 --out NAME": "--out",
    "merge spec.yaml --method averaging --out NAME/merged": "--out",
    "fisher spec.yaml --expert red --out NAME.safetensors": "--out",
    "export spec.yaml --out NAME": "--out",
    "report spec.yaml --out NAME": "--out",
    "evaluate spec.yaml --model NAME": "--model",
    "init base red --data red.validation.jsonl --out NAME.yaml": "--out",
    "init base NAME --data red.validation.jsonl": "DIR",
    "init base red --data NAME.jsonl": "--data",
    "init red --base NAME --data red.validation.jsonl": "--base",
    "run NAME.yaml": "SPEC",
    "status NAME.yaml": "SPEC",
    "list spec.yaml --storage sqlite:///NAME.db": "storage",
}


@pytest.mark.parametrize("line", LINES)
def test_a_path_that_is_no_text_is_refused_by_its_flag(project: Project, line: str) -> None:
    shutil.copytree(project.folder / "red", project.folder / NO_TEXT)  # so that only its name is wrong
    for made in ("spec.yaml", "red.validation.jsonl"):
        shutil.copy(project.folder / made, project.folder / (NO_TEXT + Path(made).suffix))
    before = project.files()
    said = project.cli(*line.replace("NAME", NO_TEXT).split(), check=2).stderr
    assert said.startswith("error: ")
    assert f"{LINES[line]}: " in said
    assert said.count("\n") == 1
    assert "not foreseen" not in said
    assert project.files() == before


def test_a_project_in_a_folder_whose_name_is_no_text_is_refused_by_that_name(project: Project) -> None:
    moved = Project(project.folder.rename(project.folder.parent / NO_TEXT), project.family, project.spec)
    for line in ("run spec.yaml", "validate spec.yaml", "list spec.yaml", "merge spec.yaml --method gta --out merged"):
        said = moved.cli(*line.split(), check=2).stderr
        assert "SPEC: " in said
        assert "has bytes that are no UTF-8 text" in said
    assert "the working directory: " in moved.cli("run", check=2).stderr


def test_where_file_names_are_ascii_the_locale_is_what_mends_it(project: Project) -> None:
    environment = cli_environment(**ASCII)
    words = [sys.executable, "-m", "dfmerge_studies", "merge", "spec.yaml", "--method", "averaging", "--out", "café"]
    said = subprocess.run(words, cwd=project.folder, env=environment, capture_output=True, text=True, check=False)
    assert said.returncode == 2
    assert "--out: " in said.stderr
    assert "no ASCII text. Use a path that is, or set LC_ALL=C.UTF-8." in said.stderr
