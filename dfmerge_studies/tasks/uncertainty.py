"""How far a score may be off because its rows are few, and whether two scores can be told apart.

s[i]   what a model scores on row i of a task, i = 1..n; of a metric that is no mean over rows (F1, Matthews
       correlation) what the row makes of the score to first order (`ratios`); the score is their mean
e      standard error of a score: sd(s) / sqrt(n), sd with n - 1 as in lm-evaluation-harness
d[i]   s[i] of one model minus s[i] of another: the rows are the same, so their difficulty cancels out

Where the rows' scores are not known, e is that of a number between `low` and `high` with this mean,
sqrt((high - s) (s - low) / (n - 1)): the same for accuracy and an upper bound for other means over rows, but no bound
for metrics of all rows together: for F1 of a rare class it is several times too small, since it rests on the few rows
that have to do with the class, and n is all of them.  A metric without an end has none then.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from dfmerge_studies.tasks.metrics import SAME, Metric, Metrics, TaskScore

CLEAR = 2.0  # standard errors from which on two scores are told apart


@dataclass(frozen=True)
class Difference:
    """One score minus another, such that more is better.

    Attributes:
        value: in the metric's own unit.
        error: its standard error; None where it is not known.
        paired: whether it was taken row by row.
    """

    value: float
    error: float | None
    paired: bool

    @property
    def clear(self) -> bool | None:
        """Whether the two are told apart: more than `CLEAR` standard errors; None where the error is not known."""
        return None if self.error is None else abs(self.value) > CLEAR * self.error and abs(self.value) > SAME

    @property
    def beats(self) -> bool | None:
        """Whether the first is better by more than one standard error; None where that is not known."""
        return None if self.error is None else self.value > self.error and self.value > SAME


def standard_error(score: TaskScore, metric: Metric) -> float | None:
    """Standard error of a score; None where neither its rows nor their number are known, or one row is all.

    Args:
        score: on one task.
        metric: of the task.
    """
    if score.n < 2:
        return None
    if score.rows is not None:
        return stdev(score.rows) / math.sqrt(score.n)
    if not math.isfinite(metric.high - metric.low):
        return None
    return math.sqrt(max(0.0, (metric.high - score.score) * (score.score - metric.low)) / (score.n - 1))


def mean_error(scores: Mapping[str, TaskScore], metrics: Metrics) -> float | None:
    """Standard error of the mean over tasks, whose rows are different ones; None where one task's is not known.

    Args:
        scores: by task.
        metrics: of the tasks.
    """
    errors = [standard_error(score, metrics[task]) for task, score in scores.items()]
    known = [error for error in errors if error is not None]
    return math.hypot(*known) / len(known) if known and len(known) == len(errors) else None


def difference(
    a: Mapping[str, TaskScore],
    b: Mapping[str, TaskScore],
    metrics: Metrics,
    weights: tuple[Mapping[str, float], Mapping[str, float]] | None = None,
) -> Difference:
    """What one model scores more than another over the same rows of some tasks, in worth (`Metric.worth`).

    Args:
        a: scores of the one, by task.
        b: scores of the other, of the same tasks.
        metrics: of the tasks.
        weights: of the tasks in what `a` and what `b` is worth; by default each is the mean over the tasks.
    """
    equal = dict.fromkeys(a, 1 / len(a))
    parts = [
        _weighted(a[task], b[task], metrics[task], *(each.get(task, 0.0) for each in weights or (equal, equal)))
        for task in a
    ]
    errors = [part.error for part in parts if part.error is not None]
    return Difference(
        sum(part.value for part in parts),
        math.hypot(*errors) if len(errors) == len(parts) else None,
        all(part.paired for part in parts),
    )


def _weighted(a: TaskScore, b: TaskScore, metric: Metric, of_a: float, of_b: float) -> Difference:
    value = of_a * metric.worth(a.score) - of_b * metric.worth(b.score)
    if not of_a and not of_b:
        return Difference(0.0, 0.0, True)
    if a.rows is not None and b.rows is not None and len(a.rows) == len(b.rows) > 1:
        rows = [of_a * mine - of_b * other for mine, other in zip(a.rows, b.rows, strict=True)]
        return Difference(value, stdev(rows) / math.sqrt(len(rows)), True)
    errors = [standard_error(a, metric), standard_error(b, metric)]
    known = [weight * error for weight, error in zip((of_a, of_b), errors, strict=True) if error is not None]
    return Difference(value, math.hypot(*known) if len(known) == 2 else None, False)


def mean_rows(several: Sequence[Sequence[float]]) -> list[float] | None:
    """Row by row the mean of several models' scores, of one method at several seeds; None where rows are not the same.

    Args:
        several: scores by row.
    """
    if len({len(rows) for rows in several}) != 1:
        return None
    return [fmean(scores) for scores in zip(*several, strict=True)]
