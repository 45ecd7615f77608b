"""How `project.zip` was made: a project with a finished study and a study that was cut three times, at commit 57a5fbe.

    git worktree add --detach /tmp/old 57a5fbe
    cd /tmp/old && PYTHONPATH=. python .../tests/old/make.py project.zip

Run it with that version only: the point of the file is that an earlier version wrote it.  Both studies have one name,
hence the same seeds, and are in two databases: what the cut one becomes can be compared with what the other is.
"""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import T5ForConditionalGeneration

from tests.project import make_project

# A process that runs the study and is hit at its second, its second and its first trial: by SIGTERM and by SIGKILL in
# an evaluation, and by SIGKILL between the outbox and the storage.
CUT = """
import os, signal, sys
from dfmerge_studies.cli.app import main
from dfmerge_studies.objective.merger import Merger
from dfmerge_studies.study import loop
number, place, calls = int(sys.argv[1]), sys.argv[2], 0
def hit(function):
    def hitting(*arguments):
        global calls
        calls += 1
        if calls == int(sys.argv[3]):
            os.kill(os.getpid(), number)
        return function(*arguments)
    return hitting
if place == "evaluation":
    Merger.run = hit(Merger.run)
else:
    loop.tell = hit(loop.tell)
main(["run", "spec.yaml", "--set", "storage=sqlite:///cut.db"])
"""


def make(target: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "p"
        project = make_project(folder, "t5", rows=12, samples=4, trials=5)
        for model in ("base", "red", "blue"):
            short = T5ForConditionalGeneration.from_pretrained(folder / model)
            with torch.no_grad():
                for parameter in short.parameters():
                    parameter.copy_(parameter.bfloat16().float())  # half of each number is zeros: packs better
            short.save_pretrained(folder / model)
        project.write(search={"trials": 5, "startup_trials": 2, "step": 0.05, "seed": 3}, storage="sqlite:///done.db")
        project.process("run", "spec.yaml")
        for arguments, code in (
            (("15", "evaluation", "2"), 130),
            (("9", "evaluation", "2"), -9),
            (("9", "tell", "1"), -9),
        ):
            cut = subprocess.run([sys.executable, "-c", CUT, *arguments], cwd=folder, check=False)
            assert cut.returncode == code, cut.returncode
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as packed:
            for database in ("done", "cut"):
                with sqlite3.connect(folder / f"{database}.db") as connection:
                    packed.writestr(f"{database}.sql", "\n".join(connection.iterdump()))
            for file in sorted(folder.rglob("*")):
                if file.is_file() and ".db" not in file.name and "fishers" not in file.parts:
                    packed.write(file, file.relative_to(folder))
    print(target.stat().st_size)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
