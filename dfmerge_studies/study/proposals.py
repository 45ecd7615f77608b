"""What a method and the settings of a search make of a study: its total, its first points, its sampler."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from optuna.samplers import BaseSampler

from dfmerge_studies.methods import Coefficients, Method, fixed_coefficients
from dfmerge_studies.search import make_sampler
from dfmerge_studies.spec import (
    DEFAULT_SAMPLER,
    DEFAULT_STARTUP,
    DESCENT,
    UNIFORM,
    ObjectiveSettings,
    SearchSettings,
    StudySpec,
    has_slopes,
)
from dfmerge_studies.study.totals import stored_total
from dfmerge_studies.tasks.metrics import Metrics
from dfmerge_studies.tied import TiedSampler
from dfmerge_studies.trials.space import Space
from dfmerge_studies.trust_region import Goal

_MEANS = ("mean", "weighted", "agreement")  # objectives that are a mean of task scores


def total_trials(method: Method, search: SearchSettings) -> int:
    """Trials that a study should reach: what is asked for, or as many as a method without a search has points."""
    totals = {
        Coefficients.FIXED: 1,
        Coefficients.FISHER_TRACE: 1,
        Coefficients.SHARED_GRID: math.prod(len(values) for values in method.grid.values()),
        Coefficients.PER_EXPERT: search.trials,
    }
    return totals[method.coefficients]


def new_startup(spec: StudySpec) -> str | None:
    """What the startup trials of a new study are, as far as its spec alone says it, in the words of `search.startup`.

    Args:
        spec: the settings.

    Returns:
        None where another sampler than `auto` proposes, or none.
    """
    search = spec.search
    if (search.stated_sampler or DEFAULT_SAMPLER) != "auto" or not spec.row.searches:
        return None
    if search.startup is not None:
        return search.startup
    return DEFAULT_STARTUP if has_slopes(spec) else UNIFORM


def first_points(method: Method, experts: Sequence[str], search: SearchSettings) -> list[Mapping[str, float]]:
    """What a study tries first: 1/M, then what is asked for; none on a grid, nor what the models must be asked for."""
    if method.coefficients is Coefficients.SHARED_GRID:
        return []
    first = fixed_coefficients(experts)
    if not method.coefficients.chosen:
        return [first]
    asked = [dict.fromkeys(experts, p) if isinstance(p, float) else p for p in search.enqueue if not isinstance(p, str)]
    own = {each.name: each.default for each in method.searched if each.default is not None}
    space = method.space(experts, search.bounds, search.step)
    return [{**own, **point} for point in ({name: inside(space, name, value) for name, value in first.items()}, *asked)]


def inside(space: Space, name: str, value: float) -> float:
    """A value moved into the range of its name, and onto the step where it has one.

    Args:
        space: what is searched.
        name: one of its names.
        value: from anywhere.
    """
    (low, high), step = space.range_of(name), None if name in space.own else space.step
    moved = min(max(value, low), high)
    return moved if step is None else min(low + round((moved - low) / step) * step, high)


def study_sampler(
    name: str,
    method: Method,
    space: Space,
    search: SearchSettings,
    goal: Goal,
    sampler: str,
    startup: str | None = None,
) -> BaseSampler:
    """The sampler that proposes a study's trials.

    Args:
        name: of the study.
        method: row of the method table.
        space: what is searched.
        search: the settings.
        goal: what task scores are worth together.
        sampler: what the study has, in the words of `search.sampler`.
        startup: of `auto`, what the study has, in the words of `search.startup`.
    """
    if search.acquisition == "ucb":
        sampler = "ucb"
    if not method.searches:
        sampler = "grid" if method.grid else "random"

    def of(searched: Space) -> BaseSampler:
        return make_sampler(
            sampler,
            seed=search.seed,
            study_name=name,
            space=searched,
            startup_trials=search.startup_trials,
            grid=method.grid or None,
            kappa=search.kappa,
            goal=goal,
            rate=search.rate,
            descends=startup == DESCENT,
        )

    if not space.tied or sampler == "gradient":  # a slope costs the same for one coefficient or many
        return of(space)
    return TiedSampler(of(space.coarse), of(space), space=space, total=stored_total)


def goal_of(objective: ObjectiveSettings, metrics: Metrics, allowed: Mapping[str, float]) -> Goal:
    """What task scores are worth together.

    Args:
        objective: how they become one value.
        metrics: what they are; empty where all are numbers with a range of 1, of which higher is better.
        allowed: points that tasks may lose.
    """
    kind = objective.kind
    points = {task: math.copysign(metric.span / 100.0, metric.worth(1.0)) for task, metric in metrics.items()}
    return Goal("mean" if kind in _MEANS else kind, objective.weights, points, allowed, frozenset(metrics.guards))
