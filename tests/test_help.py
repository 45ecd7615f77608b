"""`--help` of every command: it fits a terminal of 80 columns and ends with an example that can be given."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

import click
import pytest
import typer
from typer.testing import CliRunner

from dfmerge_studies.cli.app import app

GROUP = typer.main.get_command(app)


def commands(group: click.Group = GROUP, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Names of all commands that a user is shown."""
    for name, command in group.commands.items():
        if isinstance(getattr(command, "commands", None), dict):
            yield from commands(command, (*path, name))
        elif not command.hidden:
            yield (*path, name)


def help_of(*path: str) -> str:
    shown = CliRunner().invoke(app, [*path, "--help"], prog_name="dfmerge", env={"COLUMNS": "80"})
    assert shown.exit_code == 0
    return shown.stdout


@pytest.mark.parametrize("path", [(), ("cache",), *commands()], ids=" ".join)
def test_help_fits_eighty_columns(path):
    assert max(map(len, help_of(*path).splitlines())) <= 80


@pytest.mark.parametrize("path", list(commands()), ids=" ".join)
def test_help_ends_with_an_example_that_parses(path):
    *_, label, line = help_of(*path).rstrip().splitlines()
    assert label.strip() == "Example:"
    program, *arguments = shlex.split(line)
    assert program == "dfmerge"
    assert tuple(arguments[: len(path)]) == path
    command = GROUP
    for name in path:
        command = command.commands[name]
    command.make_context("dfmerge", arguments[len(path) :])  # raises what the command line would refuse
