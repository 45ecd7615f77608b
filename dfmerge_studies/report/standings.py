"""The numbers of every table of scores: what `run`, `compare`, `evaluate`, a page and a card show.

They are worked out from scores; nothing here is read or run, and `renderings.py` says how they look.

s[m, k, t]   score of method m at seed k on task t, by the metric of t
S[m, k]      mean of s[m, k, t] over the tasks

A cell of a task is the mean and the sample standard deviation (n - 1) of s[m, k, t] over the seeds, the cell of the
mean those of S[m, k].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from types import MappingProxyType
from typing import Any

from dfmerge_studies.study.comparison import FINE_TUNED, ZERO_SHOT, ComparedStudy, Comparison
from dfmerge_studies.tasks.metrics import MEAN, SAME, Guarded, Metric, Metrics, TaskScore, guarded, largest_drop
from dfmerge_studies.tasks.splits import Split
from dfmerge_studies.tasks.uncertainty import difference, mean_error, mean_rows, standard_error

BASE, EXPERTS = "base, unmerged", "each task's own expert"  # rows of a study's own tables
OURS = "df-merge"
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Scored:
    """What was scored, on one split or several: a row of as many tables.

    Attributes:
        name: what it is.
        scores: by split and task; a row may lack a split or, the experts', a task.
        compete: whether it may be best or second.
        detail: how it was merged, as JSON has it beside its scores: coefficients and the like.
        results: the same scores with the rows that they rest on, as far as these are known.
    """

    name: str
    scores: Mapping[Split, Mapping[str, float]]
    compete: bool = True
    detail: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[Split, Mapping[str, TaskScore]] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One number of the table.

    Attributes:
        mean: over the seeds.
        std: over the seeds; None for a single one.
        error: standard error of the mean over the rows, of which there are so many whatever the seeds; None where
            it is not known.
        n: rows that it rests on; 0 where that is not known.
    """

    mean: float
    std: float | None
    error: float | None = None
    n: int = 0


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
        entries: studies of a comparison that the row rests on, one per seed; empty for models that are not merged.
        errors: of the seeds that failed.
        detail: of `Scored`.
        results: scores by task with their rows, of several seeds their mean row by row.
    """

    method: str
    compete: bool
    cells: Mapping[str, Cell]
    by_seed: Mapping[int, float]
    drop: tuple[str, float] | None = None
    p: float | None = None
    entries: Sequence[ComparedStudy] = ()
    errors: Sequence[str] = ()
    detail: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, TaskScore] = field(default_factory=dict)

    @property
    def star(self) -> bool:
        """Whether the test says that `df-merge` is better."""
        return self.p is not None and self.p < SIGNIFICANT


@dataclass(frozen=True)
class Standings:
    """A whole table.

    Attributes:
        study: name of the spec, empty where the table is of no study.
        split: whose scores.
        metrics: what they are; their tasks are the columns before the mean.
        seeds: of the comparison.
        rows: in order, the models that are not merged first.
        ranks: by column, 1 for the rows that are best and 2 for those that are second, by method; none for guards.
        marks: the same as tables show it: nothing where the rows of the data do not tell the best from the others.
    """

    study: str
    split: Split
    metrics: Metrics
    seeds: Sequence[int]
    rows: Sequence[Standing]
    ranks: Mapping[str, Mapping[str, int]]
    marks: Mapping[str, Mapping[str, int]]

    @classmethod
    def of(
        cls, study: str, split: Split, metrics: Metrics, seeds: Sequence[int], rows: Sequence[Standing]
    ) -> Standings:
        """The table of some rows.

        Args:
            study: name of the spec.
            split: whose scores.
            metrics: what they are.
            seeds: of the comparison.
            rows: in order.
        """
        ranks = _ranks(rows, metrics)
        marks = {c: {} if _alike(rows, metrics, c, by_method) else by_method for c, by_method in ranks.items()}
        return cls(study, split, metrics, seeds, rows, ranks, marks)

    @property
    def tasks(self) -> list[str]:
        """Columns before the mean."""
        return list(self.metrics)

    @property
    def columns(self) -> list[str]:
        """Columns with scores."""
        return [*self.metrics, MEAN]

    @property
    def base(self) -> dict[str, float]:
        """Scores of the base, if it has a row."""
        row = next((row for row in self.rows if row.method in (BASE, ZERO_SHOT)), None)
        return {} if row is None else {task: cell.mean for task, cell in row.cells.items() if task != MEAN}

    @property
    def bounds(self) -> dict[str, float]:
        """The score that each guard must keep, as far as the base's is known."""
        return self.metrics.bounds(self.base)

    def guards_of(self, row: Standing) -> dict[str, Guarded]:
        """How a row stands to each guard, as far as both it and the base have a score of it.

        Args:
            row: one of the table's.
        """
        scores = {task: row.cells[task].mean for task in self.bounds if task in row.cells}
        return guarded(scores, self.base, self.metrics)

    @property
    def rows_by_column(self) -> dict[str, int]:
        """How many rows of data the scores of each column rest on, as far as it is known."""
        rows = [row for row in self.rows if row.compete] or self.rows
        numbers = {column: {row.cells[column].n for row in rows if column in row.cells} for column in self.columns}
        return {column: max(found) for column, found in numbers.items() if max(found, default=0)}

    @property
    def errors(self) -> tuple[str, dict[str, float]] | None:
        """The last merged row that has standard errors, and these by column."""
        for row in reversed(self.rows):
            found = {column: cell.error for column, cell in row.cells.items() if cell.error is not None}
            if row.compete and found:
                return row.method, found
        return None

    @property
    def undecided(self) -> list[str]:
        """Columns in which the data's rows do not tell the best from the others."""
        return [column for column, ranks in self.ranks.items() if ranks and not self.marks[column]]

    @property
    def compared(self) -> bool:
        """Whether the rows are studies of a comparison, which have trials, seconds and drops to show."""
        return any(row.entries or row.errors for row in self.rows)


