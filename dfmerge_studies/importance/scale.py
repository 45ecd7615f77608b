"""The scale of importances: how those of one expert stand against those of another.

    F[i]   importance of expert i                  {name: tensor}, >= 0
    p      power                                   1 or 0.5
    C[i]   what the equation is given              {name: tensor}, shapes of F[i]

    C[i]  =  F[i]^p / m[i]        m[i] = 1                                    normalise: none
                                  m[i] = mean of F[i]^p over all entries      normalise: expert
                                  m[i] = mean of F[i]^p over each tensor      normalise: tensor

The trace of a Fisher at the scaled model grows with lambda, by a factor of 13 to 53 between 0.2 and 1 on five tasks of
ours, so that a coefficient acts twice: on its expert's step and on that expert's weight in every mean.  Dividing by
the mean leaves it the first only.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dfmerge_studies.methods import UNSCALED, Scale
from dfmerge_studies.params import OnDemand, stacked


def scaled(values: Mapping[str, Tensor], scale: Scale) -> Mapping[str, Tensor]:
    """The importance of one expert, scaled; the same object where there is nothing to do.

    Args:
        values: F[i], float32 at least.
        scale: p, and over what the mean is taken.
    """
    return values if scale == UNSCALED else _Scaled(values, scale)


class _Scaled(OnDemand[Tensor]):
    """C[i], worked out tensor by tensor when it is asked for, so that there is no second importance in memory."""

    def __init__(self, values: Mapping[str, Tensor], scale: Scale) -> None:
        super().__init__(values)
        self._scale = scale
        self._mean = self._mean_of_all() if scale.normalise == "expert" else None

    def __getitem__(self, name: str) -> Tensor:
        value = self._raised(name)
        if self._scale.normalise == "none":
            return value
        return _divided(value, float(value.double().mean()) if self._mean is None else self._mean)

    def _raised(self, name: str) -> Tensor:
        value = self._source[name]
        return value if self._scale.power == 1.0 else value.pow(self._scale.power)

    def _mean_of_all(self) -> float:
        raised = map(self._raised, self._source)
        found = [(value.numel(), value.double().sum()) for value in raised]
        if not found:
            return 0.0
        sums: list[float] = stacked([total for _, total in found]).tolist()  # one wait for the device
        return sum(sums) / max(1, sum(entries for entries, _ in found))


def _divided(value: Tensor, mean: float) -> Tensor:
    """A tensor over its mean; as it is where all of it is zero, which the floor then makes uniform."""
    return value / mean if mean > 0 else value
