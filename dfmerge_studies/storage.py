"""From a URL to an Optuna storage that several processes can share.

    sqlite:///study.db                          one machine; the default
    postgresql+psycopg://user:pw@host/name      several machines (postgresql:// and postgres:// mean the same)
    journal:///study.log                        a file on a network file system
    grpc://host:port                            Optuna's storage proxy, in a private network

SQLite is used with a write-ahead log, a long wait for locks and BEGIN IMMEDIATE: its row locks do nothing, so with
plain transactions two workers can take the same waiting trial.  No password ever appears in a message.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import re
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, RDBStorage
from optuna.study import StudyDirection
from sqlalchemy import event, exc
from sqlalchemy.engine import URL, make_url

from dfmerge_studies.errors import InputError, RunError

_T = TypeVar("_T")

_SCHEMES = "sqlite:///FILE, postgresql+psycopg://USER@HOST/NAME, journal:///FILE or grpc://HOST:PORT"
_SQLITE_MAGIC = b"SQLite format 3\x00"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
_NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "glusterfs", "lustre", "beegfs", "gpfs", "fuse.sshfs"}
)
_FIRST_START_TRIES = 10
_STORAGE_ERRORS = (exc.SQLAlchemyError, StorageInternalError)


def safe_url(url: str) -> str:
    """Return a URL with its password masked: the only form to print or to store."""
    try:
        parsed = make_url(url)
    except (exc.ArgumentError, ValueError):
        return re.sub(r"//[^@/]*@", "//***@", url)
    secret = [key for key in parsed.query if "password" in key.lower()]
    return parsed.update_query_dict(dict.fromkeys(secret, "***")).render_as_string(hide_password=True)


def resolve_url(url: str, folder: Path) -> str:
    """Make the path of a sqlite or journal URL absolute, below `folder`; other URLs stay as they are."""
    scheme, separator, path = url.partition(":///")
    if separator and scheme in ("sqlite", "sqlite+pysqlite", "journal") and path and path != ":memory:":
        return f"{scheme}:///{(folder / path).absolute()}"
    return url


def open_storage(url: str, *, create: bool = True, heartbeat: int = 30, grace: int = 180) -> BaseStorage:
    """Open the storage that a URL names, creating its file and tables if there are none.

    Args:
        url: one of the forms at the top of this module; relative paths are relative to the current directory.
        create: whether a file that does not exist is created; reading commands pass False.
        heartbeat: seconds between two signs of life of a running trial.
        grace: seconds without a sign of life after which a running trial counts as dead.

    Raises:
        InputError: the URL or what it points to cannot be used; nothing has been created then.
        RunError: the database does not answer.
    """
    parsed = _parse(url)
    if parsed.drivername in ("sqlite", "sqlite+pysqlite"):
        return _open_sqlite(parsed, create, heartbeat, grace)
    if parsed.drivername in ("postgres", "postgresql", "postgresql+psycopg"):
        return _open_postgres(parsed.set(drivername="postgresql+psycopg"), heartbeat, grace)
    if parsed.drivername == "journal":
        return _open_journal(parsed, create)
    if parsed.drivername == "grpc":
        return _open_grpc(parsed)
    raise _unsupported(parsed, url)


def check_url(url: str, *, create: bool = True) -> None:
    """Refuse, without opening it, a URL that is none or whose file cannot become or is not a storage.

    Args:
        url: as for `open_storage`.
        create: whether the file may be missing.

    Raises:
        InputError: the URL or what it points to cannot be used.
    """
    parsed = _parse(url)
    if parsed.drivername in ("sqlite", "sqlite+pysqlite"):
        if parsed.database and parsed.database != ":memory:":
            _check_file(Path(parsed.database), create)
            _check_sqlite_file(Path(parsed.database))
    elif parsed.drivername == "journal":
        if parsed.database:
            _check_file(Path(parsed.database).absolute(), create)
    elif parsed.drivername not in ("postgres", "postgresql", "postgresql+psycopg", "grpc"):
        raise _unsupported(parsed, url)


def _unsupported(parsed: URL, url: str) -> InputError:
    return InputError(
        f"storages of kind {parsed.drivername}:// are not supported", where=safe_url(url), mend=f"Use {_SCHEMES}"
    )


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except (exc.ArgumentError, ValueError):
        raise InputError("this is not a storage URL", where=safe_url(url), mend=f"Use {_SCHEMES}") from None
    if any("password" in key.lower() for key in parsed.query):
        raise InputError(
            "a password among the URL's parameters would show in logs",
            where=safe_url(url),
            mend="Write it as //user:password@host, or leave it to a password file",
        )
    return parsed


def _optuna_url(url: URL) -> str:
    """Render a URL for Optuna, which passes it through `str.format`."""
    return url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")


@contextlib.contextmanager
def storage_errors(url: str | None = None) -> Iterator[None]:
    """Turn errors of the database into `RunError`, or `InputError` where the file is at fault.

    Args:
        url: named in the message, with its password masked.
    """
    try:
        yield
    except _STORAGE_ERRORS as error:
        raise _translated(error, url) from None  # the chain would print the database's own text, URL included


def _translated(error: Exception, url: str | None) -> InputError | RunError:
    text = root_text(error)
    where = None
    if url is not None:
        where = safe_url(url)
        with contextlib.suppress(exc.ArgumentError, ValueError):
            password = make_url(url).password
            text = text.replace(str(password), "***") if password else text
    if is_damaged(error):
        return InputError(f"the database is damaged ({text})", where=where, mend="Restore a copy, or name another file")
    return RunError(f"the study's storage failed: {text}", where=where, mend="Run the same command again to go on")


def is_damaged(error: BaseException) -> bool:
    """Tell whether an error means that the database's file is no longer a database: trying again cannot help."""
    root, text = _root(error), root_text(error)
    return isinstance(root, sqlite3.DatabaseError) and ("not a database" in text or "malformed" in text)


