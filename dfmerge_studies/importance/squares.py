"""Per-row gradients of one parameter in factored form, and the sum of their squares.

    r        row: one (input, choice) pair, or one direction of an input's class scores
    G[r]     gradient of row r, shape of the parameter
    n        rows of a part; T positions (tokens) of a row
    left     (n, T, o)   right (n, T, i)      G[r] = left[r]^T right[r], what a dense layer leaves
    ids      (n, T)      values (n, T, d)     G[r][ids[r, t]] += values[r, t], what an embedding leaves
    F        sum over r of G[r]^2, elementwise; accumulated in place, in the accumulator's precision

A parameter that is used several times has several parts; a row's gradient is the sum over its parts, and only then is
it squared.  No per-row gradient of a dense layer is ever stored: one row's lives for the time it takes to square it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PAIR_LIMIT = 4  # positions up to which the sum over pairs of positions is cheaper than one matrix per row
BLOCK = 1 << 25  # elements of the per-row gradients that an accelerator forms at once,
CPU_BLOCK = 1 << 16  # and a CPU, so that they stay in its cache; of larger parameters it forms one row's at a time


@dataclass(frozen=True, slots=True)
class Outer:
    """Gradients G[r] = left[r]^T right[r]; `rows` (n,) says which rows of the chunk these are, on the CPU."""

    rows: Tensor
    left: Tensor
    right: Tensor

    def row(self, k: int, like: Tensor) -> Tensor:
        """G of the k-th row, in the shape and precision of `like`.

        Args:
            k: position in `rows`.
            like: a tensor of the parameter's shape, in the precision to compute in.
        """
        return self.left[k].to(like.dtype).T @ self.right[k].to(like.dtype)


@dataclass(frozen=True, slots=True)
class Sparse:
    """Gradients that touch only the parameter's rows `ids`; a row of the parameter may occur many times."""

    rows: Tensor
    ids: Tensor
    values: Tensor

    def row(self, k: int, like: Tensor) -> Tensor:
        """G of the k-th row, in the shape and precision of `like`.

        Args:
            k: position in `rows`.
            like: a tensor of the parameter's shape, in the precision to compute in.
        """
        dense = torch.zeros_like(like)
        return _add_rows_(dense, self.ids[k], self.values[k].to(like.dtype))


@dataclass(frozen=True, slots=True)
class Whole:
    """Gradients as they are, (n, *shape of the parameter): for small parameters, and for what nothing else fits."""

    rows: Tensor
    gradients: Tensor

    def row(self, k: int, like: Tensor) -> Tensor:
        """G of the k-th row, in the shape and precision of `like`.

        Args:
            k: position in `rows`.
            like: a tensor in the precision to compute in.
        """
        return self.gradients[k].to(like.dtype)


Part = Outer | Sparse | Whole


def add_squares_(total: Tensor, parts: Sequence[Part]) -> None:
    """Add F of the rows in `parts` to `total`, in place.

    Args:
        total: the accumulator, shape of the parameter.
        parts: all parts of these rows; a row may occur in several parts, but only once in each.
    """
    with torch.autocast(total.device.type, enabled=False):  # the model may run in 16 bits, the squares may not
        _add_squares_(total, parts)


def _add_squares_(total: Tensor, parts: Sequence[Part]) -> None:
    outers = [part for part in parts if isinstance(part, Outer)]
    sparses = [part for part in parts if isinstance(part, Sparse)]
    wholes = [part for part in parts if isinstance(part, Whole)]
    if not parts:
        return
    if not wholes and _aligned(outers):
        outer = _concatenated(outers, total.dtype)
        if outer is not None:
            _add_outer_(total, outer)
        if sparses:
            _add_sparse_(total, sparses, outer)
    elif len(wholes) == len(parts) and _aligned(wholes):
        gradients = sum(part.gradients.to(total.dtype) for part in wholes)
        assert isinstance(gradients, Tensor)
        total.add_(gradients.square_().sum(0) if len(wholes) > 1 else gradients.square().sum(0))
    else:
        for places in _by_row(parts):
            gradient = sum(part.row(k, total) for part, k in places)
            assert isinstance(gradient, Tensor)
            total.addcmul_(gradient, gradient)


def _aligned(parts: Sequence[Outer] | Sequence[Whole]) -> bool:
    return all(part.rows is parts[0].rows or torch.equal(part.rows, parts[0].rows) for part in parts)


def _by_row(parts: Sequence[Part]) -> Iterator[list[tuple[Part, int]]]:
    places: dict[int, list[tuple[Part, int]]] = {}
    for part in parts:
        for k, row in enumerate(part.rows.tolist()):
            places.setdefault(row, []).append((part, k))
    yield from places.values()


