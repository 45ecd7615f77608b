"""Names under which files are written until they are whole, and what killed processes left under such names.

A name says who writes: 8 digits for the machine, 8 for the process, 16 drawn.  So what a dead process of this machine
left can be deleted at once, and what may be somebody's work is left alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import socket
import uuid
from pathlib import Path

_NAME = re.compile(r"(?P<what>.*)\.(?P<host>[0-9a-f]{8})(?P<process>[0-9a-f]{8})[0-9a-f]{16}\.tmp")


def token() -> str:
    """32 hexadecimal digits that nobody else uses, with the machine and the process in them."""
    return f"{_host()}{os.getpid():08x}{uuid.uuid4().hex[:16]}"


def beside(path: Path) -> Path:
    """A hidden name in the same folder, from which a rename to `path` is one step."""
    return path.with_name(f".{path.name}.{token()}.tmp")


def sweep(folder: Path, name: str | None = None) -> list[Path]:
    """Delete what dead processes of this machine left unfinished.

    Args:
        folder: where to look, not below it; it may be missing.
        name: of the file or folder that they were to write; None for any.

    Returns:
        What was deleted.
    """
    import psutil

    gone = []
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            match = _NAME.fullmatch(path.name)
            if match is None or match["host"] != _host() or psutil.pid_exists(int(match["process"], 16)):
                continue
            if name is not None and match["what"] != f".{name}":
                continue
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
                gone.append(path)
    return gone


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
