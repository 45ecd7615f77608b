"""What the columns of the method table hold: importances, estimators, scales, who chooses the coefficients."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Literal

Blocks = Literal["gram", "kfac"]


class Importance(Enum):
    """Where the importance of an expert's parameters is estimated."""

    UNIFORM = "C = I"
    AT_EXPERT = "F(theta_i)"
    AT_SCALED_EXPERT = "F(theta_pre + lambda_i tau_i)"
    GRAM_AT_EXPERT = "Gram matrices of inputs at theta_i"
    KFAC_AT_EXPERT = "Kronecker factors of F(theta_i)"
    KFAC_AT_SCALED_EXPERT = "Kronecker factors of F(theta_pre + lambda_i tau_i)"

    @property
    def at_scaled_expert(self) -> bool:
        """Whether it depends on lambda."""
        return self in (Importance.AT_SCALED_EXPERT, Importance.KFAC_AT_SCALED_EXPERT)

    @property
    def blocks(self) -> Blocks | None:
        """What it has instead of a diagonal for linear layers."""
        if self is Importance.GRAM_AT_EXPERT:
            return "gram"
        return "kfac" if self in (Importance.KFAC_AT_EXPERT, Importance.KFAC_AT_SCALED_EXPERT) else None

    @property
    def word(self) -> str:
        """What a spec calls it."""
        return _IMPORTANCE_WORDS[self]


class Estimator(StrEnum):
    """Which choices of an input count for Fisher information; `importance.task_fisher` has the formulas."""

    EXACT = "exact"
    SAMPLED = "sampled"
    EMPIRICAL = "empirical"
    MASK_NODES = "mask-nodes"

    @property
    def draws(self) -> bool:
        """Whether the one choice of an input that counts is drawn, so that a generator is needed."""
        return self in (Estimator.SAMPLED, Estimator.MASK_NODES)

    @property
    def of_texts(self) -> Estimator:
        """What it is for texts that a model writes: they have no finite set of choices to take the mean over."""
        return Estimator.SAMPLED if self is Estimator.EXACT else self


Normalise = Literal["none", "expert", "tensor"]


@dataclass(frozen=True)
class Scale:
    """How importances are scaled before they are compared across experts; `importance.scale` has the formula.

    Attributes:
        normalise: over what each expert's mean is taken that its importance is divided by.
        power: of every entry, before that.
    """

    normalise: Normalise = "none"
    power: float = 1.0


UNSCALED = Scale()


class Coefficients(Enum):
    """Who chooses lambda."""

    FIXED = "1/M"
    SHARED_GRID = "one shared value on a grid"
    PER_EXPERT = "one per expert, Bayesian"
    FISHER_TRACE = "one per expert and layer, from the trace of the Fisher information on random tokens"

    @property
    def chosen(self) -> bool:
        """Whether trials choose among several; otherwise there is one trial."""
        return self in (Coefficients.SHARED_GRID, Coefficients.PER_EXPERT)

    @property
    def word(self) -> str:
        """What a spec calls it."""
        return _COEFFICIENT_WORDS[self]


_IMPORTANCE_WORDS = {
    Importance.UNIFORM: "uniform",
    Importance.AT_EXPERT: "fisher-at-expert",
    Importance.AT_SCALED_EXPERT: "fisher-at-scaled-expert",
    Importance.GRAM_AT_EXPERT: "gram-at-expert",
    Importance.KFAC_AT_EXPERT: "kfac-at-expert",
    Importance.KFAC_AT_SCALED_EXPERT: "kfac-at-scaled-expert",
}
_COEFFICIENT_WORDS = {
    Coefficients.FIXED: "fixed",
    Coefficients.SHARED_GRID: "shared",
    Coefficients.PER_EXPERT: "per-expert",
    Coefficients.FISHER_TRACE: "fisher-trace",
}
