"""Scoring a merge on growing parts of the rows, against the incumbent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dfmerge_studies.racing import PartialWorth, Position, Rival
from dfmerge_studies.tasks.metrics import TaskScore

if TYPE_CHECKING:
    from dfmerge_studies.objective.merger import Merger


@dataclass(frozen=True)
class Raced:
    """How a merge did against the incumbent.

    Attributes:
        results: by task, on all rows; empty where it was stopped.
        rows: how many were scored, by task.
        estimates: what it was worth after so many rows, at every look; the last one is why it was stopped.
    """

    results: Mapping[str, TaskScore] = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict)
    estimates: Mapping[int, PartialWorth] = field(default_factory=dict)

    @property
    def stopped(self) -> PartialWorth | None:
        """What it is worth by the rows that it was scored on, if it was stopped."""
        return None if self.results else self.estimates[max(self.estimates)]


def race(merger: Merger, rival: Rival) -> Raced:
    """Score the model as it stands on the validation inputs, until it cannot win any more.

    Tasks that the objective is not about, guards among them, are scored only where it is not stopped.

    Args:
        merger: its model is scored; experts have answered where scores are agreement.
        rival: the incumbent.

    Raises:
        RunError: a loss is not finite.
    """
    order, estimates = rival.order(), dict[int, PartialWorth]()
    given: dict[str, dict[int, Any]] = {task: {} for task in rival.rows}
    scores: dict[Position, float] = {}
    metrics = merger.problem.spec.metrics("validation")
    done = 0
    for until in rival.looks():
        for task, rows in by_task(order[done:until]).items():
            answers = merger.given(task, "validation", rows)
            given[task].update(zip(rows, answers, strict=True))
            found = merger.judged(task, "validation", answers, rows).rows
            assert found is not None, f"the metric of {task} is no mean over rows"
            scores.update({(task, row): metrics[task].worth(score) for row, score in zip(rows, found, strict=True)})
        done = until
        seen = [(position, scores[position]) for position in order[:done]]
        estimates[done] = rival.estimate(seen)
        if rival.cannot_win(seen):
            return Raced({}, {task: len(known) for task, known in given.items()}, estimates)
    results = {task: _whole(merger, task, given.get(task, {})) for task in merger.problem.tasks}
    return Raced(results, {task: result.n for task, result in results.items()}, estimates)


def by_task(positions: Sequence[Position]) -> dict[str, list[int]]:
    """Positions of rows by task, in ascending order.

    Args:
        positions: in any order.
    """
    found: dict[str, list[int]] = {}
    for task, row in sorted(positions):
        found.setdefault(task, []).append(row)
    return found


def _whole(merger: Merger, task: str, given: dict[int, Any]) -> TaskScore:
    """The score on all rows of a task, some of which have been answered."""
    count = len(merger.problem.examples(task, "validation"))
    missing = [row for row in range(count) if row not in given]
    if missing:
        given.update(zip(missing, merger.given(task, "validation", missing), strict=True))
    return merger.judged(task, "validation", [given[row] for row in range(count)])
