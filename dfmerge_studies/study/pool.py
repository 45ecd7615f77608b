"""Several local processes as workers of one study: started, heard, and started again by one parent.

A worker reads its orders as one JSON line from its standard input and reports in JSON lines on its standard output.
Its standard input stays open for as long as it is wanted: the end of it, also by the parent's death, means "hand your
trial back and leave".  So no worker outlives its parent, and no signal is sent that a terminal or a batch system may
have sent already.

All import at once, but the first one loads alone.  When it has, and the others wait, its memory and what is free say
whether they fit (`room.py`); only then do they load.  A worker says "ready" and waits for a line on its standard input,
which has its share of what was free on its device before anybody loaded, loads, says "loaded" and waits for another.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from signal import Signals
from typing import Any, Literal

from dfmerge_studies.errors import InputError, RunError
from dfmerge_studies.signals import INTERRUPTS, STOP
from dfmerge_studies.spec import StudySpec
from dfmerge_studies.study.room import Need, Room, check_room, shares_of
from dfmerge_studies.tasks.splits import Split
from dfmerge_studies.trials.guards import Interrupts

MAX_RESTARTS = 3  # of one worker without a trial completed in between
_TICK = 0.2  # seconds after which the parent notices a signal
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_DELIBERATE = frozenset({130, *(-number for number in (*INTERRUPTS, STOP))})


@dataclass(frozen=True)
class Orders:
    """What one worker is told.

    Attributes:
        fields: the spec, as `StudySpec.model_dump(mode="json")` gives it; never to be printed: it
            holds the storage's URL.
        file: the spec's file.
        workdir: where relative outputs go, if not beside it.
        target: the total to reach, None for what the study has, or the spec.
        splits: what will be scored.
        index: of the worker, from 0.
        workers: how many there are.
        phases: whether to report the phases of a trial.
        owed: results that are wanted whatever would stop the search before.
    """

    fields: Mapping[str, Any]
    file: str
    workdir: str | None
    target: int | None
    splits: Sequence[Split]
    index: int
    workers: int
    phases: bool = False
    owed: int = 0

    @property
    def spec(self) -> StudySpec:
        """The spec to work on."""
        workdir = Path(self.workdir) if self.workdir is not None else None
        return StudySpec.from_fields(self.fields, file=Path(self.file), workdir=workdir)


NoticeKind = Literal[
    "ready", "loaded", "memory", "joined", "study", "trial", "phase", "log", "error", "died", "stopped", "given up"
]


@dataclass(frozen=True)
class Notice:
    """Something that a worker said, or that became of it.

    Attributes:
        worker: its number, from 1.
        pid: its process.
        kind: "ready" with `device`, its `free` and `total` bytes, before it loads; "loaded" with what it needs (`held`,
            `peak`, `beside`), `device`, `free`, `total`, and `host` with those two of the host; "memory" with `text`, a
            warning that it may run out; "joined" with `threads` and `device`; "study" with `name` and `total` when it
            starts on a study; "trial" with the fields of an `Event` and `study`; "phase" with `what`, `done`, `total`;
            "log" with `text`, a line of its standard error; "error" with `what`, `where`, `hint`, `exit_code`; "died"
            with `how` when it is started again, "given up" with `how` when it is not; "stopped" when somebody else
            ended it.
        content: the fields.
    """

    worker: int
    pid: int
    kind: NoticeKind
    content: Mapping[str, Any] = field(default_factory=dict)


def threads_each(workers: int) -> int:
    """Threads that one of several workers of this machine may use: its share of the cores, at least one.

    A smaller number that the user has set in OMP_NUM_THREADS stands.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, cores // workers)
    given = os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(given)) if given.isdigit() and int(given) else share


def device_of(wanted: str, index: int, gpus: int) -> str:
    """The device of one of several workers: its own GPU where there are several and the spec does not name one.

    Args:
        wanted: the spec's `device`.
        index: of the worker, from 0; with more workers than GPUs they share them in turn.
        gpus: CUDA devices of the machine.

    >>> device_of("auto", 5, 4), device_of("cuda", 6, 4), device_of("auto", 5, 1), device_of("cuda:3", 5, 4)
    ('cuda:1', 'cuda:2', 'auto', 'cuda:3')
    """
    return f"cuda:{index % gpus}" if wanted in ("auto", "cuda") and gpus > 1 else wanted


