"""In a pipe or a log, long work says what it does; a shell completes commands and options."""

from __future__ import annotations

import contextlib
import io
import time

import pytest

from dfmerge_studies.cli import pulse
from dfmerge_studies.cli.app import main
from dfmerge_studies.cli.pulse import Pulse
from tests.project import Project


def lines_in(seconds: float, monkeypatch: pytest.MonkeyPatch, *, said: int = 0, on: bool = True) -> list[str]:
    """Lines of work that lasts so long, where each second is a tenth of one; something else is said so many times."""
    monkeypatch.setattr(pulse, "SILENCE", 0.3)
    lines: list[str] = []
    with Pulse(lines.append, on=on) as told:
        told.doing("red: validation", 3, 24)
        for _ in range(said or 1):
            time.sleep(seconds / (said or 1))
            if said:
                told.said()
    return lines


def test_silent_work_says_what_it_does(monkeypatch):
    lines = lines_in(1.0, monkeypatch)
    assert lines
    assert set(lines) == {"red: validation: 3 of 24"}


def test_work_that_talks_by_itself_or_is_watched_says_no_more(monkeypatch):
    assert lines_in(0.6, monkeypatch, said=12) == []
    assert lines_in(0.6, monkeypatch, on=False) == []


@pytest.mark.slow
def test_a_long_run_in_a_pipe_is_never_silent_for_long(project: Project, monkeypatch):
    monkeypatch.setattr(pulse, "SILENCE", 0.02)
    done = project.cli("run", "spec.yaml", "--trials", "1")
    assert "loading" in done.stderr
    assert "fisher" in done.stderr.lower() or "validation" in done.stderr


@pytest.mark.parametrize(
    ("words", "expected"), [("dfmerge expo", "export"), ("dfmerge export --push", "--push-to-hub")]
)
def test_a_shell_completes_commands_and_options(words, expected, monkeypatch):
    for name, value in {"_DFMERGE_COMPLETE": "complete_bash", "COMP_WORDS": words}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        main([])
    assert expected in out.getvalue().split()
