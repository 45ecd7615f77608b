"""Several processes as one worker: who computes what, what is summed, and how errors are agreed upon.

    rank     position of this process, 0 <= rank < size; rank 0 leads: it alone talks to people, storage and cache
    share    the inputs that one rank computes; every input is in exactly one share

A launcher (`torchrun`, `accelerate launch`) starts the processes.  The leader runs the command as a single process
would; whatever needs all ranks goes through `Ranks.everywhere`, which sends the same call to the others.

A rank that leaves a collective operation early would leave the others waiting, so no rank may: results are exchanged by
`agreed`, in which every rank takes part whether its work went well or not, and an error on one is raised on all.  Only
that exchange may be followed by an operation on tensors.  Signals are held back until a rank's next look at them.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from dfmerge_studies.errors import DFMergeError, InputError, first_line, out_of_memory
from dfmerge_studies.signals import INTERRUPTS, STOP

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
Command = Callable[[dict[str, Any]], object]  # a picklable call; it is handed what the follower remembers

TIMEOUT = "DFMERGE_RANK_TIMEOUT"  # environment: seconds to wait for a rank that works on its share
TIMEOUT_SECONDS = 1800.0
_IDLE = timedelta(days=30)  # the leader may wait for other workers, or for a database, as long as it likes
_SIGNALS = tuple({*INTERRUPTS, STOP})


class GroupError(DFMergeError):
    """The processes cannot go on together.  It is not the trial's fault: its coefficients go back into the queue."""


