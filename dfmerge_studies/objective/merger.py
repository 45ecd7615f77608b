"""Coefficients -> importance -> merged weights in the resident model -> scores."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch import Tensor

from dfmerge_studies.errors import InputError, out_of_memory
from dfmerge_studies.importance.cache import FisherCache, Shelf
from dfmerge_studies.importance.factors import blocks_of
from dfmerge_studies.importance.scale import scaled
from dfmerge_studies.merging import Weights, merge_into_, merge_parts_into_
from dfmerge_studies.methods import (
    STRENGTH,
    Coefficients,
    Importance,
    Method,
    fixed_coefficients,
    importance_coefficient,
)
from dfmerge_studies.objective.classes import named_classes
from dfmerge_studies.objective.computing import computing
from dfmerge_studies.objective.derive import derive_problem
from dfmerge_studies.objective.given import Given, point_of
from dfmerge_studies.objective.groups import Groups
from dfmerge_studies.objective.importances import Importances, Uses, asked_once
from dfmerge_studies.objective.in_parts import InParts, gathered_on_host
from dfmerge_studies.objective.layer_trace import layer_coefficients_
from dfmerge_studies.objective.problem import Problem
from dfmerge_studies.objective.protection import Directions, damp_, directions_
from dfmerge_studies.objective.raced import Raced, race
from dfmerge_studies.objective.slopes import Sample, Slope, loss_gradient, slopes_along
from dfmerge_studies.params import float_parameters
from dfmerge_studies.points import Coefficient, Point
from dfmerge_studies.progress import Progress, counted, silent
from dfmerge_studies.racing import Rival
from dfmerge_studies.spec import StudySpec
from dfmerge_studies.tasks.answers import given_answers, judged, taken_answers, wanted_answers
from dfmerge_studies.tasks.metrics import TaskScore
from dfmerge_studies.tasks.sampling import torch_generator
from dfmerge_studies.tasks.splits import Split
from dfmerge_studies.transforms import TRANSFORMS, Prepared, start_of

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn running out of memory, on any device, into a `RunError` that fails the trial and not the study."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's own out-of-memory errors are RuntimeErrors
        lacking = out_of_memory(error)
        if lacking is None:
            raise
        raise lacking from error


def _some(values: Sequence[T], rows: Sequence[int] | None) -> Sequence[T]:
    return values if rows is None else [values[row] for row in rows]


@dataclass(frozen=True)
class _Call:
    """A call of a merger's method on the other ranks, with what tells its problem from the one that was loaded."""

    spec: StudySpec
    indices: dict[str, list[int]]
    method: Method
    name: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def __call__(self, memory: dict[str, Any]) -> None:
        if memory.get("merger", (None, None))[0] != (self.spec, self.indices, self.method):
            problem = derive_problem(memory["problem"], self.spec, indices=self.indices)
            merger = Merger(problem, self.method, None)
            memory["merger"] = (self.spec, self.indices, self.method), merger  # one: each may hold task vectors
        getattr(memory["merger"][1], self.name)(*self.arguments, **self.keywords)


def _everywhere(function: Callable[Concatenate[Merger, P], R]) -> Callable[Concatenate[Merger, P], R]:
    """What is called on the leader is called on every rank, so that all have the same weights in their model."""

    @functools.wraps(function)
    def call(self: Merger, /, *arguments: P.args, **keywords: P.kwargs) -> R:
        problem = self.problem
        if problem.ranks.size == 1:
            return function(self, *arguments, **keywords)
        command = _Call(problem.spec, problem.fisher_indices(), self.method, function.__name__, arguments, keywords)
        return problem.ranks.everywhere(command, lambda: function(self, *arguments, **keywords))

    return call


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


