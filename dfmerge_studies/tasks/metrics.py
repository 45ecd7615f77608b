"""What a score is: the table of metrics, and the metrics of several tasks side by side.

A new metric is a new row of `METRICS`; everything that shows, compares or constrains a score asks its row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Protocol

from dfmerge_studies.errors import InputError
from dfmerge_studies.tasks.choices import Answers, balanced_accuracy, f1, macro_f1, mcc, no_positive, one_class
from dfmerge_studies.tasks.label_sets import LabelSets, no_labels
from dfmerge_studies.tasks.numbers import all_equal, pearson, spearman, squared_errors
from dfmerge_studies.tasks.splits import Split
from dfmerge_studies.tasks.tags import Tags, no_entities_in, no_entity
from dfmerge_studies.tasks.texts import bits_per_byte, perplexity
from dfmerge_studies.tasks.written import (
    ROUGE,
    Written,
    best_of,
    no_number,
    nothing_for_rouge,
    rouge,
    same_number,
    token_f1,
)

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
class Scored:
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
        rows: one score per input, in their order, where the metric is a mean over inputs and they are known.
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
        if isinstance(answers, Scored):
            return TaskScore(answers.score, self.name, len(answers.wanted), answers.rows)
        score = self.of_rows or self.of_all
        assert score is not None
        found = score(answers)
        if isinstance(found, (int, float)):
            return TaskScore(float(found), self.name, len(answers.wanted))
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


class Metrics(Mapping[str, Metric]):
    """The metrics of a split's tasks by task, and what their mean is.

    Args:
        by_task: at least one.
        guards: of the tasks those that the objective is not about, each with the points that it may lose against the
            base.
    """

    def __init__(self, by_task: Mapping[str, Metric], guards: Mapping[str, float] = MappingProxyType({})) -> None:
        self._by_task = dict(by_task)
        self.guards = {task: guards[task] for task in by_task if task in guards}

    @classmethod
    def named(cls, names: Mapping[str, str], guards: Mapping[str, float] = MappingProxyType({})) -> Metrics:
        """The metrics of these names, which may be those of a study that another version has stored.

        Args:
            names: by task.
            guards: as above.
        """
        return cls({task: _metric_named(name) for task, name in names.items()}, guards)

    def __getitem__(self, task: str) -> Metric:
        return self._by_task[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_task)

    def __len__(self) -> int:
        return len(self._by_task)

    def only(self, tasks: Iterable[str]) -> Metrics:
        """Those of some of the tasks.

        Args:
            tasks: at least one.
        """
        return Metrics({task: self[task] for task in tasks}, self.guards)

    @cached_property
    def aims(self) -> Metrics:
        """Those of the tasks that the objective and every mean are about: all but guards, unless all are."""
        aims = {task: metric for task, metric in self.items() if task not in self.guards}
        return Metrics(aims or self._by_task)

    @cached_property
    def names(self) -> dict[str, str]:
        """Name of each task's metric."""
        return {task: metric.name for task, metric in self.items()}

    @cached_property
    def mean(self) -> Metric:
        """What the mean over the tasks is: their metric if they have one, otherwise a number in percent if all are.

        Guards are not in it. Where for some tasks higher is better and for others lower, the mean is that of `worth`.
        """
        first, *others = dict.fromkeys(self.aims.values())
        if not others:
            return first
        everything = [first, *others]
        return Metric(
            self.short,
            low=min(metric.low for metric in everything),
            high=max(metric.high for metric in everything),
            higher_is_better=any(metric.higher_is_better for metric in everything),
            percent=all(metric.percent for metric in everything),
        )

    def of(self, column: str) -> Metric:
        """What the numbers of a table's column are.

        Args:
            column: a task, or "mean".
        """
        return self[column] if column in self._by_task else self.mean

    def worths(self, scores: Mapping[str, float]) -> dict[str, float]:
        """Scores such that higher is better.

        Args:
            scores: by task.
        """
        return {task: self[task].worth(score) for task, score in scores.items()}

    def mean_of(self, scores: Mapping[str, float]) -> float:
        """Mean over tasks, without guards.

        Args:
            scores: of at least one task.
        """
        worths = self.worths_of_aims(scores)
        return self.mean.worth(sum(worths.values()) / len(worths))

    def worths_of_aims(self, scores: Mapping[str, float]) -> dict[str, float]:
        """`worths` of the tasks that the objective is about.

        Args:
            scores: by task; those of guards are left out.
        """
        return self.worths({task: score for task, score in scores.items() if task in self.aims})

    def bounds(self, base: Mapping[str, float]) -> dict[str, float]:
        """The score that every guard must keep, by guard.

        Args:
            base: scores of the base; a guard that has none has no bound.
        """
        return {
            task: self[task].worth(self[task].worth(base[task]) - allowed * self[task].span / 100.0)
            for task, allowed in self.guards.items()
            if task in base
        }

    def drops(self, scores: Mapping[str, float], references: Mapping[str, float]) -> dict[str, float]:
        """Points (see `Metric.drop`) that every task loses against a reference; negative where it gains.

        Args:
            scores: of a merged model.
            references: of each task's expert, of a guard the base's; tasks that are not among them are left out.
        """
        return {task: self[task].drop(scores[task], reference) for task, reference in references.items()}

    @cached_property
    def short(self) -> str:
        """What the scores but those of guards are, in few words: `accuracy`, or `accuracy or f1`."""
        return " or ".join(sorted(set(self.aims.names.values())))

    @cached_property
    def text(self) -> str:
        """What the scores are, task by task if they differ: `accuracy of a and b, f1 of c`."""
        return ", ".join(f"{name} of {' and '.join(t)}" if t else name for name, t in self._groups())

    @cached_property
    def heading(self) -> str:
        """What the shown numbers are: `accuracy in percent`, or `accuracy of a in percent, log_likelihood of b`."""
        if len({metric.percent for metric in self.values()}) == 1:
            return f"{self.text} in percent" if self.mean.percent else self.text
        percent = {metric.name for metric in self.values() if metric.percent}
        return ", ".join(
            f"{name} of {' and '.join(t)}{' in percent' if name in percent else ''}" for name, t in self._groups()
        )

    @property
    def unit(self) -> str:
        """Of the mean as it is shown."""
        return self.mean.unit

    def value_text(self, values: Sequence[float], digits: int = 1) -> str:
        """What a trial is worth, as its numbers are shown: one, or for `pareto` one per task."""
        kinds = [self.mean] if len(values) == 1 else list(self.aims.values())
        return " ".join(kind.shown(kind.worth(value), digits) for kind, value in zip(kinds, values, strict=True))

    def _groups(self) -> list[tuple[str, list[str]]]:
        """Metrics by name with their tasks, which are left out if all have the same one."""
        kinds = sorted(set(self.names.values()))
        if len(kinds) == 1:
            return [(kinds[0], [])]
        return [(kind, [task for task, name in self.names.items() if name == kind]) for kind in kinds]


