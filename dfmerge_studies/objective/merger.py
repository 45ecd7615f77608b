"""Coefficients -> importance -> merged weights in the resident model -> scores."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from dfmerge_studies.errors import InputError, RunError, memory_errors
from dfmerge_studies.importance.cache import FisherCache, Shelf
from dfmerge_studies.merging import Weights, merge_into_, merge_parts_into_
from dfmerge_studies.methods import (
    STRENGTH,
    Coefficients,
    Method,
    fixed_coefficients,
)
from dfmerge_studies.objective.everywhere import everywhere
from dfmerge_studies.objective.given import Given, point_of
from dfmerge_studies.objective.groups import Groups
from dfmerge_studies.objective.importances import Importances, Uses, asked_once
from dfmerge_studies.objective.layer_trace import layer_coefficients_
from dfmerge_studies.objective.problem import Problem
from dfmerge_studies.objective.protection import Directions, damp_, directions_
from dfmerge_studies.objective.raced import Raced, race
from dfmerge_studies.objective.scorer import Scorer
from dfmerge_studies.objective.slopes import Sample, Slope, loss_gradient, slopes_along
from dfmerge_studies.objective.weighing import Weighing
from dfmerge_studies.params import float_parameters
from dfmerge_studies.points import Coefficient, Point
from dfmerge_studies.progress import Progress, silent
from dfmerge_studies.racing import Rival
from dfmerge_studies.tasks.sampling import torch_generator
from dfmerge_studies.transforms import TRANSFORMS, Prepared, start_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What one merge gave.

    Attributes:
        tasks: score per task.
        rows: score per validation input, by task, where the task's score is their mean.
        seconds: wall-clock time per phase: fisher, merge, evaluate.
        computed: Fishers that were computed.
        cached: Fishers that came from the cache.
        raced: how it went against the incumbent, None without one; of a merge that was stopped there is no score.
        slope: of the loss along the coefficients, where it was asked for.
    """

    tasks: dict[str, float] = field(default_factory=dict)
    rows: dict[str, list[float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    computed: int = 0
    cached: int = 0
    raced: Raced | None = None
    slope: Slope | None = None


class Merger(Scorer):
    """Merges and scores inside the problem's resident model.

    Args:
        problem: the loaded spec.
        method: row of the method table.
        cache: where Fishers are kept, or None; a cache by itself keeps all that is computed.
        uses: how often a trial's Fisher will be asked for again, from the position of the expert and its coefficient.
        progress: told how far a merge or an evaluation is.

    Raises:
        InputError: the method's importance cannot be estimated for this kind of model.
    """

    def __init__(
        self,
        problem: Problem,
        method: Method,
        cache: Shelf | FisherCache | None,
        *,
        uses: Uses = asked_once,
        progress: Progress = silent,
    ) -> None:
        super().__init__(problem, method, progress)
        self.importances = Importances(problem, method, cache, uses)
        self._weighed: list[Weights | None] = []  # the experts' importances of a merge whose slope is asked for

    @everywhere
    def run(
        self, point: Point | Mapping[str, float], rival: Rival | None = None, sample: Sample | None = None
    ) -> Outcome:
        """Merge at a point and score every task's validation inputs.

        Args:
            point: coefficients and parameters of the method; or the coefficients alone, by expert.
            rival: the incumbent, if scoring stops as soon as the merge cannot win against it.
            sample: rows that the slope of the loss along the coefficients is taken of, if it is asked for.

        Raises:
            RunError: something is not finite, or memory ran out.
        """
        self.ask_experts_("validation")
        point = self._whole(point)
        merged = self.merge_(point, keep=sample is not None)
        start = time.perf_counter()
        slope = self._slope_if_any(point, sample) if sample is not None else None
        spent = {"gradient": time.perf_counter() - start} if sample is not None else {}
        start = time.perf_counter()
        raced = None if rival is None else race(self, rival)
        found = self.results("validation") if raced is None else raced.results
        tasks = {task: result.score for task, result in found.items()}
        rows = {task: list(result.rows) for task, result in found.items() if result.rows is not None}
        seconds = {**merged.seconds, **spent, "evaluate": time.perf_counter() - start}
        return replace(merged, tasks=tasks, rows=rows, seconds=seconds, raced=raced, slope=slope)

    @everywhere
    @memory_errors()
    def merge_(self, point: Point | Mapping[str, float], *, keep: bool = False) -> Outcome:
        """Write the merged weights into the resident model, without scoring them.

        Args:
            point: coefficients and parameters of the method; or the coefficients alone, by expert.
            keep: the importances, for a slope.

        Raises:
            RunError: an importance or a weight is not finite.
        """
        point = self._whole(point)
        resident, spec, at = self.problem.resident, self.problem.spec, self._coefficients(point)
        start = time.perf_counter()
        directions, vectors = self._protected, self._transformed(point.parameters)
        preparing = time.perf_counter() - start
        base, floor, parts = start_of(vectors, resident.base), spec.importance.floor, self.problem.parts()
        alpha = point.parameters.get("alpha", 1.0)
        weigh = Weighing(self.importances, self.method, at, list(base), alpha=alpha, keep=keep, progress=self.progress)
        if len(parts) == 1:
            seconds = merge_into_(resident.model, base, vectors, at, weigh, floor=floor)
        else:
            seconds = merge_parts_into_(resident.model, base, vectors, at, weigh, parts, floor=floor)
        if directions:
            parameters = dict(resident.model.named_parameters())
            damp_(parameters, resident.base, directions, point.parameters[STRENGTH.name])
        seconds["merge"] += preparing
        self._weighed = list(weigh.kept.values())
        hits = list(weigh.hits.values())
        return Outcome(seconds=seconds, computed=hits.count(False), cached=hits.count(True))

    def _slope_if_any(self, point: Point, sample: Sample) -> Slope | None:
        try:
            return self._slope(point, sample)
        except RunError as error:
            if not sample.optional:
                raise
            logger.warning("a trial without a slope of the loss: %s", error)
            return None

    @memory_errors()
    def _slope(self, point: Point, sample: Sample) -> Slope:
        """Slope of the loss at the merge that has just been made, whose importances were kept."""
        weighed, self._weighed = self._weighed, []
        loss, gradient = loss_gradient(self.problem, sample, self.progress)
        groups = self._groups if point.groups else {}
        vectors, floor = self._transformed(point.parameters), self.problem.spec.importance.floor
        return Slope(loss, slopes_along(gradient, vectors, weighed, groups, floor=floor))

    def _whole(self, point: Point | Mapping[str, float]) -> Point:
        """A point with the method's parameters; of coefficients alone, with their defaults."""
        return point if isinstance(point, Point) else Point(point, self.method.complete({}))

    def _coefficients(self, point: Point) -> dict[str, Coefficient]:
        return point.spread(self._groups if point.groups else {})

    @property
    def _groups(self) -> Groups:
        """Names of the parameters that share a coefficient where an expert has several."""
        by_layer = self.method.coefficients is Coefficients.FISHER_TRACE
        return self.problem.layers if by_layer else self.problem.groups

    def point(self, given: Given | None, parameters: Mapping[str, float], where: str) -> Point:
        """What somebody asks for, or what the method itself chooses.

        Args:
            given: coefficients, see `given.point_of`; None for a method that has its own.
            parameters: of the method.
            where: what to name as the place at fault.

        Raises:
            InputError: a coefficient is missing, unknown or outside the bounds, or the method has its own.
        """
        if self.method.coefficients is Coefficients.FISHER_TRACE:
            if given:
                raise InputError(f"the method {self.method.name!r} has its own", where=where, hint="Leave them out")
            return replace(self.traced_point(), parameters=parameters)
        if given is None and self.method.coefficients is Coefficients.FIXED:
            given = fixed_coefficients(self.problem.experts)
        return point_of(self.problem, self.method, given or {}, parameters, where)

    @everywhere
    @memory_errors()
    def traced_point(self) -> Point:
        """Coefficients by expert and layer, or by the groups of a search, from random tokens; see `layer_trace`.

        Raises:
            RunError: a loss is not finite, or memory ran out.
        """
        found = layer_coefficients_(self.problem, self._groups, self.progress)
        return Point.grouped(found, self.method.complete({}))

    @everywhere
    @memory_errors()
    def importance(
        self, index: int, coefficient: Coefficient, *, names: Sequence[str] | None = None
    ) -> tuple[Mapping[str, Tensor], bool]:
        """`Importances.at` on every rank.

        Args:
            index: position of the expert.
            coefficient: lambda.
            names: parameters; those on which an expert differs by default.

        Returns:
            The values by parameter name, and whether they came from the cache.
        """
        return self.importances.at(index, coefficient, names, progress=self.progress)

    def all_names(self) -> list[str]:
        """Every shared parameter of the base, changed by an expert or not."""
        heads = {name for head in self.problem.resident.heads.values() for name in head}
        return [name for name in float_parameters(self.problem.resident.model) if name not in heads]

    @cached_property
    def _protected(self) -> dict[str, Directions]:
        """Directions along which merges are damped; overwrites the model the first time."""
        return directions_(self.problem, self.progress) if self.problem.spec.protect is not None else {}

    @cached_property
    def _transformed(self) -> Prepared:
        """Phi, with what is the same in every trial computed once."""
        generator = functools.partial(torch_generator, self.problem.spec.search.seed)
        return TRANSFORMS[self.method.transform].prepare(self.problem.resident.task_vectors, generator)
