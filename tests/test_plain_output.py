"""Tables where nobody watches: nothing is cut in a pipe, and columns stand under each other in ASCII, too."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.project import Project, cli_environment

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
LONG = "a-study-" * 12 + "long"
GTA = ("--set", "method=gta")


def piped(project: Project, *words: str, check: int = 0, **environment: str) -> str:
    """What a command writes to a pipe, in a process of its own that knows no width."""
    known = {name: value for name, value in cli_environment(**environment).items() if name != "COLUMNS"}
    command = [sys.executable, "-m", "dfmerge_studies", *words]
    done = subprocess.run(command, cwd=project.folder, env=known, capture_output=True, check=False)
    assert done.returncode == check, done.stderr
    return done.stdout.decode("ascii" if environment else "utf-8")


@pytest.fixture
def studied(project: Project) -> Project:
    """A project with one study of a long name."""
    project.write(name=LONG, storage="sqlite:///s.db")
    project.json("run", "spec.yaml", *GTA, "--no-test")
    return project


def test_names_are_whole_in_a_pipe(studied: Project) -> None:
    (line,) = [line for line in piped(studied, "list", "spec.yaml").splitlines() if "a-study" in line]
    assert line.split()[:4] == [LONG, "gta", "4", "4"]
    (line,) = [line for line in piped(studied, "status", "spec.yaml", *GTA).splitlines() if "a-study" in line]
    assert line.split() == ["study", LONG, "(gta)"]


def test_what_ascii_does_not_have_is_spelled_before_columns_are_laid_out(project: Project) -> None:
    shown = piped(project, "evaluate", "spec.yaml", "--model", "base", **ASCII)
    lines = shown.splitlines()
    (spread,) = [line for line in lines if line.startswith("|+- standard error")]
    (scores,) = [line for line in lines if line.startswith("|base ")]
    assert "\\x" not in shown
    assert [i for i, c in enumerate(spread) if c in ".|"] == [i for i, c in enumerate(scores) if c in ".|"]


def test_json_is_json_in_ascii_too(project: Project) -> None:
    project.write(name="größe")
    said = json.loads(piped(project, "list", "spec.yaml", "--json", check=2, **ASCII))
    assert "'größe'" in said["problems"][0]["what"]
