"""Phi, the transform of the task vectors before they are summed; it is joint, since some need to see all of them.

    tau[i]     task vector of expert i                {name: tensor}; absent names are zero
    p          drop rate of a trial                   0 <= p < 1
    k          entries that trimming keeps            density * d, d entries of all names that some expert changed

A transform is prepared once and then gives the vectors of every trial from the values of the method's parameters.
Transformed tensors are computed when they are looked up and not kept: a trial needs no second copy of the task vectors.
A new transform is a function and its row in `TRANSFORMS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from dfmerge_studies.params import TaskVector, at_least_float32

Streams = Callable[..., torch.Generator]  # from labels to a generator on the CPU that depends on seed and labels only
Prepared = Callable[[Mapping[str, float]], Sequence[TaskVector]]  # from a trial's parameters, by name, to Phi(tau)
Prepare = Callable[[Sequence[TaskVector], Streams], Prepared]


@dataclass(frozen=True)
class Transform:
    """One row of the table.

    Attributes:
        prepare: what all trials share, computed once.
        kept: bytes that it keeps between trials, from the entries of all task vectors and of all changed parameters.
    """

    prepare: Prepare
    kept: Callable[[int, int], int] = lambda vectors, changed: 0


class _Computed(Mapping[str, Tensor]):
    """Tensors by name, each computed from a source's tensor whenever it is looked up."""

    def __init__(self, source: Mapping[str, Tensor], compute: Callable[[str, Tensor], Tensor]) -> None:
        self._source = source
        self._compute = compute

    def __getitem__(self, name: str) -> Tensor:
        return self._compute(name, self._source[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)


def identity(task_vectors: Sequence[TaskVector], streams: Streams) -> Prepared:
    """Leave the task vectors as they are.

    Args:
        task_vectors: one per expert.
        streams: not used.
    """
    return lambda parameters: task_vectors


def drop_and_rescale(task_vectors: Sequence[TaskVector], streams: Streams) -> Prepared:
    """DARE (Yu et al., 2023, arXiv 2311.03099): zero each entry with probability p, divide the others by 1 - p.

    An entry is dropped where a uniform number of its own is below p.  The numbers derive from the expert's and the
    tensor's name, so masks are the same in every trial, process and device, and those of a larger p contain those of a
    smaller one.

    Args:
        task_vectors: one per expert.
        streams: gives each tensor of each expert its numbers.
    """

    def dropped(expert: str, drop_rate: float, name: str, delta: Tensor) -> Tensor:
        numbers = torch.rand(delta.shape, generator=streams("dare", expert, name), dtype=torch.float32)
        keep = (numbers >= drop_rate).to(delta.device)
        return delta.to(at_least_float32(delta)) * keep / (1.0 - drop_rate)

    def prepared(parameters: Mapping[str, float]) -> Sequence[TaskVector]:
        drop_rate = parameters["drop_rate"]
        return [TaskVector(v.expert, _Computed(v.deltas, partial(dropped, v.expert, drop_rate))) for v in task_vectors]

    return prepared


def trim_and_elect(task_vectors: Sequence[TaskVector], streams: Streams) -> Prepared:
    """TIES (Yadav et al., 2023, arXiv 2306.01708): trim, elect signs by mass, share the mean among agreeing entries.

    Phi(tau)_i = A_i tau_i / sum_j A_j, where A_i is 1 on the entries that trimming keeps and whose sign is that of the
    sum of all trimmed vectors.  The agreement masks A are TIES's importance C; their inverse sum is applied here, so
    that with C = I the step of the equation, sum_i lam_i Phi(tau)_i, is the disjoint mean, without the factor M.

    An expert's k largest magnitudes are kept over its whole task vector, as in the paper, not tensor by tensor; several
    of equal magnitude at the threshold are all kept.  Where the signs balance exactly, none is elected and the step is
    0.  Only the masks and counts of one density are kept between trials.

    Args:
        task_vectors: one per expert.
        streams: not used.
    """

    @lru_cache(maxsize=1)
    def trimmed(density: float) -> Sequence[TaskVector]:
        return _trimmed(task_vectors, density)

    return lambda parameters: trimmed(parameters["density"])


@torch.no_grad()
def _trimmed(task_vectors: Sequence[TaskVector], density: float) -> Sequence[TaskVector]:
    shapes = {name: delta for vector in task_vectors for name, delta in vector.deltas.items()}
    kept = max(1, int(density * sum(delta.numel() for delta in shapes.values())))
    thresholds = [_threshold(vector, kept) for vector in task_vectors]
    masks: list[dict[str, Tensor]] = [{} for _ in task_vectors]
    counts: dict[str, Tensor] = {}
    for name in shapes:
        trimmed = {
            i: torch.where(vector.deltas[name].abs() >= thresholds[i], vector.deltas[name], 0)
            for i, vector in enumerate(task_vectors)
            if name in vector.deltas
        }
        mass = sum((part.to(at_least_float32(part)) for part in trimmed.values()), torch.zeros(()))
        elected = mass.sign()
        for i, part in trimmed.items():
            masks[i][name] = (part.sign() == elected) & (elected != 0)
        counts[name] = torch.stack([masks[i][name] for i in trimmed]).sum(0, dtype=torch.int16).clamp_(min=1)

    def shared(index: int, name: str, delta: Tensor) -> Tensor:
        return delta.to(at_least_float32(delta)) * masks[index][name] / counts[name]

    return [TaskVector(v.expert, _Computed(v.deltas, partial(shared, i))) for i, v in enumerate(task_vectors)]


def _threshold(vector: TaskVector, kept: int) -> Tensor | float:
    """The magnitude of a task vector's `kept`-th largest entry; 0 where it has no more than that many."""
    if not vector.deltas:
        return 0.0
    magnitudes = torch.cat([delta.abs().flatten().to(at_least_float32(delta)) for delta in vector.deltas.values()])
    if kept >= magnitudes.numel():
        return 0.0
    return magnitudes.kthvalue(magnitudes.numel() - kept + 1).values


TRANSFORMS: Mapping[str, Transform] = {
    "identity": Transform(identity),
    "drop-and-rescale": Transform(drop_and_rescale),
    "trim-and-elect": Transform(trim_and_elect, kept=lambda vectors, changed: vectors + 2 * changed),
}
