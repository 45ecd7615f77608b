"""Whether a storage's file is still the file that was opened, and a newcomer finds in it what was told.

A process that has a file open does not notice that it was deleted, replaced or written over: it goes on with what it
has, and nobody will ever read what it writes.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import sqlite3
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from weakref import WeakKeyDictionary

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from dfmerge_studies.storage.handles import storage_of

_TAIL = 4096  # bytes of a journal that are looked at again
_ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
_TURN_SECONDS = 10.0  # that a process waits for another one to write the file again


class Watch(ABC):
    """Looks after one storage's file.

    Args:
        path: the file, open by now.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        found = self.path.stat()
        self._identity, self._changed = (found.st_dev, found.st_ino), (found.st_size, found.st_mtime_ns)

    def lost(self, study: str, told: Collection[int]) -> str | None:
        """What has happened to the file, as a clause; None if nothing has, or if that cannot be said.

        Args:
            study: name of a study.
            told: numbers of trials that have been completed in it.
        """
        if (how := self.gone()) is not None:
            return how
        try:
            found = self.path.stat()
        except OSError:
            return None
        before, self._changed = self._changed, (found.st_size, found.st_mtime_ns)
        return None if self._reads(study, told, before != self._changed) else "was cut short or written over"

    def gone(self) -> str | None:
        """What has happened to the file if another is in its place or none, as a clause; nothing of it is read."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return "was deleted"
        except OSError:
            return None  # a server that is away
        return None if (found.st_dev, found.st_ino) == self._identity else "was replaced by another file"

    @abstractmethod
    def _reads(self, study: str, told: Collection[int], changed: bool) -> bool:
        """Whether a newcomer finds everything in the file; True where that cannot be said."""

    def copy(self, target: Path) -> bool:
        """Write all that is still open into a new file, where that can be done.

        Args:
            target: a file that does not exist.

        Returns:
            Whether it was written.
        """
        return False

    @abstractmethod
    def holds(self, file: Path, study: str, numbers: Collection[int]) -> bool:
        """Whether a file of this kind has the results of trials.

        Args:
            file: the file.
            study: name of a study.
            numbers: of the trials.
        """

    def restore(self, whole: Path, study: str, numbers: Collection[int]) -> Path:
        """Move a whole copy to where it is found: to the file's own place if that is free, else beside it.

        Args:
            whole: the copy.
            study: name of a study.
            numbers: of the trials whose results the copy has.

        Returns:
            Where it is now, or one of another process that has the same results.
        """
        with _turn(self.path):
            if not self.path.exists() or (self.path.is_file() and self.path.stat().st_size == 0):
                for end in ("-wal", "-shm"):  # of the file that is gone: SQLite would take them for those of the copy
                    self.path.with_name(self.path.name + end).unlink(missing_ok=True)
                whole.replace(self.path)
                return self.path
            # One name for all workers that had this file open; where one knows what another does not, both are kept.
            for more in itertools.count():
                end = f"-{more}" if more else ""
                place = self.path.with_name(f"{self.path.stem}.rescued-{self._identity[1]:x}{end}{self.path.suffix}")
                if not place.exists():
                    whole.rename(place)
                    return place
                if self.holds(place, study, numbers):
                    return place
            raise AssertionError("unreachable")


class SQLiteWatch(Watch):
    """Looks after an SQLite file.

    Args:
        path: the file.
        storage: which has it open.
    """

    def __init__(self, path: Path, storage: RDBStorage) -> None:
        super().__init__(path)
        self._engine = storage.engine

    def refuse_another(self, *_arguments: object) -> None:
        """Refuse a new connection to a file that is not the one that was opened, or to none, which would make one.

        Raises:
            sqlite3.OperationalError: in the words of the database.
        """
        try:
            found = self.path.stat()
        except OSError:
            raise sqlite3.OperationalError("unable to open database file") from None
        if (found.st_dev, found.st_ino) != self._identity:
            raise sqlite3.OperationalError("the database file was replaced")

    def _reads(self, study: str, told: Collection[int], changed: bool) -> bool:
        try:
            with _newcomer(self.path) as database:
                return not (changed and _damage(database)) and set(told) <= _completed(database, study)
        except sqlite3.OperationalError as error:
            return "no such table" not in str(error)  # anything else may pass
        except sqlite3.DatabaseError:
            return False

    def holds(self, file: Path, study: str, numbers: Collection[int]) -> bool:
        """See `Watch.holds`."""
        try:
            with _newcomer(file) as database:
                return set(numbers) <= _completed(database, study)
        except sqlite3.Error:
            return False

    def copy(self, target: Path) -> bool:
        """See `Watch.copy`: SQLite's own backup through a connection that was there before."""
        try:
            source = self._engine.raw_connection()
            try:
                with contextlib.closing(sqlite3.connect(target)) as whole:
                    source.driver_connection.backup(whole)  # type: ignore[union-attr]
                    whole.execute("PRAGMA journal_mode=DELETE")  # one file, without a log beside it
                    return not _damage(whole)
            finally:
                source.close()
        except Exception:  # whatever SQLAlchemy and SQLite find: there is another way
            return False


