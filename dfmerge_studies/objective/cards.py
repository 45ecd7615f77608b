"""What the CUDA devices of a process have free, and what of it the weights of a spread model may take.

    W        bytes of the weights               T    bytes of a trial at its peak, W included
    w[d]     bytes of weights on device d       f    free bytes of a device, less what is spared

What belongs to a layer (base value, task vectors, sums, importance, most activations) is on the layer's device and in
proportion to its weights: device d takes about T w[d] / W.  So it has room where w[d] <= f[d] W / T, and a trial has
where T <= f[d] W / w[d] for every device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dfmerge_studies.errors import InputError
from dfmerge_studies.ranks import SOLO, Ranks
from dfmerge_studies.spec import StudySpec, parse_size

SPARE = 0.1  # of what is free on a device: fragments, libraries' own buffers


def check_device_map(spec: StudySpec, ranks: Ranks = SOLO) -> None:
    """Refuse to spread a model where there are not several devices for one process.

    Args:
        spec: may have a `device_map`.
        ranks: processes that share the work.

    Raises:
        InputError: several ranks, or fewer than two CUDA devices.
    """
    if spec.device_map is None:
        return
    if ranks.size > 1:
        raise refused_in_group(spec, ranks.size)
    count = torch.cuda.device_count()
    if count < 2:
        there = "no CUDA device is there" if count == 0 else "one CUDA device is there"
        raise InputError(
            f"{spec.device_map} spreads a model over two or more CUDA devices, and {there}",
            where=spec.where("device_map"),
            hint="Leave it out",
        )


def refused_in_group(spec: StudySpec, processes: int) -> InputError:
    """The error for several launched processes, which have a device each.

    Args:
        spec: with a `device_map`.
        processes: how many there are.
    """
    return InputError(
        f"{spec.device_map} spreads one model over all CUDA devices of one process, and there are "
        f"{processes} processes, which have a whole model each",
        where=spec.where("device_map"),
        hint="Leave it out, or start run without accelerate launch or torchrun",
    )


def free_bytes(device: torch.device | int) -> int:
    """Bytes of a CUDA device that no process holds."""
    return int(torch.cuda.mem_get_info(device)[0])


def own_bytes(device: torch.device | int) -> int:
    """Bytes of a CUDA device that this process holds, in use or not."""
    return int(torch.cuda.memory_reserved(device))


def idle_bytes(device: torch.device | int) -> int:
    """Bytes of a CUDA device that this process holds and does not use, or that no process holds."""
    return free_bytes(device) + own_bytes(device) - int(torch.cuda.memory_allocated(device))


def weight_budgets(free: Sequence[int], weights: int, trial: int, memory: str = "auto") -> dict[int, int]:
    """How many bytes of weights each device may be given, so that a trial has room beside them: f[d] W / T.

    Args:
        free: bytes of every device, by its number.
        weights: W.
        trial: T.
        memory: of the spec; a size bounds what all devices together are used for.
    """
    usable = [(1 - SPARE) * each for each in free]
    bound = 1.0 if memory == "auto" else min(1.0, parse_size(memory) / max(1.0, sum(usable)))
    return {number: int(each * bound * weights / trial) for number, each in enumerate(usable)}


def room_on(shares: Mapping[torch.device, float], held: int) -> int:
    """The largest T for which every device has room.

    Args:
        shares: w[d] / W.
        held: bytes of all devices that are taken already and counted in T.
    """
    return int(min(held + (1 - SPARE) * free_bytes(device) / share for device, share in shares.items()))
