"""Racing: a trial is scored on growing parts of the rows and stopped when it can no longer win against the incumbent.

    r[i]      what the incumbent, the best trial so far, scores on row i, such that more is better
    s[i]      what the trial scores there; known for the first k of n rows in a random order
    z[i]      what row i adds to the trial's lead; the trial wins, or ties, where mean z >= 0 over all n rows
    b         the largest z that a remaining row can have, whatever the trial answers
    m[k]      -sum(z[:k]) / (n - k): what the other rows have on average if the trial ends level
    K[k](c)   prod_j (1 - c (z[j] - m[j]) / (b - m[j])), j < k: capital of who stakes the share c on the incumbent
    a         error, the bound on the rate at which trials that win are stopped

Rows are drawn without replacement, so the next one has the mean m[k] or more where the trial wins: K is then a
non-negative supermartingale that begins with 1, and so is its mean over several c.  It ever reaches 1/a with
probability a at most, over all rows at which one looks (Ville's inequality; Waudby-Smith and Ramdas 2020, arXiv
2006.04347; 2010.09686).  No distribution is assumed, and nothing is to be corrected for looking often.  Where several
things must hold for a win (`min`: every task above the incumbent's worst), each is tested at its share of a.

The order is drawn with the study's seed and is one for all trials, as batches are: the bound is on the rate for a
trial over orders, and errors of one study are not independent of each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dfmerge_studies.tasks.sampling import seeded_generator

SHARES = (0.25, 0.5, 0.75)  # c: few discordant rows, all against the trial, must do for a verdict
LOOKS = (0.02, 0.05, *(tenth / 10 for tenth in range(1, 10)))  # shares of the rows after which a trial may be stopped,
LEAST = 30  # where they are so many rows at least: fewer say little, and every look is a pass for each task

Rows = Mapping[str, Sequence[float]]
Array = NDArray[np.float64]
Position = tuple[str, int]  # a task, and the position of a row among its rows


@dataclass(frozen=True)
class Rival:
    """What a trial is raced against.

    Attributes:
        rows: r, by task, on all rows of every task that the objective is about.
        highest: the best score of a row that there can be, by task.
        weights: of the tasks in the objective, with the sum 1; None where it is the worst task.
        error: a.
        seed: of the order of rows.
    """

    rows: Rows
    highest: Mapping[str, float]
    weights: Mapping[str, float] | None
    error: float
    seed: int

    @property
    def count(self) -> int:
        """Rows of all its tasks."""
        return sum(map(len, self.rows.values()))

    def order(self) -> list[Position]:
        """All rows in the order in which trials are scored on them, the same in every trial of a study."""
        pool = [(task, row) for task, rows in self.rows.items() for row in range(len(rows))]
        return [pool[i] for i in seeded_generator(self.seed, "racing").permutation(len(pool))]

    def looks(self) -> list[int]:
        """Numbers of rows after which a trial may be stopped."""
        counts = {math.ceil(share * self.count) for share in LOOKS}
        return sorted(count for count in counts if LEAST <= count < self.count)

    def cannot_win(self, seen: Sequence[tuple[Position, float]]) -> bool:
        """Whether a trial is worse than this on all rows, with the error a over all looks together.

        Args:
            seen: the first rows of the order, each with s.
        """
        tests = self._tests()
        return any(loses(test.leads(self, seen), test.count, test.highest, self.error / len(tests)) for test in tests)

    def _tests(self) -> list[_Test]:
        if self.weights is not None:
            scales = {t: weight * self.count / len(self.rows[t]) for t, weight in self.weights.items()}
            leads = [scales[t] * (self.highest[t] - r) for t, rows in self.rows.items() for r in rows]
            return [_Test(scales, 0.0, self.count, max(leads))]
        means = {task: _mean(rows) for task, rows in self.rows.items()}
        worst = min(means.values())
        return [
            _Test({task: 1.0}, means[task] - worst, len(rows), means[task] - worst + self.highest[task] - min(rows))
            for task, rows in self.rows.items()
        ]

    def estimate(self, seen: Sequence[tuple[Position, float]]) -> PartialWorth:
        """What a trial scores on all rows by what it scores on some.

        The incumbent's score plus the mean difference on the rows that both have: its luck with these rows cancels out.
        A row as different as any counts as seen besides, so that no error is nothing.

        Args:
            seen: rows of the order, each with s.
        """
        differences: dict[str, list[float]] = {task: [] for task in self.rows}
        for (task, row), score in seen:
            differences[task].append(score - self.rows[task][row])
        largest = max((abs(d) for each in differences.values() for d in each), default=0.0)
        tasks = {
            task: _estimated(_mean(self.rows[task]), differences[task], len(self.rows[task]), largest)
            for task in self.rows
        }
        if self.weights is None:
            return PartialWorth(*min(tasks.values()), tasks)
        value = sum(weight * tasks[task][0] for task, weight in self.weights.items())
        return PartialWorth(value, math.hypot(*(w * tasks[task][1] for task, w in self.weights.items())), tasks)


@dataclass(frozen=True)
class PartialWorth:
    """What a trial is worth by a part of its rows; more is better.

    Attributes:
        value: of the objective.
        error: its standard error.
        tasks: score and standard error, by task.
    """

    value: float
    error: float
    tasks: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Test:
    """One thing that holds if a trial wins: the mean of z over the rows of some tasks is at least 0.

    Attributes:
        scales: of differences in z, by task.
        lead: what z has besides: of a task on which the incumbent is above its worst, by how much.
        count: n.
        highest: the largest z.
    """

    scales: Mapping[str, float]
    lead: float
    count: int
    highest: float

    def leads(self, rival: Rival, seen: Sequence[tuple[Position, float]]) -> Array:
        """What the known rows add to the lead, z, in their order."""
        return np.array(
            [
                self.scales[task] * (score - rival.rows[task][row]) + self.lead
                for (task, row), score in seen
                if task in self.scales
            ]
        )


def loses(z: Array, count: int, highest: float, error: float) -> bool:
    """Whether the mean of `count` numbers is below 0, by the first of them in a random order.

    Args:
        z: the first ones.
        count: of all of them.
        highest: no number is larger.
        error: bound on the rate of a wrong yes, over all lengths of `z` together.
    """
    before = np.concatenate([[0.0], np.cumsum(z)])
    left = count - np.arange(len(z) + 1)
    if left[-1] == 0:
        return bool(before[-1] < 0)
    level = -before / left  # m
    if (level > highest).any():  # not even the best answers to all other rows would do
        return True
    room = np.maximum(highest - level[:-1], 1e-12)
    stakes = np.array(SHARES)[:, None] / room
    factors = np.maximum(1.0 - stakes * (z - level[:-1]), 1e-300)
    capital = np.exp(np.cumsum(np.log(factors), axis=1)).mean(axis=0)
    return bool((capital >= 1.0 / error).any())


def _estimated(score: float, differences: Sequence[float], count: int, largest: float) -> tuple[float, float]:
    """Score and standard error on `count` rows, from differences to a known score on some of them."""
    seen = max(1, len(differences))
    mean = _mean(differences) if differences else 0.0
    variance = (sum((d - mean) ** 2 for d in differences) + largest**2) / seen
    return score + mean, math.sqrt(variance / seen * (1.0 - len(differences) / count))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
