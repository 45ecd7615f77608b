"""Points of a stepped space: which of them an acquisition is compared on."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

LATTICE = 4096  # points that are compared, all of them where there are no more


@dataclass(frozen=True)
class Steps:
    """The lattice of a stepped space, the same in every dimension.

    Attributes:
        low: smallest value.
        step: distance between values.
        count: values in one dimension.
    """

    low: float
    step: float
    count: int


def free_points(steps: Steps, best: Tensor, taken: Tensor) -> Tensor:
    """Points that were not tried yet, to choose the next from; drawn by torch's generator where all are too many.

    Args:
        steps: the lattice.
        best: where the acquisition is largest off the lattice (d,).
        taken: points that were tried or are running (n, d).

    Returns:
        Shape (k, d); all points where none is free.
    """
    rows = _rows(steps, _rungs(best, steps), _rungs(taken, steps))
    return steps.low + steps.step * rows.to(taken)


def _rungs(points: Tensor, steps: Steps) -> Tensor:
    """Points as whole numbers of steps."""
    return ((points - steps.low) / steps.step).round().long().clamp(0, steps.count - 1)


def _rows(steps: Steps, best: Tensor, taken: Tensor) -> Tensor:
    """Points of the lattice to choose from: those not taken, and `best` with its neighbours where all are too many."""
    dimensions = len(best)
    if math.pow(steps.count, dimensions) <= LATTICE:
        every = torch.tensor(list(itertools.product(range(steps.count), repeat=dimensions)))
    else:
        near = torch.cat(
            [torch.eye(dimensions).long(), -torch.eye(dimensions).long(), torch.zeros(1, dimensions).long()]
        )
        drawn = torch.randint(steps.count, (LATTICE, dimensions))  # under the sampler's own seed
        every = torch.cat([(best + near).clamp(0, steps.count - 1), drawn])
    gone = set(map(tuple, taken.tolist()))
    free = [row for row in every.tolist() if tuple(row) not in gone]
    return torch.tensor(free) if free else every
