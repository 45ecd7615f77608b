"""How long work tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # what is being done, how much of it, of how much


def silent(what: str, done: int, total: int) -> None:
    """A progress callback that shows nothing."""


def counted(progress: Progress, what: str, total: int) -> Callable[[int], None]:
    """A callback for "so many more are done" that tells how many are done of how many."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(what, done, total)

    progress(what, 0, total)
    return advance
