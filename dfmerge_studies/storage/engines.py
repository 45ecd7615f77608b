"""SQLite, Postgres, the journal and the proxy, set up for several processes."""

from __future__ import annotations

import importlib.util
import os
import random
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, RDBStorage
from sqlalchemy import event, exc
from sqlalchemy.engine import URL, Engine

from dfmerge_studies.errors import InputError, RunError
from dfmerge_studies.storage.failures import is_damaged, storage_errors
from dfmerge_studies.storage.files import check_file, check_sqlite_file
from dfmerge_studies.storage.journal import open_journal
from dfmerge_studies.storage.read_only import cannot_write, open_read_only
from dfmerge_studies.storage.urls import optuna_url, parse_url, safe_url, unsupported, write_url
from dfmerge_studies.storage.watch import SQLiteWatch, set_watch

_T = TypeVar("_T")
_FIRST_START_TRIES = 10


def open_storage(url: str, *, create: bool = True, heartbeat: int = 30, grace: int = 180) -> BaseStorage:
    """Open the storage that a URL names, creating its file and tables if there are none.

    Args:
        url: one of the forms that `dfmerge_studies.storage` lists; relative paths start here.
        create: whether a file that does not exist is created; reading commands pass False.
        heartbeat: seconds between two signs of life of a running trial.
        grace: seconds without a sign of life after which a running trial counts as dead.

    Raises:
        InputError: the URL or what it points to cannot be used; nothing has been created then.
        RunError: the database does not answer.
    """
    parsed = parse_url(url)
    if parsed.drivername in ("sqlite", "sqlite+pysqlite"):
        return _open_sqlite(parsed, create, heartbeat, grace)
    if parsed.drivername in ("postgres", "postgresql", "postgresql+psycopg"):
        return _open_postgres(parsed.set(drivername="postgresql+psycopg"), heartbeat, grace)
    if parsed.drivername == "journal":
        return open_journal(parsed, create)
    if parsed.drivername == "grpc":
        return _open_grpc(parsed)
    raise unsupported(parsed, url)


def check_url(url: str, *, create: bool = True) -> None:
    """Refuse, without opening it, a URL that is none or whose file cannot become or is not a storage.

    Raises:
        InputError: the URL or what it points to cannot be used.
    """
    parsed = parse_url(url)
    if parsed.drivername in ("sqlite", "sqlite+pysqlite"):
        if parsed.database and parsed.database != ":memory:":
            check_file(Path(parsed.database), create)
            check_sqlite_file(Path(parsed.database))
    elif parsed.drivername == "journal":
        if parsed.database:
            check_file(Path(parsed.database).absolute(), create)
    elif parsed.drivername not in ("postgres", "postgresql", "postgresql+psycopg", "grpc"):
        raise unsupported(parsed, url)


def first_start(build: Callable[[], _T], where: str) -> _T:
    """Build a storage; several processes may be creating its tables at this moment, so try again with jitter.

    Args:
        build: makes the storage; called up to 10 times.
        where: file or URL without password, for the message.

    Raises:
        InputError: Optuna says that the database is of another version.
        SQLAlchemyError, StorageInternalError: the last try failed, or the server cannot be reached, or the file is
            damaged.
    """
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
                hint="Run `optuna storage upgrade` on a copy of it, or name another storage",
            ) from error
    raise AssertionError("unreachable")


def _open_sqlite(url: URL, create: bool, heartbeat: int, grace: int) -> BaseStorage:
    if not url.database or url.database == ":memory:":
        raise InputError("a study kept in memory could not be resumed", where=safe_url(str(url)), hint="Name a file")
    path = Path(url.database)
    check_file(path, create)
    check_sqlite_file(path)
    if cannot_write(path):
        with storage_errors(str(url)):
            return first_start(lambda: open_read_only(path), str(path))

    def build() -> RDBStorage:
        storage = RDBStorage(
            optuna_url(url),
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
        storage = first_start(build, str(path))
    watch = SQLiteWatch(path, storage)
    set_watch(storage, watch)
    event.listen(storage.engine, "do_connect", watch.refuse_another)
    weakref.finalize(storage, _close, storage.engine, os.getpid())
    return storage


def _close(engine: Engine, process: int) -> None:
    """Close what a process has open, at its end at the latest: the last to do so leaves all of a study in one file.

    Left to the interpreter's end, a connection may stay open, and then what was written stays in the file's log.
    """
    if os.getpid() == process:  # connections are not for a fork
        engine.dispose()


def _configure_sqlite(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # sqlite3 must not begin transactions of its own: _begin_immediate does
    connection.execute("PRAGMA synchronous=NORMAL")


def _begin_immediate(connection: Any) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _open_postgres(url: URL, heartbeat: int, grace: int) -> BaseStorage:
    if importlib.util.find_spec("psycopg") is None:
        raise InputError(
            "Postgres needs the package psycopg, which is not installed",
            where=safe_url(str(url)),
            hint="Install the extra: pip install 'dfmerge-studies[postgres]'",
        )
    engine = {"pool_pre_ping": True, "pool_size": 2, "max_overflow": 3, "connect_args": {"connect_timeout": 10}}
    with storage_errors(write_url(url)):
        return first_start(
            lambda: RDBStorage(
                optuna_url(url), engine_kwargs=dict(engine), heartbeat_interval=heartbeat, grace_period=grace
            ),
            safe_url(str(url)),
        )


def _open_grpc(url: URL) -> BaseStorage:
    if importlib.util.find_spec("grpc") is None or importlib.util.find_spec("google.protobuf") is None:
        raise InputError(
            "the storage proxy needs the packages grpcio and protobuf, which are not installed",
            where=safe_url(str(url)),
            hint="Install the extra: pip install 'dfmerge-studies[grpc]'",
        )
    if not url.host or not url.port:
        raise InputError("the URL names no host and port", where=safe_url(str(url)), hint="Use grpc://HOST:PORT")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        storage = optuna.storages.GrpcStorageProxy(host=url.host, port=url.port)
    try:
        storage.wait_server_ready(timeout=30)
    except ConnectionError:
        raise RunError("the storage proxy does not answer", where=safe_url(str(url))) from None
    return storage
