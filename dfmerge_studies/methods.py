"""The method table: every way to merge is a choice of importance C, coefficients lambda, and transform Phi.

A new method is a new row here (and a function in `transforms` if its Phi is new).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from dfmerge_studies.transforms import Transform, identity

SHARED = "lambda"  # name of the one coefficient that all experts share in a grid


class Importance(Enum):
    """Where the importance of an expert's parameters is estimated."""

    UNIFORM = "C = I"
    AT_EXPERT = "F(theta_i)"
    AT_SCALED_EXPERT = "F(theta_pre + lambda_i tau_i)"


class Coefficients(Enum):
    """Who chooses lambda."""

    FIXED = "1/M"
    SHARED_GRID = "one shared value on a grid"
    PER_EXPERT = "one per expert, Bayesian"


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: as the spec writes it.
        importance: C.
        coefficients: the policy for lambda.
        transform: Phi.
        grid: values of the shared coefficient, for `SHARED_GRID`.
    """

    name: str
    importance: Importance
    coefficients: Coefficients
    transform: Transform = identity
    grid: tuple[float, ...] = ()


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("averaging", Importance.UNIFORM, Coefficients.FIXED),
        Method(
            "task-arithmetic",
            Importance.UNIFORM,
            Coefficients.SHARED_GRID,
            grid=tuple(round(0.1 * step, 1) for step in range(11)),
        ),
        Method("gta", Importance.UNIFORM, Coefficients.PER_EXPERT),
        Method("fisher", Importance.AT_EXPERT, Coefficients.FIXED),
        Method("df-merge-static", Importance.AT_EXPERT, Coefficients.PER_EXPERT),
        Method("df-merge", Importance.AT_SCALED_EXPERT, Coefficients.PER_EXPERT),
    )
}


def fixed_coefficients(experts: Sequence[str]) -> dict[str, float]:
    """1/M for every expert.

    Args:
        experts: names of the M experts.
    """
    return dict.fromkeys(experts, 1.0 / len(experts))


def expand(parameters: Mapping[str, float], experts: Sequence[str]) -> dict[str, float]:
    """Coefficients per expert from the parameters of a trial, which may be one shared value.

    Args:
        parameters: what the sampler proposed.
        experts: names of the experts.
    """
    if SHARED in parameters and SHARED not in experts:
        return dict.fromkeys(experts, parameters[SHARED])
    return {expert: parameters[expert] for expert in experts}


def importance_coefficient(method: Method, coefficient: float) -> float:
    """The lambda at which an expert's Fisher information is estimated.

    Args:
        method: row of the table.
        coefficient: lambda_i of the trial.
    """
    return coefficient if method.importance is Importance.AT_SCALED_EXPERT else 1.0
