"""LoRE (Liu et al., 2025, arXiv 2502.10749): low-rank estimates of the task vectors, and of what they start from.

    theta_i       an expert's matrix                          (m, n); a vector is a matrix of one column
    theta_0       estimate of the base's                      (m, n)
    delta_i       estimate of the expert's task vector        (m, n), of low rank
    mu            threshold of singular values

They minimise sum_i 1/2 |theta_0 + delta_i - theta_i|^2 + mu |delta_i|_* in turn, from delta_i = 0:

    theta_0 = 1/M sum_i (theta_i - delta_i)         delta_i = SVT(theta_i - theta_0, mu)

SVT lowers each singular value by mu, to 0 at least.  The base's own weights only say where zero is: shifted by
anything, theta_i and theta_0 are shifted alike, and delta_i stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from dfmerge_studies.params import TaskVector, at_least_float32
from dfmerge_studies.transforms.base import Moved, Prepared, Streams

_ROUNDS = 20
_SETTLED = 1e-6  # of the size of theta_0: it has stopped moving


def estimate_low_rank(task_vectors: Sequence[TaskVector], streams: Streams) -> Prepared:
    """Phi(tau)_i = delta_i, and the merge starts at theta_0.

    The estimates are computed once for each mu and kept: one tensor per expert, and one for theta_0, of every name that
    some expert changed.

    Args:
        task_vectors: one per expert.
        streams: not used.
    """

    @lru_cache(maxsize=1)
    @torch.no_grad()
    def estimated(mu: float) -> Moved:
        names = dict.fromkeys(name for vector in task_vectors for name in vector.deltas)
        found: list[dict[str, Tensor]] = [{} for _ in task_vectors]
        shift: dict[str, Tensor] = {}
        for name in names:
            changes = [vector.deltas.get(name) for vector in task_vectors]
            like = next(change for change in changes if change is not None)
            whole = [torch.zeros_like(like) if change is None else change for change in changes]
            tau = torch.stack([change.to(at_least_float32(change)) for change in whole])
            shift[name], deltas = alternate(tau, mu)
            for own, delta in zip(found, deltas, strict=True):
                own[name] = delta
        return Moved([TaskVector(v.expert, own) for v, own in zip(task_vectors, found, strict=True)], shift)

    def prepared(parameters: Mapping[str, float]) -> Sequence[TaskVector]:
        return estimated(parameters["mu"])

    return prepared


def alternate(theta: Tensor, mu: float) -> tuple[Tensor, Tensor]:
    """theta_0 and delta of one parameter, by at most 20 rounds.

    Args:
        theta: of all experts, (M, ...), measured from anywhere.
        mu: the threshold.

    Returns:
        theta_0, of a parameter's shape, and delta, of theta's.
    """
    delta = torch.zeros_like(theta)
    start = theta.mean(0)
    for turn in range(_ROUNDS):
        before, start = start, (theta - delta).mean(0)
        if turn and (start - before).norm() <= _SETTLED * start.norm():
            break
        delta = torch.stack([shrunk(each - start, mu) for each in theta])
    return start, delta


def shrunk(matrix: Tensor, mu: float) -> Tensor:
    """SVT: the matrix whose singular values are lower by mu, 0 at least.

    By the eigenvalues of the smaller of its two Gram matrices, in float64 since they are squares: several times as fast
    as its singular vectors on both sides.

    Args:
        matrix: (m, ...); its first dimension against all others.
        mu: 0 or more.
    """
    wide = matrix.reshape(matrix.shape[0], -1) if matrix.dim() > 1 else matrix.reshape(1, -1)
    rows = wide.double()
    tall = rows.shape[0] > rows.shape[1]
    rows = rows.T if tall else rows
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    sizes = values.clamp(min=0).sqrt()
    factors = torch.where(sizes > mu, 1.0 - mu / sizes.clamp(min=torch.finfo(sizes.dtype).tiny), 0.0)
    found: Tensor = (vectors * factors) @ (vectors.T @ rows)
    return (found.T if tall else found).reshape(matrix.shape).to(matrix.dtype)
