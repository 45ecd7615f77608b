"""What one merge needs to know besides the models.

lam[i]       coefficient of expert i, or one per group of its parameters      number, or {group: number}
EXPERT.GROUP what the coefficient of a group is called in a study
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

GROUPS = "groups"  # attribute of a trial: lambda per expert and group
Coefficient = float | Mapping[str, float]  # lambda of an expert: of all its parameters, or by name of the parameter


@dataclass(frozen=True)
class Point:
    """Coefficients, and the method's own parameters.

    Attributes:
        coefficients: lambda per expert; where its groups have one each, their mean.
        parameters: value of each of the method's parameters.
        groups: lambda per expert and group of parameters; empty where every expert has one.
    """

    coefficients: Mapping[str, float]
    parameters: Mapping[str, float] = field(default_factory=dict)
    groups: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @classmethod
    def grouped(cls, groups: Mapping[str, Mapping[str, float]], parameters: Mapping[str, float]) -> Point:
        """The point of coefficients by expert and group."""
        return cls({expert: mean_of(own.values()) for expert, own in groups.items()}, parameters, groups)

    def on_step(self, step: float | None) -> Point:
        """The same with coefficients that are free of rounding: 3 * 0.1 and 0.3 are one point, and one Fisher.

        Args:
            step: distance between coefficients; None: they are left as they are.
        """
        if step is None:
            return self
        groups = {expert: _rounded(own) for expert, own in self.groups.items()}
        if groups:
            return Point.grouped(groups, self.parameters)
        return replace(self, coefficients=_rounded(self.coefficients))

    def described(self) -> dict[str, Any]:
        """The same for `--json` and a trial's attributes, each of the method's parameters by its name."""
        return {"coefficients": dict(self.coefficients), **groups_json(self), **self.parameters}

    def spread(self, members: Mapping[str, Sequence[str]]) -> dict[str, Coefficient]:
        """Lambda of each expert: one number where all its groups have the same, otherwise one per parameter.

        Args:
            members: names of the parameters of each group.
        """
        if not self.groups:
            return dict(self.coefficients)
        found: dict[str, Coefficient] = {}
        for expert, own in self.groups.items():
            one = set(own.values())
            found[expert] = (
                one.pop() if len(one) == 1 else {name: own[group] for group in members for name in members[group]}
            )
        return found


def fine_name(expert: str, group: str) -> str:
    """What the coefficient of an expert's group is called."""
    return f"{expert}.{group}"


def groups_json(point: Point) -> dict[str, dict[str, dict[str, float]]]:
    """Coefficients by expert and group for JSON, under a name of their own; nothing where experts have one each."""
    return {GROUPS: {expert: dict(own) for expert, own in point.groups.items()}} if point.groups else {}


def mean_of(values: Iterable[float]) -> float:
    """The mean of some coefficients, exactly their value where they are equal."""
    numbers = list(values)
    return float(numbers[0]) if len(set(numbers)) == 1 else fmean(numbers)


def coefficient_at(coefficient: Coefficient, name: str) -> float:
    """Lambda of one parameter.

    Args:
        coefficient: of its expert.
        name: of the parameter.
    """
    return coefficient[name] if isinstance(coefficient, Mapping) else coefficient


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 12) for name, value in values.items()}
