"""Importance of a matrix as one block of a Kronecker product, and the merge of several such blocks.

    X        a matrix, or a change of one, as the model stores it                      (m, n)
    L, R     second moments of what stands left and right of it in its gradients       (m, m), (n, n); None: identity
    C(X)     L X R, the block of the importance times the matrix
    N        sum_i C_i(M lam_i Phi(tau)_i)                                             (m, n)
    start    sum_i lam_i Phi(tau)_i, the step under C = 1                              (m, n)

The merged step D solves (sum_i C_i)(D) = N.  With one factor that is one linear system with many right-hand sides,
solved at once.  With two, a sum of Kronecker products is none, and the step is found by conjugate gradients (Tam et
al., 2023, arXiv 2312.04339).  Features that no input reaches have no equation: there the step stays `start`, as the
floor has it for a diagonal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ITERATIONS = 100
TOLERANCE = 1e-6  # of the residual against the right-hand side


@dataclass(frozen=True)
class Block:
    """C of one matrix of one expert: L (x) R.

    Attributes:
        left: L, symmetric, or None for the identity.
        right: R, the same.
    """

    left: Tensor | None
    right: Tensor | None

    def __call__(self, matrix: Tensor) -> Tensor:
        """C(X)."""
        found = matrix if self.left is None else self.left.to(matrix.dtype) @ matrix
        return found if self.right is None else found @ self.right.to(matrix.dtype)

    def diagonal(self, like: Tensor) -> Tensor:
        """The diagonal of C, as a matrix of the shape of `like`."""
        rows = torch.ones_like(like[:, :1]) if self.left is None else self.left.diagonal().to(like.dtype)[:, None]
        columns = torch.ones_like(like[:1]) if self.right is None else self.right.diagonal().to(like.dtype)[None]
        return rows * columns

    def shrunk(self, factor: float) -> Block:
        """The same with off-diagonal entries times a factor.

        Args:
            factor: in [0, 1].
        """
        return Block(*(None if each is None else _shrunk(each, factor) for each in (self.left, self.right)))


def _shrunk(moments: Tensor, factor: float) -> Tensor:
    return moments * factor + torch.diag(moments.diagonal()) * (1.0 - factor)


def merged_step(blocks: Sequence[Block], right_hand: Tensor, start: Tensor) -> Tensor:
    """D of one matrix.

    Args:
        blocks: C_i of all experts; all have the same factors.
        right_hand: N.
        start: the step under C = 1.
    """
    if all(block.left is None for block in blocks):
        total = sum((b.right.double() for b in blocks if b.right is not None), torch.zeros((), device=start.device))
        return start + _solved(total, (right_hand.double() - start.double() @ total).T).T.to(start.dtype)
    if all(block.right is None for block in blocks):
        total = sum((b.left.double() for b in blocks if b.left is not None), torch.zeros((), device=start.device))
        return start + _solved(total, right_hand.double() - total @ start.double()).to(start.dtype)
    return _by_conjugate_gradients(blocks, right_hand, start)


def _solved(total: Tensor, right_hand: Tensor) -> Tensor:
    """The least solution of S Y = B for a symmetric S >= 0, in float64: null directions get 0.

    Args:
        total: S (n, n).
        right_hand: B (n, k).
    """
    values, vectors = torch.linalg.eigh(total)
    least = values.max().clamp(min=0) * len(values) * torch.finfo(torch.float32).eps  # of moments in float32
    inverse = torch.where(values > least, 1.0 / values.clamp(min=torch.finfo(values.dtype).tiny), 0.0)
    found: Tensor = vectors @ (inverse[:, None] * (vectors.T @ right_hand))
    return found


def _by_conjugate_gradients(blocks: Sequence[Block], right_hand: Tensor, start: Tensor) -> Tensor:
    """Conjugate gradients with the diagonal of sum_i C_i as preconditioner, from `start`.

    A direction along which the sum is zero but for rounding ends the search.
    """

    def applied(matrix: Tensor) -> Tensor:
        return torch.stack([block(matrix) for block in blocks]).sum(0)

    diagonal = torch.stack([block.diagonal(start) for block in blocks]).sum(0)
    inverse = torch.where(diagonal > 0, 1.0 / diagonal.clamp(min=torch.finfo(diagonal.dtype).tiny), 0.0)
    step, residual = start.clone(), right_hand - applied(start)
    enough = TOLERANCE * float(right_hand.norm())
    direction = inverse * residual
    size = float((residual * direction).sum())
    for _ in range(ITERATIONS):
        if float(residual.norm()) <= enough:
            break
        image = applied(direction)
        curvature = float((direction * image).sum())
        if curvature <= 0.0:
            break
        step += size / curvature * direction
        residual -= size / curvature * image
        towards = inverse * residual
        before, size = size, float((residual * towards).sum())
        direction = towards + size / before * direction
    return step