def _concatenated(parts: Sequence[Outer], dtype: torch.dtype) -> Outer | None:
    """Several uses of a dense layer by the same rows are one use on the positions of all."""
    if not parts:
        return None
    if len(parts) == 1:
        return Outer(parts[0].rows, parts[0].left.to(dtype), parts[0].right.to(dtype))
    left = torch.cat([part.left.to(dtype) for part in parts], dim=1)
    right = torch.cat([part.right.to(dtype) for part in parts], dim=1)
    return Outer(parts[0].rows, left, right)


def _add_outer_(total: Tensor, outer: Outer) -> None:
    """F += sum over r of (left[r]^T right[r])^2."""
    left, right = outer.left, outer.right
    lengths = [left.shape[1]] * left.shape[0]
    on_cpu = left.device.type == "cpu"
    block = (CPU_BLOCK if on_cpu else BLOCK) // total.numel()
    one_by_one = on_cpu and block < 2
    if one_by_one and left.shape[1] > 1:
        left, right, lengths = _without_zeros(left, right)
    if not lengths:
        return
    if max(lengths) == 1 or (max(lengths) <= PAIR_LIMIT and (one_by_one or not on_cpu)):
        _add_pairs_(total, left[:, : max(lengths)], right[:, : max(lengths)])
    elif one_by_one:
        gradient = torch.empty_like(total)
        for r, length in enumerate(lengths):
            torch.mm(left[r, :length].T, right[r, :length], out=gradient)
            total.addcmul_(gradient, gradient)
    else:
        for lefts, rights in zip(*(torch.split(x, max(1, block)) for x in (left, right)), strict=True):
            total.add_(torch.bmm(lefts.transpose(1, 2), rights).square_().sum(0))


def _add_pairs_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """The same by one matrix product for each distance between two positions.

    (sum over t of l_t r_t)^2 = sum over t <= u of (1 or 2) l_t l_u r_t r_u.  Rounding may leave entries that cancel
    slightly below zero; the sum is clamped when it is finished.
    """
    positions = left.shape[1]
    for apart in range(positions):
        pairs = [x[:, : positions - apart] * x[:, apart:] for x in (left, right)]
        total.addmm_(pairs[0].flatten(0, 1).T, pairs[1].flatten(0, 1), alpha=1.0 if apart == 0 else 2.0)


def _without_zeros(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Both factors without positions whose share is zero: padding, and what a last layer computes but nobody reads.

    Returns:
        left and right with the used positions of every row in front, and how many each row has.
    """
    used = _anything(left)
    if bool(used.all()):
        used = _anything(right)
    counts = used.sum(1)
    most = int(counts.max()) if len(counts) else 0
    if 2 * most <= used.shape[1]:
        places = used.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most, None]
        left = left.gather(1, places.expand(-1, -1, left.shape[2]))
        right = right.gather(1, places.expand(-1, -1, right.shape[2]))
        return left, right, counts.tolist()
    after = torch.arange(1, used.shape[1] + 1) * used  # moving costs more than it saves: only cut the padding off
    return left, right, after.amax(1).tolist()


def _anything(x: Tensor) -> Tensor:
    """(n, T) whether any of x (n, T, d) is not zero; two reductions are many times faster than a comparison."""
    return x.amax(-1).ne(0) | x.amin(-1).ne(0)


def _add_sparse_(total: Tensor, parts: Sequence[Sparse], outer: Outer | None) -> None:
    """F += S (2 L + S) on the touched rows of the parameter: S sparse part, L dense part (added before), per row r."""
    rows = torch.cat([part.rows[:, None].expand_as(part.ids).reshape(-1).to(total.device) for part in parts])
    ids = torch.cat([part.ids.reshape(-1) for part in parts])
    values = torch.cat([part.values.reshape(-1, total.shape[1]).to(total.dtype) for part in parts])
    keys, inverse = torch.unique(rows * total.shape[0] + ids, return_inverse=True)
    gradient = _add_rows_(total.new_zeros((len(keys), total.shape[1])), inverse, values)
    owners, touched = keys // total.shape[0], keys % total.shape[0]
    factor = gradient
    if outer is not None:
        place = torch.full((int(owners.max()) + 1,), -1, device=total.device)
        inside = outer.rows.to(total.device) < len(place)
        place[outer.rows.to(total.device)[inside]] = torch.arange(len(outer.rows), device=total.device)[inside]
        at = place[owners]
        known = at >= 0
        left = outer.left[at[known], :, touched[known]]
        dense = torch.bmm(left[:, None, :], outer.right[at[known]]).squeeze(1)
        factor = gradient.clone()
        factor[known] += 2 * dense
    _add_rows_(total, touched, gradient * factor)


def _add_rows_(target: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    """Add values to rows of the target; repeated ids are summed in an order that does not vary between runs."""
    if target.device.type == "cpu":
        return target.index_add_(0, ids, values)
    return target.index_put_((ids,), values, accumulate=True)
