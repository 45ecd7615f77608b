"""Seeded draws of rows: nothing random is global, nothing random is unrecorded."""

from __future__ import annotations

import hashlib

import numpy as np
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
    return torch.Generator().manual_seed(int(seeded_generator(seed, *labels).integers(2**62)))


def draw_rows(total: int, count: int, generator: np.random.Generator) -> list[int]:
    """`count` of `total` row numbers without repetition; a smaller draw of the same generator is a prefix.

    Args:
        total: rows that there are.
        count: rows wanted; all of them where there are fewer.
        generator: source of randomness.
    """
    return [int(row) for row in generator.permutation(total)[:count]]


def limited_rows(total: int, limit: float | None, generator: np.random.Generator) -> list[int]:
    """Row numbers that `limit` leaves, in ascending order; smaller limits give subsets of larger ones.

    Args:
        total: rows that there are.
        limit: a count (int), a fraction in (0, 1] (float), or None for all.
        generator: source of randomness.
    """
    if limit is None:
        return list(range(total))
    count = max(1, round(limit * total)) if isinstance(limit, float) else limit
    return sorted(draw_rows(total, count, generator))
