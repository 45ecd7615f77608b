"""Fishers written to a cache beside the trials: a trial hands its values over and goes on.

One thread writes, in the order of arrival.  What waits is in memory, so it is bounded in bytes, and found there by who
asks for it meanwhile.  A process that is killed loses what waits, and nothing of what is written: an entry gets its
name when it is whole.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from dfmerge_studies.errors import first_line
from dfmerge_studies.importance.cache.base import FisherCache
from dfmerge_studies.importance.cache.key import FisherKey

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)


class CacheWriter:
    """Writes entries of one cache from a thread.

    Args:
        cache: where to.
        room: bytes that may wait.
        written: told bytes and seconds of each entry that was written.
    """

    def __init__(self, cache: FisherCache, room: int, written: Callable[[int, float], None]) -> None:
        self._cache = cache
        self._room = room
        self._written = written
        self._changed = threading.Condition()
        self._waiting: dict[str, Mapping[str, Tensor]] = {}
        self._bytes = 0
        self._thread: ThreadPoolExecutor | None = None
        self._last: Future[None] | None = None

    def waiting(self, key: FisherKey) -> Mapping[str, Tensor] | None:
        """The values of a key that is not written yet."""
        with self._changed:
            return self._waiting.get(key.digest)

    def put(self, key: FisherKey, values: Mapping[str, Tensor], *, wait: bool) -> bool:
        """Hand an entry over.

        Args:
            key: what the values are.
            values: in the host's memory, never changed from now on.
            wait: for room, where there is none; an entry that is larger than all of it waits for the others.

        Returns:
            Whether it was taken.
        """
        size = size_of(values)
        with self._changed:
            while self._bytes and self._bytes + size > self._room:
                if not wait:
                    return False
                self._changed.wait()
            self._waiting[key.digest] = values
            self._bytes += size
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, "fisher-cache")  # joined at the interpreter's end
            self._last = self._thread.submit(self._write, key, values, size)
        return True

    def flush(self) -> None:
        """Wait until all that was handed over is written."""
        if self._last is not None:
            self._last.result()

    def _write(self, key: FisherKey, values: Mapping[str, Tensor], size: int) -> None:
        start = time.perf_counter()
        try:
            if self._cache.put(key, values):
                self._written(size, time.perf_counter() - start)
        except Exception as error:  # whatever it is: it costs the entry, never a trial
            logger.warning("a Fisher was not written to the cache %s: %s", self._cache.location, first_line(error))
        finally:
            with self._changed:
                self._waiting.pop(key.digest, None)
                self._bytes -= size
                self._changed.notify_all()


def size_of(values: Mapping[str, Tensor]) -> int:
    """Bytes of some tensors."""
    return sum(value.numel() * value.element_size() for value in values.values())
