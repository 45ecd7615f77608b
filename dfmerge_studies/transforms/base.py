"""What a transform is: from all task vectors, once, to the vectors of a trial from the method's parameters.

Transformed tensors are computed when they are looked up and not kept: a trial needs no second copy of the task vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dfmerge_studies.params import OnDemand, TaskVector

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


class Computed(OnDemand[Tensor]):
    """Tensors by name, each computed from a source's tensor whenever it is looked up."""

    def __init__(self, source: Mapping[str, Tensor], compute: Callable[[str, Tensor], Tensor]) -> None:
        super().__init__(source)
        self._compute = compute

    def __getitem__(self, name: str) -> Tensor:
        return self._compute(name, self._source[name])


class Moved(list[TaskVector]):
    """Task vectors that start elsewhere than at the base.

    Args:
        vectors: one per expert.
        shift: from theta_pre to where they start, by name.
    """

    def __init__(self, vectors: Sequence[TaskVector], shift: Mapping[str, Tensor]) -> None:
        super().__init__(vectors)
        self.shift = shift


def start_of(vectors: Sequence[TaskVector], base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Where a merge of transformed task vectors starts: theta_pre, unless the transform has moved it.

    Args:
        vectors: Phi(tau).
        base: theta_pre of the parameters that are merged.
    """
    if not isinstance(vectors, Moved):
        return base
    return Computed(base, lambda name, start: start + vectors.shift[name] if name in vectors.shift else start)
