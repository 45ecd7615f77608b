"""Optuna's journal: a file that only grows, also on a network file system."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from optuna.storages import BaseStorage
from sqlalchemy.engine import URL

from dfmerge_studies.errors import InputError
from dfmerge_studies.storage.files import check_file


def open_journal(url: URL, create: bool) -> BaseStorage:
    """Open a journal file; a last line that a dying process wrote in part is cut off.

    Args:
        url: `journal:///FILE`.
        create: whether the file may be missing.

    Raises:
        InputError: the file is something else, or cannot be written.
    """
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

    if not url.database:
        raise InputError("the URL names no file", where=str(url), mend="Use journal:///FILE")
    path = Path(url.database).absolute()
    check_file(path, create)
    lock = JournalFileSymlinkLock(str(path))
    if path.exists() and path.stat().st_size:
        _check_journal(path)
        _cut_partial_line(path, lock)
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))


def _check_journal(path: Path) -> None:
    with path.open("rb") as file:
        first = file.readline()
    try:
        known = not first.endswith(b"\n") or "op_code" in json.loads(first)
    except (ValueError, TypeError):
        known = False
    if not known:
        raise InputError("this file is not an Optuna journal", where=str(path), mend="Name another file")


def _cut_partial_line(path: Path, lock: Any) -> None:
    """Remove a last line that a dying process wrote in part: the next line would be glued to it and both be lost."""
    if _complete(path):
        return
    lock.acquire()
    try:
        if not _complete(path):
            with path.open("rb+") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
    finally:
        lock.release()


def _complete(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