def launched() -> int:
    """How many processes a launcher started together with this one; 1 without a launcher."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        return 1
    return int(os.environ["WORLD_SIZE"])


def launched_rank() -> int:
    """Which of the launched processes this one is; 0 without a launcher."""
    return int(os.environ["RANK"]) if launched() > 1 else 0


class Ranks:
    """A process by itself: everything is its share, and there is nobody to ask.

    `Group` is the same for several processes.  Of every method the other ranks must make the same call.
    """

    rank: int = 0
    size: int = 1
    device: torch.device | None = None  # of this rank, where the launcher decides that

    @property
    def leader(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def shares(self, costs: Sequence[int]) -> list[list[int]]:
        """Which inputs each rank computes: the dearest first, in turn, so that shares cost about the same.

        Args:
            costs: what each input costs, in any unit.

        Returns:
            Positions, ascending, per rank; a share is empty where there are fewer inputs than ranks.
        """
        order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
        return [sorted(order[rank :: self.size]) for rank in range(self.size)]

    def everywhere(self, command: Command, run: Callable[[], T]) -> T:
        """Make a call on every rank."""
        return run()

    def agreed(self, compute: Callable[[], T]) -> list[T]:
        """Compute on every rank and exchange the results; if it fails on one, it fails on all.

        Args:
            compute: this rank's part; its result travels pickled, so it must be small.

        Returns:
            The results of all ranks, in their order.
        """
        return [compute()]

    def from_leader(self, compute: Callable[[], Mapping[str, Tensor] | None]) -> Mapping[str, Tensor] | None:
        """Tensors that the leader alone can give."""
        return compute()

    def sum_on_leader_(self, tensors: Iterable[Tensor]) -> None:
        """Add up tensors over the ranks, in place; afterwards only the leader's are of use.

        Args:
            tensors: of the same shapes, in the same order, on every rank; nothing may fail between the last `agreed`
                and this call.
        """

    def check(self) -> None:
        """A place in a long computation where a signal that was held back takes effect.

        Raises:
            KeyboardInterrupt: there was one.
        """

    def leave(self) -> None:
        """End the work together."""


SOLO = Ranks()


@dataclass(frozen=True)
class _Report:
    """What a rank says in an exchange: a result, or an error."""

    value: Any = None
    error: type[BaseException] | None = None
    what: str = ""
    where: str | None = None
    hint: str | None = None

    @classmethod
    def of(cls, error: BaseException) -> _Report:
        error = out_of_memory(error) or error
        if isinstance(error, DFMergeError):
            return cls(None, type(error), error.what, error.where, error.hint)
        if isinstance(error, KeyboardInterrupt):
            return cls(None, KeyboardInterrupt)
        hint = "Run again with --debug for the traceback"
        return cls(None, GroupError, first_line(error), None, hint)

    def exception(self, rank: int) -> BaseException:
        assert self.error is not None
        if not issubclass(self.error, DFMergeError):
            return self.error()
        return self.error(f"rank {rank}: {self.what}", where=self.where, hint=self.hint)


class _HeldSignals:
    """Holds back the first SIGINT or SIGTERM, and every SIGUSR1.  In the main thread only."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._former: dict[signal.Signals, Any] = {}

    def hold(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._former[number] = signal.signal(number, self._handle)

    def release(self, *, deliver: bool) -> None:
        """Put the former handlers back, and let them have what was held back."""
        for number, handler in self._former.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._former.clear()
        held, self.received = self.received, None
        if held is not None and deliver:
            signal.raise_signal(held)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for each in INTERRUPTS:
            signal.signal(each, signal.SIG_DFL)


class Group(Ranks):
    """The processes of a launcher, joined through Accelerate.

    Args:
        device: as the spec names it; "auto", "cuda" and "cpu" have a meaning for several ranks.

    Raises:
        InputError: the device is one for a single process, or there are not enough of them.
        GroupError: the processes do not find each other.
    """

    def __init__(self, device: str) -> None:
        import torch
        import torch.distributed as dist
        import torch.distributed.nn.functional  # its default arguments would keep a group that is there before them

        cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
        self.lost = False
        self._inside = False
        self._settled = False
        self._signals = _HeldSignals()
        _check_device(device, cpu)
        # A collective that waits for a rank which is gone must raise, not be aborted by a watchdog.
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
        from accelerate import PartialState

        limit = timedelta(seconds=float(os.environ.get(TIMEOUT) or TIMEOUT_SECONDS))
        with self._losses("starting"):
            self._state = PartialState(cpu=cpu, timeout=limit)
            self.rank, self.size = self._state.process_index, self._state.num_processes
            self.device = self._state.device
            # Small objects go over the CPU whatever the tensors do, and a dead peer is noticed there at once.
            self._control = dist.new_group(backend="gloo", timeout=limit)
            # A follower waits for work as long as it takes; a leader that is not heard is waiting for a hung one.
            self._commands = dist.new_group(backend="gloo", timeout=limit if self.leader else _IDLE)
        if self.size != launched():
            raise GroupError(f"{launched()} processes were launched, but {self.size} found each other")

    def everywhere(self, command: Command, run: Callable[[], T]) -> T:  # noqa: D102
        if self._inside or not self.leader:
            return run()
        result: list[T] = []
        self._signals.hold()
        try:
            self._send(command)
            self._together(lambda: result.append(run()))
        finally:
            self._signals.release(deliver=not self.lost)
        return result[0]

    def agreed(self, compute: Callable[[], T]) -> list[T]:  # noqa: D102
        self._settled = False
        try:
            self.check()
            report = _Report(compute())
        except BaseException as error:
            if not self._settled and not self.lost:
                self._exchange(_Report.of(error))
                self._settled = True
            raise
        reports = self._exchange(report)
        for rank, each in enumerate(reports):
            if each.error is not None:
                self._settled = True  # everyone knows: nobody may tell it once more
                raise each.exception(rank)
        return [each.value for each in reports]

    def from_leader(self, compute: Callable[[], Mapping[str, Tensor] | None]) -> Mapping[str, Tensor] | None:  # noqa: D102
        import torch
        import torch.distributed as dist

        tensors: dict[str, Tensor] = {}

        def give() -> list[tuple[str, torch.Size, torch.dtype]] | None:
            given = compute() if self.leader else None
            if given is None:
                return None
            tensors.update((name, value.to(self.device).contiguous()) for name, value in given.items())
            return [(name, value.shape, value.dtype) for name, value in tensors.items()]

        contents = self.agreed(give)[0]
        if contents is None:
            return None

        def make_room() -> None:
            for name, shape, dtype in contents:
                if name not in tensors:
                    tensors[name] = torch.empty(shape, dtype=dtype, device=self.device)

        self.agreed(make_room)
        with self._losses("receiving"):
            for name, _, _ in contents:
                dist.broadcast(tensors[name].reshape(-1).view(torch.uint8), src=0)  # bytes: of any type
        return tensors

    def sum_on_leader_(self, tensors: Iterable[Tensor]) -> None:  # noqa: D102
        import torch.distributed as dist

        with self._losses("adding up"):
            for tensor in tensors:
                whole = tensor.contiguous()
                dist.reduce(whole, dst=0)
                if whole is not tensor:
                    tensor.copy_(whole)

    def check(self) -> None:  # noqa: D102
        if self._signals.received is not None:
            raise KeyboardInterrupt

    def follow(self) -> None:
        """Make the leader's calls, until it leaves.

        Raises:
            GroupError: a rank is lost.
        """
        memory: dict[str, Any] = {"ranks": self}
        self._signals.hold()
        try:
            while (command := self._receive()) is not None:
                try:
                    self._together(partial(command, memory))
                except BaseException:
                    if self.lost:
                        raise
                    # The leader knows of it, and decides what it means for the study.
        finally:
            self._signals.release(deliver=False)

    def leave(self) -> None:  # noqa: D102
        if self.lost:
            return
        if self.leader:
            with suppress(GroupError):  # whoever is gone by now has nothing left to do
                self._send(None)
        self._state.destroy_process_group()
        # Threads of a group end with the last reference to it.  One that lets go of a tensor while the interpreter ends
        # aborts the process (pytorch issue 190489).
        del self._control, self._commands

    def _together(self, run: Callable[[], object]) -> None:
        """One whole call: if it fails here where others have nothing left to agree on, they still hear of it."""

        def whole() -> None:
            run()

        self._inside = True
        try:
            self.agreed(whole)
        finally:
            self._inside = False

    def _exchange(self, report: _Report) -> list[_Report]:
        import torch.distributed as dist

        reports: list[Any] = [None] * self.size
        with self._losses("waiting for the others"):
            dist.all_gather_object(reports, report, group=self._control)
        return reports

    def _send(self, command: Command | None) -> None:
        import torch.distributed as dist

        with self._losses("sending a command"):
            dist.broadcast_object_list([command], src=0, group=self._commands)

    def _receive(self) -> Command | None:
        import torch.distributed as dist

        command: list[Command | None] = [None]
        with self._losses("waiting for rank 0"):
            dist.broadcast_object_list(command, src=0, group=self._commands)
        return command[0]

    @contextmanager
    def _losses(self, doing: str) -> Iterator[None]:
        """Turn what torch raises when a peer is gone, or silent for too long, into an error with a meaning."""
        try:
            if self.lost:
                raise GroupError(f"a process of the group of {self.size} is lost", hint="Run it again to go on")
            yield
        except (RuntimeError, OSError) as error:
            self.lost = True
            raise GroupError(
                f"one of the {launched()} processes died or does not answer ({doing}: {first_line(error)})",
                hint=f"Look for what ended it, such as a lack of memory, and run it again: the study goes on. "
                f"{TIMEOUT} sets the seconds to wait for a slow one",
            ) from error


def _check_device(device: str, cpu: bool) -> None:
    """Refuse what only one process can have."""
    import torch

    if not cpu and (device == "mps" or ":" in device):
        raise InputError(
            f"{launched()} processes cannot share the one device {device!r}", where="device", hint="Use auto or cuda"
        )
    here = int(os.environ.get("LOCAL_WORLD_SIZE", launched()))
    if not cpu and torch.cuda.device_count() < here:
        raise InputError(
            f"{here} processes on this machine, but {torch.cuda.device_count()} CUDA devices",
            where="device",
            hint="Start as many processes as there are devices, or use device: cpu",
        )


def join(device: str) -> Ranks:
    """The processes that a launcher started together with this one, or this one by itself."""
    return Group(device) if launched() > 1 else SOLO
