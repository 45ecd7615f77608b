"""The numbers of a comparison's table, from the scores of its studies; nothing here is read or run.

s[m, k, t]   score of method m at seed k on task t, by the metric of t
S[m, k]      mean of s[m, k, t] over the tasks

A cell of a task is the mean and the sample standard deviation (n - 1) of s[m, k, t] over the seeds, the cell of the
mean those of S[m, k].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from dfmerge_studies.study.comparison import FINE_TUNED, Comparison, Entry
from dfmerge_studies.tasks.metrics import MEAN, Metric, Metrics

OURS = "df-merge"
SIGNIFICANT = 0.05
_SAME = 1e-9  # scores are counts over counts: what differs by less is the same number


@dataclass(frozen=True)
class Cell:
    """One number of the table.

    Attributes:
        mean: over the seeds.
        std: over the seeds; None for a single one.
    """

    mean: float
    std: float | None


@dataclass(frozen=True)
class Standing:
    """One row of the table.

    Attributes:
        method: its name.
        compete: whether it may be best or second; base, experts and the multi-task model may not.
        cells: by task, and `mean` where every task has a score; empty if it failed at every seed.
        by_seed: S, mean score by seed.
        drop: the task that loses most against its own expert, and by how many points of the means.
        p: of the paired test that `df-merge` is better, None where there is none to make.
        entries: what the row rests on, one per seed; empty for models that are not merged.
        errors: of the seeds that failed.
    """

    method: str
    compete: bool
    cells: Mapping[str, Cell]
    by_seed: Mapping[int, float]
    drop: tuple[str, float] | None = None
    p: float | None = None
    entries: Sequence[Entry] = ()
    errors: Sequence[str] = ()

    @property
    def star(self) -> bool:
        """Whether the test says that `df-merge` is better."""
        return self.p is not None and self.p < SIGNIFICANT


@dataclass(frozen=True)
class Standings:
    """A whole table.

    Attributes:
        study: name of the spec.
        split: whose scores.
        metrics: what they are; their tasks are the columns before the mean.
        seeds: of the comparison.
        rows: in order, the models that are not merged first.
        ranks: by column, 1 for the rows that are best and 2 for those that are second, by method.
    """

    study: str
    split: str
    metrics: Metrics
    seeds: Sequence[int]
    rows: Sequence[Standing]
    ranks: Mapping[str, Mapping[str, int]]

    @property
    def tasks(self) -> list[str]:
        """Columns before the mean."""
        return list(self.metrics)


def standings(comparison: Comparison, split: str) -> Standings:
    """The table of one split.

    Args:
        comparison: scores of all studies.
        split: "validation" or "test", one that the comparison was scored on.
    """
    tasks, metrics = comparison.tasks, comparison.metrics[split]
    scores = {
        row: {seed: by_split[split] for seed, by_split in by_seed.items()}
        for row, by_seed in comparison.references.items()
    }
    for variant in comparison.variants:
        scores[variant] = {entry.seed: entry.scores[split] for entry in comparison.of(variant)}
    means = {
        row: {seed: mean for seed, found in by_seed.items() if (mean := column_score(found, metrics, MEAN)) is not None}
        for row, by_seed in scores.items()
    }
    cells = {row: _cells(by_seed, means[row], tasks) for row, by_seed in scores.items()}
    experts = {task: cell.mean for task, cell in cells.get(FINE_TUNED, {}).items() if task in tasks}
    rows = []
    for row in scores:
        merged = row in comparison.variants
        rows.append(
            Standing(
                method=row,
                compete=merged,
                cells=cells[row],
                by_seed=means[row],
                drop=largest_drop({t: c.mean for t, c in cells[row].items()}, experts, metrics)
                if row != FINE_TUNED
                else None,
                p=paired_p(means.get(OURS, {}), means[row], metrics.mean) if row != OURS else None,
                entries=comparison.of(row) if merged else (),
                errors=[str(e.error) for e in comparison.failed if merged and e.variant == row],
            )
        )
    ranks = {
        column: ranked(
            {row.method: row.cells[column].mean for row in rows if row.compete and column in row.cells},
            metrics.of(column),
        )
        for column in (*tasks, MEAN)
    }
    return Standings(comparison.study, split, metrics, comparison.seeds, rows, ranks)


def column_score(scores: Mapping[str, float], metrics: Metrics, column: str) -> float | None:
    """One row's score in one column.

    Args:
        scores: by task; some may be missing.
        metrics: of all tasks that there are.
        column: a task, or "mean", which only a row with all tasks has.
    """
    if column == MEAN:
        return metrics.mean_of(scores) if set(scores) == set(metrics) else None
    return scores.get(column)


def spread(values: Sequence[float]) -> Cell:
    """Mean and sample standard deviation.

    Args:
        values: one per seed, at least one.
    """
    return Cell(fmean(values), stdev(values) if len(values) > 1 else None)


def ranked(values: Mapping[str, float], metric: Metric) -> dict[str, int]:
    """Which are best (1), all that tie; and which second (2): the best of the others, all that tie.

    Args:
        values: by name.
        metric: what they are.
    """
    ranks: dict[str, int] = {}
    for rank in (1, 2):
        rest = {name: metric.worth(value) for name, value in values.items() if name not in ranks}
        top = max(rest.values(), default=0.0)
        ranks.update({name: rank for name, value in rest.items() if value > top - _SAME})
    return ranks


def paired_p(ours: Mapping[int, float], theirs: Mapping[int, float], metric: Metric) -> float | None:
    """One-sided p-value of a paired t-test that our mean score is better.

    The pairs are seeds: at one seed both methods have the same Fisher inputs and the same validation rows.

    Args:
        ours: mean score by seed.
        theirs: the same of the other row.
        metric: what the mean scores are.

    Returns:
        The p-value; None for fewer than two common seeds, or where all differences are equal, of which the test, having
        no spread to compare with, says nothing.
    """
    from scipy.stats import ttest_rel

    seeds = sorted(ours.keys() & theirs.keys())
    better = "greater" if metric.higher_is_better else "less"
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    if len(seeds) < 2 or max(differences) - min(differences) < _SAME:
        return None
    found = ttest_rel([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds], alternative=better)
    return float(found.pvalue)


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


def _cells(
    by_seed: Mapping[int, Mapping[str, float]], means: Mapping[int, float], tasks: Sequence[str]
) -> dict[str, Cell]:
    columns = {task: [found[task] for found in by_seed.values() if task in found] for task in tasks}
    return {name: spread(values) for name, values in {**columns, MEAN: list(means.values())}.items() if values}
