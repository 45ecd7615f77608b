"""Coefficients -> importance -> merged weights in the resident model -> scores."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from dfmerge_studies.checkpoints.digest import ids_digest, json_digest
from dfmerge_studies.errors import out_of_memory
from dfmerge_studies.importance.cache import FisherCache, FisherKey
from dfmerge_studies.importance.fisher import Estimator, diagonal_fisher, whole
from dfmerge_studies.importance.nodes import masks_of
from dfmerge_studies.merging import WeightedSum
from dfmerge_studies.methods import (
    METHODS,
    Importance,
    Method,
    check_drop_rate,
    coefficient_range,
    importance_coefficient,
)
from dfmerge_studies.objective.derive import derive_problem
from dfmerge_studies.objective.problem import Problem, Progress, counted, silent
from dfmerge_studies.params import float_parameters
from dfmerge_studies.spec import StudySpec, check_coefficients
from dfmerge_studies.tasks.evaluate import accuracy, agreement, choice_losses, predict
from dfmerge_studies.tasks.sampling import seeded_generator
from dfmerge_studies.transforms import Prepared

P = ParamSpec("P")
R = TypeVar("R")


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


@dataclass(frozen=True)
class _Call:
    """A call of a merger's method on the other ranks, with what tells its problem from the one that was loaded."""

    spec: StudySpec
    indices: dict[str, list[int]]
    method: str
    name: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def __call__(self, memory: dict[str, Any]) -> None:
        if memory.get("merger", (None, None))[0] != (self.spec, self.indices, self.method):
            problem = derive_problem(memory["problem"], self.spec, indices=self.indices)
            merger = Merger(problem, METHODS[self.method], None)
            memory["merger"] = (self.spec, self.indices, self.method), merger  # one: each may hold task vectors
        getattr(memory["merger"][1], self.name)(*self.arguments, **self.keywords)


def _everywhere(function: Callable[Concatenate[Merger, P], R]) -> Callable[Concatenate[Merger, P], R]:
    """What is called on the leader is called on every rank, so that all have the same weights in their model."""

    @functools.wraps(function)
    def call(self: Merger, /, *arguments: P.args, **keywords: P.kwargs) -> R:
        problem = self.problem
        if problem.ranks.size == 1:
            return function(self, *arguments, **keywords)
        command = _Call(
            problem.spec, problem.fisher_indices(), self.method.name, function.__name__, arguments, keywords
        )
        return problem.ranks.everywhere(command, lambda: function(self, *arguments, **keywords))

    return call


@dataclass(frozen=True)
class Outcome:
    """What one merge gave.

    Attributes:
        tasks: score per task, 0..1.
        seconds: wall-clock time per phase: fisher, merge, evaluate.
        computed: Fishers that were computed.
        cached: Fishers that came from the cache.
    """

    tasks: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    computed: int = 0
    cached: int = 0


def check_importance(problem: Problem, method: Method) -> Estimator:
    """The estimator of a method's importance, which must know the model's layers if it works by layers.

    Args:
        problem: the loaded spec.
        method: row of the method table.

    Raises:
        InputError: naming the layers that it does not know.
    """
    estimator = Estimator(method.estimator_for(problem.spec.importance.estimator))
    if estimator is Estimator.MASK_NODES and method.importance is not Importance.UNIFORM:
        masks_of(problem.resident.model)
    return estimator