@dataclass
class _Member:
    """One worker's place in the pool, over its restarts.

    Attributes:
        device: where it will load; None until it is ready to.
        allowed: how often it was let go on: to load, and to join the study.
    """

    orders: Orders
    process: subprocess.Popen[str]
    restarts: int = 0
    device: str | None = None
    allowed: int = 0


class Pool:
    """Runs workers until each has come to its end.

    Args:
        command: what starts a worker; it must do what `worker.serve` does.
        orders: one for each worker.
        on_notice: told what the workers say; called in the thread that calls `run`.
        on_death: called when a worker has died, so that its trial goes back into the queue at once.
    """

    def __init__(
        self,
        command: Sequence[str],
        orders: Sequence[Orders],
        *,
        on_notice: Callable[[Notice], None],
        on_death: Callable[[], None],
    ) -> None:
        self._command = command
        self._orders = orders
        self._on_notice = on_notice
        self._on_death = on_death
        self._said: queue.SimpleQueue[tuple[_Member, subprocess.Popen[str], NoticeKind | None, Any]]
        self._said = queue.SimpleQueue()
        self._members: list[_Member] = []
        self._errors: list[Mapping[str, Any]] = []
        self._lost: list[str] = []  # how each worker died that was not started again
        self._stopping = False
        self._rooms: dict[str, Room] = {}
        self._shares: dict[str, int] | None = None  # of one of several workers on a device; None until all are ready
        self._need: Need | None = None
        self._fit = False  # whether all may load

    def run(self) -> bool:
        """Start the workers and wait for their end.

        Returns:
            Whether they were let work to the end: not interrupted, here or each by itself.

        Raises:
            InputError: a worker was refused; the others have handed their trials back.
            RunError: no worker came to a good end.
        """
        good = stopped = 0
        with Interrupts() as interrupts:
            try:
                for orders in self._orders:
                    self._begin(_Member(orders, self._spawn(orders)))
                while self._members:
                    if interrupts.requested:
                        self._stop()
                    try:
                        member, process, kind, content = self._said.get(timeout=_TICK)
                    except queue.Empty:
                        continue
                    if kind is not None:
                        self._heard(member, process, kind, content)
                    else:
                        ended = self._ended(member, process)
                        good, stopped = good + (ended == "good"), stopped + (ended == "stopped")
                    self._admit()
            finally:
                self._stop()
        self._raise(good)
        return not interrupts.requested and not (stopped and not good)

    def _spawn(self, orders: Orders) -> subprocess.Popen[str]:
        threads = str(threads_each(orders.workers))
        # By standard input and not by arguments, which every user of the machine can read.
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, **dict.fromkeys(_THREADS, threads)},
        )
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(asdict(orders)) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died already: its end will be heard
        return process

    def _begin(self, member: _Member) -> None:
        if member not in self._members:
            self._members.append(member)
        process = member.process
        readers = [
            threading.Thread(target=self._listen, args=(member, process, stream), daemon=True)
            for stream in ("stdout", "stderr")
        ]
        for reader in readers:
            reader.start()

        def wait() -> None:
            process.wait()
            for reader in readers:
                reader.join()
            self._said.put((member, process, None, None))

        threading.Thread(target=wait, daemon=True).start()

    def _listen(self, member: _Member, process: subprocess.Popen[str], stream: Literal["stdout", "stderr"]) -> None:
        lines = process.stdout if stream == "stdout" else process.stderr
        assert lines is not None
        for line in lines:
            if stream == "stdout":
                content = json.loads(line)
                self._said.put((member, process, content.pop("kind"), content))
            elif line.strip():
                self._said.put((member, process, "log", {"text": line.rstrip()}))

    def _heard(self, member: _Member, process: subprocess.Popen[str], kind: NoticeKind, content: Any) -> None:
        if kind == "trial" and content["event"] in ("completed", "pruned"):
            member.restarts = 0
        if kind == "error":
            self._errors.append(content)
        elif kind == "ready":
            member.device = content["device"]
            self._look(content["device"], content)
        elif kind == "loaded":
            if not self._fit:
                self._need = Need(content["held"], content["peak"], content["beside"])
                self._look(content["device"], content)
                self._look("cpu", content["host"])
        else:
            self._on_notice(Notice(member.orders.index + 1, process.pid, kind, content))

    def _look(self, device: str, content: Mapping[str, Any]) -> None:
        room = Room(content["free"], content["total"])
        self._rooms[device] = room.within(self._rooms.get(device, room))

    def _admit(self) -> None:
        """Let the first worker load when all are ready to, and all when it is known that they fit."""
        if self._stopping or not self._members:
            return
        first = self._members[0]
        devices = [each.device for each in self._members if each.device is not None]
        if not self._fit and len(devices) < len(self._members):
            return
        if self._shares is None:
            self._shares = shares_of(devices, self._rooms)
        if not self._fit and self._need is not None:
            try:
                warning = check_room(devices, self._rooms, self._need)
            except InputError as error:
                self._errors.append(
                    {"what": error.what, "where": error.where, "hint": error.hint, "exit_code": error.exit_code}
                )
                self._stop()
                return
            if warning is not None:
                self._tell(first, first.process, "memory", {"text": warning})
            self._fit = True
        for member in self._members if self._fit else [first]:
            if member.device is not None:
                self._allow(member, 2 if self._fit else 1, self._shares.get(member.device))

    def _allow(self, member: _Member, steps: int, share: int | None) -> None:
        stdin = member.process.stdin
        assert stdin is not None
        while member.allowed < steps:
            member.allowed += 1
            try:
                stdin.write(f"{'' if share is None else share}\n")
                stdin.flush()
            except BrokenPipeError:
                return  # it has died: its end will be heard

    def _ended(self, member: _Member, process: subprocess.Popen[str]) -> Literal["good", "stopped", "bad", "again"]:
        """Decide what follows from a worker's end."""
        code = process.returncode
        if member is self._members[0] and not self._fit:
            self._need = None  # what it has loaded is gone
        if code == 0 or (self._stopping and code in _DELIBERATE):
            self._members.remove(member)
            return "good" if code == 0 else "stopped"
        if code in (1, 2) and self._errors:
            self._members.remove(member)
            if code == 2:
                self._stop()
            return "bad"
        if code in _DELIBERATE:
            self._members.remove(member)
            self._tell(member, process, "stopped", {})
            self._on_death()
            return "stopped"
        self._on_death()
        how = Signals(-code).name if code < 0 else f"exit code {code}"
        if self._stopping or member.restarts >= MAX_RESTARTS:
            self._members.remove(member)
            self._lost.append(how)
            self._tell(member, process, "given up", {"how": how})
            return "bad"
        member.restarts += 1
        self._tell(member, process, "died", {"how": how, "restart": member.restarts})
        member.process, member.device, member.allowed = self._spawn(member.orders), None, 0
        self._begin(member)
        return "again"

    def _tell(self, member: _Member, process: subprocess.Popen[str], kind: NoticeKind, content: Any) -> None:
        self._on_notice(Notice(member.orders.index + 1, process.pid, kind, content))

    def _stop(self) -> None:
        """Ask all workers to hand their trials back and to leave; safe to repeat."""
        self._stopping = True
        for member in self._members:
            stdin = member.process.stdin
            if stdin is not None and not stdin.closed:
                stdin.close()

    def _raise(self, good: int) -> None:
        refused = next((error for error in self._errors if error["exit_code"] == InputError.exit_code), None)
        if refused is not None:
            raise InputError(refused["what"], where=refused["where"], hint=refused["hint"])
        if good:
            return
        if self._errors:
            raise RunError(self._errors[0]["what"], where=self._errors[0]["where"], hint=self._errors[0]["hint"])
        if self._lost:
            raise RunError(
                f"no worker is left: they died again and again ({', '.join(self._lost)})",
                hint="SIGKILL mostly means that memory ran out: try fewer workers. Run again to go on",
            )
