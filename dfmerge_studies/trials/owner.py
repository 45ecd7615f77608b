"""Which process runs a trial, and whether that process still lives.

A process is known by machine (host name, boot, process-id namespace), process id and start time; a process id alone
comes round again.  Only processes of this machine can be judged: for others, see the heartbeats in `recovery.py`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import uuid
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

_working: set[str] = set()  # the calls of `work` that go on in this process now


@contextlib.contextmanager
def working() -> Iterator[dict[str, Any]]:
    """Describe this process as the owner of trials for as long as the context lasts."""
    worker, since = uuid.uuid4().hex, datetime.now().isoformat(timespec="seconds")
    _working.add(worker)
    try:
        yield {**_machine(), "pid": os.getpid(), "started": _start_of(os.getpid()), "since": since, "worker": worker}
    finally:
        _working.discard(worker)


def is_dead(owner: Mapping[str, Any]) -> bool | None:
    """Tell whether an owner has ended; None if that cannot be told from here.

    Args:
        owner: as `working` gave it, read back from a storage.
    """
    here = _machine()
    if owner.get("host") != here["host"]:
        return None
    if owner.get("boot") != here["boot"]:
        return True  # the machine has been restarted since
    if owner.get("space") != here["space"]:
        return None  # another container, with process ids of its own
    started = _start_of(int(owner["pid"]))
    if started is None or started != owner.get("started"):
        return True
    return int(owner["pid"]) == os.getpid() and owner.get("worker") not in _working


def _machine() -> dict[str, str]:
    return {"host": socket.gethostname(), "boot": _boot(), "space": _process_space()}


def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _process_space() -> str:
    with contextlib.suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
    return ""


def _start_of(pid: int) -> str | None:
    """Return when a process started, or None if there is none (a zombie has ended)."""
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists():
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else fields[19]  # ticks since boot: unmoved by a change of the clock
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.0f}"
    except psutil.Error:
        return None
