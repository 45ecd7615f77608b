"""A study while a trial is drawn: its trials as read a moment ago, and what is then written together."""

from __future__ import annotations

import copy
from collections.abc import Container, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, check_distribution_compatibility
from optuna.trial import FrozenTrial, TrialState

from dfmerge_studies.storage.handles import id_of, storage_of

_PARAMETERS = ":relative_params:"  # in the name of a system attribute


class DrawnStorage:
    """Stands before a storage: knows the trials, and takes parameters and attributes without writing them.

    Args:
        study: the study.
        trials: all of its trials, in the order of their numbers, as read just now; the one to draw among them.

    Attributes:
        params: internal value and distribution of the drawn trial's parameters, by name.
        attributes: what a sampler has noted on it.
    """

    def __init__(self, study: optuna.Study, trials: Sequence[FrozenTrial]) -> None:
        self._behind = storage_of(study)
        self._trials = trials
        self.params: dict[str, tuple[float, BaseDistribution]] = {}
        self.attributes: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._behind, name)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """See Optuna's storages."""
        found = [trial for trial in self._trials if states is None or trial.state in states]
        return copy.deepcopy(found) if deepcopy else found

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """See Optuna's storages."""
        found = next((trial for trial in self._trials if id_of(trial) == trial_id), None)
        return self._behind.get_trial(trial_id) if found is None else copy.deepcopy(found)

    def get_trial_system_attrs(self, trial_id: int) -> dict[str, Any]:
        """See Optuna's storages."""
        return self.get_trial(trial_id).system_attrs

    def set_trial_param(self, trial_id: int, name: str, value: float, distribution: BaseDistribution) -> None:
        """Keep a parameter for who writes it.

        Raises:
            ValueError: the study's trials have this name for something else.
        """
        former = next((each.distributions[name] for each in self._trials if name in each.distributions), None)
        if former is not None:
            check_distribution_compatibility(former, distribution)
        self.params[name] = (value, distribution)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Keep an attribute for who writes it."""
        self.attributes[key] = value

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Write Optuna's notes, but for the one that tells others of the parameters before they are written."""
        if _PARAMETERS not in key:
            self._behind.set_trial_system_attr(trial_id, key, value)


def drawn_from(study: optuna.Study, drawing: DrawnStorage) -> optuna.Study:
    """The study, asked through `drawing`.

    Args:
        study: the study.
        drawing: stands before its storage.
    """
    other = copy.copy(study)
    other._storage = drawing  # type: ignore[assignment]  # it has all that samplers and trials ask for
    return other
