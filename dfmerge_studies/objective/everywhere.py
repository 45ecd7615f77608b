"""What the leader calls, every rank does, so that all have the same weights in their model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar

from dfmerge_studies.methods import Method
from dfmerge_studies.objective.derive import derive_problem
from dfmerge_studies.objective.problem import Problem
from dfmerge_studies.spec import StudySpec

P = ParamSpec("P")
R = TypeVar("R")
D = TypeVar("D", bound="Distributed")


class Distributed:
    """What every rank has one of, of the same problem and method.

    Args:
        problem: the loaded spec.
        method: row of the method table.
    """

    def __init__(self, problem: Problem, method: Method) -> None:
        self.problem = problem
        self.method = method


@dataclass(frozen=True)
class _Call:
    """A call of a method on the other ranks, with what tells its problem from the one that was loaded."""

    made: Callable[[Problem, Method, None], Distributed]  # without a cache: the leader has it
    spec: StudySpec
    indices: dict[str, list[int]]
    method: Method
    name: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def __call__(self, memory: dict[str, Any]) -> None:
        if memory.get("made", (None, None))[0] != (self.spec, self.indices, self.method):
            problem = derive_problem(memory["problem"], self.spec, indices=self.indices)
            made = self.made(problem, self.method, None)
            memory["made"] = (self.spec, self.indices, self.method), made  # one: each may hold task vectors
        getattr(memory["made"][1], self.name)(*self.arguments, **self.keywords)


def everywhere(function: Callable[Concatenate[D, P], R]) -> Callable[Concatenate[D, P], R]:
    """A method that runs on every rank when the leader calls it."""

    @functools.wraps(function)
    def call(self: D, /, *arguments: P.args, **keywords: P.kwargs) -> R:
        problem = self.problem
        if problem.ranks.size == 1:
            return function(self, *arguments, **keywords)
        command = _Call(
            type(self), problem.spec, problem.fisher_indices(), self.method, function.__name__, arguments, keywords
        )
        return problem.ranks.everywhere(command, lambda: function(self, *arguments, **keywords))

    return call
