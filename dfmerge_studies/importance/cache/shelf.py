"""Which Fishers are kept in a cache, and when they are written.

    uses    how often a Fisher will be asked for again, as far as that is known: 0 for one of continuous coefficients
    costs   seconds to write and to read it, from bytes and measured speeds, against the seconds that it took to compute

Under `auto` a Fisher is kept where  write / uses + read < compute.  One without known uses is held until its trial is
over, and kept if the trial is the best so far: that is the one which `export` and `report` merge again.  Under `all`
each is kept.  What is computed outside of trials was asked for by name, is kept, and is written before work goes on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from dfmerge_studies.importance.cache.base import FisherCache
from dfmerge_studies.importance.cache.key import FisherKey
from dfmerge_studies.importance.cache.writer import CacheWriter, size_of

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

Policy = Literal["auto", "all"]

SMALL = 8_000_000  # bytes: an entry up to here is written and read in less time than can be measured well
_ROOM = 1_000_000_000  # bytes that may wait to be written, or an eighth of the free memory if that is less
_WRITE, _READ, _COPY = 2e8, 1e9, 3e9  # bytes a second until they were measured; from a device to the host
_TRIALS_PER_BEST = 12  # of which one is the best so far, in a study of 60: 1/1 + 1/2 + ... + 1/60 is 4.7


@dataclass
class Speed:
    """Bytes a second, measured over all that was moved.

    Attributes:
        assumed: before anything was measured.
        moved: bytes.
        seconds: that they took.
    """

    assumed: float
    moved: int = 0
    seconds: float = 0.0

    def add(self, moved: int, seconds: float) -> None:
        """Count what was moved; small entries say nothing of speed."""
        if moved > SMALL:
            self.moved, self.seconds = self.moved + moved, self.seconds + seconds

    def time_of(self, size: int) -> float:
        """Seconds that so many bytes will take."""
        return size * self.seconds / self.moved if self.moved else size / self.assumed


@dataclass
class Tally:
    """What became of the Fishers that were computed in trials.

    Attributes:
        kept: how many, and their bytes.
        unasked: not kept, since nothing will ask for them again.
        cheaper: not kept, since computing them again is quicker than writing and reading them.
        no_room: not kept, since a trial's would not fit into the cache's limit, or the disk was too slow.
    """

    kept: list[int] = field(default_factory=lambda: [0, 0])
    unasked: list[int] = field(default_factory=lambda: [0, 0])
    cheaper: list[int] = field(default_factory=lambda: [0, 0])
    no_room: list[int] = field(default_factory=lambda: [0, 0])

    def text(self) -> str:
        """The same in words; empty where nothing was computed."""
        kept = f"{self.kept[0]} of this run's Fishers kept ({self.kept[1] / 1e9:.2f} GB)"
        why = {
            "nothing asks for them again": self.unasked,
            "computing them again is quicker than reading them": self.cheaper,
            "there was no room, or no time to write them": self.no_room,
        }
        left = [f"{count} not ({size / 1e9:.2f} GB: {reason})" for reason, (count, size) in why.items() if count]
        return ", ".join([kept, *left]) if left or self.kept[0] else ""

    @staticmethod
    def count(kind: list[int], size: int) -> None:
        """Add one entry of so many bytes."""
        kind[0], kind[1] = kind[0] + 1, kind[1] + size


@dataclass(frozen=True)
class _Held:
    key: FisherKey
    values: Mapping[str, Tensor]
    size: int


class Trial:
    """The Fishers of one trial that nothing is known to ask for again."""

    def __init__(self) -> None:
        self.held: list[_Held] = []
        self.is_best = False

    def keep(self) -> None:
        """The trial is the best so far: keep them."""
        self.is_best = True


class Shelf:
    """A Fisher cache as one process uses it: what it reads, and what of its own it keeps.

    Args:
        cache: where entries are; None for nowhere.
        policy: what is kept of a trial.
        together: Fishers that one merge needs: those of a trial are kept all or none.
    """

    def __init__(self, cache: FisherCache | None, policy: Policy = "all", *, together: int = 1) -> None:
        self.cache = cache
        self.policy = policy
        self.tally = Tally()
        self._together = together
        self._writing, self._reading = Speed(_WRITE), Speed(_READ)
        self._writer: CacheWriter | None = None
        self._trial: Trial | None = None

    def get(self, key: FisherKey) -> Mapping[str, Tensor] | None:
        """The values of a key, or None."""
        if self.cache is None:
            return None
        if self._writer is not None and (waiting := self._writer.waiting(key)) is not None:
            return waiting
        start = time.perf_counter()
        values = self.cache.get(key)
        if values is not None:
            self._reading.add(size_of(values), time.perf_counter() - start)
        return values

    def put(self, key: FisherKey, values: Mapping[str, Tensor], *, seconds: float, uses: float) -> None:
        """Keep values that were computed, or hold them, or let them go.

        Args:
            key: what they are.
            values: one tensor per parameter name, already in the stored dtype.
            seconds: that computing them took.
            uses: how often they will be asked for again, as far as that is known.
        """
        if self.cache is None:
            return
        if self._trial is None:
            self.cache.put(key, _on_host(values))
            return
        size = size_of(values)
        limit, device = self.cache.limit, next(iter(values.values())).device.type
        if self.policy == "auto" and limit is not None and size * self._together > limit:
            self.tally.count(self.tally.no_room, size)
        elif self.policy == "auto" and not self._pays(size, seconds, uses, on_host=device == "cpu"):
            self.tally.count(self.tally.cheaper, size)
        elif self.policy == "all" or uses > 0:
            self._keep(_Held(key, _on_host(values), size))
        else:
            self._trial.held.append(_Held(key, _on_host(values), size))

    @contextmanager
    def trial(self) -> Iterator[Trial]:
        """Around a trial: its Fishers are written by a thread, or held until it is known whether it is the best."""
        self._trial = trial = Trial()
        try:
            yield trial
        finally:
            self._trial = None
            for each in trial.held:
                if trial.is_best:
                    self._keep(each)
                else:
                    self.tally.count(self.tally.unasked, each.size)

    def flush(self) -> None:
        """Wait until everything that is kept is written."""
        if self._writer is not None:
            self._writer.flush()

    def _pays(self, size: int, seconds: float, uses: float, *, on_host: bool) -> bool:
        if size <= SMALL:
            return True
        copying = 0.0 if on_host else size / _COPY * (1 if uses else _TRIALS_PER_BEST)
        writing = self._writing.time_of(size) / max(uses, 1.0)
        return copying + writing + self._reading.time_of(size) < seconds

    def _keep(self, entry: _Held) -> None:
        if self._writer is None:
            assert self.cache is not None
            import psutil  # only where it is needed, as everywhere in the package

            room = min(_ROOM, psutil.virtual_memory().available // 8)
            self._writer = CacheWriter(self.cache, room, self._writing.add)
        taken = self._writer.put(entry.key, entry.values, wait=self.policy == "all")
        self.tally.count(self.tally.kept if taken else self.tally.no_room, entry.size)


def _on_host(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in values.items()}
