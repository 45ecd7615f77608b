"""A number that a method has besides the coefficients: its range, its grid, its flag."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dfmerge_studies.errors import InputError
from dfmerge_studies.methods.choices import Coefficients


@dataclass(frozen=True)
class Parameter:
    """A number that a method has besides the coefficients.

    Attributes:
        name: in specs, in a trial's attributes and in JSON; with dashes it is a flag of `merge`.
        meaning: what it says, for `--help`.
        low: smallest value that it can have.
        high: largest value that it can have.
        below_high: whether `high` itself is too large.
        default: its value where it is not searched; None: a merge must be told.
        grid: values to try, of a method whose coefficients are on a grid.
        bounds: range to search, of a method whose coefficients are searched.
    """

    name: str
    meaning: str
    low: float
    high: float
    below_high: bool = False
    default: float | None = None
    grid: tuple[float, ...] = ()
    bounds: tuple[float, float] | None = None

    @property
    def label(self) -> str:
        """Its name as a text has it."""
        return label(self.name)

    @property
    def flag(self) -> str:
        """Its flag of `merge`."""
        return "--" + self.name.replace("_", "-")

    @property
    def searched(self) -> bool:
        """Whether trials differ in it."""
        return bool(self.grid) or self.bounds is not None

    def under(self, coefficients: Coefficients) -> Parameter:
        """The same parameter of a method with another policy: a grid and a range stand for each other.

        Args:
            coefficients: the policy.
        """
        values = self.grid or self.bounds or ()
        if not values:
            return self
        middle = self.default if self.default is not None else values[len(values) // 2]
        if coefficients is Coefficients.SHARED_GRID:
            return self if self.grid else replace(self, bounds=None)
        if coefficients is Coefficients.PER_EXPERT:
            return replace(self, grid=(), bounds=(min(values), max(values)), default=middle)
        return replace(self, grid=(), bounds=None)

    def check(self, value: float, where: str | None = None) -> None:
        """Refuse a value that it cannot have.

        Args:
            value: the value.
            where: what to name as the place at fault, such as a flag.

        Raises:
            InputError: it is out of range.
        """
        if not self.low <= value <= self.high or (self.below_high and value == self.high):
            close = ")" if self.below_high else "]"
            raise InputError(
                f"the {self.label} is {value}, outside [{self.low:g}, {self.high:g}{close}",
                where=where,
                hint="Choose one inside",
            )


def label(name: str) -> str:
    """A parameter's name as a text has it: `drop rate`."""
    return name.replace("_", " ")
