"""Names under which files are written until they are whole, and what killed processes left under such names.

A name says who writes: 8 digits for the machine, 8 for the process, 16 drawn.  So what a dead process of this machine
left can be deleted at once, and what may be somebody's work is left alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import socket
import uuid
from pathlib import Path

_NAME = re.compile(r".*\.(?P<host>[0-9a-f]{8})(?P<process>[0-9a-f]{8})[0-9a-f]{16}\.tmp")


def token() -> str:
    """32 hexadecimal digits that nobody else uses, with the machine and the process in them."""
    return f"{_host()}{os.getpid():08x}{uuid.uuid4().hex[:16]}"


def beside(path: Path) -> Path:
    """A hidden name in the same folder, from which a rename to `path` is one step."""
    return path.with_name(f".{path.name}.{token()}.tmp")


def sweep(folder: Path) -> list[Path]:
    """Delete the unfinished files of dead processes of this machine.

    Args:
        folder: where to look, not below it; it may be missing.

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
            with contextlib.suppress(OSError):
                path.unlink()
                gone.append(path)
    return gone


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
