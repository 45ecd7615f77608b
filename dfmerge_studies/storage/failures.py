"""What a database says when it fails, in our words and without its URL."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sqlite3
from collections.abc import Iterator
from typing import Any

from optuna.exceptions import StorageInternalError
from sqlalchemy import exc

from dfmerge_studies.errors import InputError, RunError
from dfmerge_studies.storage.urls import read_url, safe_url


def _rpc_errors() -> tuple[type[Exception], ...]:
    if importlib.util.find_spec("grpc") is None:
        return ()
    import grpc

    error: type[Exception] = grpc.RpcError
    return (error,)


DATABASE_ERRORS: tuple[type[Exception], ...] = (exc.SQLAlchemyError, StorageInternalError, *_rpc_errors())
# A journal is a file.
STORAGE_FAILURES: tuple[type[Exception], ...] = (*DATABASE_ERRORS, OSError)

# PendingRollbackError: a connection was lost between two statements of one transaction.
_PASSING = (
    exc.OperationalError,
    exc.InterfaceError,
    exc.InternalError,
    exc.PendingRollbackError,
    exc.TimeoutError,
    OSError,
    *_rpc_errors(),
)
# What a Postgres server answers for as long as nobody mends it; where a connection fails, drivers give no code for it.
_REFUSALS = (
    (re.compile(r'database "[^"]*" does not exist'), "Create the database, or correct its name in the URL"),
    (
        re.compile(
            r'role "[^"]*" does not exist|(password|peer|ident) authentication failed|no password supplied', re.I
        ),
        "Correct the user and the password in the URL",
    ),
    (re.compile(r"permission denied", re.I), "Give the user of the URL the right to it, or name another database"),
    (re.compile(r"could not translate host name|failed to resolve host", re.I), "Correct the host in the URL"),
)


@contextlib.contextmanager
def storage_errors(url: str | None = None) -> Iterator[None]:
    """Turn errors of the database into `RunError`, or `InputError` where the file is at fault.

    Args:
        url: named in the message, with its password masked.
    """
    try:
        yield
    except DATABASE_ERRORS as error:
        raise _translated(error, url) from None  # the chain would print the database's own text, URL included


def _translated(error: Exception, url: str | None) -> InputError | RunError:
    text = root_text(error)
    where = None
    if url is not None:
        where = safe_url(url)
        with contextlib.suppress(exc.ArgumentError, ValueError):
            password = read_url(url).password
            text = text.replace(str(password), "***") if password else text
    if is_damaged(error):
        return InputError(f"the database is damaged ({text})", where=where, hint="Restore a copy, or name another file")
    hint = next((hint for said, hint in _REFUSALS if said.search(text)), "Run the same command again to go on")
    return RunError(f"the study's storage failed: {text}", where=where, hint=hint)


def is_damaged(error: BaseException) -> bool:
    """Tell whether an error means that the database's file is no longer a database: trying again cannot help.

    Args:
        error: of Optuna, SQLAlchemy or the driver.
    """
    root, text = _root(error), root_text(error)
    return isinstance(root, sqlite3.DatabaseError) and ("not a database" in text or "malformed" in text)


def may_pass(error: BaseException) -> bool:
    """Tell whether a failure of the storage may be over in a moment: a restarted server, a lost connection.

    Args:
        error: of Optuna, SQLAlchemy, the driver or the proxy.
    """
    return isinstance(_cause(error), _PASSING) and not is_damaged(error)


def _cause(error: BaseException) -> BaseException:
    return error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error


def _root(error: BaseException) -> BaseException:
    cause = _cause(error)
    return getattr(cause, "orig", None) or cause


def root_text(error: BaseException) -> str:
    """Return what the database driver said, in one line, without SQLAlchemy's statement and parameters.

    Args:
        error: of Optuna, SQLAlchemy, the driver or the proxy.
    """
    root: Any = _root(error)
    details = root.details() if isinstance(root, _rpc_errors()) and hasattr(root, "details") else None
    # What the server of a proxy lets through ends with the statement, its parameters and a link.
    text = str(root) if details is None else f"storage proxy: {details}".partition("[SQL:")[0]
    return " ".join(text.split()) or "no reason is given"