def side_by_side(rows: Sequence[Scored], metrics: Mapping[Split, Metrics], study: str = "") -> dict[Split, Standings]:
    """A table for each split that some row has scores of.

    Args:
        rows: in order; those without a score of a split are not in its table.
        metrics: what the scores are, by split.
        study: name of the spec.
    """
    tables: dict[Split, Standings] = {}
    for split, kinds in metrics.items():
        standing = [
            _standing(
                row.name,
                {0: row.scores[split]},
                kinds,
                compete=row.compete,
                detail=row.detail,
                results=[row.results.get(split, {})],
            )
            for row in rows
            if row.scores.get(split)
        ]
        if standing:
            tables[split] = Standings.of(study, split, kinds, (0,), standing)
    return tables


def standings(comparison: Comparison, split: Split) -> Standings:
    """The table of a comparison's scores on one split.

    Args:
        comparison: scores of all studies.
        split: one that the comparison was scored on.
    """
    metrics = comparison.metrics[split]
    references = {
        row: {seed: by_split[split] for seed, by_split in by_seed.items()}
        for row, by_seed in comparison.references.items()
    }
    rows = [_standing(name, by_seed, metrics, compete=False) for name, by_seed in references.items()]
    for variant in comparison.variants:
        entries = comparison.of(variant)
        by_seed = {entry.seed: entry.scores[split] for entry in entries}
        errors = [str(entry.error) for entry in comparison.failed if entry.variant == variant]
        found = [entry.results.get(split, {}) for entry in entries]
        rows.append(_standing(variant, by_seed, metrics, entries=entries, errors=errors, results=found))
    ours: Mapping[int, float] = next((row.by_seed for row in rows if row.method == OURS), {})
    means = {row.method: {column: cell.mean for column, cell in row.cells.items()} for row in rows}
    experts = {task: mean for task, mean in means.get(FINE_TUNED, {}).items() if task in metrics}
    rows = [
        replace(
            row,
            drop=largest_drop(means[row.method], experts, metrics) if row.method != FINE_TUNED else None,
            p=paired_p(ours, row.by_seed, metrics.mean) if row.method != OURS else None,
        )
        for row in rows
    ]
    return Standings.of(comparison.study, split, metrics, comparison.seeds, rows)


