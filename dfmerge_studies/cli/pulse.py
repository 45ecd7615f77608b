"""Where nobody watches a bar, in a pipe or a log: a line for every half minute in which nothing was said."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Event, Thread
from typing import Any

SILENCE = 30.0  # seconds


class Pulse:
    """Says what is being done, until the context ends.

    Args:
        say: prints a line.
        on: whether anything is said at all.
    """

    def __init__(self, say: Callable[[str], None], *, on: bool) -> None:
        self._say = say
        self._doing = "working"
        self._last = time.monotonic()
        self._ended = Event()
        self._thread = Thread(target=self._run, name="pulse", daemon=True) if on else None

    def __enter__(self) -> Pulse:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def doing(self, what: str, done: int, total: int) -> None:
        """Note what is being done; nothing is said yet.

        Args:
            what: is being done.
            done: how much of it.
            total: of how much.
        """
        self._doing = f"{what}: {done} of {total}" if total > 1 else what

    def said(self) -> None:
        """Note that something else was said just now."""
        self._last = time.monotonic()

    def _run(self) -> None:
        while not self._ended.wait(max(0.05, self._last + SILENCE - time.monotonic())):
            if time.monotonic() - self._last >= SILENCE:
                self._say(self._doing)
                self.said()
