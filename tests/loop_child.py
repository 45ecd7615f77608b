"""A worker process for the tests: it calls `work` once, on a cheap real objective.

Faults are real: the process kills or signals itself at the moment that the test asks for.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna

from dfmerge_studies.errors import DFMergeError, RunError
from dfmerge_studies.search import make_sampler
from dfmerge_studies.storage import join_study, open_storage
from dfmerge_studies.trials import claims, loop, results
from dfmerge_studies.trials.loop import work
from dfmerge_studies.trials.queue import enqueue
from dfmerge_studies.trials.results import Event, TrialResult
from dfmerge_studies.trials.space import Space

SPACE = Space(("a", "b", "c"))


def objective(point: dict[str, float]) -> float:
    return -((point["a"] - 0.3) ** 2) - (point["b"] - 0.8) ** 2 - 0.5 * (point["c"] - point["a"]) ** 2


def study_of(settings: dict[str, Any]) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = make_sampler(
        settings.get("sampler", "random"),
        seed=settings.get("seed", 0),
        study_name="s",
        space=SPACE,
        startup_trials=settings.get("startup", 4),
        grid=settings.get("grid"),
    )
    directions = ["maximize"] * settings.get("objectives", 1)
    storage = open_storage(settings["url"], heartbeat=settings.get("heartbeat", 30), grace=settings.get("grace", 180))
    return join_study(storage, "s", directions=directions, sampler=sampler)


def limit_files(size: int) -> None:
    """Let no file of this process grow beyond so many bytes: what a full disk does, without the rights to make one."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


def _wait_until_there(file: Path) -> None:
    until = time.monotonic() + 60
    while not file.exists() and time.monotonic() < until:
        time.sleep(0.01)


def _hang(settings: dict[str, Any]) -> None:
    print(json.dumps(["hanging"]), flush=True)
    _wait_until_there(Path(settings["go"]))


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _before_call(number: int | None, act: Callable[[], None], function: Any) -> Any:
    """A function that acts before its call of that number, from 1 on; itself without one."""
    if number is None:
        return function
    calls = 0

    def called(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            act()
        return function(*arguments)

    return called


def work_as_told(settings: dict[str, Any]) -> None:
    """One call of `work`, and the end of this process."""
    loop.PATIENCE_SECONDS = settings.get("patience", loop.PATIENCE_SECONDS)
    results.TELL_DELAYS = settings.get("tell_delays", results.TELL_DELAYS)
    log = Path(settings["log"])
    calls = 0

    def evaluate(point: dict[str, float], place: int) -> TrialResult:
        nonlocal calls
        calls += 1
        with log.open("a") as file:
            file.write(json.dumps([place, point]) + "\n")
        if calls == settings.get("kill_at_call"):
            _die()
        if calls == settings.get("hang_at_call"):
            try:
                _hang(settings)
            except KeyboardInterrupt:
                if not settings.get("stubborn"):
                    raise
                print(json.dumps(["stubborn"]), flush=True)
                time.sleep(60)
        time.sleep(settings.get("seconds", 0.0))
        if place in settings.get("failing", []):
            raise RunError(f"no result at place {place}")
        values = {"inf": float("inf"), "nan": float("nan")}.get(settings.get("value", ""), objective(point))
        more = (point["a"] + point["b"], point["c"])[: settings.get("objectives", 1) - 1]
        constraints = (point["a"] - 0.5, 0.1 - point["b"])[: settings.get("constraints", 0)]
        return TrialResult((values, *more), {"tasks": {"t": point["a"]}}, constraints)

    def on_event(event: Event) -> None:
        print(json.dumps([event.kind, event.number, event.place, event.message]), flush=True)

    loop.tell = _before_call(settings.get("kill_at_tell"), _die, loop.tell)
    claims.begin_trial = _before_call(settings.get("hang_at_claim"), lambda: _hang(settings), claims.begin_trial)
    begun = time.monotonic()
    if settings.get("kill_after") is not None:
        threading.Timer(settings["kill_after"], os.kill, (os.getpid(), signal.SIGKILL)).start()
    try:
        study = study_of(settings)
        enqueue(study, SPACE, settings.get("points", []))
        if settings.get("file_limit"):
            limit_files(settings["file_limit"])
        outbox = Path(settings["outbox"]) if settings.get("outbox") else None
        summary = work(study, SPACE, evaluate, target=settings["target"], outbox=outbox, on_event=on_event)
    except DFMergeError as error:
        print(json.dumps(["error", str(error)]), flush=True)
        raise SystemExit(error.exit_code) from None
    print(json.dumps(["summary", {**summary.__dict__, "seconds": time.monotonic() - begun}]), flush=True)
    os._exit(0)  # a timer that would kill this process later has nothing left to kill
