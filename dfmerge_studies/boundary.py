"""The boundary to the file system and to libraries that read what a user gave.

Whatever goes wrong behind it is told as one `InputError` that names the file or the field.
"""

from __future__ import annotations

import json
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dfmerge_studies.errors import DFMergeError, InputError, first_line, out_of_memory

LARGEST_TEXT = 64 * 2**20  # bytes of a text file that is read whole: the largest tokenizers have about a third
PERMIT = "Change its permissions, or those of its folder"
_SHOWN = 120  # characters of a path in a message
_KINDS = (
    (stat.S_ISDIR, "folder"),
    (stat.S_ISFIFO, "pipe"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISCHR, "device"),
    (stat.S_ISBLK, "device"),
)


@contextmanager
def reading(where: str, what: str, hint: str) -> Iterator[None]:
    """The boundary to a library that reads what a user gave: whatever it raises becomes one `InputError`.

    Libraries raise types of every kind for bad files, panics of their Rust parts included, so that no list of types
    would be whole.  Nothing but the call into the library belongs into the block: a mistake of ours would be told as
    the file's.

    Args:
        where: the file, or file and field, that is being read.
        what: what cannot be done, as a clause that the reason follows after a colon.
        hint: what the reader can do about it, unless permissions are what is lacking.

    Raises:
        InputError: for whatever was raised; errors of this package and lack of memory pass.
    """
    try:
        yield
    except (DFMergeError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if isinstance(error, OSError) and error.strerror and str(error.filename) in where:
            reason = first_line(OSError(error.errno, error.strerror))
        else:
            reason = first_line(error)
        hint = PERMIT if _is_forbidden(error) else hint
        raise out_of_memory(error) or InputError(f"{what}: {reason}", where=where, hint=hint) from error


def _is_forbidden(error: BaseException | None) -> bool:
    """Whether what was raised, or what it was raised from, is a lack of permission: no other file would mend that."""
    while error is not None and not isinstance(error, PermissionError):
        error = error.__cause__
    return error is not None


def local_path(text: str | Path, root: Path, where: str) -> Path:
    """The absolute path that a text means, links followed; nothing need be there.

    Args:
        text: a path, relative to `root`, or from the home folder with `~`.
        root: folder that relative paths start from.
        where: file and field that the text stands in, or a flag.

    Raises:
        InputError: no file can have this path: it is too long, runs in a circle of links, or may not be looked at; or
            its name is no text.
    """
    shown = str(text) if len(str(text)) <= _SHOWN else f"{str(text)[:_SHOWN]}..."
    with reading(where, f"{shown!r} is no path that can be used", "Correct the path"):
        path = (root / Path(text).expanduser()).resolve()
        with suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
    check_is_text(path, where)
    return path


def check_is_text(path: Path, where: str) -> None:
    """Refuse a path that is no text: databases, JSON and the libraries that load models cannot hold its name.

    Args:
        path: as it will be used.
        where: file and field that it stands in, or a flag.

    Raises:
        InputError: it has bytes that the encoding of file names does not know.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        encoding = sys.getfilesystemencoding()
        locale = "" if encoding == "utf-8" else ", or set LC_ALL=C.UTF-8"
        raise InputError(
            f"{str(path)!r} has bytes that are no {encoding.upper()} text",
            where=where,
            hint=f"Use a path that is{locale}",
        ) from None


def kind_of(path: Path) -> str | None:
    """What is at a path: None for a file, otherwise "folder", "pipe", "socket" or "device"; "" where nothing is.

    Args:
        path: where to look.

    Raises:
        OSError: it may not be looked at.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return ""
    return next((name for is_kind, name in _KINDS if is_kind(mode)), None)


def check_regular(path: Path, where: str, hint: str = "Name a file") -> None:
    """Refuse what is no file: reading a pipe or a device may never end.

    Args:
        path: what is about to be opened; where nothing is, nothing is said.
        where: what names it, for messages.
        hint: what to do about it.

    Raises:
        InputError: it is a folder, a pipe, a socket or a device.
    """
    with reading(where, "cannot be read", hint):
        kind = kind_of(path)
    if kind:
        named = "this" if where == str(path) else str(path)
        raise InputError(f"{named} is a {kind}, not a file", where=where, hint=hint)


def read_text(file: Path, *, where: str | None = None, hint: str, limit: int = LARGEST_TEXT) -> str:
    """A text file as a whole.

    Args:
        file: which exists.
        where: what names it, for messages; the file itself by default.
        hint: what to do where it cannot be read.
        limit: bytes that it may have.

    Raises:
        InputError: it is no file, is no UTF-8 text, is too large, or cannot be read.
    """
    where = where or str(file)
    check_regular(file, where, hint)
    with reading(where, "cannot be read", hint):
        size = file.stat().st_size
        if size > limit:
            raise InputError(f"{size} bytes are more than such a file can have ({limit})", where=where, hint=hint)
        return file.read_text(encoding="utf-8")


def read_json(file: Path, *, where: str | None = None, hint: str) -> Any:
    """A JSON file as a whole.

    Args:
        file: which exists.
        where: what names it, for messages; the file itself by default.
        hint: what to do where it cannot be read.

    Raises:
        InputError: it cannot be read, or is no JSON.
    """
    text = read_text(file, where=where, hint=hint)
    with reading(where or str(file), "not readable as JSON", hint):
        return json.loads(text)
