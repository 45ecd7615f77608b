"""Whether several workers fit into the memory of the devices that they share, asked before all of them have loaded.

held    bytes that a worker took when it loaded: weights and task vectors
peak    bytes of a worker in a trial, as `validate` estimates them
free    bytes of a device that nobody holds, when one worker has loaded and the others have not
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from dfmerge_studies.errors import InputError

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Room:
    """Memory of a device, or of the host.

    Attributes:
        free: bytes that nobody holds; other processes and earlier runs hold some.
        total: bytes.
    """

    free: int
    total: int

    def within(self, other: Room) -> Room:
        """The tighter of two limits.

        Args:
            other: of memory that holds this one's.
        """
        return Room(min(self.free, other.free), min(self.total, other.total))


@dataclass(frozen=True)
class Need:
    """What a worker needs, see the top of the module."""

    held: int
    peak: int
    beside: int = 0


def host_room() -> Room:
    """Memory of this machine, or what a container or a batch system lets this process have of it."""
    memory = psutil.virtual_memory()
    room = Room(int(memory.available), int(memory.total))
    for group in _control_groups():
        limit = _read_bytes(group / "memory.max", group / "memory.limit_in_bytes")
        used = _read_bytes(group / "memory.current", group / "memory.usage_in_bytes")
        if limit is not None and used is not None:
            room = room.within(Room(max(0, limit - used + _files_in_memory(group)), limit))
    return room


def shares_of(devices: Sequence[str], rooms: Mapping[str, Room]) -> dict[str, int]:
    """Bytes for each of several workers on a device, of what is free when none has loaded; nothing for one alone.

    Args:
        devices: of each worker.
        rooms: of each device.
    """
    counts = {device: devices.count(device) for device in devices}
    return {device: rooms[device].free // count for device, count in counts.items() if count > 1}


def check_room(devices: Sequence[str], rooms: Mapping[str, Room], need: Need) -> str | None:
    """Look whether workers fit, when the first of them has loaded.

    Args:
        devices: of each worker, in their order; no more than the first has loaded.
        rooms: of each device, and of the CPU where something is needed there.
        need: of a worker; all load the same.

    Returns:
        A warning where memory may run out in a trial, else None.

    Raises:
        InputError: what the workers hold all the time is more than a device has.
    """

    def missing(device: str, workers: int) -> int:
        return workers * need.peak - (need.held if device == devices[0] else 0)

    def all_hold(device: str, workers: int) -> bool:
        return workers * need.held <= rooms[device].total

    def all_run(device: str, workers: int) -> bool:
        return missing(device, workers) <= rooms[device].free

    counts = {device: devices.count(device) for device in devices}
    for device, count in counts.items():
        if not all_hold(device, count):
            raise InputError(
                f"{_workers(count, device)} hold {_gb(count * need.held)} of weights and task vectors;"
                f" it has {_gb(rooms[device].total)} in all",
                where="--workers",
                hint=f"{_advice(devices, all_hold)}; dtype: bfloat16 takes half",
            )
    for device, count in counts.items():
        if not all_run(device, count):
            loaded = need.held if device == devices[0] else 0
            each = (rooms[device].free + loaded) // count
            bound = f"; memory: {each // 10**6}MB bounds each" if each > need.held else ""
            return (
                f"memory may run out: {_workers(count, device)} need about {_gb(missing(device, count))}"
                f"{' more' if loaded else ''} in their trials, and {_gb(rooms[device].free)} are free"
                f" ({_advice(devices, all_run)}{bound})"
            )
    others = need.beside * (len(devices) - 1)
    if "cpu" in rooms and "cpu" not in counts and others > rooms["cpu"].free:
        return (
            f"memory may run out: beside their devices, {len(devices)} workers need about {_gb(others)} more of this"
            f" machine, and {_gb(rooms['cpu'].free)} are free"
        )
    return None


def _workers(count: int, device: str) -> str:
    place = "this machine" if device == "cpu" else device
    return f"{count} workers on {place}" if count > 1 else f"the worker on {place}"


def _advice(devices: Sequence[str], fit: Callable[[str, int], bool]) -> str:
    """How many of the workers, in their order, fit on all of their devices."""
    for most in range(len(devices) - 1, 0, -1):
        kept = devices[:most]
        if all(fit(device, kept.count(device)) for device in set(kept)):
            return f"--workers {most} fits" if most > 1 else "one fits, without --workers"
    return "not even one fits"


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


# --- limits of control groups: https://docs.kernel.org/admin-guide/cgroup-v2.html, cgroup-v1/memory.html -------------


def _control_groups() -> list[Path]:
    """Folders of the groups that bound this process's memory, its own and those around it; none but on Linux."""
    try:
        lines = _OWN_GROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found: list[Path] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = _CGROUPS / "memory" if controllers else _CGROUPS
        own = root / path.lstrip("/")
        # In a container its own group is the root, and the path may be one that only the host knows.
        found += [folder for folder in (own, *own.parents) if folder.is_relative_to(root) and folder.is_dir()]
    return found


def _read_bytes(*files: Path) -> int | None:
    """The number in the first of the files that there is; None where it says that there is no limit."""
    for file in files:
        try:
            text = file.read_text(encoding="utf-8").strip()
        except OSError:
            continue
        return int(text) if text.isdigit() else None
    return None


def _files_in_memory(group: Path) -> int:
    """Bytes of files that the kernel keeps for a group and gives up when memory is asked for."""
    try:
        lines = (group / "memory.stat").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    counts = dict(line.split() for line in lines)
    return int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))
