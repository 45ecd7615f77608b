"""Files that are to be storages: refused before anything opens them for writing."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

from dfmerge_studies.boundary import check_regular, local_path
from dfmerge_studies.errors import InputError, RunError, first_line
from dfmerge_studies.storage.read_only import cannot_write, uri_of

_SMALLEST_DATABASE = 512  # one page; SQLite takes a file of a few bytes for an empty database
_NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "glusterfs", "lustre", "beegfs", "gpfs", "fuse.sshfs"}
)


def check_file(path: Path, create: bool) -> None:
    """Refuse a path that could not become, or is not, a writable file; create nothing.

    Args:
        path: the file.
        create: whether it may be missing and will be written to; otherwise it is only looked at.

    Raises:
        InputError: it is a folder, its folder is missing, it is missing and may not be, or it cannot be written to.
    """
    where = str(path)
    check_regular(local_path(path, Path.cwd(), where), where, "Name a file in it")
    if not path.parent.is_dir():
        raise InputError(
            f"the folder {path.parent} does not exist", where=where, hint="Create it, or name another file"
        )
    if not path.exists() and not create:
        raise InputError("there is no such storage", where=where, hint="Check the path, or start the study with `run`")
    # SQLite also writes its log beside the file, so the folder matters even when the file exists.
    if path.exists() and not os.access(path, os.R_OK):
        raise InputError("the file cannot be read", where=where, hint="Change its permissions")
    if create and (not os.access(path.parent, os.W_OK | os.X_OK) or cannot_write(path)):
        raise InputError("the file or its folder cannot be written to", where=where, hint="Change its permissions")


def check_sqlite_file(path: Path) -> None:
    """Refuse a file that is no SQLite database, a database of other software, and a network file system.

    Args:
        path: the file; it may be missing or empty.

    Raises:
        InputError: it is one of these, or it is damaged.
        RunError: it cannot be read.
    """
    where = str(path)
    kind = network_file_system(path)
    if kind is not None:
        raise InputError(
            f"SQLite cannot share a file safely on a network file system ({kind})",
            where=where,
            hint="Use a local folder, a journal:///FILE storage, or Postgres",
        )
    if not path.exists() or path.stat().st_size == 0:
        return
    damaged = InputError("this file is not an SQLite database", where=where, hint="Name another file")
    if path.stat().st_size < _SMALLEST_DATABASE:
        raise damaged
    # SQLite alone may open the file: closing it elsewhere drops this process's locks on it, whereupon another process
    # takes itself for the last one and removes the log that this one still reads and writes.
    try:
        with contextlib.closing(sqlite3.connect(uri_of(path), uri=True, timeout=60)) as db:
            tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            (health,) = db.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.OperationalError as error:
        raise RunError(f"the database cannot be read: {first_line(error)}", where=where) from error
    except sqlite3.DatabaseError as error:
        raise damaged from error
    if health != "ok":
        text = " ".join(str(health).replace("*", "").split())
        raise InputError(f"the database is damaged: {text}", where=where, hint="Restore a copy, or name another file")
    # Another process may be creating the tables one by one: any of Optuna's will do.
    if tables and not tables & {"studies", "version_info", "alembic_version", "trials"}:
        raise InputError(
            f"this database belongs to other software (it has a table named {min(tables)})",
            where=where,
            hint="Name another file",
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
