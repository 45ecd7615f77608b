"""The estimators of the Fisher information; the formulas stand in `fisher`."""

from __future__ import annotations

from enum import StrEnum


class Estimator(StrEnum):
    """Which choices of an input count, and how much."""

    EXACT = "exact"
    SAMPLED = "sampled"
    EMPIRICAL = "empirical"
    MASK_NODES = "mask-nodes"

    @property
    def draws(self) -> bool:
        """Whether the one choice of an input that counts is drawn, so that a generator is needed."""
        return self in (Estimator.SAMPLED, Estimator.MASK_NODES)
