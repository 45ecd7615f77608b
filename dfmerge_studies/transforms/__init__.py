"""Phi, the transform of the task vectors before they are summed; it is joint, since some need to see all of them.

A transform is prepared once and then gives the vectors of every trial from the values of the method's parameters.
A new transform is a function and its row in `TRANSFORMS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dfmerge_studies.params import TaskVector
from dfmerge_studies.transforms.base import Moved, Prepared, Streams, Transform, start_of
from dfmerge_studies.transforms.low_rank import estimate_low_rank
from dfmerge_studies.transforms.sparse import drop_and_rescale, drop_by_rank_and_elect, mask_extremes, trim_and_elect

__all__ = ["TRANSFORMS", "Moved", "Prepared", "Streams", "Transform", "start_of"]


def identity(task_vectors: Sequence[TaskVector], streams: Streams) -> Prepared:
    """Leave the task vectors as they are.

    Args:
        task_vectors: one per expert.
        streams: not used.
    """
    return lambda parameters: task_vectors


TRANSFORMS: Mapping[str, Transform] = {
    "identity": Transform(identity),
    "drop-and-rescale": Transform(drop_and_rescale),
    "trim-and-elect": Transform(trim_and_elect, kept=lambda vectors, changed: vectors + 2 * changed),
    "mask-extremes": Transform(mask_extremes),
    "drop-by-rank-and-elect": Transform(drop_by_rank_and_elect, kept=lambda vectors, changed: vectors + 2 * changed),
    # Of the estimates one per expert and one of the base, in float32; the number of experts is not known here.
    "low-rank": Transform(estimate_low_rank, kept=lambda vectors, changed: 4 * (vectors + changed)),
}