def largest_drop(
    scores: Mapping[str, float], experts: Mapping[str, float], metrics: Metrics
) -> tuple[str, float] | None:
    """The task that loses most against its own expert, and how many points (`Metric.drop`); the first among equals.

    Args:
        scores: of a merged model by task.
        experts: of each task's own expert; tasks without one do not count.
        metrics: what the scores are.

    Returns:
        The task and its loss, negative if every task gains; None if there is nothing to compare.
    """
    lost = metrics.drops(scores, {task: score for task, score in experts.items() if task in scores})
    if not lost:
        return None
    task = max(lost, key=lambda name: lost[name])
    return task, lost[task]


@dataclass(frozen=True)
class Guarded:
    """How a model stands to a guard.

    Attributes:
        drop: points that it loses against the base.
        allowed: points that it may lose.
    """

    drop: float
    allowed: float

    @property
    def kept(self) -> bool:
        """Whether it loses no more than it may; rounding counts for nothing."""
        return round(self.drop - self.allowed, 9) <= 0

    def described(self) -> dict[str, float | bool]:
        """The same for JSON."""
        return {"drop": round(self.drop, 4), "allowed": self.allowed, "kept": self.kept}


def guarded(scores: Mapping[str, float], base: Mapping[str, float], metrics: Metrics) -> dict[str, Guarded]:
    """How a model stands to each guard that both it and the base have a score of.

    Args:
        scores: of the model, by task.
        base: of the base, by task.
        metrics: what the scores are.
    """
    return {
        task: Guarded(metrics[task].drop(scores[task], base[task]), allowed)
        for task, allowed in metrics.guards.items()
        if task in scores and task in base
    }


def agrees(split: Split, doc_to_target: object) -> bool:
    """Whether `objective: agreement` scores a split by agreement: what is searched on, and what has no labels."""
    return split != "test" or doc_to_target is None


def _right(answers: Settled) -> list[float]:
    return list(map(float, answers.right))


def _log_probability(answers: Answers | LabelSets | Tags) -> list[float]:
    return answers.log_probabilities


def _nothing_for_rouge(answers: Written) -> str | None:
    return nothing_for_rouge(answers.wanted)


def _no_labels(answers: Answers | LabelSets) -> str | None:
    return no_labels(answers) if isinstance(answers, LabelSets) else None


