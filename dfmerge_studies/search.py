"""The samplers that propose points in a study's space.

    point       coefficients by name                    {name: float}
    place       ordinal of a trial in its study         0, 1, 2, ...

A trial's random numbers derive from (study's seed, study's name, place) and from nothing that a process remembers, so a
study that was cut and resumed proposes what an uncut one proposes.  The place, unlike Optuna's trial number, stays with
the coefficients when a trial is put back in the queue; the loop stores it on the trial (see `trials/marks.py`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GPSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState

from dfmerge_studies.descent import RATE, DescentSampler
from dfmerge_studies.errors import InputError
from dfmerge_studies.joint import JointSampler
from dfmerge_studies.storage import id_of, storage_of
from dfmerge_studies.trials.marks import DISCARDED, FIXED, PROPOSAL, RETRY_OF, place_of
from dfmerge_studies.trials.reading import violation
from dfmerge_studies.trials.space import GridExhausted, Space
from dfmerge_studies.trust_region import PLAIN_MEAN, Goal, TrustRegionSampler

if TYPE_CHECKING:
    from optuna.study import Study


def trial_seed(seed: int, study_name: str, place: int, *words: str) -> int:
    """Derive the seed of one trial's random numbers, 32 bits, from a hash of what identifies it.

    Args:
        seed: the study's seed.
        study_name: the study's name.
        place: the trial's place.
        *words: what else tells apart several draws of one trial.
    """
    text = json.dumps([seed, study_name, place, *words])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


class _OrderedGP(GPSampler):
    """Optuna's GP sampler, shown the completed trials in the order of their places.

    A point that was put back in the queue completes under a later number; the sums inside the GP depend, in their last
    bits, on the order of the rows.  This overrides the one private name of Optuna that we rely on for proposals, and
    another one to learn what is expected of a proposal; without that, trials keep no expectation.
    """

    expected: dict[str, Any] | None = None  # of the point that it has proposed; of several objectives nothing
    _scale: tuple[float, float] | None = None  # mean and deviation that values are standardised by

    def _sample_relative_impl(
        self,
        study: Study,
        completed_trials: list[FrozenTrial],
        running_trials: list[FrozenTrial],
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        ordered = sorted(completed_trials, key=place_of)
        if len(study.directions) == 1 and any(violation(trial) == 0 for trial in ordered):
            values = np.array([trial.values[0] for trial in ordered])
            self._scale = float(values.mean()), float(values.std())
        return super()._sample_relative_impl(study, ordered, running_trials, search_space)

    def _optimize_acqf(self, acqf: Any, best_params: Any) -> Any:
        import torch

        point = super()._optimize_acqf(acqf, best_params)  # over the whole space
        if self._scale is not None and self._gprs_cache_list:
            mean, deviation = self._scale
            there, variance = self._gprs_cache_list[0].posterior(torch.from_numpy(point))
            self.expected = {
                "mean": mean + deviation * float(there),
                "deviation": deviation * math.sqrt(float(variance)),
                "gain": deviation * math.exp(float(acqf.eval_acqf_no_grad(point))),
            }
        return point


class StatelessSampler(BaseSampler):
    """Proposes each trial with a fresh sampler, seeded for that trial alone.

    Safe to share between threads: nothing is kept between two trials.  What a sampler expects of the point that it
    proposes is kept on the trial.

    Args:
        fresh: builds the sampler of one trial from that trial's seed.
        space: what is searched; Optuna would infer it from past trials, and turn to random points when they differ.
        seed: the study's seed.
        study_name: the study's name.
    """

    def __init__(self, fresh: Callable[[int], BaseSampler], *, space: Space, seed: int, study_name: str) -> None:
        self._fresh = fresh
        self._space = space
        self._seed = seed
        self._study_name = study_name

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the whole space, or nothing for a trial whose coefficients are given.

        Args:
            study: not looked at.
            trial: the trial to be drawn.
        """
        return {} if FIXED in trial.system_attrs else {**self._space.distributions()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Propose all coefficients together; empty where the sampler leaves them to `sample_independent`.

        Args:
            study: whose trials the fresh sampler learns from.
            trial: the trial to be drawn; its place decides the seed.
            search_space: from `infer_relative_search_space`; nothing is proposed where it is empty.

        Raises:
            GridExhausted: the grid has no row left.
        """
        if not search_space:
            return {}
        sampler = self._fresh(trial_seed(self._seed, self._study_name, place_of(trial)))
        point = sampler.sample_relative(study, trial, search_space)
        expected: Mapping[str, Any] | None = getattr(sampler, "expected", None)
        if expected is not None:
            storage_of(study).set_trial_user_attr(id_of(trial), PROPOSAL, expected)
        return point

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Propose one coefficient uniformly: the startup trials, and all trials of the random sampler.

        Args:
            study: the study of the trial.
            trial: the trial to be drawn; its place decides the seed.
            param_name: whose coefficient; part of the seed.
            param_distribution: the range to draw from.
        """
        seed = trial_seed(self._seed, self._study_name, place_of(trial), param_name)
        return RandomSampler(seed=seed).sample_independent(study, trial, param_name, param_distribution)


class _InTurn(JointSampler):
    """Proposes what the second of two samplers does, and what the first one does until the second one begins.

    Args:
        first: for the startup trials.
        second: proposes nothing in the startup trials.

    Attributes:
        expected: of the proposed point, as the sampler that proposed it has it; None before.
    """

    def __init__(self, first: BaseSampler, second: BaseSampler) -> None:
        self._samplers = second, first
        self.expected: Mapping[str, Any] | None = None

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        for sampler in self._samplers:
            if point := sampler.sample_relative(study, trial, search_space):
                self.expected = getattr(sampler, "expected", None)
                return point
        return {}


class _Grid(JointSampler):
    """Proposes the rows of a grid in order, each once.

    Optuna's GridSampler chooses by trial number and by a process's own random state, so a failed or enqueued trial
    costs a row and a resumed run takes another order.  Here the row follows from the places: two workers that draw at
    the same moment stand at different places, hence get different rows.
    """

    def __init__(self, rows: Sequence[dict[str, float]]) -> None:
        self._rows = rows

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        others = [
            other
            for other in study.get_trials(deepcopy=False)
            if other.number != trial.number and DISCARDED not in other.user_attrs
        ]
        given = {place_of(t): t.system_attrs[FIXED] for t in others if FIXED in t.system_attrs and not _is_retry(t)}
        left, due = list(self._rows), dict[int, dict[str, float]]()
        for place in range(place_of(trial)):
            if place not in given:
                due.update({place: left.pop(0)} if left else {})
            elif given[place] in left:
                left.remove(given[place])
        taken = [t.system_attrs.get(FIXED, t.params) for t in others if place_of(t) != place_of(trial)]
        # A trial that runs may not have stored its row yet.
        taken += [due[place_of(t)] for t in others if t.state == TrialState.RUNNING and place_of(t) in due]
        for row in itertools.chain(left, self._rows):
            if row not in taken:
                return dict(row)
        raise GridExhausted


def _is_retry(trial: FrozenTrial) -> bool:
    return RETRY_OF in trial.user_attrs


@dataclass(frozen=True)
class SamplerSettings:
    """What a row of `SAMPLERS` may use.

    Attributes:
        space: what is searched.
        startup_trials: completed trials before the model proposes.
        grid: values by name, for the grid.
        kappa: of `ucb`, weight of the deviation against the mean.
        goal: of `auto`, what task scores are worth together.
        rate: of a descent, length of a step.
        descends: whether the startup trials of `auto` are steps down the loss instead of uniform draws.
    """

    space: Space
    startup_trials: int = 10
    grid: Mapping[str, Sequence[float]] | None = None
    kappa: float = 2.576
    goal: Goal = PLAIN_MEAN
    rate: float = RATE
    descends: bool = False


def _gp(settings: SamplerSettings, seed: int) -> BaseSampler:
    return _OrderedGP(seed=seed, n_startup_trials=max(1, settings.startup_trials), warn_independent_sampling=False)


def _ucb(settings: SamplerSettings, seed: int) -> BaseSampler:
    from dfmerge_studies.acquisitions import UCBSampler  # an extra
    from dfmerge_studies.lattice import Steps

    space = settings.space
    steps = Steps(space.low, space.step, 1 + round((space.high - space.low) / space.step)) if space.step else None
    return UCBSampler(kappa=settings.kappa, startup_trials=max(1, settings.startup_trials), seed=seed, steps=steps)


def _auto(settings: SamplerSettings, seed: int) -> BaseSampler:
    region = TrustRegionSampler(
        space=settings.space, goal=settings.goal, startup_trials=settings.startup_trials, seed=seed
    )
    return _InTurn(_gradient(settings, seed), region) if settings.descends else region


def _gradient(settings: SamplerSettings, seed: int) -> BaseSampler:
    return DescentSampler(space=settings.space, rate=settings.rate)


def _random(settings: SamplerSettings, seed: int) -> BaseSampler:
    return RandomSampler(seed=seed)


def _grid(settings: SamplerSettings, seed: int) -> BaseSampler:
    return _Grid(grid_rows(settings.space, settings.grid))


# A sampler is a function from the settings and one trial's seed to a fresh Optuna sampler for that trial.
SAMPLERS: dict[str, Callable[[SamplerSettings, int], BaseSampler]] = {
    "auto": _auto,
    "gp": _gp,
    "random": _random,
    "gradient": _gradient,
    "grid": _grid,
    "ucb": _ucb,
}
_ON_A_LATTICE = ("auto", "ucb")  # one step for every dimension


def grid_rows(space: Space, grid: Mapping[str, Sequence[float]] | None) -> list[dict[str, float]]:
    """List the distinct points of a grid, the last name varying fastest.

    Args:
        space: what is searched; every row must lie in it.
        grid: values to combine, by name.

    Raises:
        InputError: there is no grid, or it does not fit the space.
    """
    if not grid or set(grid) != set(space.names) or not all(grid.values()):
        raise InputError(
            "the grid sampler needs values for every coefficient",
            where="grid",
            hint=f"Give a list of values for each of {', '.join(space.names)}",
        )
    columns = [list(dict.fromkeys(float(value) for value in grid[name])) for name in space.names]
    rows = [dict(zip(space.names, values, strict=True)) for values in itertools.product(*columns)]
    for row in rows:
        space.check(row, where="grid")
    return rows


def make_sampler(
    name: str,
    *,
    seed: int,
    study_name: str,
    space: Space,
    startup_trials: int = 10,
    grid: Mapping[str, Sequence[float]] | None = None,
    kappa: float = 2.576,
    goal: Goal = PLAIN_MEAN,
    rate: float = RATE,
    descends: bool = False,
) -> BaseSampler:
    """Build the sampler of a study, of one objective or several.

    Args:
        name: a row of `SAMPLERS`.
        seed: the study's seed.
        study_name: the study's name, so that two studies of one seed differ.
        space: what is searched.
        startup_trials: completed trials before the Gaussian process proposes (at least 1).
        grid: values by name, for the grid sampler.
        kappa: of `ucb`, weight of the deviation against the mean.
        goal: of `auto`, what task scores are worth together.
        rate: of a descent, length of a step, as a share of the range.
        descends: whether the startup trials of `auto` are steps down the loss instead of uniform draws.

    Raises:
        InputError: unknown sampler, or a grid that does not fit.
        RuntimeError: this version of Optuna lacks a name that `_OrderedGP` relies on.
    """
    if name not in SAMPLERS:
        raise InputError(
            f"there is no sampler named {name!r}", where="search.sampler", hint=f"Use one of {', '.join(SAMPLERS)}"
        )
    if name in _ON_A_LATTICE and space.step and space.own:
        raise InputError(
            f"search.step goes for coefficients only, and {name} cannot search {', '.join(space.own)} beside them",
            where="search.step",
            hint="Leave search.step out, fix the method's parameter, or use sampler: gp",
        )
    if not hasattr(GPSampler, "_sample_relative_impl"):
        raise RuntimeError(f"Optuna {optuna.__version__} renamed GPSampler._sample_relative_impl; see _OrderedGP")
    settings = SamplerSettings(space, startup_trials, grid, kappa, goal, rate, descends)
    row = SAMPLERS[name]
    row(settings, 0)  # a setting that does not fit is refused now, not at the first trial
    return StatelessSampler(lambda trial: row(settings, trial), space=space, seed=seed, study_name=study_name)
