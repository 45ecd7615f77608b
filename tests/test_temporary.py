"""What a killed process leaves under a temporary name is gone after the next run, and nobody else's work is."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dfmerge_studies import temporary
from dfmerge_studies.checkpoints.write import new_directory


def left_by_a_dead_process(folder: Path) -> Path:
    """A file as a process leaves it that is killed while it writes."""
    code = (
        "import os, signal, sys; from pathlib import Path; from dfmerge_studies.temporary import beside\n"
        "new = beside(Path(sys.argv[1]) / 'entry.safetensors'); new.write_bytes(b'half'); print(new, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert done.returncode == -9
    return Path(done.stdout.strip())


def test_what_a_killed_process_left_is_deleted_and_all_else_stays(tmp_path: Path) -> None:
    dead = left_by_a_dead_process(tmp_path)
    mine = temporary.beside(tmp_path / "mine.json")
    mine.write_text("at work")
    elsewhere = tmp_path / f".entry.{'f' * 8}{os.getpid():08x}{'0' * 16}.tmp"  # of another machine
    elsewhere.write_text("at work there")
    whole = tmp_path / "entry.safetensors"
    whole.write_text("whole")
    assert dead.exists()
    assert temporary.sweep(tmp_path) == [dead]
    assert sorted(tmp_path.iterdir()) == sorted([mine, elsewhere, whole])


def test_a_new_directory_deletes_what_a_killed_process_was_writing_to_its_place(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from dfmerge_studies.checkpoints.write import new_directory\n"
        "with new_directory(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'model.safetensors').write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    for name in ("merged", "other"):
        assert subprocess.run([sys.executable, "-c", code, str(tmp_path / name)]).returncode == -9
    assert len(list(tmp_path.iterdir())) == 2
    with new_directory(tmp_path / "merged") as folder:
        (folder / "whole").touch()
    left = sorted(path.name.partition(".tmp")[0].rpartition(".")[0] for path in tmp_path.iterdir())
    assert left == ["", ".other"]


def test_an_interrupted_replacement_leaves_the_old_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(content: str) -> None:
        with new_directory(tmp_path / "merged", force=True, mark="mark.json") as folder:
            (folder / "mark.json").write_text(f'{{"settings": "{content}"}}')

    write("old")
    rename, renamed = Path.rename, list[Path]()

    def interrupted(path: Path, target: Path) -> Path:
        renamed.append(path)
        if len(renamed) == 2:  # the old one is out of the way, the new one not there yet
            signal.raise_signal(signal.SIGINT)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write("new")
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert '"old"' in (tmp_path / "merged" / "mark.json").read_text()


def test_a_missing_folder_has_nothing_to_sweep(tmp_path: Path) -> None:
    assert temporary.sweep(tmp_path / "none") == []


def test_two_names_differ_and_are_hidden(tmp_path: Path) -> None:
    one, other = temporary.beside(tmp_path / "a"), temporary.beside(tmp_path / "a")
    assert one != other
    assert re.fullmatch(r"\.a\.[0-9a-f]{32}\.tmp", one.name)


@pytest.mark.slow
def test_a_run_leaves_no_unfinished_file_of_a_killed_one(project) -> None:
    project.cli("run", "spec.yaml", "--trials", "1")
    cache = project.folder / ".dfmerge/fishers"
    left = left_by_a_dead_process(cache)
    project.cli("run", "spec.yaml", "--trials", "2")
    assert not left.exists()
    assert not list((project.folder / ".dfmerge").rglob("*.tmp"))