class Merger:
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
        self.problem = problem
        self.method = method
        self.progress = progress
        self.importances = Importances(problem, method, cache, uses)
        self._weighed: list[Weights | None] = []  # the experts' importances of a merge whose slope is asked for

    @_everywhere
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
        slope = self._slope(point, sample) if sample is not None else None
        spent = {"gradient": time.perf_counter() - start} if sample is not None else {}
        start = time.perf_counter()
        raced = None if rival is None else race(self, rival)
        found = self.results("validation") if raced is None else raced.results
        tasks = {task: result.score for task, result in found.items()}
        rows = {task: list(result.rows) for task, result in found.items() if result.rows is not None}
        seconds = {**merged.seconds, **spent, "evaluate": time.perf_counter() - start}
        return replace(merged, tasks=tasks, rows=rows, seconds=seconds, raced=raced, slope=slope)

    @_everywhere
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
        uniform, hits = self.method.importance is Importance.UNIFORM, list[bool]()
        self._weighed = [None] * len(self.problem.experts) if keep and uniform else []

        scale, gather = (
            self.method.scale_for(spec.importance.scale),
            keep or gathered_on_host(self.problem, self.method),
        )
        wholes: dict[int, Weights] = {}  # of a merge in parts, where one part needs all

        def weights(index: int, names: Sequence[str] | None = None) -> Weights | None:
            """The importance of an expert, or a part of it."""
            if uniform:
                return None
            if index in wholes:
                return wholes[index]
            coefficient = importance_coefficient(self.method, at[self.problem.experts[index]])
            if names is None:
                values, hit = self.importance(index, coefficient)
            elif gather:
                values, hit = gathered.whole(index, coefficient)
            else:
                values, hit = gathered.at(index, coefficient, names)
            if names is None or names is parts[0]:
                hits.append(hit)
            if self.method.importance.blocks is not None:
                shrink = point.parameters.get("alpha", 1.0)
                return blocks_of(resident.model, values, list(resident.base), shrink=shrink)
            found = scaled(values, scale)
            if keep:
                self._weighed.append(found)
            if names is not None and gather:
                wholes[index] = found
            return found

        start = time.perf_counter()
        directions, vectors = self._protected, self._transformed(point.parameters)
        preparing = time.perf_counter() - start
        base, floor, parts = start_of(vectors, resident.base), spec.importance.floor, self.problem.parts()
        if len(parts) == 1:
            seconds = merge_into_(resident.model, base, vectors, at, weights, floor=floor)
        else:
            gathered = InParts(self.importances, list(base), self.progress)
            seconds = merge_parts_into_(resident.model, base, vectors, at, weights, parts, floor=floor)
        if directions:
            parameters = dict(resident.model.named_parameters())
            damp_(parameters, resident.base, directions, point.parameters[STRENGTH.name])
        seconds["merge"] += preparing
        return Outcome(seconds=seconds, computed=hits.count(False), cached=hits.count(True))

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

    @_everywhere
    @memory_errors()
    def traced_point(self) -> Point:
        """Coefficients by expert and layer, or by the groups of a search, from random tokens; see `layer_trace`.

        Raises:
            RunError: a loss is not finite, or memory ran out.
        """
        found = layer_coefficients_(self.problem, self._groups, self.progress)
        return Point.grouped(found, self.method.complete({}))

    @_everywhere
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

    @_everywhere
    def hold_out_(self, share: float) -> None:
        """`Problem.hold_out_` on every rank."""
        self.problem.hold_out_(share)

    @_everywhere
    def scores(self, split: Split) -> dict[str, float]:
        """Score of the model as it stands on every task; of the held-out rows, on those that have some.

        Args:
            split: of the tasks' data.

        Raises:
            RunError: a loss is not finite.
        """
        return {task: result.score for task, result in self.results(split).items()}

    @_everywhere
    def results(self, split: Split, tasks: Sequence[str] | None = None) -> dict[str, TaskScore]:
        """The same with the rows that the scores rest on.

        Args:
            split: of the tasks' data.
            tasks: those to score; all by default.

        Raises:
            RunError: a loss is not finite.
        """
        wanted = [task for task in self.problem.tasks_of(split) if tasks is None or task in tasks]
        return {task: self.result(task, split) for task in wanted}

    @_everywhere
    def result(self, task: str, split: Split) -> TaskScore:
        """Score of the model as it stands on one task, by the metric of task and split.

        Args:
            task: name of the task.
            split: of the tasks' data.
        """
        return self.judged(task, split, self.given(task, split))

    def judged(self, task: str, split: Split, given: Sequence[Any], rows: Sequence[int] | None = None) -> TaskScore:
        """Score of answers to one task, by the metric of task and split.

        Args:
            task: name of the task.
            split: of the tasks' data.
            given: the answers, as `given` has them.
            rows: positions of the inputs that they answer; all by default.
        """
        spec, settings = self.problem.spec, self.problem.spec.tasks[task]
        metric = spec.metrics(split)[task]
        if metric.labels:
            wanted = wanted_answers(settings, _some(self.problem.examples(task, split), rows))
            answers = judged(settings, given, wanted, *named_classes(spec, task, self.problem.classes))
        else:
            answers = judged(settings, given, _some(self.problem.expert_answers[task, split], rows))
        return metric.result(answers)

    @_everywhere
    def ask_experts_(self, split: Split) -> None:
        """Let each task's expert answer, where scores are agreement with it; overwrites the model the first time.

        Args:
            split: of the tasks' data.
        """
        known = self.problem.expert_answers
        for index, expert in enumerate(self.problem.spec.experts.values()):
            if expert.task not in self.problem.tasks_of(split) or self.problem.spec.metrics(split)[expert.task].labels:
                continue
            key = (expert.task, split)
            if not all(self.problem.ranks.agreed(functools.partial(known.__contains__, key))):
                self.problem.resident.load_scaled_(index, 1.0)
                known[key] = taken_answers(self.problem.spec.tasks[expert.task], self.given(*key))

    @_everywhere
    @memory_errors()
    def given(self, task: str, split: Split, rows: Sequence[int] | None = None) -> Sequence[Any]:
        """What the model as it stands gives for every input of one task, as in `tasks.answers`.

        Args:
            task: name of the task.
            split: of the tasks' data.
            rows: positions of the inputs to answer; all by default.

        Raises:
            RunError: a loss is not finite.
        """
        examples = _some(self.problem.examples(task, split), rows)
        self.problem.resident.use_head_(task)
        with computing(self.problem.spec, self.problem.resident.device):
            return given_answers(
                self.problem.resident.model,
                self.problem.spec.tasks[task],
                self.problem.kinds[task],
                examples,
                tokenizer=self.problem.resident.tokenizer,
                pad_id=self.problem.pad_id,
                token_budget=self.problem.spec.token_budget,
                progress=counted(self.progress, f"{task}: {split}", len(examples)),
                ranks=self.problem.ranks,
            )

    @_everywhere
    def expert_results(self, split: Split) -> dict[str, TaskScore]:
        """Score of every task's own expert on it, by task; tasks without one are left out.

        Args:
            split: of the tasks' data.
        """
        self.ask_experts_(split)
        results: dict[str, TaskScore] = {}
        for index, (_, expert) in enumerate(self.problem.spec.experts.items()):
            if expert.task in self.problem.tasks_of(split) and expert.task not in results:
                self.problem.resident.load_scaled_(index, 1.0)
                results[expert.task] = self.result(expert.task, split)
        return results

    @_everywhere
    def base_results(self, split: Split, tasks: Sequence[str] | None = None) -> dict[str, TaskScore]:
        """Score of the base on every task, under the task's head where there are heads.

        Args:
            split: of the tasks' data.
            tasks: those to score; all by default.
        """
        self.ask_experts_(split)
        self.problem.resident.load_base_()
        return self.results(split, tasks)

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