def _standing(
    name: str,
    by_seed: Mapping[int, Mapping[str, float]],
    metrics: Metrics,
    *,
    compete: bool = True,
    entries: Sequence[ComparedStudy] = (),
    errors: Sequence[str] = (),
    detail: Mapping[str, Any] = MappingProxyType({}),
    results: Sequence[Mapping[str, TaskScore]] = (),
) -> Standing:
    means = {seed: mean for seed, found in by_seed.items() if (mean := column_score(found, metrics, MEAN)) is not None}
    columns = {task: [found[task] for found in by_seed.values() if task in found] for task in metrics}
    cells = {name: spread(values) for name, values in {**columns, MEAN: list(means.values())}.items() if values}
    together = _together(cells, results)
    cells = {column: _with_rows(cell, column, together, metrics) for column, cell in cells.items()}
    return Standing(name, compete, cells, means, entries=entries, errors=errors, detail=detail, results=together)


def _together(cells: Mapping[str, Cell], results: Sequence[Mapping[str, TaskScore]]) -> dict[str, TaskScore]:
    """Scores with their rows, of several seeds one: the mean of each row, which may be another row at another seed."""
    found = {}
    for task in results[0] if results else ():
        of_seeds = [each.get(task) for each in results]
        known = [each for each in of_seeds if each is not None and each.n]
        if task in cells and len(known) == len(of_seeds):
            rows = mean_rows([each.rows or () for each in known])
            found[task] = TaskScore(cells[task].mean, known[0].metric, min(each.n for each in known), rows or None)
    return found


def _with_rows(cell: Cell, column: str, results: Mapping[str, TaskScore], metrics: Metrics) -> Cell:
    """A cell with its standard error and number of rows."""
    if column in results:
        return replace(cell, error=standard_error(results[column], metrics[column]), n=results[column].n)
    aims = {task: result for task, result in results.items() if task in metrics.aims}
    if column == MEAN and aims.keys() == metrics.aims.keys():
        return replace(cell, error=mean_error(aims, metrics), n=sum(each.n for each in aims.values()))
    return cell


def _of(row: Standing, tasks: Sequence[str]) -> dict[str, TaskScore]:
    return {task: row.results[task] for task in tasks}


def _alike(rows: Sequence[Standing], metrics: Metrics, column: str, ranks: Mapping[str, int]) -> bool:
    """Whether the data's rows do not tell the best of a column from the others, as far as they are known."""
    tasks = list(metrics.aims) if column == MEAN else [column]
    known = [row for row in rows if row.compete and column in row.cells and set(tasks) <= row.results.keys()]
    best = [row for row in known if ranks.get(row.method) == 1]
    others = [row for row in known if row not in best[:1]]
    found = [difference(_of(best[0], tasks), _of(other, tasks), metrics.only(tasks)) for other in others if best]
    return any(each.clear is False for each in found)


def _ranks(rows: Sequence[Standing], metrics: Metrics) -> dict[str, dict[str, int]]:
    """Ranks by column; in that of a guard nobody competes."""
    return {
        column: ranked(
            {row.method: row.cells[column].mean for row in rows if row.compete and column in row.cells}
            if column not in metrics.guards
            else {},
            metrics.of(column),
        )
        for column in (*metrics, MEAN)
    }


def column_score(scores: Mapping[str, float], metrics: Metrics, column: str) -> float | None:
    """One row's score in one column.

    Args:
        scores: by task; some may be missing.
        metrics: of all tasks that there are.
        column: a task, or "mean", which only a row with all tasks but guards has.
    """
    if column == MEAN:
        return metrics.mean_of(scores) if set(metrics.aims) <= set(scores) else None
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
        ranks.update({name: rank for name, value in rest.items() if value > top - SAME})
    return ranks


def paired_p(ours: Mapping[int, float], theirs: Mapping[int, float], metric: Metric) -> float | None:
    """One-sided p-value of a paired t-test that our mean score is better.

    The pairs are seeds: at one seed both methods have the same Fisher inputs and the same validation rows.

    Returns:
        The p-value; None for fewer than two common seeds, or where all differences are equal, of which the test, having
        no spread to compare with, says nothing.
    """
    from scipy.stats import ttest_rel

    seeds = sorted(ours.keys() & theirs.keys())
    better = "greater" if metric.higher_is_better else "less"
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    if len(seeds) < 2 or max(differences) - min(differences) < SAME:
        return None
    found = ttest_rel([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds], alternative=better)
    return float(found.pvalue)