def _root(error: BaseException) -> BaseException:
    cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
    return getattr(cause, "orig", None) or cause


def root_text(error: BaseException) -> str:
    """Return what the database driver said, in one line, without SQLAlchemy's statement and parameters."""
    root = _root(error)
    return " ".join(str(root).split()) or type(root).__name__


def _first_start(build: Callable[[], _T], where: str) -> _T:
    """Build a storage; several processes may be creating its tables at this moment, so try again with jitter."""
    for attempt in range(1, _FIRST_START_TRIES + 1):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)  # heartbeats
                return build()
        except (exc.OperationalError, exc.IntegrityError, exc.ProgrammingError, StorageInternalError) as error:
            unreachable = "psycopg" in type(getattr(error, "orig", None)).__module__ and not getattr(
                getattr(error, "orig", None), "sqlstate", None
            )
            if attempt == _FIRST_START_TRIES or unreachable or is_damaged(error):
                raise
            time.sleep(random.uniform(0.02, 0.1) * attempt)  # jitter only: no result depends on it
        except RuntimeError as error:
            raise InputError(
                "the database was written by another version of Optuna",
                where=where,
                mend="Run `optuna storage upgrade` on a copy of it, or name another storage",
            ) from error
    raise AssertionError("unreachable")


def _open_sqlite(url: URL, create: bool, heartbeat: int, grace: int) -> BaseStorage:
    if not url.database or url.database == ":memory:":
        raise InputError("a study kept in memory could not be resumed", where=safe_url(str(url)), mend="Name a file")
    path = Path(url.database)
    _check_file(path, create)
    _check_sqlite_file(path)

    def build() -> RDBStorage:
        storage = RDBStorage(
            _optuna_url(url),
            engine_kwargs={"connect_args": {"timeout": 60}},
            heartbeat_interval=heartbeat,
            grace_period=grace,
        )
        if create:  # only looking must not change a file of another program
            with storage.engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA journal_mode=WAL")
        storage.engine.dispose()  # connections made so far have not the settings below
        event.listen(storage.engine, "connect", _configure_sqlite)
        event.listen(storage.engine, "begin", _begin_immediate)
        return storage

    with storage_errors(str(url)):
        return _first_start(build, str(path))


def _configure_sqlite(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # sqlite3 must not begin transactions of its own: _begin_immediate does
    connection.execute("PRAGMA synchronous=NORMAL")


def _begin_immediate(connection: Any) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _check_file(path: Path, create: bool) -> None:
    """Refuse a path that could not become, or is not, a writable file; create nothing."""
    where = str(path)
    if path.is_dir():
        raise InputError("this is a folder, not a file", where=where, mend="Name a file in it")
    if not path.parent.is_dir():
        raise InputError(
            f"the folder {path.parent} does not exist", where=where, mend="Create it, or name another file"
        )
    if not path.exists() and not create:
        raise InputError("there is no such storage", where=where, mend="Check the path, or start the study with `run`")
    # SQLite also writes its log beside the file, so the folder matters even when the file exists.
    if not os.access(path.parent, os.W_OK | os.X_OK) or (path.exists() and not os.access(path, os.R_OK | os.W_OK)):
        raise InputError("the file or its folder cannot be written to", where=where, mend="Change its permissions")


def _check_sqlite_file(path: Path) -> None:
    """Refuse a file that is no SQLite database, a database of other software, and a network file system."""
    where = str(path)
    kind = network_file_system(path)
    if kind is not None:
        raise InputError(
            f"SQLite cannot share a file safely on a network file system ({kind})",
            where=where,
            mend="Use a local folder, a journal:///FILE storage, or Postgres",
        )
    if not path.exists() or path.stat().st_size == 0:
        return
    damaged = InputError("this file is not an SQLite database", where=where, mend="Name another file")
    with path.open("rb") as file:
        if file.read(len(_SQLITE_MAGIC)) != _SQLITE_MAGIC:
            raise damaged
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=60)) as db:
            tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            (health,) = db.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.OperationalError as error:
        raise RunError(f"the database cannot be read: {error}", where=where) from error
    except sqlite3.DatabaseError as error:
        raise damaged from error
    if health != "ok":
        text = " ".join(str(health).replace("*", "").split())
        raise InputError(f"the database is damaged: {text}", where=where, mend="Restore a copy, or name another file")
    # Another process may be creating the tables one by one: any of Optuna's will do.
    if tables and not tables & {"studies", "version_info", "alembic_version", "trials"}:
        raise InputError(
            f"this database belongs to other software (it has a table named {min(tables)})",
            where=where,
            mend="Name another file",
        )


