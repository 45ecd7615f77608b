"""Real processes that are there in a moment: forked from one that has imported everything heavy already.

Starting Python with torch, transformers and optuna anew costs several seconds of a core, and the suite starts some
two hundred processes. What happens in the first seconds of a real start is tested by those tests that use
`subprocess`; and by those of `run --workers` in a test's own process (`Project.cli`), or with `anew`.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing import forkserver, process
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[1]
_IMPORTED = ("pytest", "tests.place", "tests.ranks_child", "tests.preloaded")


def command(arguments: list[str]) -> None:
    """What `python -m dfmerge_studies` does."""
    from dfmerge_studies.cli.app import main

    main(arguments)


def command_with_forked_workers(arguments: list[str]) -> None:
    """The same, and workers that it starts are processes like this one."""
    from dfmerge_studies.study import pool

    vars(pool)["subprocess"] = SimpleNamespace(Popen=Worker, PIPE=subprocess.PIPE)
    command(arguments)


def context() -> Any:
    """The multiprocessing context whose processes are forked from the prepared one."""
    found = multiprocessing.get_context("forkserver")
    if forkserver._forkserver._forkserver_address is not None:  # type: ignore[attr-defined]
        return found
    found.set_forkserver_preload(list(_IMPORTED))
    with contextlib.chdir(ROOT):  # where the modules of the tests are
        forkserver.ensure_running()
    return found


def free_port() -> int:
    """A port for a server that is started later, or again.

    It lies below those that a kernel gives out by itself (from 32768 on), so no other connection takes it meanwhile; it
    is a random one, so tests that run at the same time do not take each other's.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


class Forked:
    """A process of its own that calls a function, with the attributes and methods of `subprocess.Popen` in text mode.

    Args:
        target: a function of a module; a `SystemExit` of it is the exit code.
        arguments: what it is called with.
        folder: the working directory.
        environment: all of the environment.
        filters: warnings that are errors or ignored, as `warnings.simplefilter` takes them.
        leader: whether it begins a session, and so a process group, of its own.
        told: whether it has a standard input that is written to, `stdin`.
    """

    def __init__(
        self,
        target: Callable[..., None],
        *arguments: Any,
        folder: Path = ROOT,
        environment: Mapping[str, str] | None = None,
        filters: Iterable[tuple[Any, type[Warning]]] = (),
        leader: bool = False,
        told: bool = False,
    ) -> None:
        pipes = [os.pipe(), os.pipe()]
        ends = {number: Connection(write, readable=False) for number, (_, write) in enumerate(pipes, start=1)}
        if told:
            read, write = os.pipe()
            ends[0] = Connection(read, writable=False)
            self.stdin = os.fdopen(write, "w", encoding="utf-8")
        settings = (str(folder), dict(os.environ if environment is None else environment), tuple(filters), leader)
        self._process = context().Process(target=_begin, args=(ends, settings, target, arguments), daemon=True)
        self._process.start()
        for end in ends.values():
            end.close()
        self.args = arguments
        self.pid: int = self._process.pid
        self.stdout, self.stderr = (os.fdopen(read, "r", encoding="utf-8") for read, _ in pipes)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode  # type: ignore[no-any-return]

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self.args), timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What is left to read of standard output and error, at the end of the process."""
        read = {"stdout": "", "stderr": ""}

        def drain(name: str, stream: io.TextIOBase) -> None:
            with contextlib.suppress(ValueError):  # another thread reads it to its end
                read[name] = stream.read()

        drains = [threading.Thread(target=drain, args=(name, getattr(self, name)), daemon=True) for name in read]
        for thread in drains:
            thread.start()
        self.wait(timeout)
        for thread in drains:
            thread.join(timeout)
        return read["stdout"], read["stderr"]

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Worker(Forked):
    """What `run --workers` starts, as `subprocess.Popen` would."""

    begins: Callable[[list[str]], None] = staticmethod(command)

    def __init__(self, words: Sequence[str], *, env: Mapping[str, str], **_: Any) -> None:
        arguments = list(words[words.index("dfmerge_studies") + 1 :])
        super().__init__(self.begins, arguments, folder=Path.cwd(), environment=env, told=True)
        process._children.discard(self._process)  # type: ignore[attr-defined]  # a thread waits for it


def _begin(
    ends: Mapping[int, Connection], settings: Any, target: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    """In the new process: take its place in the world, then do its work."""
    folder, environment, filters, leader = settings
    process.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # it may start others, and from
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[attr-defined]  # where it comes from itself
    if leader:
        os.setsid()
    for number, end in ends.items():
        os.dup2(end.fileno(), number)
        end.close()
    if 0 in ends:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    unbuffered = "PYTHONUNBUFFERED" in environment
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False, buffering=1 if unbuffered else -1)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for action, category in filters:
        warnings.simplefilter(action, category)
    try:
        target(*arguments)
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out
