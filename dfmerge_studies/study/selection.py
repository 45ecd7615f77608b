"""Naming the winner: the few trials that cannot be told from the best are compared on more rows.

    n[t]     validation rows of task t that the search sees
    m[t]     rows that it does not see and that are scored now
    s, f     score of a trial on the n[t] and on the m[t] rows
    T        completed trials

A trial cannot be told from the best if it is worth at least as much in one of twenty resamples of the rows, drawn with
replacement, the same for all trials (the paired bootstrap: Efron and Tibshirani 1993, chapter 16; Koehn 2004).  Of F1
and its kin, rows are what they make of the score to first order (`tasks/ratios.py`).  Where a trial keeps no rows, its
score is drawn with the standard error of a share of n[t] rows instead, independently of the others.

Of those, at most five are scored on the m[t] rows and judged by (n s + m f) / (n + m): a mean over all rows where the
metric is one.  All of it costs as many scored rows as 0.05 T trials, or as one: K = max(2, floor(0.05 T)) trials, and
m / n the power of two below max(1, 0.05 T) / K, so that trials that are added later find the same rows and the scores
that are there.  Fishers come from the cache; experts, and the base for guards, are scored once on the same rows where a
bound or agreement needs them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from optuna.trial import FrozenTrial

from dfmerge_studies.errors import RunError
from dfmerge_studies.spec import ObjectiveSettings
from dfmerge_studies.study.rows import trial_rows
from dfmerge_studies.study.value import DIGITS, constraint_values, objective_values, trial_value
from dfmerge_studies.study.winner import Rescored, Selection, keep_selection, selection_of
from dfmerge_studies.tasks.metrics import SAME, Metric, Metrics, TaskScore
from dfmerge_studies.tasks.sampling import seeded_generator
from dfmerge_studies.tasks.uncertainty import standard_error
from dfmerge_studies.trials.marks import DROPS, TASKS, place_of
from dfmerge_studies.trials.reading import results, violation

if TYPE_CHECKING:
    from dfmerge_studies.study.session import Session

logger = logging.getLogger(__name__)

COST = 0.05  # of the rows that the trials of a study are scored on
MOST = 5  # trials that are scored again
LEVEL = 0.05  # share of resamples in which a trial must be as good as the best
DRAWS = 1000
_COMPARED = 20  # trials that are compared with the best: of more than that, no more are ever scored again


def name_winner_(session: Session) -> Selection | None:
    """Name the winner of a study among its completed trials and keep it there; at once where that has been done.

    Every worker comes to the same: what one has scored, another finds in the study.

    Args:
        session: an open study, whose search is over for now.

    Returns:
        How it was named; None where there is nothing to choose: no trial, or an objective per task, whose front stays.
    """
    completed = results(session.study)
    if session.spec.objective.kind == "pareto" or not completed:
        return None
    most, share = budget(len(completed))
    session.merger.hold_out_(share)
    data = session.problem.data_digests("holdout")
    found = selection_of(session.study, completed)
    if found is not None and found.data == data:
        return found
    try:
        selection = _selection(session, completed, most, data)
    except RunError as error:
        logger.warning("the winner is the best of the search, as it could not be scored on more rows: %s", error)
        return None
    keep_selection(session.study, selection)
    return selection


def budget(trials: int) -> tuple[int, float]:
    """How many trials are scored again, and on how many rows each as a share of those that the search sees.

    Args:
        trials: T.

    Returns:
        K and m / n: their product is at most max(1, 0.05 T).
    """
    units = max(1.0, COST * trials)
    most = min(MOST, max(2, math.floor(units)))
    return most, 2.0 ** math.floor(math.log2(units / most))


def _selection(session: Session, completed: Sequence[FrozenTrial], most: int, data: Mapping[str, str]) -> Selection:
    spec, problem = session.spec, session.problem
    metrics = spec.metrics("validation")
    seen = {task: len(problem.examples(task, "validation")) for task in problem.tasks}
    further = {task: len(problem.examples(task, "holdout")) for task in problem.tasks}
    tied = contenders(completed, spec.objective, metrics, seen, seed=spec.search.seed)
    scored: dict[int, Rescored] = {}
    if len(tied) > 1 and any(further.values()):
        references: dict[str, float] = {}
        if spec.allowed:
            references = _together(session.references("validation"), session.references("holdout"), seen, further)
        for position, trial in enumerate(tied[:most], start=1):
            session.merger.progress("choosing the winner", position - 1, min(most, len(tied)))
            found = session.trial_scores(trial, "holdout")
            tasks = _together(trial.user_attrs[TASKS], found, seen, further)
            (value,) = objective_values(spec.objective, tasks, metrics)
            scored[trial.number] = Rescored(value, tasks, found, metrics.drops(tasks, references))
    among = [trial for trial in tied if trial.number in scored] or tied
    return Selection(
        winner=preferred(among, scored, spec.allowed).number,
        among=len(completed),
        tied=[trial.number for trial in tied],
        rows={task: seen[task] + (further[task] if scored else 0) for task in seen},
        further_rows=further if scored else dict.fromkeys(further, 0),
        scored=scored,
        data=data,
    )


def contenders(
    completed: Sequence[FrozenTrial],
    objective: ObjectiveSettings,
    metrics: Metrics,
    rows: Mapping[str, int],
    *,
    seed: int,
) -> list[FrozenTrial]:
    """The trials that cannot be told from the best on the rows of the search, the best first.

    Args:
        completed: at least one trial, in the order of their places.
        objective: what makes one better than another; not `pareto`.
        metrics: what the task scores are.
        rows: n, by task.
        seed: of the study.
    """
    least = min(violation(trial) for trial in completed)
    rivals = [trial for trial in completed if violation(trial) <= least]
    rivals = sorted(rivals, key=lambda trial: (-round(trial_value(trial), DIGITS), largest_drop(trial)))
    rivals = rivals[: _COMPARED + 1]
    scores = {task: _resampled(rivals, task, metrics[task], rows[task], seed) for task in metrics}
    values = np.array(
        [
            [
                objective_values(objective, {task: drawn[draw, column] for task, drawn in scores.items()}, metrics)[0]
                for column in range(len(rivals))
            ]
            for draw in range(DRAWS)
        ]
    )
    as_good = (values >= values[:, [0]] - SAME).mean(axis=0)
    return [trial for trial, share in zip(rivals, as_good, strict=True) if share >= LEVEL]


def preferred(
    trials: Sequence[FrozenTrial],
    scored: Mapping[int, Rescored],
    allowed: Mapping[str, float] = MappingProxyType({}),
) -> FrozenTrial:
    """The best of some trials: by constraints, then by value, then by the smaller largest drop, then the earliest.

    Args:
        trials: at least one; either all of them are scored again or none.
        scored: on all rows, by number.
        allowed: points that tasks may lose, of the spec.
    """

    def order(trial: FrozenTrial) -> tuple[float, float, float, int]:
        again = scored.get(trial.number)
        missed, value = (violation(trial), trial_value(trial))
        drops: Mapping[str, float] = trial.user_attrs.get(DROPS, {})
        if again is not None:
            missed = sum(max(0.0, each) for each in constraint_values(again.drops, allowed))
            value, drops = again.value, again.drops or drops
        return missed, -round(value, DIGITS), _largest(drops), place_of(trial)

    return min(trials, key=order)


def largest_drop(trial: FrozenTrial) -> float:
    """Points that the worst task of a completed trial loses against what it is compared with; 0 where nothing is."""
    return _largest(trial.user_attrs.get(DROPS, {}))


def _largest(drops: Mapping[str, float]) -> float:
    return round(max(drops.values(), default=0.0), DIGITS)


def _together(
    seen: Mapping[str, float], further: Mapping[str, float], n: Mapping[str, int], m: Mapping[str, int]
) -> dict[str, float]:
    """Scores on all rows from those on two parts of them."""
    return {
        task: (n[task] * score + m[task] * further[task]) / (n[task] + m[task]) if task in further else score
        for task, score in seen.items()
    }


def _resampled(trials: Sequence[FrozenTrial], task: str, metric: Metric, n: int, seed: int) -> np.ndarray:
    """Scores of trials on one task in every draw, as an array of draws by trials."""
    generator = seeded_generator(seed, "winner", task)
    kept = [trial_rows(trial).get(task, []) for trial in trials]
    drawn = np.empty((DRAWS, len(trials)))
    counts = generator.multinomial(n, np.full(n, 1.0 / n), size=DRAWS).astype(float)
    for column, (trial, rows) in enumerate(zip(trials, kept, strict=True)):
        score = trial.user_attrs[TASKS][task]
        if len(rows) == n:
            drawn[:, column] = counts @ np.array(rows) / n
        else:
            error = standard_error(TaskScore(score, metric.name, n), metric) or 0.0
            drawn[:, column] = score + error * generator.standard_normal(DRAWS)
    return drawn
