"""Seeded draws of rows: nothing random is global, nothing random is unrecorded."""

from __future__ import annotations

import hashlib
from math import ceil
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def seeded_generator(seed: int, *labels: str) -> np.random.Generator:
    """A generator that depends on the study's seed and on what it is for, and on nothing else.

    Args:
        seed: the study's seed.
        labels: purpose of the draw, e.g. `("fisher", task)`.
    """
    text = "\x1f".join([str(seed), *labels])
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big"))


def torch_generator(seed: int, *labels: str) -> torch.Generator:
    """The same for torch, on the CPU."""
    import torch

    return torch.Generator().manual_seed(int(seeded_generator(seed, *labels).integers(2**62)))


def draw_rows(total: int, count: int, generator: np.random.Generator) -> list[int]:
    """`count` of `total` row numbers without repetition; a smaller draw of the same generator is a prefix.

    Args:
        total: rows that there are.
        count: rows wanted; all of them where there are fewer.
        generator: source of randomness.
    """
    return [int(row) for row in generator.permutation(total)[:count]]


def divided_rows(
    total: int, limit: float | None, holdout: float | None, generator: np.random.Generator
) -> tuple[list[int], list[int]]:
    """Row numbers that a search sees, and those that it does not.

    Args:
        total: rows that there are.
        limit: of those that it sees, at most: a count (int), a fraction in (0, 1] (float), or None for all.
        holdout: of those that it may not see: a count or a fraction; None for those that `limit` leaves over.
        generator: source of randomness.

    Returns:
        The seen ones in ascending order; smaller limits give subsets of larger ones.  The others in the order of the
        draw, so that any number of the first ones is a draw; all of one draw, so that no row is in both.
    """
    if limit is None and not holdout:
        return list(range(total)), []
    order = draw_rows(total, total, generator)
    held = 0 if holdout is None else min(total, _count(holdout, total))
    seen = min(total - held, total if limit is None else _count(limit, total))
    return sorted(order[:seen]), order[seen:] if holdout is None else order[total - held :]


def divided_first_rows(
    total: int, limit: float | None, holdout: float | None, generator: np.random.Generator
) -> tuple[list[int], list[int]]:
    """The same where the search sees the first rows, as `lm_eval --limit` does; a fraction is rounded up as there.

    Args:
        total: rows that there are.
        limit: of those that it sees.
        holdout: of those that it may not see, which are among the last ones.
        generator: source of randomness, of the order of the others.
    """
    held = 0 if holdout is None else min(total, _count(holdout, total))
    wanted = total if limit is None else ceil(limit * total) if isinstance(limit, float) and limit < 1 else int(limit)
    seen = min(total - held, wanted)
    if holdout == 0 or seen == total:
        return list(range(seen)), []
    return list(range(seen)), [seen + row for row in draw_rows(total - seen, total - seen, generator)]


def _count(share: float, total: int) -> int:
    return max(1, round(share * total)) if isinstance(share, float) else share
