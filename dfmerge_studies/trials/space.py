"""The space that a study searches.

names       what the coefficients belong to, one each     (M,)
point       coefficients by name                          {name: float}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from dfmerge_studies.errors import InputError, did_you_mean

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
        tied: the coarser name that some of the names belong to; those of one have the same value where they are tied.

    Raises:
        InputError: the names or the range cannot be searched.
    """

    names: tuple[str, ...]
    low: float = 0.0
    high: float = 1.0
    step: float | None = None
    own: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)

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

    @property
    def coarse(self) -> Space:
        """The space of the coarser names; the same where there are none."""
        names = tuple(dict.fromkeys(self.tied.get(name, name) for name in self.names))
        return replace(self, names=names, tied={})

    def spread(self, point: Mapping[str, float]) -> dict[str, float]:
        """A point of the coarser space in this one.

        Args:
            point: of `coarse`; one that is here already, and any point of a space without coarser names, is left as it
                is.
        """
        if not self.tied or set(self.names) <= set(point):
            return dict(point)
        return {name: point[self.tied.get(name, name)] for name in self.names}

    def distributions(self) -> dict[str, FloatDistribution]:
        """Return the Optuna distribution of each coefficient."""
        from optuna.distributions import FloatDistribution  # not before: the spec checks its points without Optuna

        return {name: FloatDistribution(*self.range_of(name), step=self._step(name)) for name in self.names}

    def range_of(self, name: str) -> tuple[float, float]:
        """Smallest and largest value of one name."""
        return self.own.get(name, (self.low, self.high))

    def _step(self, name: str) -> float | None:
        return None if name in self.own else self.step

    def check(self, point: Mapping[str, float], *, where: str | None = None) -> None:
        """Refuse a point that is not in the space, with the first thing that is wrong with it.

        Args:
            point: coefficients by name.
            where: what to name as the place at fault, such as a flag or a field of a spec.

        Raises:
            InputError: a name is missing or unknown, or a value is outside the range or off the step.
        """
        for name in point:
            if name not in self.names:
                raise InputError(
                    f"unknown name {name!r}",
                    where=where,
                    hint=did_you_mean(name, self.names) or f"The names are {', '.join(self.names)}",
                )
        for name in self.names:
            if name not in point:
                raise InputError(
                    f"no coefficient for {name!r}", where=where, hint=f"Give one for each of {', '.join(self.names)}"
                )
            self._check_value(name, point[name], where)

    def _check_value(self, name: str, value: float, where: str | None) -> None:
        (low, high), step = self.range_of(name), self._step(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InputError(f"the coefficient of {name!r} is {value!r}, not a number", where=where)
        if not low <= value <= high:
            raise InputError(
                f"the coefficient of {name!r} is {value}, outside the bounds [{low:g}, {high:g}]",
                where=where,
                hint="Choose a value inside, or widen search.bounds",
            )
        if step is not None and not is_multiple(value - low, step):
            raise InputError(
                f"the coefficient of {name!r} is {value}, not {low:g} plus a multiple of the step {step:g}",
                where=where,
                hint="Choose a value on the step, or leave search.step out",
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
