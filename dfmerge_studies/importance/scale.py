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


def scaled(values: Mapping[str, Tensor], scale: Scale) -> Mapping[str, Tensor]:
    """The importance of one expert, scaled; the same object where there is nothing to do.

    Args:
        values: F[i], float32 at least.
        scale: p, and over what the mean is taken.
    """
    if scale == UNSCALED:
        return values
    raised = {name: value if scale.power == 1.0 else value.pow(scale.power) for name, value in values.items()}
    if scale.normalise == "none":
        return raised
    if scale.normalise == "tensor":
        return {name: _divided(value, float(value.double().mean())) for name, value in raised.items()}
    entries = sum(value.numel() for value in raised.values())
    mean = sum(float(value.double().sum()) for value in raised.values()) / max(1, entries)
    return {name: _divided(value, mean) for name, value in raised.items()}


def _divided(value: Tensor, mean: float) -> Tensor:
    """A tensor over its mean; as it is where all of it is zero, which the floor then makes uniform."""
    return value / mean if mean > 0 else value
