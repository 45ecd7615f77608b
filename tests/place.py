"""A place where workers work on a cheap real objective: a storage, an outbox, a log; and a crowd of such workers."""

from __future__ import annotations

import json
import os
import random
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any

import optuna

from dfmerge_studies.trials.reading import counts, failures, results
from tests.loop_child import objective, study_of, work_as_told
from tests.processes import Forked, context

POINTS = [{"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, {"a": 0.5, "b": 0.5, "c": 0.5}, {"a": 0.0, "b": 1.0, "c": 0.25}]


class Place:
    """A folder with a database, an outbox and a log of evaluations, and the settings of workers there."""

    def __init__(self, folder: Path, storage: str = "sqlite:///{}/s.db", **settings: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.seconds = 0.0
        self.filters: list[tuple[Any, type[Warning]]] = [("error", Warning)]
        self.settings = {
            "url": storage.format(folder),
            "log": f"{folder}/log",
            "outbox": f"{folder}/outbox",
            "go": f"{folder}/go",
            "target": 10,
            "points": POINTS,
            **settings,
        }

    def start(self, **settings: Any) -> Forked:
        return Forked(work_as_told, {**self.settings, **settings}, filters=self.filters)

    def release(self) -> None:
        """Let a worker that hangs (`hang_at_call`) go on."""
        Path(self.settings["go"]).touch()

    def run(self, code: int = 0, **settings: Any) -> list[list[Any]]:
        """Run a worker to its end; return its events."""
        process = self.start(**settings)
        output, errors = process.communicate(timeout=300)
        assert process.returncode == code, (output, errors)
        return [json.loads(line) for line in output.splitlines()]

    def study(self) -> optuna.Study:
        return study_of(self.settings)

    def rows(self) -> list[tuple[Any, ...]]:
        return [(t.params, t.values, t.constraints, t.user_attrs["tasks"]) for t in results(self.study())]

    def evaluations(self) -> list[list[Any]]:
        return [json.loads(line) for line in Path(self.settings["log"]).read_text().splitlines()]

    def check_whole(self, *, deaths: bool = False) -> None:
        """The total is exact, no place is empty or taken twice, nothing runs or waits, nothing is left to apply.

        With `deaths`, coefficients on which four processes died may have become a failure, as they should.
        """
        total, study = self.settings["target"], self.study()
        failed = failures(study.trials)
        now = counts(study)
        assert now == {"complete": total, "running": 0, "waiting": 0, "failed": len(failed), "pruned": 0}
        assert not failed or (deaths and all("died 4 times" in t.user_attrs["error"] for t in failed))
        places = [trial.user_attrs["place"] for trial in (*results(study), *failed)]
        assert sorted(places) == list(range(total + len(failed)))
        for trial in results(study):
            assert trial.values is not None
            assert trial.values[0] == objective(trial.params)
        assert not list((self.folder / "outbox").glob("*.json"))


def _member(settings: dict[str, Any]) -> None:
    """A worker that prints into a file."""
    output = os.open(settings["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    work_as_told(settings)


class Crowd:
    """Some workers of one place, forked from a process that has everything imported: one is there in a moment."""

    def __init__(self, place: Place, size: int) -> None:
        self.place = place
        self.size = size
        self.workers: list[BaseProcess] = []
        self.excused: list[BaseProcess] = []  # those that may end because they could not reach their storage
        self.output = place.folder / "output"

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for worker in self.workers:
            worker.kill()
            worker.join()

    def start(self, **settings: Any) -> BaseProcess:
        told = {**self.place.settings, "output": str(self.output), **settings}
        process: BaseProcess = context().Process(target=_member, args=(told,))
        process.start()
        return process

    def fill(self) -> None:
        """Start a worker for each that has ended; those that reached the total find a larger one."""
        ended = [worker for worker in self.workers if not worker.is_alive()]
        self._check(ended)
        if any(worker.exitcode == 0 for worker in ended):
            self.place.settings["target"] += 10
        self.workers = [worker for worker in self.workers if worker not in ended]
        while len(self.workers) < self.size:
            self.workers.append(self.start())

    def kill(self, moments: random.Random) -> None:
        """End one of the workers with SIGKILL."""
        victim = moments.choice(self.workers)
        victim.kill()
        victim.join()

    def wait(self) -> None:
        """Wait until all have reached the total."""
        for worker in self.workers:
            worker.join(300)
        self._check(self.workers)
        self.workers = []

    def _check(self, ended: list[BaseProcess]) -> None:
        for worker in ended:
            allowed = (0, 1, -9, -15) if worker in self.excused else (0, -9, -15)
            assert worker.exitcode in allowed, (worker.exitcode, self.output.read_text()[-2000:])


def wait_for(process: Forked, kind: str, times: int = 1) -> None:
    """Read a worker's events until the given one has come so many times."""
    for line in process.stdout:
        times -= json.loads(line)[0] == kind
        if times == 0:
            return
    raise AssertionError(f"the worker ended before {kind}: {process.communicate()}")
