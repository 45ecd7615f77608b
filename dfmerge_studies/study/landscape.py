"""The landscape of two experts: mean score over their coefficients, laid out in a plane (paper, Figure 6, footnote 4).

    tau[0], tau[1]   task vectors of the two experts, over all parameters that either changed
    u, v             orthonormal axes: u = tau[0] / |tau[0]|,  v = (tau[1] - (tau[1].u) u) / |...|
    (x, y)           place of a model theta: ((theta - theta_pre).u, (theta - theta_pre).v)

Merges of `gta` lie in the plane.  Those of `df-merge` do not: they are projected onto it, which is what (x, y) gives.
The two experts are merged with each other alone (M = 2), whatever others the study has.  Sums are taken in float64.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfmerge_studies import limits
from dfmerge_studies.checkpoints.resident import Resident
from dfmerge_studies.errors import InputError, did_you_mean
from dfmerge_studies.importance.cache import LocalCache
from dfmerge_studies.methods import Coefficients, Importance, Method
from dfmerge_studies.objective.merger import Merger
from dfmerge_studies.objective.problem import Problem
from dfmerge_studies.progress import Progress, silent
from dfmerge_studies.study.probed import BestPlace, ScoredPlace, ScoredPlane
from dfmerge_studies.study.session import Session

GRID = 9
_PARALLEL = 1e-6  # relative length of tau[1] off u below which there is no plane


@dataclass(frozen=True)
class Plane:
    """The plane through the base and two experts.

    Attributes:
        u: first axis, by parameter name.
        v: second axis.
        base: theta_pre, by parameter name.
        corners: places of the two experts.
    """

    u: Mapping[str, Tensor]
    v: Mapping[str, Tensor]
    base: Mapping[str, Tensor]
    corners: tuple[tuple[float, float], tuple[float, float]]

    def place(self, parameters: Mapping[str, Tensor]) -> tuple[float, float]:
        """Where a model is, projected onto the plane.

        Args:
            parameters: at least those that the axes name.
        """
        x = y = 0.0
        for name, axis in self.u.items():
            step = (parameters[name].detach() - self.base[name]).double()
            x += float((step * axis).sum())
            y += float((step * self.v[name]).sum())
        return x, y


def plane_of(resident: Resident) -> Plane:
    """The plane of the first two experts of a resident model.

    Args:
        resident: the base and at least two task vectors.

    Raises:
        InputError: their task vectors are parallel.
    """
    first, second = (
        {
            name: vector.deltas[name].double() if name in vector.deltas else torch.zeros_like(base).double()
            for name, base in resident.base.items()
        }
        for vector in resident.task_vectors[:2]
    )
    length = _dot(first, first) ** 0.5
    if length == 0:
        raise InputError("the first expert is the base", where="--pair", hint="Choose other experts")
    u = {name: value / length for name, value in first.items()}
    along = _dot(second, u)
    off = {name: value - along * u[name] for name, value in second.items()}
    height = _dot(off, off) ** 0.5
    if height <= _PARALLEL * max(length, abs(along)):
        raise InputError("the two task vectors are parallel: there is no plane", where="--pair", hint="Choose others")
    v = {name: value / height for name, value in off.items()}
    return Plane(u, v, resident.base, ((length, 0.0), (along, height)))


def _dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return sum(float((value * b[name]).sum()) for name, value in a.items())


def chosen_pair(experts: Sequence[str], pair: Sequence[str] | None) -> tuple[str, str]:
    """The two experts of a landscape.

    Args:
        experts: all there are, in their order.
        pair: two of them; the first two by default.

    Raises:
        InputError: there are not two, or one is not known.
    """
    if len(experts) < 2:
        raise InputError("a landscape needs two experts", where="--pair")
    names = list(pair) if pair is not None else list(experts)[:2]
    for name in names:
        if name not in experts:
            raise InputError(
                f"there is no expert {name!r}",
                where="--pair",
                hint=did_you_mean(name, experts) or f"Experts: {', '.join(experts)}",
            )
    if len(names) != 2 or names[0] == names[1]:
        raise InputError("a landscape is that of two experts", where="--pair", hint="Give two, such as a,b")
    return names[0], names[1]


def landscape_methods(method: Method) -> list[str]:
    """GTA, and the study's own method where it weighs coefficients of its own by importance, else DF-Merge."""
    searched = method.coefficients is Coefficients.PER_EXPERT and method.importance is not Importance.UNIFORM
    return ["gta", method.name if searched else "df-merge"]


