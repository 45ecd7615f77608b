"""What a command imports before it begins: who only looks at a study waits for no model library."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.processes import free_port
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


@pytest.mark.slow
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


SERVES = """
import os, signal, sys, threading, time, urllib.request
from dfmerge_studies.cli.app import main
pages = []
def visit():
    while not pages:
        try:
            for page in ("dashboard", "api/studies"):
                pages.append(urllib.request.urlopen("http://127.0.0.1:{port}/" + page).read())
        except OSError:
            time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=visit, daemon=True).start()
try:
    main(["dashboard", "spec.yaml", "--port", "{port}"])
except SystemExit as end:
    assert not end.code, end.code
assert b"colours" in pages[1]
found = sorted(set({heavy!r}) & set(sys.modules))
assert not found, found
"""


@pytest.mark.slow
def test_the_dashboard_is_served_without_a_model_library(finished: Project) -> None:
    served = subprocess.run(
        [sys.executable, "-c", SERVES.format(port=free_port(), heavy=HEAVY)],
        cwd=finished.folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert served.returncode == 0, served.stderr


@pytest.mark.slow
def test_libraries_are_loaded_without_a_look_for_garbage_and_what_comes_later_is_looked_at() -> None:
    code = """
import gc
from dfmerge_studies.cli import common
looks = []
common.quiet_libraries()
gc.callbacks.append(lambda phase, info: looks.append(phase))
common.load_libraries()
assert not looks, len(looks)
assert gc.isenabled() and gc.get_freeze_count() > 100_000
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
