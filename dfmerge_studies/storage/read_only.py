"""SQLite files that may be looked at and not written to: a file or folder of other users, a read-only disk."""

from __future__ import annotations

import os
import sqlite3
import weakref
from pathlib import Path
from urllib.parse import quote

from optuna.storages import BaseStorage, RDBStorage

from dfmerge_studies.storage.handles import backend_of

_OPENED: weakref.WeakSet[BaseStorage] = weakref.WeakSet()


def is_read_only(storage: BaseStorage) -> bool:
    """Tell whether a storage was opened for looking alone, because its file cannot be written to.

    Args:
        storage: from `open_storage`.
    """
    return backend_of(storage) in _OPENED


def cannot_write(path: Path) -> bool:
    """Tell whether SQLite could not write to an existing file; it needs the folder too, for its log."""
    return path.exists() and not (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK | os.X_OK))


def uri_of(path: Path) -> str:
    """SQLite's URI of a file that is not written to.

    A log beside the file can be read only together with an index that SQLite would have to create; where the folder
    forbids that and there is no index, the file is taken as it is.
    """
    index = path.with_name(f"{path.name}-shm")
    fixed = "&immutable=1" if not os.access(path.parent, os.W_OK) and not index.exists() else ""
    return f"file:{quote(str(path.absolute()))}?mode=ro{fixed}"


def open_read_only(path: Path) -> BaseStorage:
    """Open a study's file for looking alone.

    Args:
        path: the file; its tables exist.
    """
    storage = RDBStorage(
        "sqlite://",
        engine_kwargs={"creator": lambda: sqlite3.connect(uri_of(path), uri=True, timeout=60, check_same_thread=False)},
        skip_table_creation=True,
    )
    _OPENED.add(storage)
    return storage
