"""Optuna's journal: a file that only grows, also on a network file system."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from sqlalchemy.engine import URL

from dfmerge_studies.errors import InputError
from dfmerge_studies.storage.files import check_file
from dfmerge_studies.storage.watch import JournalWatch, set_watch


def open_journal(url: URL, create: bool) -> BaseStorage:
    """Open a journal file; a last line that a dying process wrote in part is cut off.

    Raises:
        InputError: the file is something else, or cannot be written.
    """
    if not url.database:
        raise InputError("the URL names no file", where=str(url), hint="Use journal:///FILE")
    path = Path(url.database).absolute()
    check_file(path, create)
    lock = JournalFileSymlinkLock(str(path))
    if path.exists() and path.stat().st_size:
        _check_journal(path)
        _cut_partial_line(path, lock)
    backend = _WholeLines(path, lock)
    storage = JournalStorage(backend)
    backend.watch = JournalWatch(path, _whole_size)
    set_watch(storage, backend.watch)
    return storage


_START = b'{"op_code":'  # how Optuna begins every line


class _WholeLines(JournalFileBackend):
    """A journal that gains whole lines or nothing, though a disk is full or another process died while writing."""

    watch: JournalWatch | None = None

    def __init__(self, path: Path, lock: JournalFileSymlinkLock) -> None:
        super().__init__(str(path), lock_obj=lock)
        self._path = path
        self._guard = lock

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write entries at the end.

        Raises:
            StorageInternalError: the file cannot be written; it is as it was.
        """
        text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        self._guard.acquire()
        try:
            with self._path.open("rb+", buffering=0) as file:
                if self.watch is not None and not self.watch.is_same(file):
                    raise StorageInternalError("the journal was replaced or cut short")
                size = _whole_size(file)
                try:
                    file.truncate(size)
                    file.seek(size)
                    rest = memoryview(text.encode())
                    while rest:
                        rest = rest[file.write(rest) :]
                    os.fsync(file.fileno())
                    if self.watch is not None:
                        self.watch.look(file)
                except OSError:
                    file.truncate(size)
                    raise
        except OSError as error:
            raise StorageInternalError("the journal cannot be written") from error
        finally:
            self._guard.release()


def _whole_size(file: BinaryIO | io.BufferedReader | io.FileIO) -> int:
    """Bytes up to the end of the last whole line."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 65536)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _check_journal(path: Path) -> None:
    with path.open("rb") as file:
        first = file.readline()
    try:
        if first.endswith(b"\n"):
            known = "op_code" in json.loads(first)
        else:  # what a process that died has written of the very first line, and nothing that merely has one line
            known = first.startswith(_START) or _START.startswith(first)
    except (ValueError, TypeError):
        known = False
    if not known:
        raise InputError("this file is not an Optuna journal", where=str(path), hint="Name another file")


def _cut_partial_line(path: Path, lock: Any) -> None:
    """Remove a last line that a dying process wrote in part: the next line would be glued to it and both be lost."""
    if _complete(path):
        return
    lock.acquire()
    try:
        if not _complete(path):
            with path.open("rb+") as file:
                file.truncate(_whole_size(file))
    finally:
        lock.release()


def _complete(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
