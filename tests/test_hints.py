"""Commands that commands print: they mean the same study, and a shell takes them as they are."""

from __future__ import annotations

import html
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.project import Project

SAME = ("--set", "method=gta", "--set", "tasks.red.metric=macro_f1")


def hints(text: str) -> list[list[str]]:
    """The words of every command in a text, as a shell reads them."""
    lines = [line.strip() for line in text.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("dfmerge ")]


@pytest.fixture
def spaced(project_of: Callable[..., Project]) -> Project:
    """A project whose spec has a space in its name."""
    project = project_of("bert")
    project.file.rename(project.folder / "sp ec.yaml")
    return project


def test_what_export_says_is_next_scores_the_same_model_on_the_same_study(spaced: Project) -> None:
    spaced.cli("run", "sp ec.yaml", *SAME, "--no-test")
    said = spaced.cli("export", "sp ec.yaml", *SAME, "--device", "cpu", "--trust-remote-code", "--out", "mer ged")
    (words,) = hints(said.stdout)
    where = ["--set", "device=cpu", "--model", "mer ged", "--split", "test", "--trust-remote-code"]
    assert words == ["evaluate", "sp ec.yaml", *SAME, *where]
    found = json.loads(spaced.cli(*words, "--json").stdout)
    assert found["tasks"]["red"]["metric"] == "macro_f1"
    exported = json.loads((spaced.folder / "mer ged" / "dfmerge.json").read_text())
    assert exported["method"] == "gta"


def test_what_run_says_is_next_looks_at_the_study_that_its_flags_made(spaced: Project) -> None:
    flags = ("--method", "gta", "--seed", "3", "--no-test")
    first, then = hints(spaced.cli("run", "sp ec.yaml", *flags).stdout)
    same = ["sp ec.yaml", "--set", "method=gta", "--set", "search.seed=3"]
    assert (first, then) == (["status", *same], ["export", *same, "--out", "merged-model"])
    assert spaced.json(*first)["method"] == "gta"
    assert spaced.json(*then)["trial"] == 0


def test_a_storage_that_was_given_is_told_where_the_environment_names_another(spaced: Project) -> None:
    url = "sqlite:///given.db"
    said = spaced.cli("run", "sp ec.yaml", *SAME, "--no-test", "--storage", url, DFMERGE_STORAGE="sqlite:///other.db")
    assert hints(said.stdout)[0] == ["status", "sp ec.yaml", "--storage", url, *SAME]
    said = spaced.cli("run", "sp ec.yaml", *SAME, "--no-test", DFMERGE_STORAGE=url)
    assert hints(said.stdout)[0] == ["status", "sp ec.yaml", *SAME]


def test_the_report_s_page_names_a_command_that_makes_it_again(spaced: Project) -> None:
    spaced.cli("run", "sp ec.yaml", *SAME, "--no-test")
    flags = ("--figures", "interpolation", "--points", "3")
    spaced.cli("report", "sp ec.yaml", *SAME, *flags, "--out", "a page")
    page = html.unescape((spaced.folder / "a page" / "index.html").read_text().replace("<pre>", "\n"))
    run, report = hints(page.replace("</pre>", "\n"))
    assert run == ["run", "sp ec.yaml", *SAME]
    assert report == ["report", "sp ec.yaml", *SAME, *flags, "--out", "a page"]


def test_init_quotes_the_spec_that_it_wrote(project: Project) -> None:
    models = ("base", "red", "blue")
    rows = [word for file in sorted(project.folder.glob("*.jsonl")) for word in ("--data", file.name)]
    out = Path("my spec's.yaml")
    said = project.cli("init", *models, *rows, "--base", "base", "--out", out)
    assert hints(said.stdout) == [["validate", str(out)], ["run", str(out)]]
