"""The metrics of several tasks side by side: their mean, drops against experts, guards against the base."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

from dfmerge_studies.tasks.metrics.row import Metric
from dfmerge_studies.tasks.metrics.table import metric_named


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
        return cls({task: metric_named(name) for task, name in names.items()}, guards)

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