def network_file_system(path: Path, mounts: str | None = None) -> str | None:
    """Return the kind of network file system that a path lies on, or None if it is local or cannot be told.

    Args:
        path: a file that need not exist.
        mounts: the text of the system's mount table; read from /proc/mounts when None.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/mounts").read_text(errors="replace")
        except OSError:
            return None
    absolute = path.parent.resolve()
    best: tuple[int, str] = (-1, "")
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = Path(fields[1].replace("\\040", " "))
        if absolute.is_relative_to(point) and len(point.parts) >= best[0]:  # a later mount hides an earlier one
            best = (len(point.parts), fields[2])
    return best[1] if best[1] in _NETWORK_FILE_SYSTEMS else None


def _open_postgres(url: URL, heartbeat: int, grace: int) -> BaseStorage:
    if importlib.util.find_spec("psycopg") is None:
        raise InputError(
            "Postgres needs the package psycopg, which is not installed",
            where=safe_url(str(url)),
            mend="Install the extra: pip install 'dfmerge-studies[postgres]'",
        )
    engine = {"pool_pre_ping": True, "pool_size": 2, "max_overflow": 3, "connect_args": {"connect_timeout": 10}}
    with storage_errors(url.render_as_string(hide_password=False)):
        return _first_start(
            lambda: RDBStorage(
                _optuna_url(url), engine_kwargs=dict(engine), heartbeat_interval=heartbeat, grace_period=grace
            ),
            safe_url(str(url)),
        )


def _open_journal(url: URL, create: bool) -> BaseStorage:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

    if not url.database:
        raise InputError("the URL names no file", where=str(url), mend="Use journal:///FILE")
    path = Path(url.database).absolute()
    _check_file(path, create)
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


def _open_grpc(url: URL) -> BaseStorage:
    if importlib.util.find_spec("grpc") is None or importlib.util.find_spec("google.protobuf") is None:
        raise InputError(
            "the storage proxy needs the packages grpcio and protobuf, which are not installed",
            where=safe_url(str(url)),
            mend="Install them: pip install grpcio protobuf",
        )
    if not url.host or not url.port:
        raise InputError("the URL names no host and port", where=safe_url(str(url)), mend="Use grpc://HOST:PORT")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        storage = optuna.storages.GrpcStorageProxy(host=url.host, port=url.port)
    try:
        storage.wait_server_ready(timeout=30)
    except ConnectionError:
        raise RunError("the storage proxy does not answer", where=safe_url(str(url))) from None
    return storage


def check_name(name: str) -> None:
    """Refuse a study name that could not safely appear in paths and pages.

    Raises:
        InputError: it is empty, longer than 100 characters, starts with a dot, or has other than `A-Za-z0-9._-`.
    """
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{name[:120]!r} cannot be a study's name",
            mend="Use up to 100 of the characters A-Z a-z 0-9 . _ - and no dot in front",
        )


def join_study(
    storage: BaseStorage, name: str, *, directions: Sequence[str], sampler: BaseSampler | None = None
) -> optuna.Study:
    """Create a study, or load it if it exists; several processes may do so at once.

    Args:
        storage: from `open_storage`.
        name: the study's name.
        directions: "maximize" or "minimize", one for each objective.
        sampler: what proposes points.

    Raises:
        InputError: the name is not allowed, or the stored study has other directions.
    """
    check_name(name)
    wanted = [StudyDirection[direction.upper()] for direction in directions]
    with storage_errors():
        study = optuna.create_study(
            storage=storage, study_name=name, directions=wanted, sampler=sampler, load_if_exists=True
        )
        stored = study.directions
    if stored != wanted:
        raise InputError(
            f"the stored study has the directions {[d.name.lower() for d in stored]}, this one {list(directions)}",
            where=name,
            mend="Give the new study another name",
        )
    return study


def load_study(storage: BaseStorage, name: str, *, sampler: BaseSampler | None = None) -> optuna.Study:
    """Load a study that exists.

    Raises:
        InputError: there is no study of that name; the message lists those that there are.
    """
    with storage_errors():
        names = [study.study_name for study in storage.get_all_studies()]
        if name not in names:
            known = ", ".join(sorted(names)[:20]) or "none"
            raise InputError(f"there is no study named {name!r}", mend=f"Studies of this storage: {known}")
        return optuna.load_study(study_name=name, storage=storage, sampler=sampler)