def landscape(
    session: Session, grid: int = GRID, *, pair: Sequence[str] | None = None, progress: Progress = silent
) -> ScoredPlane:
    """Score two experts' merges over a grid of their coefficients, with GTA and with the study's method or DF-Merge.

    Args:
        session: an open study.
        grid: coefficients per expert, from 0 to 1.
        pair: two experts; the first two by default.
        progress: told of every merge.

    Raises:
        InputError: the pair or the grid cannot be used.
    """
    if not 2 <= grid <= limits.GRID:
        raise InputError(f"a grid of {grid} cannot be drawn", where="--grid", hint=f"Give 2 to {limits.GRID}")
    names = chosen_pair(session.problem.experts, pair)
    problem = _of_two(session.problem, names)
    plane = plane_of(problem.resident)
    places = session.problem.experts.index(names[0]), session.problem.experts.index(names[1])
    found = ScoredPlane(names, _tasks(problem), [i / (grid - 1) for i in range(grid)], plane.corners, {})
    former = ScoredPlane.of(session.study, *places)
    if former is not None and all(
        getattr(former, field) == getattr(found, field) for field in ("experts", "tasks", "lambdas")
    ):
        found = former
    with ExitStack() as stack:
        cache = session.merger.importances.shelf.cache
        if cache is None:  # every Fisher serves a whole row of the grid
            cache = LocalCache(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dfmerge-"))))
        for method in landscape_methods(session.method):
            cells = dict(found.methods.get(method, {}))
            merger = Merger(problem, problem.spec.row_of(method), cache)
            merger.ask_experts_("validation")
            for i, first in enumerate(found.lambdas):
                missing = {j: second for j, second in enumerate(found.lambdas) if (i, j) not in cells}
                for j, second in missing.items():
                    progress(f"landscape of {method}", len(cells), grid * grid)
                    cells[i, j] = _scored(merger, plane, {names[0]: first, names[1]: second}, found.tasks)
                if missing:
                    found = replace(found, methods={**found.methods, method: dict(cells)})
                    found.keep(session.study, *places)
        best = session.best()
        if best is not None and len(session.problem.experts) == 2:
            session.merge_(best)
            place = plane.place(dict(problem.resident.model.named_parameters()))
            found = replace(found, best=BestPlace(session.method.name, best.number, place))
            found.keep(session.study, *places)
    return found


def _scored(merger: Merger, plane: Plane, coefficients: Mapping[str, float], tasks: Sequence[str]) -> ScoredPlace:
    merger.merge_(coefficients)
    x, y = plane.place(dict(merger.problem.resident.model.named_parameters()))
    metrics = merger.problem.spec.metrics("validation").only(tasks)
    return ScoredPlace(x, y, metrics.mean_of({task: merger.result(task, "validation").score for task in tasks}))


def _of_two(problem: Problem, names: Sequence[str]) -> Problem:
    """The same loaded models with two experts only; parameters that neither changed stay the base's."""
    resident = problem.resident
    vectors = [resident.task_vectors[problem.experts.index(name)] for name in names]
    experts = {name: problem.spec.experts[name].model_dump() for name in names}
    return replace(
        problem,
        spec=problem.spec.derive(experts=experts, search=_plain_search(problem)),
        resident=replace(resident, task_vectors=vectors),
    )


def _plain_search(problem: Problem) -> dict[str, Any]:
    """The search settings without given points, which name experts that are left out."""
    return {**problem.spec.search.model_dump(), "enqueue": []}


def _tasks(problem: Problem) -> list[str]:
    """The two experts' own tasks, or all where one has none of its own."""
    own = [expert.task for expert in problem.spec.experts.values()]
    return problem.spec.aims if None in own else list(dict.fromkeys(task for task in own if task is not None))
