"""What a metric is: a row of the table, what it judges, and what comes out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dfmerge_studies.errors import InputError

SAME = 1e-9  # scores are counts over counts: what differs by less is the same number
MEAN = "mean"  # name of the column after the tasks
CHOICES = frozenset({"choice", "classification"})  # types of task whose answer is one of several
TEXTS = frozenset({"text"})  # types of task that score texts, among which nothing is chosen
NUMBERS = frozenset({"regression"})
SETS = frozenset({"multi-label-classification"})
TAGS = frozenset({"token-classification"})
GENERATE = frozenset({"generate"})  # those whose answer is a text
AGREEMENT = "agreement"  # the metric of `objective: agreement`; no task can name it


class Judged(Protocol):
    """What a metric judges: something per input that a model gives, and what is wanted there."""

    @property
    def given(self) -> Sequence[Any]:
        """Per input, what the model gives."""

    @property
    def wanted(self) -> Sequence[Any]:
        """Per input, what it should give."""


class Settled(Judged, Protocol):
    """The same where what is given is right or wrong."""

    @property
    def right(self) -> Sequence[float]:
        """Per input, 1 where the model gives what it should, else 0; of several things, the share that is right."""


@dataclass(frozen=True)
class HarnessScore:
    """Answers to one task that lm-evaluation-harness has judged.

    Attributes:
        given: per input, what the model gives.
        wanted: per input, what was asked.
        score: the harness's number.
        rows: one number per input, where the score is their mean.
    """

    given: Sequence[Any]
    wanted: Sequence[Any]
    score: float
    rows: Sequence[float] | None


@dataclass(frozen=True)
class TaskScore:
    """What a model scores on one task.

    Attributes:
        score: the number.
        metric: name of what it is.
        n: inputs that it rests on; 0 where that is not known.
        rows: one number per input, in their order, whose mean is the score, where they are known: what the input
            scores, or of a metric that is no mean over inputs what it makes of the score to first order.
    """

    score: float
    metric: str
    n: int
    rows: Sequence[float] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Metric:
    """One row of the table; it has either `of_rows` or `of_all`.

    Attributes:
        name: as `metric` of a task names it; lm-evaluation-harness's and scikit-learn's name where they have one.
        tasks: types of task that it fits; what it is given is what `answers.judged` makes of those.
        of_rows: one number per input, where the score is their mean: any subset of the inputs then has a score.
        of_all: the score of all inputs together, where it is no mean over them; of code of one's own perhaps one number
            per input after all.
        linear: beside `of_all`, one number per input, whose mean is the score and whose spread gives its standard error
            (`ratios`). They do not score a part of the inputs.
        low: the worst score that there can be, or the best where `higher_is_better` is false.
        high: the other end.
        higher_is_better: which of two scores is the better one.
        percent: shown in percent; otherwise as a plain number.
        labels: needs the labels of the data.
        classes: compares choices across inputs, so that all inputs of a task must have the same ones.
        positive: needs the task's `positive`.
        size: of a choice's text; where there is one, a choice's loss is the sum over its tokens, divided by it.
        pointless: from what is wanted of all inputs, why every model would score the same, if so.
        unreadable: from the names of the classes, why the metric can make nothing of them, if so.
        fault: why a target text cannot be compared with, if so.
    """

    name: str
    of_rows: Callable[[Any], Sequence[float]] | None = None
    of_all: Callable[[Any], float | Sequence[float]] | None = None
    linear: Callable[[Any], Sequence[float]] | None = None
    tasks: frozenset[str] = CHOICES
    low: float = 0.0
    high: float = 1.0
    higher_is_better: bool = True
    percent: bool = True
    labels: bool = True
    classes: bool = False
    positive: bool = False
    size: Callable[[str], float] | None = None
    pointless: Callable[[Any], str | None] = lambda answers: None
    unreadable: Callable[[Sequence[str]], str | None] = lambda names: None
    fault: Callable[[str], str | None] = lambda target: None

    def score(self, answers: Judged) -> float:
        """The score of a model on one task.

        Args:
            answers: to at least one input.

        Raises:
            InputError: there is nothing to score.
            ValueError: there are not as many answers as inputs.
        """
        return self.result(answers).score

    def result(self, answers: Judged) -> TaskScore:
        """The score of a model on one task, with the rows that it rests on.

        Args:
            answers: to at least one input.

        Raises:
            InputError: there is nothing to score.
            ValueError: there are not as many answers as inputs.
        """
        if len(answers.given) != len(answers.wanted):
            raise ValueError(f"{len(answers.given)} answers to {len(answers.wanted)} inputs")
        if not answers.wanted:
            raise InputError("there are no examples to score", hint="Check the split and its limit")
        if isinstance(answers, HarnessScore):
            return TaskScore(answers.score, self.name, len(answers.wanted), answers.rows)
        score = self.of_rows or self.of_all
        assert score is not None
        found = score(answers)
        if isinstance(found, (int, float)):
            rows = None if self.linear is None else self.linear(answers)
            return TaskScore(float(found), self.name, len(answers.wanted), rows)
        return TaskScore(sum(found) / len(found), self.name, len(found), found)

    def worth(self, score: float) -> float:
        """A score such that higher is better; applied to that it gives the score again."""
        return score if self.higher_is_better else -score

    def drop(self, score: float, reference: float) -> float:
        """Points by which a score is worse than another one: hundredths of the range from `low` to `high`.

        A range without an end has no hundredths; there a point is 0.01 of the metric's own unit.
        """
        return 100.0 * (self.worth(reference) - self.worth(score)) / self.span

    @property
    def span(self) -> float:
        """Length of the range from `low` to `high`; 1 where it has no end."""
        span = self.high - self.low
        return span if math.isfinite(span) else 1.0

    @property
    def best(self) -> float:
        """The best score that there can be; infinite where there is none."""
        return self.high if self.higher_is_better else self.low

    @property
    def unit(self) -> str:
        """What stands behind a shown number: "%" or nothing."""
        return "%" if self.percent else ""

    @property
    def factor(self) -> float:
        """What a score is multiplied by to be shown."""
        return 100.0 if self.percent else 1.0

    def shown(self, score: float, digits: int = 1) -> str:
        """A score as text: `82.1` for 0.821 in percent, otherwise `0.821`.

        Args:
            score: of this metric.
            digits: after the point, of percents; a plain number has two more.
        """
        return f"{self.factor * score:.{digits if self.percent else digits + 2}f}"
