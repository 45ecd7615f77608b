"""The other side of `pool.py`: one worker process, under the orders of its parent."""

from __future__ import annotations

import json
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from types import FrameType
from typing import Any

import torch

from dfmerge_studies.objective.loading import choose_device
from dfmerge_studies.objective.memory import held_bytes
from dfmerge_studies.objective.problem import Problem
from dfmerge_studies.progress import Progress, silent
from dfmerge_studies.signals import STOP, stop_this_process
from dfmerge_studies.study.pool import Orders, device_of, threads_each
from dfmerge_studies.study.room import Room, host_room
from dfmerge_studies.study.session import Session, open_study
from dfmerge_studies.study.totals import owe
from dfmerge_studies.study.validate import memory_estimate
from dfmerge_studies.study.variants import baseline_specs
from dfmerge_studies.trials.results import Event

Say = Callable[..., None]
_PHASE_SECONDS = 0.25  # between two reports of how far a phase is
_LOOK_SECONDS = 0.5  # after which one who waits notices a signal, where waiting cannot be interrupted


def read_orders(line: str) -> Orders:
    """Orders as the parent sent them."""
    return Orders(**json.loads(line))


@contextmanager
def reporting() -> Iterator[Say]:
    """Keep standard output for reports: what libraries print goes to standard error meanwhile.

    Yields:
        A function from a notice's kind and fields to nothing.
    """
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as reports:
        os.dup2(2, 1)
        lock = threading.Lock()

        def say(kind: str, **content: Any) -> None:
            with lock:
                try:
                    reports.write(json.dumps({"kind": kind, **content}) + "\n")
                    reports.flush()
                except BrokenPipeError:
                    pass  # the parent has died: standard input says so too

        yield say


class Leave:
    """The parent's leave to go on, a line of standard input each time."""

    def __init__(self) -> None:
        self._given: queue.SimpleQueue[str] = queue.SimpleQueue()

    def give(self, line: str) -> None:
        """What the parent does; from any thread."""
        self._given.put(line)

    def is_given(self) -> bool:
        """Take it if it is there already."""
        with suppress(queue.Empty):
            self._given.get_nowait()
            return True
        return False

    def wait(self) -> str:
        """Take it when it is there, and what it says."""
        while True:
            with suppress(queue.Empty):
                return self._given.get(timeout=_LOOK_SECONDS)


def obey_parent() -> Leave:
    """Stop this process, its trial handed back, when its standard input ends.

    Returns:
        What the parent gives by the lines there.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(STOP, interrupt)
    leave = Leave()

    def listen() -> None:
        rest = b""
        while said := os.read(0, 1024):
            *lines, rest = (rest + said).split(b"\n")
            for line in lines:
                leave.give(line.decode())
        stop_this_process()

    threading.Thread(target=listen, name="obey-parent", daemon=True).start()
    return leave


def serve(orders: Orders, say: Say, leave: Leave) -> bool:
    """Work as ordered: on the study, then on those of its baselines.

    Args:
        orders: from `read_orders`.
        say: from `reporting`.
        leave: from `obey_parent`.

    Returns:
        Whether the work was not interrupted.
    """
    threads = threads_each(orders.workers)
    torch.set_num_threads(threads)
    spec = orders.spec
    spec = spec.derive(device=device_of(spec.device, orders.index, torch.cuda.device_count()))
    device = choose_device(spec)
    if device.index is not None:
        torch.cuda.set_device(device)  # what names no device goes to the same one
    progress = _phases(say) if orders.phases else silent
    say("ready", device=str(device), **asdict(_room(device)))
    share = leave.wait()

    def loaded(problem: Problem) -> None:
        if leave.is_given():  # others have loaded before: it is known that all fit
            return
        estimate, held = memory_estimate(problem), held_bytes(problem)
        needs = {"held": held, "peak": estimate.peak_bytes, "beside": estimate.host_bytes}
        say("loaded", device=str(device), **needs, **asdict(_room(device)), host=asdict(host_room()))
        leave.wait()

    allowed = int(share) if share else None
    session = open_study(spec, splits=orders.splits, progress=progress, on_loaded=loaded, share=allowed)
    say("joined", threads=torch.get_num_threads(), device=str(session.problem.resident.device))
    return all(_work(each, orders if each is session else None, say, progress) for each in (session, *_others(session)))


def _room(device: torch.device) -> Room:
    return Room(*torch.cuda.mem_get_info(device)) if device.type == "cuda" else host_room()


def _others(session: Session) -> Iterator[Session]:
    for spec in baseline_specs(session.spec):
        yield open_study(spec, problem=session.problem)


def _work(session: Session, orders: Orders | None, say: Say, progress: Progress) -> bool:
    target = orders.target if orders is not None else None
    if orders is not None and orders.owed:
        owe(session.study, orders.owed)
    session.merger.progress = progress
    say("study", name=session.spec.name, total=session.total(target))

    def report(event: Event) -> None:
        say(
            "trial",
            study=session.spec.name,
            event=event.kind,
            number=event.number,
            place=event.place,
            values=event.values,
            message=event.message,
        )

    summary = session.run(target=target, lower=False, regardless=False, on_event=report, name_winner=False)
    return not summary.interrupted


def _phases(say: Say) -> Progress:
    last = ("", 0.0)

    def show(what: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if what != last[0] or now - last[1] > _PHASE_SECONDS:
            last = (what, now)
            say("phase", what=what, done=done, total=total)

    return show
