"""What a command imports before it begins: who only looks at a study waits for no model library."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.project import Project

HEAVY = ("torch", "transformers", "datasets", "peft", "botorch")

LOOKS = """
import sys
from dfmerge_studies.cli.app import main
for command in {commands!r}:
    try:
        main(command)
    except SystemExit as end:
        assert not end.code, (command, end.code)
    found = sorted(set({heavy!r}) & set(sys.modules))
    assert not found, (command, found)
"""


def test_commands_that_only_read_a_database_import_no_model_library(finished: Project) -> None:
    spec = "spec.yaml"
    commands = [
        ["status", spec],
        ["status", spec, "--json"],
        ["list", spec],
        ["repair", spec],
        ["cache", "ls", spec],
        ["schema"],
        ["report", spec, "--out", "page"],
    ]
    looked = subprocess.run(
        [sys.executable, "-c", LOOKS.format(commands=commands, heavy=HEAVY)],
        cwd=finished.folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert looked.returncode == 0, looked.stderr