_accuracy = Metric("accuracy", of_rows=_right, tasks=CHOICES | SETS)
_of_sums = Metric("acc", of_rows=_right, tasks=frozenset({"choice"}), size=lambda text: 1.0)
_likelihood = Metric("log_likelihood", of_rows=_log_probability, low=-math.inf, high=0.0, percent=False)
_of_texts = Metric("bits_per_byte", high=math.inf, higher_is_better=False, percent=False, tasks=TEXTS)
METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        _accuracy,
        # As lm-evaluation-harness has them: `acc_norm` divides by the characters of a choice, `acc_bytes` by its bytes.
        _of_sums,
        replace(_of_sums, name="acc_norm", size=lambda text: float(len(text))),
        replace(_of_sums, name="acc_bytes", size=lambda text: float(len(text.encode()))),
        # Classes that neither labels nor answers have do not count in the three that follow: scikit-learn's rule.
        Metric("balanced_accuracy", of_all=balanced_accuracy, classes=True),
        Metric("f1", of_all=f1, classes=True, positive=True, pointless=no_positive),
        Metric("macro_f1", of_all=macro_f1, classes=True, tasks=CHOICES | SETS, pointless=_no_labels),
        Metric("mcc", of_all=mcc, low=-1.0, classes=True, pointless=one_class),
        replace(_likelihood, tasks=CHOICES | SETS | TAGS),
        Metric("micro_f1", of_all=LabelSets.micro_f1, tasks=SETS, pointless=_no_labels),
        Metric("entity_f1", of_all=Tags.entity_f1, tasks=TAGS, pointless=no_entity, unreadable=no_entities_in),
        Metric("word_accuracy", of_all=Tags.word_accuracy, tasks=TAGS),
        replace(_of_texts, of_rows=bits_per_byte),
        replace(_of_texts, name="byte_perplexity", of_rows=perplexity("bytes"), low=1.0),
        replace(_of_texts, name="word_perplexity", of_rows=perplexity("words"), low=1.0),
        Metric("pearson", of_all=pearson, tasks=NUMBERS, low=-1.0, pointless=all_equal),
        Metric("spearman", of_all=spearman, tasks=NUMBERS, low=-1.0, pointless=all_equal),
        Metric("mse", of_rows=squared_errors, tasks=NUMBERS, high=math.inf, higher_is_better=False, percent=False),
        Metric("exact_match", of_rows=_right, tasks=GENERATE),
        Metric("token_f1", of_rows=best_of(token_f1), tasks=GENERATE),
        *(Metric(name, of_rows=rouge(kind), tasks=GENERATE, pointless=_nothing_for_rouge) for name, kind in ROUGE),
        Metric("numeric", of_rows=best_of(same_number), tasks=GENERATE, fault=no_number),
        replace(_accuracy, name=AGREEMENT, labels=False, tasks=CHOICES | SETS | TAGS | GENERATE),
    )
}


# What the numbers of lm-evaluation-harness are, where they are no shares; it judges them itself.
_HARNESS = {
    metric.name: metric
    for metric in (
        *(Metric(name) for name in ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "f1", "em")),
        Metric("mcc", low=-1.0),
        Metric("brier_score", high=2.0, higher_is_better=False, percent=False),
        Metric("bits_per_byte", high=math.inf, higher_is_better=False, percent=False),
        *(
            Metric(name, low=1.0, high=math.inf, higher_is_better=False, percent=False)
            for name in ("perplexity", "word_perplexity", "byte_perplexity")
        ),
        *(Metric(name, high=100.0, percent=False) for name in ("bleu", "chrf")),
        Metric("ter", high=math.inf, higher_is_better=False, percent=False),
    )
}


def own_metric(name: str, score: Callable[[Any], float | Sequence[float]] | None = None) -> Metric:
    """What a score of somebody's own is.

    Args:
        name: of the function; a minus before it says that lower is better.
        score: from answers to the score; None where only what is stored is looked at.
    """
    return Metric(
        name,
        of_all=score,
        tasks=CHOICES | SETS | TAGS | NUMBERS | GENERATE,
        low=-math.inf,
        high=math.inf,
        higher_is_better=not name.startswith("-"),
        percent=False,
    )


def is_own(name: str) -> bool:
    """Whether a metric's name is that of code: `package.module:function`."""
    return ":" in name


def _metric_named(name: str) -> Metric:
    return METRICS.get(name) or (own_metric(name) if is_own(name) or name.startswith("-") else harness_metric(name))


def harness_metric(name: str) -> Metric:
    """What a number of lm-evaluation-harness is; of a name that is not known, a number of which more is better.

    Args:
        name: as the harness names it.
    """
    return replace(_HARNESS.get(name) or Metric(name, percent=False), tasks=frozenset({"lm_eval"}))


def task_metrics(task_type: str | None = None) -> list[str]:
    """Names that a task's `metric` can have.

    Args:
        task_type: type of the task; None for all types.
    """
    return [n for n, row in METRICS.items() if n != AGREEMENT and (task_type is None or task_type in row.tasks)]
