"""Sums of squared per-row gradients against a loop over rows in float64."""

from __future__ import annotations

import pytest
import torch

from dfmerge_studies.importance.squares import CPU_BLOCK, Outer, add_squares_

ROWS = 5
SHAPES = {"many rows fit into the cache": (12, 20), "one row does not": (300, CPU_BLOCK // 256)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("positions", [1, 2, 4, 7])
def test_squares_of_a_dense_layer_are_those_of_each_row_padded_or_not(shape: tuple[int, int], positions: int) -> None:
    draws = torch.Generator().manual_seed(positions)
    left, right = (torch.randn(ROWS, positions, size, generator=draws) for size in shape)
    left[1, positions // 2 + 1 :] = 0  # padding has no gradient
    left[3] = 0
    before = torch.rand(shape, generator=draws)
    total = before.clone()
    add_squares_(total, [Outer(torch.arange(ROWS), left, right)])
    rows = [left[r].double().T @ right[r].double() for r in range(ROWS)]
    expected = before + sum(row.square() for row in rows)
    # Pairs of positions cancel where a row's gradient is small beside its parts: float32 against the largest entry.
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-6 * float(expected.max()))
