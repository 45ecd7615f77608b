"""The space that a study searches.

names       what the coefficients belong to, one each     (M,)
point       coefficients by name                          {name: float}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dfmerge_studies.errors import InputError

if TYPE_CHECKING:
    from optuna.distributions import FloatDistribution

_ON_STEP = 1e-8  # the tolerance that Optuna's FloatDistribution uses for membership of a stepped range


@dataclass(frozen=True)
class Space:
    """A box of coefficients, the same range for every name that has no range of its own.

    Attributes:
        names: what the coefficients belong to, in the study's order.
        low: smallest coefficient allowed.
        high: largest coefficient allowed.
        step: distance between allowed values, counted from `low`; None for a continuous range.
        own: smallest and largest value of names that have a range of their own, continuous.

    Raises:
        InputError: the names or the range cannot be searched.
    """

    names: tuple[str, ...]
    low: float = 0.0
    high: float = 1.0
    step: float | None = None
    own: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) != len(self.names):
            raise InputError(f"the names to search over must be distinct and at least one, got {list(self.names)}")
        for low, high in ((self.low, self.high), *self.own.values()):
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise InputError(f"the bounds must be two finite numbers in rising order, got [{low}, {high}]")
        if self.step is not None and not (self.step > 0 and is_multiple(self.high - self.low, self.step)):
            raise InputError(
                f"the step must be positive and divide the range [{self.low}, {self.high}], got {self.step}"
            )

    def distributions(self) -> dict[str, FloatDistribution]:
        """Return the Optuna distribution of each coefficient."""
        from optuna.distributions import FloatDistribution  # not before: the spec checks its points without Optuna

        return {name: FloatDistribution(*self._range(name), step=self._step(name)) for name in self.names}

    def _range(self, name: str) -> tuple[float, float]:
        return self.own.get(name, (self.low, self.high))

    def _step(self, name: str) -> float | None:
        return None if name in self.own else self.step

    def check(self, point: Mapping[str, float], *, where: str | None = None) -> None:
        """Refuse a point that the study could not have proposed.

        Args:
            point: coefficients by name.
            where: what to name as the place at fault, such as a flag or a field of a spec.

        Raises:
            InputError: a name is missing or unknown, or a value is outside the range or off the step.
        """
        missing = [name for name in self.names if name not in point]
        unknown = [name for name in point if name not in self.names]
        if missing or unknown:
            raise InputError(
                f"coefficients for unknown experts {unknown}" if unknown else f"no coefficient for {missing}",
                where=where,
                mend=f"Give one coefficient for each of {', '.join(self.names)}",
            )
        for name in self.names:
            value, (low, high), step = point[name], self._range(name), self._step(name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise InputError(
                    f"the coefficient of {name} is {value}, outside [{low}, {high}]",
                    where=where,
                    mend="Choose a value in the range, or widen search.bounds in a new study",
                )
            if step is not None and not is_multiple(value - low, step):
                raise InputError(
                    f"the coefficient of {name} is {value}, not {low} plus a multiple of {step}", where=where
                )


def is_multiple(value: float, step: float) -> bool:
    """Whether a value is a whole number of steps, but for rounding.

    Args:
        value: the value.
        step: the size of a step, not 0.
    """
    return abs(value / step - round(value / step)) < _ON_STEP


class GridExhausted(Exception):
    """Every row of the grid has been proposed: there is nothing left to draw."""