class JournalWatch(Watch):
    """Looks after a journal: of a file that only grows, what was its end stays where it was.

    Args:
        path: the file.
        whole_size: from an open file to the bytes of its whole lines; a last line in part may be cut off by anybody.
    """

    def __init__(self, path: Path, whole_size: Callable[[io.BufferedReader | io.FileIO], int]) -> None:
        super().__init__(path)
        self._whole_size = whole_size
        self._seen, self._tail = 0, b""
        self._open = self.path.open("rb")  # what a copy is made of once the file has no name any more
        self.look(self._open)

    def look(self, file: io.BufferedReader | io.FileIO) -> None:
        """Remember the end of the file."""
        size = self._whole_size(file)
        file.seek(max(0, size - _TAIL))
        self._seen, self._tail = size, file.read(min(size, _TAIL)) or b""

    def is_same(self, file: io.BufferedReader | io.FileIO) -> bool:
        """Whether an open file is the one that was opened before, and has what it had."""
        found = os.fstat(file.fileno())
        file.seek(self._seen - len(self._tail))
        return (found.st_dev, found.st_ino) == self._identity and (file.read(len(self._tail)) or b"") == self._tail

    def _reads(self, study: str, told: Collection[int], changed: bool) -> bool:
        try:
            with self.path.open("rb") as file:
                same = self.is_same(file)
                if same:
                    self.look(file)
        except OSError:
            return True
        return same

    def holds(self, file: Path, study: str, numbers: Collection[int]) -> bool:
        """See `Watch.holds`."""
        try:
            storage = JournalStorage(JournalFileBackend(str(file)))
            trials = optuna.load_study(study_name=study, storage=storage).get_trials(deepcopy=False)
        except (OSError, KeyError, ValueError):  # a line that is none, or no such study
            return False
        return set(numbers) <= {trial.number for trial in trials if trial.state in _ENDED}

    def copy(self, target: Path) -> bool:
        """See `Watch.copy`: whole lines of a file that has what it had."""
        try:
            if not self.is_same(self._open):
                return False
            size = self._whole_size(self._open)
            self._open.seek(0)
            target.write_bytes(self._open.read(size))
        except OSError:
            return False
        return True


_WATCHES: WeakKeyDictionary[object, Watch] = WeakKeyDictionary()


def set_watch(storage: BaseStorage, watch: Watch) -> None:
    """Remember who looks after a storage's file.

    Args:
        storage: as it was opened.
        watch: looks after it.
    """
    _WATCHES[_backend(storage)] = watch


def watch_of(study: optuna.Study) -> Watch | None:
    """Who looks after the file behind a study; None for a server."""
    return _WATCHES.get(_backend(storage_of(study)))


def _backend(storage: BaseStorage) -> object:
    """What both the storage as it was opened and the storage behind a study have in common."""
    return getattr(storage, "_backend", None) or storage


@contextlib.contextmanager
def _turn(path: Path) -> Iterator[None]:
    """One process at a time; one that died in its turn is not waited for longer than some seconds."""
    mutex = path.with_name(f".{path.name}.rescue")
    until = time.monotonic() + _TURN_SECONDS
    while time.monotonic() < until:
        try:
            os.close(os.open(mutex, os.O_CREAT | os.O_EXCL))
            break
        except FileExistsError:
            time.sleep(0.05)
    try:
        yield
    finally:
        mutex.unlink(missing_ok=True)


@contextlib.contextmanager
def _newcomer(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that has seen nothing of the file yet, through SQLite itself (see `files.check_sqlite_file`)."""
    uri = f"{path.absolute().as_uri()}?mode=ro"
    with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=60)) as connection:
        yield connection


def _completed(database: sqlite3.Connection, study: str) -> set[int]:
    asked = (
        "SELECT trials.number FROM trials JOIN studies ON studies.study_id = trials.study_id "
        "WHERE studies.study_name = ? AND trials.state IN ('COMPLETE', 'PRUNED')"
    )
    return {number for (number,) in database.execute(asked, (study,))}


def _damage(database: sqlite3.Connection) -> bool:
    (health,) = database.execute("PRAGMA quick_check(1)").fetchone()
    return bool(health != "ok")


def beside(path: Path) -> Path:
    """A temporary name beside a file."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
