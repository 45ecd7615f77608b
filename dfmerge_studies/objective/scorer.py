"""Scores of the resident model as it stands: on every task, as each task's expert, as the base."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeVar

from dfmerge_studies.errors import memory_errors
from dfmerge_studies.methods import Method
from dfmerge_studies.objective.classes import named_classes
from dfmerge_studies.objective.computing import computing
from dfmerge_studies.objective.everywhere import Distributed, everywhere
from dfmerge_studies.objective.problem import Problem
from dfmerge_studies.progress import Progress, counted, silent
from dfmerge_studies.tasks.answers import given_answers, judged, taken_answers, wanted_answers
from dfmerge_studies.tasks.metrics import TaskScore
from dfmerge_studies.tasks.splits import Split

T = TypeVar("T")


def _some(values: Sequence[T], rows: Sequence[int] | None) -> Sequence[T]:
    return values if rows is None else [values[row] for row in rows]


class Scorer(Distributed):
    """Scores the weights that are in the problem's resident model.

    Args:
        problem: the loaded spec.
        method: row of the method table.
        progress: told how far an evaluation is.
    """

    def __init__(self, problem: Problem, method: Method, progress: Progress = silent) -> None:
        super().__init__(problem, method)
        self.progress = progress

    @everywhere
    def hold_out_(self, share: float) -> None:
        """`Problem.hold_out_` on every rank."""
        self.problem.hold_out_(share)

    @everywhere
    def scores(self, split: Split) -> dict[str, float]:
        """Score of the model as it stands on every task; of the held-out rows, on those that have some.

        Args:
            split: of the tasks' data.

        Raises:
            RunError: a loss is not finite.
        """
        return {task: result.score for task, result in self.results(split).items()}

    @everywhere
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

    @everywhere
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

    @everywhere
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

    @everywhere
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
                token_budget=self.problem.token_budget,
                progress=counted(self.progress, f"{task}: {split}", len(examples)),
                ranks=self.problem.ranks,
            )

    @everywhere
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

    @everywhere
    def base_results(self, split: Split, tasks: Sequence[str] | None = None) -> dict[str, TaskScore]:
        """Score of the base on every task, under the task's head where there are heads.

        Args:
            split: of the tasks' data.
            tasks: those to score; all by default.
        """
        self.ask_experts_(split)
        self.problem.resident.load_base_()
        return self.results(split, tasks)
