"""Merges outside the search that figures need: lines from the base to the experts, and subsets of the validation rows.

    lam        position on a line: theta_pre + lam * tau[i]
    rows[t]    per validation row of task t, the score of a trial's merge on it; of accuracy, 1 or 0
    ratio      share of every task's validation rows that a choice of the best trial may see

Everything is kept in the study, since validation data and weights cannot change within one; what was computed before an
interruption is not computed again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from optuna.trial import FrozenTrial

from dfmerge_studies import limits
from dfmerge_studies.errors import InputError
from dfmerge_studies.progress import Progress, silent
from dfmerge_studies.study.probed import Rechosen, ScoredLines, keep_probe, stored_probe
from dfmerge_studies.study.rows import packed, trial_rows, unpacked
from dfmerge_studies.study.scores import trial_row
from dfmerge_studies.study.selection import largest_drop
from dfmerge_studies.study.value import DIGITS, objective_values, one_value
from dfmerge_studies.tasks.metrics import Metrics
from dfmerge_studies.tasks.sampling import seeded_generator
from dfmerge_studies.tasks.splits import Split
from dfmerge_studies.trials.reading import results

if TYPE_CHECKING:
    from dfmerge_studies.study.session import Session

POINTS = 11
DRAWS = 20
DEFAULT_RATIOS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


def interpolate(session: Session, points: int = POINTS, *, progress: Progress = silent) -> ScoredLines:
    """Validation scores along theta_pre + lam * tau[i] for lam in 0..1, for each expert (paper, Figure 2).

    Args:
        session: an open study.
        points: positions, both ends included.
        progress: told of every model that is scored.

    Raises:
        InputError: fewer than two points, or too many.
    """
    if not 2 <= points <= limits.POINTS:
        raise InputError(f"{points} points make no line", where="--points", hint=f"Give 2 to {limits.POINTS}")
    lambdas = [i / (points - 1) for i in range(points)]
    former = ScoredLines.of(session.study)
    scores = dict(former.scores) if former is not None and former.lambdas == lambdas else {}
    base = session.reference_scores("base", "validation")
    session.merger.ask_experts_("validation")
    for index, expert in enumerate(session.problem.experts):
        if expert in scores:
            continue
        line = [dict(base)]
        for position, lam in enumerate(lambdas[1:], start=1):
            progress(f"{expert}: interpolation", position, points)
            session.problem.resident.load_scaled_(index, lam)
            line.append(session.merger.scores("validation"))
        scores[expert] = line
        ScoredLines(lambdas, scores).keep(session.study)
    return ScoredLines(lambdas, scores)


def row_scores(session: Session, trial: FrozenTrial) -> dict[str, list[float]]:
    """The score of a trial's merge on each validation row.

    Where the trial itself does not keep them, it is merged again once, and they are kept in the study.

    Args:
        session: an open study, whose metrics are means over rows.
        trial: a completed trial.
    """
    if (own := trial_rows(trial)).keys() == session.problem.tasks.keys():
        return own
    name = f"rows:{trial_row(trial)}"
    found = stored_probe(session.study, name)
    if found is None:
        session.merger.ask_experts_("validation")
        session.merge_(trial)
        scored = session.merger.results("validation")
        found = packed({task: result.rows for task, result in scored.items() if result.rows is not None})
        keep_probe(session.study, name, found)
    return unpacked(found)


def nested_rows(total: int, ratios: Sequence[float], generator: np.random.Generator) -> list[list[int]]:
    """Rows of each ratio from one random order, so that a larger ratio's rows contain a smaller one's.

    Args:
        total: rows that there are.
        ratios: shares in (0, 1].
        generator: source of the order.
    """
    order = [int(row) for row in generator.permutation(total)]
    return [order[: max(1, round(ratio * total))] for ratio in ratios]


def reselect(
    session: Session,
    ratios: Sequence[float] = DEFAULT_RATIOS,
    *,
    draws: int = DRAWS,
    progress: Progress = silent,
) -> Rechosen:
    """How good the chosen trial is when the choice sees only a share of the validation rows (after paper, Figure 5).

    The trials stay those of the study, which saw all rows while it searched; only the choice among them is made again,
    over `draws` seeded orders of the rows, nested within an order.  So this is the effect on the choice, not the effect
    on a search.

    Args:
        session: an open study without constraints.
        ratios: shares of every task's validation rows, in (0, 1].
        draws: orders of the rows.
        progress: told of every trial that is merged again.

    Raises:
        InputError: a ratio is not a share, or the study has constraints or no trials.
    """
    ratios = sorted({float(ratio) for ratio in ratios})
    if not ratios or not all(0 < ratio <= 1 for ratio in ratios):
        raise InputError("a ratio must be above 0 and at most 1", where="--ratios", hint="For instance 0.1,0.5,1")
    trials = results(session.study)
    metrics = session.spec.metrics("validation")
    reason = why_not_reselect(session.spec.allowed, session.spec.objective.kind, len(trials), metrics)
    if reason is not None:
        raise InputError(reason, where="--figures", hint="Leave the figure `ratio` out")
    split: Split = "validation" if session.spec.untested else "test"
    rows = {}
    for position, trial in enumerate(trials, start=1):
        progress("rows of each trial", position, len(trials))
        rows[trial.number] = row_scores(session, trial)
    by_number = {trial.number: trial for trial in trials}
    chosen = [_choices(session, by_number, rows, ratios, draw) for draw in range(draws)]
    scores = {}
    picked = sorted({number for choices in chosen for number in choices})
    for position, number in enumerate(picked, start=1):
        progress(f"{split} of chosen trials", position, len(picked))
        scores[number] = _worth(session, session.trial_scores(by_number[number], split), split)
    found = Rechosen(ratios, split, chosen, scores, sorted(rows))
    found.keep(session.study)
    return found


def why_not_reselect(allowed: Mapping[str, float], objective: str, trials: int, metrics: Metrics) -> str | None:
    """Why a study has no choice to make again, None where it has."""
    if allowed:
        return "a choice under max_drop depends on more than the rows of the merges"
    if objective not in ("mean", "weighted", "min", "pareto"):
        return f"the objective {objective} does not score answers against labels"
    whole = [metric.name for metric in metrics.values() if metric.of_rows is None]
    if whole:
        return f"{whole[0]} is no mean over rows, so that the rows of a merge do not give it for a share of them"
    if trials < 2:
        return "there is nothing to choose between with fewer than two completed trials"
    return None


def _choices(
    session: Session,
    trials: Mapping[int, FrozenTrial],
    rows: Mapping[int, Mapping[str, Sequence[float]]],
    ratios: Sequence[float],
    draw: int,
) -> list[int]:
    """Number of the best trial per ratio; among equals that of the smaller largest drop, then the earliest."""
    seed, tasks = session.spec.search.seed, list(session.problem.tasks)
    totals = {task: len(next(iter(rows.values()))[task]) for task in tasks}
    subsets = {
        task: nested_rows(totals[task], ratios, seeded_generator(seed, "ratio", str(draw), task)) for task in tasks
    }
    chosen = []
    for place in range(len(ratios)):
        worth = {}
        for number, row in rows.items():
            shares = {
                task: sum(row[task][i] for i in subsets[task][place]) / len(subsets[task][place]) for task in tasks
            }
            worst = min(session.spec.metrics("validation").worths(shares).values())
            worth[number] = (
                round(_worth(session, shares, "validation"), DIGITS),
                worst if session.spec.objective.kind == "pareto" else -largest_drop(trials[number]),
            )
        chosen.append(max(worth, key=worth.__getitem__))
    return chosen


def _worth(session: Session, scores: Mapping[str, float], split: Split) -> float:
    return one_value(objective_values(session.spec.objective, scores, session.spec.metrics(split)))
