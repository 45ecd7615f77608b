"""What a study searches, and how: its space, its total, its sampler, and the points that it tries first."""

from __future__ import annotations

import math
from collections.abc import Mapping

from optuna.samplers import BaseSampler

from dfmerge_studies.methods import Coefficients, fixed_coefficients
from dfmerge_studies.search import make_sampler
from dfmerge_studies.spec import StudySpec
from dfmerge_studies.trials.space import Space
from dfmerge_studies.trust_region import Goal

_MEANS = ("mean", "weighted", "agreement")  # objectives that are a mean of task scores


def search_space(spec: StudySpec) -> Space:
    """Which coefficients the study's trials have.

    Args:
        spec: the settings.
    """
    return spec.row.space(list(spec.experts), spec.search.bounds, spec.search.step)


def target_trials(spec: StudySpec, stored: int = 0) -> int:
    """Total that the study should reach: the spec's, or as many points as a method without a search has.

    Args:
        spec: the settings.
        stored: a total that an earlier `--add` raised the study to.
    """
    method = spec.row
    if method.coefficients is Coefficients.FIXED:
        return 1
    if method.coefficients is Coefficients.SHARED_GRID:
        return math.prod(len(values) for values in method.grid.values())
    return max(spec.search.trials, stored)


def study_sampler(spec: StudySpec) -> BaseSampler:
    """The sampler that proposes the study's trials.

    Args:
        spec: the settings.
    """
    search, method = spec.search, spec.row
    name: str = "ucb" if search.acquisition == "ucb" else search.sampler
    if method.coefficients is not Coefficients.PER_EXPERT:
        name = "grid" if method.coefficients is Coefficients.SHARED_GRID else "random"
    return make_sampler(
        name,
        seed=search.seed,
        study_name=spec.name,
        space=search_space(spec),
        startup_trials=search.startup_trials,
        grid=method.grid or None,
        kappa=search.kappa,
        goal=_goal(spec),
    )


def _goal(spec: StudySpec) -> Goal:
    """What task scores are worth together."""
    kind = spec.objective.kind
    metrics = spec.metrics("validation")
    points = {task: math.copysign(metric.span / 100.0, metric.worth(1.0)) for task, metric in metrics.items()}
    return Goal("mean" if kind in _MEANS else kind, spec.objective.weights, points)


def known_points(spec: StudySpec) -> list[Mapping[str, float]]:
    """What a study tries first: 1/M, then the points that the spec asks for; nothing for a grid.

    Args:
        spec: the settings.
    """
    method, experts = spec.row, list(spec.experts)
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
