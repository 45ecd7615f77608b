"""The method table: every way to merge is a choice of importance C, coefficients lambda, and transform Phi.

A new method is a new row here (and a function in `transforms` if its Phi is new).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from dfmerge_studies.errors import InputError
from dfmerge_studies.transforms import Transform, drop_and_rescale, identity, trim_and_elect

# Names of what a grid searches.
SHARED = "lambda"  # the one coefficient that all experts share
DROP_RATE = "drop_rate"  # DARE's p


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
        grid: values of the shared coefficient, and of the drop rate where the transform has one, for `SHARED_GRID`.
        estimator: of the importance, where the method prescribes one.
    """

    name: str
    importance: Importance
    coefficients: Coefficients
    transform: Transform = identity
    grid: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    estimator: str | None = None

    @property
    def drops(self) -> bool:
        """Whether its trials have a drop rate."""
        return DROP_RATE in self.grid

    def estimator_for(self, stated: str) -> str:
        """The estimator of the importance: the method's own, or else the spec's.

        Args:
            stated: `importance.estimator` of the spec.
        """
        return self.estimator or stated


def _tenths(first: int, last: int, step: int = 1) -> tuple[float, ...]:
    """Grid values by their tenths, both ends included."""
    return tuple(tenth / 10 for tenth in range(first, last + 1, step))


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("averaging", Importance.UNIFORM, Coefficients.FIXED),
        Method("task-arithmetic", Importance.UNIFORM, Coefficients.SHARED_GRID, grid={SHARED: _tenths(0, 10)}),
        Method("gta", Importance.UNIFORM, Coefficients.PER_EXPERT),
        Method("fisher", Importance.AT_EXPERT, Coefficients.FIXED),
        Method(
            "dare",
            Importance.UNIFORM,
            Coefficients.SHARED_GRID,
            drop_and_rescale,
            {SHARED: _tenths(0, 10), DROP_RATE: _tenths(1, 9, 2)},
        ),
        # The agreement mask is part of Phi: see `trim_and_elect`.
        Method("ties", Importance.UNIFORM, Coefficients.SHARED_GRID, trim_and_elect, {SHARED: _tenths(8, 18)}),
        Method("fisher-nodes", Importance.AT_EXPERT, Coefficients.FIXED, estimator="mask-nodes"),
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


def expand(
    method: Method, parameters: Mapping[str, float], experts: Sequence[str]
) -> tuple[dict[str, float], float | None]:
    """Coefficients per expert, and the drop rate if the method has one, from the parameters of a trial.

    Args:
        method: row of the table.
        parameters: what the sampler proposed; of a grid, one value that all experts share.
        experts: names of the experts.
    """
    if method.coefficients is Coefficients.SHARED_GRID:
        return dict.fromkeys(experts, parameters[SHARED]), parameters.get(DROP_RATE)
    return {expert: parameters[expert] for expert in experts}, None


def coefficient_range(method: Method, bounds: tuple[float, float]) -> tuple[float, float]:
    """Coefficients that a merge may be asked for: those that a study of the method could have.

    Args:
        method: row of the table.
        bounds: of the spec's search.
    """
    values = (*bounds, *method.grid.get(SHARED, ()))
    return min(values), max(values)


def check_drop_rate(method: Method, drop_rate: float | None, where: str | None = None) -> None:
    """Refuse a drop rate that does not go with a method, or a method without its drop rate.

    Args:
        method: row of the table.
        drop_rate: DARE's p, None where none is given.
        where: what to name as the place at fault, such as a flag.

    Raises:
        InputError: it is missing, superfluous or outside [0, 1).
    """
    if not method.drops:
        if drop_rate is not None:
            raise InputError(f"the method {method.name!r} has no drop rate", where=where, mend="Leave it out")
    elif drop_rate is None:
        raise InputError(f"the method {method.name!r} needs a drop rate", where=where, mend="Give one, such as 0.5")
    elif not 0.0 <= drop_rate < 1.0:
        raise InputError(f"the drop rate is {drop_rate}, outside [0, 1)", where=where, mend="Choose one inside")


def importance_coefficient(method: Method, coefficient: float) -> float:
    """The lambda at which an expert's Fisher information is estimated.

    Args:
        method: row of the table.
        coefficient: lambda_i of the trial.
    """
    return coefficient if method.importance is Importance.AT_SCALED_EXPERT else 1.0
