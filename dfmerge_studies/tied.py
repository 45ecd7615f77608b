"""A sampler for coefficients that are finer than a model: for half of the trials those of an expert are tied.

    fine names      EXPERT.GROUP of all experts and groups
    coarse names    the experts

The first half of a study's total is the search of the coarse names, draw for draw: the same sampler, under the same
seeds, sees the tied trials in the coarse space.  Then the names are released, and the sampler goes on in the fine space
from all trials, the best tied one among them.  So such a study is at no moment worse than the model-wise search of
half its total.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial

from dfmerge_studies.storage import id_of, storage_of
from dfmerge_studies.trials.marks import GRADIENT, PROPOSAL, place_of
from dfmerge_studies.trials.space import Space

if TYPE_CHECKING:
    from optuna.study import Study


class TiedSampler(BaseSampler):
    """Proposes in the coarse space until the names are released, then in the fine one.

    Args:
        coarse: the sampler of the coarse space.
        fine: the sampler of the fine space.
        space: the fine space.
        total: of a study, the trials that it should reach; names are released from half of it on.
    """

    def __init__(self, coarse: BaseSampler, fine: BaseSampler, *, space: Space, total: Callable[[Study], int]) -> None:
        self._coarse = coarse
        self._fine = fine
        self._space = space
        self._total = total

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """As the sampler of the fine space has it."""
        return self._fine.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Propose all coefficients together; empty where the sampler leaves them to `sample_independent`.

        Args:
            study: whose trials the sampler learns from.
            trial: the trial to be drawn; its place decides whether names are tied.
            search_space: from `infer_relative_search_space`.
        """
        if not search_space or not self._is_tied(study, trial):
            return self._fine.sample_relative(study, trial, search_space)
        seen = coarse_study(study, self._space)
        drawn = seen.get_trials(deepcopy=False)[trial.number]  # its own, since a sampler may write on it
        point = self._coarse.sample_relative(seen, drawn, {**self._space.coarse.distributions()})
        kept = seen.get_trials(deepcopy=False)[trial.number].user_attrs.get(PROPOSAL)
        if kept is not None:
            storage_of(study).set_trial_user_attr(id_of(trial), PROPOSAL, kept)
        return self._space.spread(point) if point else {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Propose one coefficient: while names are tied, the same for all of one coarse name.

        Args:
            study: the study of the trial.
            trial: the trial to be drawn.
            param_name: whose coefficient.
            param_distribution: the range to draw from.
        """
        if not self._is_tied(study, trial):
            return self._fine.sample_independent(study, trial, param_name, param_distribution)
        name = self._space.tied.get(param_name, param_name)
        return self._coarse.sample_independent(study, trial, name, param_distribution)

    def _is_tied(self, study: Study, trial: FrozenTrial) -> bool:
        return 2 * place_of(trial) < self._total(study)


def coarse_study(study: Study, space: Space) -> Study:
    """A study in memory, with the same trials under the same numbers, as a sampler of the coarse space sees them.

    Trials whose names are not tied have no point there and are left without parameters.

    Args:
        study: of the fine space.
        space: the fine space.
    """
    seen = optuna.create_study(storage=InMemoryStorage(), directions=study.directions, study_name=study.study_name)
    seen.add_trials([coarse_trial(trial, space) for trial in study.get_trials(deepcopy=False)])
    return seen


def coarse_trial(trial: FrozenTrial, space: Space) -> FrozenTrial:
    """A trial with the parameters that it has in the coarse space, and the slope of the loss along each of them.

    Along coefficients that change together the slope is the sum of theirs.

    Args:
        trial: of the fine space.
        space: the fine space.
    """
    values: dict[str, set[float]] = {}
    for name, value in trial.params.items():
        values.setdefault(space.tied.get(name, name), set()).add(value)
    ranges = space.coarse.distributions()
    whole = set(values) == set(ranges) and all(len(each) == 1 for each in values.values())
    seen = copy.copy(trial)
    seen.params = {name: next(iter(values[name])) for name in ranges} if whole else {}
    seen.distributions = {**ranges} if whole else {}
    if GRADIENT in trial.user_attrs:
        slopes: dict[str, float] = {}
        for name, slope in trial.user_attrs[GRADIENT]["slopes"].items():
            slopes[space.tied.get(name, name)] = slopes.get(space.tied.get(name, name), 0.0) + slope
        seen.user_attrs = {**trial.user_attrs, GRADIENT: {**trial.user_attrs[GRADIENT], "slopes": slopes}}
    return seen
