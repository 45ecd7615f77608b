"""What a spec means for its study, worked out once and handed down: method, space, first points, total, storage."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import optuna
from optuna.samplers import BaseSampler

from dfmerge_studies.methods import Coefficients, Method, fixed_coefficients
from dfmerge_studies.search import make_sampler
from dfmerge_studies.spec import StudySpec
from dfmerge_studies.storage import load_study, load_study_if_any, open_storage, resolve_url, safe_url, storage_errors
from dfmerge_studies.study import provenance
from dfmerge_studies.trials.space import Space
from dfmerge_studies.trust_region import Goal

_MEANS = ("mean", "weighted", "agreement")  # objectives that are a mean of task scores


@dataclass(frozen=True)
class Plan:
    """A spec's study, before anything is loaded.

    Attributes:
        spec: the settings.
        method: row of the method table, with the spec's values of its parameters.
        space: what its trials differ in.
        points: those that it tries first: 1/M, then what the spec asks for; none on a grid.
        trials: total that it should reach: the spec's, or as many points as a method without a search has.
        url: of its storage, absolute; it may hold a password: never print it, print `place`.
    """

    spec: StudySpec
    method: Method
    space: Space
    points: tuple[Mapping[str, float], ...]
    trials: int
    url: str

    @classmethod
    def of(cls, spec: StudySpec) -> Plan:
        """The plan of a spec.

        Args:
            spec: the settings.

        Raises:
            InputError: the space cannot be searched.
        """
        method, search, experts = spec.row, spec.search, list(spec.experts)
        totals = {
            Coefficients.FIXED: 1,
            Coefficients.SHARED_GRID: math.prod(len(values) for values in method.grid.values()),
            Coefficients.PER_EXPERT: search.trials,
        }
        return cls(
            spec=spec,
            method=method,
            space=method.space(experts, search.bounds, search.step),
            points=tuple(_first_points(spec, method)),
            trials=totals[method.coefficients],
            url=storage_url(spec),
        )

    @property
    def place(self) -> str:
        """The storage as it may be printed."""
        return safe_url(self.url)

    def total(self, stored: int = 0, wanted: int | None = None) -> int:
        """Trials that a run works towards; a method without a search has its own number, whatever is wanted.

        Args:
            stored: a total that an earlier run raised the study to.
            wanted: an explicit total.
        """
        if not self.method.searches:
            return self.trials
        return wanted if wanted is not None else max(self.trials, stored)

    def sampler(self) -> BaseSampler:
        """The sampler that proposes the study's trials."""
        search = self.spec.search
        name: str = "ucb" if search.acquisition == "ucb" else search.sampler
        if not self.method.searches:
            name = "grid" if self.method.grid else "random"
        return make_sampler(
            name,
            seed=search.seed,
            study_name=self.spec.name,
            space=self.space,
            startup_trials=search.startup_trials,
            grid=self.method.grid or None,
            kappa=search.kappa,
            goal=_goal(self.spec),
        )

    def study(self) -> optuna.Study:
        """The study as it is in its storage, without loading any model.

        Raises:
            InputError: there is none.
        """
        with storage_errors(self.url):
            return load_study(open_storage(self.url, create=False), self.spec.name)

    def study_if_any(self) -> optuna.Study | None:
        """The same, or None where there is none yet; nothing is created."""
        with storage_errors(self.url):
            study = load_study_if_any(self.url, self.spec.name)
            return None if study is None or provenance.is_unfinished(study) else study


def storage_url(spec: StudySpec) -> str:
    """The spec's storage, its relative path made absolute.

    Args:
        spec: the settings.
    """
    return resolve_url(spec.storage_url, spec.workdir)


def _goal(spec: StudySpec) -> Goal:
    """What task scores are worth together."""
    kind = spec.objective.kind
    metrics = spec.metrics("validation")
    points = {task: math.copysign(metric.span / 100.0, metric.worth(1.0)) for task, metric in metrics.items()}
    return Goal("mean" if kind in _MEANS else kind, spec.objective.weights, points)


def _first_points(spec: StudySpec, method: Method) -> list[Mapping[str, float]]:
    experts = list(spec.experts)
    if method.coefficients is Coefficients.SHARED_GRID:
        return []
    first = fixed_coefficients(experts)
    if method.coefficients is Coefficients.FIXED:
        return [first]
    asked = [dict.fromkeys(experts, p) if isinstance(p, float) else p for p in spec.search.enqueue]
    own = {each.name: each.default for each in method.searched if each.default is not None}
    return [{**own, **point} for point in ({name: _inside(spec, value) for name, value in first.items()}, *asked)]


def _inside(spec: StudySpec, value: float) -> float:
    """A coefficient moved into the bounds and onto the step, where the spec sets them so."""
    (low, high), step = spec.search.bounds, spec.search.step
    moved = min(max(value, low), high)
    return moved if step is None else min(low + round((moved - low) / step) * step, high)
