"""What the samplers of one trial have in common that propose all of its values together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

if TYPE_CHECKING:
    from optuna.study import Study


class JointSampler(BaseSampler):
    """Base of samplers that have `sample_relative` alone.

    `search.StatelessSampler`, which makes one for each trial, says what is searched and draws what it leaves open.
    """

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return nothing: whoever calls `sample_relative` says what is searched."""
        return {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Refuse: whoever calls `sample_relative` draws what is left open."""
        raise AssertionError(f"{type(self).__name__} has no value for {param_name} alone")
