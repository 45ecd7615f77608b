"""Phi, the transform of the task vectors before they are summed; it is joint, since some need to see all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dfmerge_studies.params import TaskVector

Transform = Callable[[Sequence[TaskVector]], Sequence[TaskVector]]


def identity(task_vectors: Sequence[TaskVector]) -> Sequence[TaskVector]:
    """Leave the task vectors as they are.

    Args:
        task_vectors: one per expert.
    """
    return task_vectors
