"""Two guards around a running trial: signals that end it in good order, and signs of life for other workers."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError

from dfmerge_studies.signals import INTERRUPTS, STOP
from dfmerge_studies.storage import (
    DATABASE_ERRORS,
    STORAGE_FAILURES,
    heartbeat_after_beginning,
    record_heartbeat,
    storage_of,
)
from dfmerge_studies.trials.marks import BEAT, mark

_BEAT_SECONDS = 30.0


class Interrupts:
    """Turns the first Ctrl-C or SIGTERM into `requested`, raising KeyboardInterrupt only inside `allowed`.

    Between trials the loop is writing to its storage, where an exception could strike half-way through; it looks at
    `requested` instead.  A second signal has its usual effect, at once, unless it is STOP.  Handlers exist from
    `__enter__` to `__exit__`, and only in the main thread, where alone Python can install them.
    """

    def __init__(self) -> None:
        self.requested = False
        self._raising = False
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in {*INTERRUPTS, STOP}:
                self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._former.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == STOP and STOP not in INTERRUPTS and self.requested:
            return
        self.requested = True
        for each in INTERRUPTS:
            signal.signal(each, signal.SIG_DFL)
        if self._raising:
            self._raising = False
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """Let a signal interrupt what runs in the context.

        Raises:
            KeyboardInterrupt: a signal arrives in the context, or has arrived before it.
        """
        self._raising = True
        try:
            if self.requested:
                raise KeyboardInterrupt
            yield
        finally:
            self._raising = False


@contextlib.contextmanager
def signs_of_life(study: optuna.Study, trial_id: int) -> Iterator[None]:
    """Record that a trial is alive, now unless it began with such a record, and from a thread until the context ends.

    Storages without a heartbeat of their own get the time of day as an attribute.  A storage that fails is tried again
    at the next beat: what counts is whether it takes the result.
    """
    over = threading.Event()

    def beat() -> float:
        with contextlib.suppress(*STORAGE_FAILURES, UpdateFinishedTrialError):
            return _beat(study, trial_id)
        return _BEAT_SECONDS

    begun = heartbeat_after_beginning(study)
    interval = beat() if begun is None else begun

    def run() -> None:
        while not over.wait(interval):
            beat()
        with contextlib.suppress(*DATABASE_ERRORS):
            storage_of(study).remove_session()  # a database session belongs to the thread that opened it

    thread = threading.Thread(target=run, name=f"signs-of-life-{trial_id}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _beat(study: optuna.Study, trial_id: int) -> float:
    """Record one sign of life, and return the seconds to the next."""
    seconds = record_heartbeat(study, trial_id)
    if seconds is None:
        mark(study, trial_id, {BEAT: time.time()})
    return seconds or _BEAT_SECONDS