class Merger:
    """Merges and scores inside the problem's resident model.

    Args:
        problem: the loaded spec.
        method: row of the method table.
        cache: where Fishers are kept, or None.
        progress: told how far a merge or an evaluation is.

    Raises:
        InputError: the method's importance cannot be estimated for this kind of model.
    """

    def __init__(
        self, problem: Problem, method: Method, cache: FisherCache | None, *, progress: Progress = silent
    ) -> None:
        self.problem = problem
        self.method = method
        self.cache = cache
        self.progress = progress
        self.estimator = check_importance(problem, method)

    @_everywhere
    def run(self, coefficients: Mapping[str, float], drop_rate: float | None = None) -> Outcome:
        """Merge at the given coefficients and score every task's validation inputs.

        Args:
            coefficients: lambda per expert.
            drop_rate: for methods that drop entries.

        Raises:
            RunError: something is not finite, or memory ran out.
        """
        self.ask_experts_("validation")
        merged = self.merge_(coefficients, drop_rate)
        start = time.perf_counter()
        tasks = self.scores("validation")
        seconds = {**merged.seconds, "evaluate": time.perf_counter() - start}
        return Outcome(tasks, seconds, merged.computed, merged.cached)

    @_everywhere
    @memory_errors()
    def merge_(self, coefficients: Mapping[str, float], drop_rate: float | None = None) -> Outcome:
        """Write the merged weights into the resident model, without scoring them.

        Args:
            coefficients: lambda per expert.
            drop_rate: for methods that drop entries.

        Raises:
            RunError: an importance or a weight is not finite.
        """
        resident, spec = self.problem.resident, self.problem.spec
        total = WeightedSum(resident.names, floor=spec.importance.floor)
        seconds = {"fisher": 0.0, "merge": 0.0}
        computed = cached = 0
        start = time.perf_counter()
        vectors = self._transformed(drop_rate)
        seconds["merge"] += time.perf_counter() - start
        for index, expert in enumerate(self.problem.experts):
            start = time.perf_counter()
            values: Mapping[str, Tensor] | None = None
            if self.method.importance is not Importance.UNIFORM:
                at = importance_coefficient(self.method, coefficients[expert])
                values, hit = self.importance(index, at)
                cached, computed = cached + hit, computed + (not hit)
            middle = time.perf_counter()
            total.add(vectors[index], coefficients[expert], values)
            seconds["fisher"] += middle - start
            seconds["merge"] += time.perf_counter() - middle
        start = time.perf_counter()
        total.write_into_(dict(resident.model.named_parameters()), resident.base)
        seconds["merge"] += time.perf_counter() - start
        return Outcome({}, seconds, computed, cached)

    @_everywhere
    @memory_errors()
    def importance(
        self, index: int, coefficient: float, *, names: Sequence[str] | None = None
    ) -> tuple[dict[str, Tensor], bool]:
        """Fisher information of one expert at theta_pre + coefficient * tau, from the cache where it is there.

        An expert without a task of its own is weighed by the mean over all tasks.

        Args:
            index: position of the expert.
            coefficient: lambda.
            names: parameters; those on which an expert differs by default.

        Returns:
            The values by parameter name, and whether they came from the cache.
        """
        resident, ranks = self.problem.resident, self.problem.ranks
        names = list(resident.names if names is None else names)
        key = self.fisher_key(index, coefficient, names)
        cache = self.cache  # the leader's; what it has or lacks, all have or lack
        stored = ranks.from_leader(lambda: cache.get(key) if cache is not None else None)
        if stored is not None:
            return self._by_parameter({name: value.to(resident.device) for name, value in stored.items()}, names), True
        resident.load_scaled_(index, coefficient)
        tasks = self._fisher_tasks(index)
        values: dict[str, Tensor] = {}
        expert = self.problem.experts[index]
        for task in tasks:
            resident.use_head_(task)
            result = diagonal_fisher(
                resident.model,
                self.problem.kind,
                self.problem.tasks[task].fisher,
                pad_id=self.problem.pad_id,
                names=names,
                estimator=self.estimator,
                generator=self._generator("sampled", task),
                row_budget=self.problem.spec.importance.row_budget,
                compact=True,
                progress=counted(self.progress, f"{expert}: fisher", len(self.problem.tasks[task].fisher)),
                ranks=ranks,
            )
            for name, value in result.values.items():
                values[name] = values[name] + value / len(tasks) if name in values else value / len(tasks)
        # What is used now and what the cache gives later must be the same, or resuming would change the study.
        dtype = getattr(torch, self.problem.spec.importance.dtype)

        def keep() -> dict[str, Tensor]:
            rounded = {name: value.to(dtype) for name, value in values.items()}
            if cache is not None:
                cache.put(key, rounded)
            return rounded

        kept = ranks.from_leader(keep)
        assert kept is not None
        return self._by_parameter(kept, names), False

    def fisher_key(self, index: int, coefficient: float, names: Sequence[str]) -> FisherKey:
        """Identity of a Fisher.

        Args:
            index: position of the expert.
            coefficient: lambda.
            names: parameters.
        """
        problem, settings = self.problem, self.problem.spec.importance
        expert = problem.experts[index]
        labelled = self.estimator is Estimator.EMPIRICAL
        tasks = self._fisher_tasks(index)
        inputs = {
            task: [
                ids_digest(
                    [e.input_ids, e.choices, e.token_type_ids, e.label if labelled else None]
                    for e in problem.tasks[task].fisher
                ),
                self._head_owner(task),
            ]
            for task in tasks
        }
        return FisherKey(
            base=problem.base_digest,
            expert=problem.expert_digests[expert],
            expert_name=expert,
            coefficient=float(coefficient).hex(),
            estimator=self.estimator.value,
            inputs=json_digest(inputs),
            indices={task: rows for task, rows in problem.fisher_indices().items() if task in tasks},
            seed=problem.spec.search.seed if self.estimator.draws else None,
            parameters=json_digest(list(names)),
            compute_dtype=problem.spec.dtype,
            dtype=settings.dtype,
        )

    @_everywhere
    def scores(self, split: str) -> dict[str, float]:
        """Score of the model as it stands on every task.

        Args:
            split: "validation" or "test".

        Raises:
            RunError: a loss is not finite.
        """
        return {task: self.score(task, split) for task in self.problem.tasks}

    @_everywhere
    def score(self, task: str, split: str) -> float:
        """Score of the model as it stands on one task, 0..1.

        Args:
            task: name of the task.
            split: "validation" or "test".
        """
        answers = self.predictions(task, split)
        if self.problem.spec.metric(task, split) == "agreement":
            return agreement(answers, self.problem.expert_answers[task, split])
        return accuracy(answers, self.problem.examples(task, split))

    def right(self, task: str, split: str) -> list[bool]:
        """Which inputs the model as it stands answers as the label has it, or for agreement as the task's expert does.

        Args:
            task: name of the task.
            split: "validation" or "test".
        """
        answers, wanted = self.predictions(task, split), [e.label for e in self.problem.examples(task, split)]
        if self.problem.spec.metric(task, split) == "agreement":
            wanted = [*self.problem.expert_answers[task, split]]
        return [answer == each for answer, each in zip(answers, wanted, strict=True)]

    @_everywhere
    def ask_experts_(self, split: str) -> None:
        """Let each task's expert answer, where scores are agreement with it; overwrites the model the first time.

        Args:
            split: "validation" or "test".
        """
        known = self.problem.expert_answers
        for index, expert in enumerate(self.problem.spec.experts.values()):
            if expert.task is None or self.problem.spec.metric(expert.task, split) != "agreement":
                continue
            key = (expert.task, split)
            if not all(self.problem.ranks.agreed(functools.partial(known.__contains__, key))):
                self.problem.resident.load_scaled_(index, 1.0)
                known[key] = self.predictions(*key)

    @_everywhere
    @memory_errors()
    def predictions(self, task: str, split: str) -> list[int]:
        """Answer of the model as it stands to every input of one task.

        Args:
            task: name of the task.
            split: "validation" or "test".

        Raises:
            RunError: a loss is not finite.
        """
        examples = self.problem.examples(task, split)
        self.problem.resident.use_head_(task)
        losses = choice_losses(
            self.problem.resident.model,
            self.problem.kind,
            examples,
            pad_id=self.problem.pad_id,
            token_budget=self.problem.spec.token_budget,
            progress=counted(self.progress, f"{task}: {split}", len(examples)),
            ranks=self.problem.ranks,
        )
        return predict(losses)

    @_everywhere
    def expert_scores(self, split: str) -> dict[str, float]:
        """Score of every task's own expert on it, by task; tasks without one are left out.

        Args:
            split: "validation" or "test".
        """
        self.ask_experts_(split)
        scores = {}
        for index, (_, expert) in enumerate(self.problem.spec.experts.items()):
            if expert.task is not None and expert.task not in scores:
                self.problem.resident.load_scaled_(index, 1.0)
                scores[expert.task] = self.score(expert.task, split)
        return scores

    @_everywhere
    def base_scores(self, split: str) -> dict[str, float]:
        """Score of the base on every task, under the task's head where there are heads.

        Args:
            split: "validation" or "test".
        """
        self.ask_experts_(split)
        self.problem.resident.load_base_()
        return self.scores(split)

    def all_names(self) -> list[str]:
        """Every shared parameter of the base, changed by an expert or not."""
        heads = {name for head in self.problem.resident.heads.values() for name in head}
        return [name for name in float_parameters(self.problem.resident.model) if name not in heads]

    def _by_parameter(self, stored: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """Importances as the cache holds them, which is by mask for mask nodes, as those of parameters, in float32."""
        values = {name: value.float() for name, value in stored.items()}
        return whole(self.problem.resident.model, values, estimator=self.estimator, names=names)

    def _fisher_tasks(self, index: int) -> list[str]:
        task = self.problem.spec.experts[self.problem.experts[index]].task
        return [task] if task is not None else list(self.problem.tasks)

    def _head_owner(self, task: str) -> str | None:
        """Digest of the expert whose head a task uses."""
        if task not in self.problem.resident.heads:
            return None
        owners = (name for name, expert in self.problem.spec.experts.items() if expert.task == task)
        return self.problem.expert_digests[next(owners)]

    @cached_property
    def _transformed(self) -> Prepared:
        """Phi, with what is the same in every trial computed once."""
        return self.method.transform(self.problem.resident.task_vectors, self._generator)

    def _generator(self, *labels: str) -> torch.Generator:
        """Random numbers for a purpose: the same at every lambda, so that Fishers, say, differ by lambda alone."""
        seed = seeded_generator(self.problem.spec.search.seed, *labels).integers(2**62)
        return torch.Generator().manual_seed(int(seed))


def merge(
    problem: Problem,
    coefficients: Mapping[str, float],
    *,
    method: str | None = None,
    drop_rate: float | None = None,
    cache: FisherCache | None = None,
) -> Outcome:
    """Merge at given coefficients and score every task's validation inputs; the model is `problem.resident.model`.

    >>> from dfmerge_studies import StudySpec, load_problem, merge
    >>> spec = StudySpec.from_yaml(quickstart)          # the shipped example: three LoRA experts on one encoder
    >>> problem = load_problem(spec)
    >>> mean = merge(problem, {"sentiment": 1 / 3, "continent": 1 / 3, "syllables": 1 / 3}, method="averaging")
    >>> sorted(mean.tasks)
    ['continent', 'sentiment', 'syllables']
    >>> expert = merge(problem, {"sentiment": 1.0, "continent": 0.0, "syllables": 0.0}, method="gta")
    >>> expert.tasks["sentiment"] > mean.tasks["sentiment"]
    True

    Args:
        problem: the loaded spec.
        coefficients: lambda per expert.
        method: row of the method table; the spec's by default.
        drop_rate: for `dare`.
        cache: where Fishers are looked up and kept, if anywhere.

    Raises:
        InputError: a coefficient is missing, unknown or outside the bounds, or the drop rate does not fit the method.
        RunError: something is not finite, or memory ran out.
    """
    row = METHODS[method or problem.spec.method]
    bounds = coefficient_range(row, problem.spec.search.bounds)
    point = check_coefficients(problem.spec, coefficients, "coefficients", bounds=bounds)
    check_drop_rate(row, drop_rate, "drop_rate")
    return Merger(problem, row, cache).run(point, drop_rate)
