"""Transforms that keep some entries of task vectors and set the others to zero.

tau[i]     task vector of expert i                {name: tensor}; absent names are zero
p          drop rate of a trial                   0 <= p < 1
k          entries that trimming keeps            density * d, d entries of all names that some expert changed
n          entries of one tensor, or of a row of it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from dfmerge_studies.params import TaskVector, at_least_float32
from dfmerge_studies.transforms.base import Computed, Prepared, Streams


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
        return [TaskVector(v.expert, Computed(v.deltas, partial(dropped, v.expert, drop_rate))) for v in task_vectors]

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


def mask_extremes(task_vectors: Sequence[TaskVector], streams: Streams) -> Prepared:
    """Breadcrumbs (Davari and Belilovsky, 2023, arXiv 2312.06795): of each tensor, mask the largest and the smallest.

    Of the n magnitudes of a tensor in rising order, those from `n - density n - gamma n` to `n - gamma n` are kept: the
    share gamma of outliers goes first, then the smallest, until the share density is left, at least one entry.  Equal
    magnitudes at either end are all kept.  Only two numbers per tensor are kept between trials.

    Args:
        task_vectors: one per expert.
        streams: not used.
    """

    @lru_cache(maxsize=1)
    def limits(density: float, gamma: float) -> list[dict[str, tuple[Tensor, Tensor]]]:
        return [{name: _limits(delta, density, gamma) for name, delta in v.deltas.items()} for v in task_vectors]

    def masked(index: int, found: list[dict[str, tuple[Tensor, Tensor]]], name: str, delta: Tensor) -> Tensor:
        (low, high), magnitudes = found[index][name], delta.abs()
        return torch.where((magnitudes >= low) & (magnitudes <= high), delta, 0).to(at_least_float32(delta))

    def prepared(parameters: Mapping[str, float]) -> Sequence[TaskVector]:
        found = limits(parameters["density"], parameters["gamma"])
        return [TaskVector(v.expert, Computed(v.deltas, partial(masked, i, found))) for i, v in enumerate(task_vectors)]

    return prepared


def drop_by_rank_and_elect(task_vectors: Sequence[TaskVector], streams: Streams) -> Prepared:
    """DELLA (Deep et al., 2024, arXiv 2406.11617): drop the small more often, rescale, elect, share the mean.

    In a row of n entries of which r are smaller, an entry is kept with probability
    q = 1 - p + w (r / (n - 1) - 1/2), p the drop rate and w the window, and then divided by q; a tensor without rows
    is one row.  The window is narrowed where it would leave (0, 1).  Signs are elected and means shared as by
    `trim_and_elect`.  An entry's number is drawn as by `drop_and_rescale`.

    Args:
        task_vectors: one per expert.
        streams: gives each tensor of each expert its numbers.
    """

    def pruned(expert: str, drop_rate: float, window: float, name: str, delta: Tensor) -> Tensor:
        numbers = torch.rand(delta.shape, generator=streams("della", expert, name), dtype=torch.float32)
        keep = _keep_probability(delta, drop_rate, window)
        return torch.where(numbers.to(delta.device) < keep, delta.to(keep.dtype) / keep, 0)

    @lru_cache(maxsize=1)
    @torch.no_grad()
    def elected(drop_rate: float, window: float) -> Sequence[TaskVector]:
        parts = [partial(pruned, vector.expert, drop_rate, window) for vector in task_vectors]
        return _elected(task_vectors, parts)

    return lambda parameters: elected(parameters["drop_rate"], parameters["window_size"])


def _keep_probability(delta: Tensor, drop_rate: float, window: float) -> Tensor:
    """By which chance each entry is kept: larger for larger magnitudes of its row."""
    rows = delta.reshape(delta.shape[0], -1) if delta.dim() > 1 else delta.reshape(1, -1)
    half = min(window / 2, drop_rate, 1.0 - drop_rate)
    order = rows.abs().argsort(dim=1, stable=True)
    ranks = torch.empty_like(order).scatter_(1, order, torch.arange(rows.shape[1], device=rows.device).expand_as(order))
    last = rows.shape[1] - 1
    place = ranks.to(at_least_float32(delta)) / last if last else torch.full_like(rows, 0.5)
    return ((1.0 - drop_rate - half) + 2.0 * half * place).reshape(delta.shape).to(at_least_float32(delta))


def _limits(delta: Tensor, density: float, gamma: float) -> tuple[Tensor, Tensor]:
    """The smallest and the largest magnitude of a tensor that are kept."""
    magnitudes = delta.abs().flatten().to(at_least_float32(delta))
    count = magnitudes.numel()
    kept = max(1, int(density * count))
    smaller = max(0, count - kept - int(gamma * count))
    return magnitudes.kthvalue(smaller + 1).values, magnitudes.kthvalue(smaller + kept).values


@torch.no_grad()
def _trimmed(task_vectors: Sequence[TaskVector], density: float) -> Sequence[TaskVector]:
    entries = {name: delta.numel() for vector in task_vectors for name, delta in vector.deltas.items()}
    kept = max(1, int(density * sum(entries.values())))
    thresholds = [_threshold(vector, kept) for vector in task_vectors]

    def trimmed(threshold: Tensor | float, name: str, delta: Tensor) -> Tensor:
        return torch.where(delta.abs() >= threshold, delta, 0).to(at_least_float32(delta))

    return _elected(task_vectors, [partial(trimmed, threshold) for threshold in thresholds])


def _elected(
    task_vectors: Sequence[TaskVector], parts: Sequence[Callable[[str, Tensor], Tensor]]
) -> Sequence[TaskVector]:
    """Each expert's part of the mean among those whose sign is the sum's; masks and counts are kept, no tensor.

    Args:
        task_vectors: one per expert.
        parts: per expert, from a name and its task vector there to what takes part.
    """
    masks: list[dict[str, Tensor]] = [{} for _ in task_vectors]
    counts: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for vector in task_vectors for name in vector.deltas):
        those = {i: parts[i](name, v.deltas[name]) for i, v in enumerate(task_vectors) if name in v.deltas}
        elected = sum(those.values(), torch.zeros(())).sign()
        for i, part in those.items():
            masks[i][name] = (part.sign() == elected) & (elected != 0)
        counts[name] = torch.stack([masks[i][name] for i in those]).sum(0, dtype=torch.int16).clamp_(min=1)

    def shared(index: int, name: str, delta: Tensor) -> Tensor:
        return parts[index](name, delta) * masks[index][name] / counts[name]

    return [TaskVector(v.expert, Computed(v.deltas, partial(shared, i))) for i, v in enumerate(task_vectors)]


def _threshold(vector: TaskVector, kept: int) -> Tensor | float:
    """The magnitude of a task vector's `kept`-th largest entry; 0 where it has no more than that many."""
    if not vector.deltas:
        return 0.0
    parts = [delta.abs().flatten().to(at_least_float32(delta)) for delta in vector.deltas.values()]
    several = len({part.device for part in parts}) > 1  # no device of a spread model has room for all: the host does
    magnitudes = torch.cat([part.cpu() for part in parts] if several else parts)
    if kept >= magnitudes.numel():
        return 0.0
    return magnitudes.kthvalue(magnitudes.numel() - kept + 1).values
