"""What races save: rows scored until a study was near its best trial, with races and without.

    python scripts/benchmark_racing.py replay URL STUDY       the trials of a finished study, raced afterwards
    python scripts/benchmark_racing.py compare URL... --raced URL... --name STUDY

`replay` takes the trials of a study that was not raced, in the order of their places, and races each against the best
before it, over 40 orders of the rows: what the same trials would have cost, and what stopping them would have missed.
`compare` takes pairs of studies of one spec and seed, of which the second was raced (its proposals are its own): rows
that were scored until the best whole trial was within half a point of the best trial of the first.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from dfmerge_studies.racing import Rival
from dfmerge_studies.study.rows import trial_rows
from dfmerge_studies.trials.marks import GRADIENT, RACED
from dfmerge_studies.trials.reading import settled

ORDERS = 40
NEAR = 0.005  # half a point


@dataclass(frozen=True)
class Replayed:
    """The trials of a study, raced in one order of the rows.

    Attributes:
        share: of the rows that are scored.
        stopped: share of the trials that are stopped.
        wrong: trials that are stopped and are worth more than their incumbent.
        lost: points between the best trial and the best that was not stopped.
        near: rows until a whole trial is within half a point of the best, of those that it took without races.
    """

    share: float
    stopped: float
    wrong: int
    lost: float
    near: float


def replay(trials: Sequence[FrozenTrial], error: float, seed: int) -> Replayed:
    """Race the trials of a study of accuracies, whose objective is the mean over tasks.

    Args:
        trials: all of them scored on all rows.
        error: bound on the rate of wrong stops.
        seed: of the order of rows.
    """
    rows = [trial_rows(trial) for trial in trials]
    worth = [float(np.mean([np.mean(each) for each in own.values()])) for own in rows]
    best, scored, stopped, wrong = 0, sum(map(len, rows[0].values())), 0, 0
    goal = max(worth) - NEAR
    plain = scored * (1 + next(number for number, each in enumerate(worth) if each >= goal))
    near = scored if worth[0] >= goal else None
    for number in range(1, len(rows)):
        tasks = rows[best]
        rival = Rival(tasks, dict.fromkeys(tasks, 1.0), dict.fromkeys(tasks, 1 / len(tasks)), error, seed)
        seen = [((task, row), rows[number][task][row]) for task, row in rival.order()]
        raced = GRADIENT not in trials[number].user_attrs  # one whose slope was asked for is scored on all rows
        looks = rival.looks() if raced else ()
        end = next((count for count in looks if rival.cannot_win(seen[:count])), None)
        scored += end or rival.count
        stopped += end is not None
        wrong += end is not None and worth[number] > worth[best]
        if end is None and worth[number] > worth[best]:
            best = number
        if near is None and worth[best] >= goal:
            near = scored
    whole = len(rows) * sum(map(len, rows[0].values()))
    lost = 100 * (max(worth) - worth[best])
    return Replayed(scored / whole, stopped / len(rows), wrong, lost, (near or scored) / plain)


def rows_until(trials: Sequence[FrozenTrial], goal: float) -> int | None:
    """Rows that were scored until a whole trial reached a value; None where none did.

    Args:
        trials: in the order of their places.
        goal: the value.
    """
    total = 0
    for trial in trials:
        total += int(trial.user_attrs[RACED]["scored"]) if RACED in trial.user_attrs else _count(trial)
        if trial.state == TrialState.COMPLETE and trial.value is not None and trial.value >= goal - 1e-9:
            return total
    return None


def _trials(url: str, name: str) -> list[FrozenTrial]:
    return settled(optuna.load_study(study_name=name, storage=url).trials)


def _count(trial: FrozenTrial) -> int:
    return sum(map(len, trial_rows(trial).values()))


def _replayed(url: str, name: str) -> None:
    trials = _trials(url, name)
    print(
        "| error | rows scored | trials stopped | wrongly | points lost | rows until near |\n|---|---|---|---|---|---|"
    )
    for error in (0.05, 0.1, 0.2):
        found = [replay(trials, error, seed) for seed in range(ORDERS)]
        names = ("share", "stopped", "wrong", "lost", "near")
        share, stopped, wrong, lost, near = (float(np.mean([getattr(each, name) for each in found])) for name in names)
        print(
            f"| {error} | {100 * share:.0f} % | {100 * stopped:.0f} % | {wrong:.2f} | {lost:.2f} | {100 * near:.0f} % |"
        )


def _compared(plain: Sequence[str], raced: Sequence[str], name: str) -> None:
    print("| | best, plain | best, raced | rows, plain | rows, raced | until near, plain | until near, raced |")
    print("|---|---|---|---|---|---|---|")
    for pair, (first, second) in enumerate(zip(plain, raced, strict=True)):
        both = _trials(first, name), _trials(second, name)
        best = [100 * max(t.value or 0.0 for t in trials if t.state == TrialState.COMPLETE) for trials in both]
        rows = [sum(t.user_attrs[RACED]["scored"] if RACED in t.user_attrs else _count(t) for t in s) for s in both]
        near = [rows_until(trials, best[0] / 100 - NEAR) for trials in both]
        print(f"| {pair} | {best[0]:.1f} | {best[1]:.1f} | {rows[0]} | {rows[1]} | {near[0]} | {near[1]} |")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    alone = commands.add_parser("replay")
    alone.add_argument("url")
    alone.add_argument("name")
    beside = commands.add_parser("compare")
    beside.add_argument("plain", nargs="+")
    beside.add_argument("--raced", nargs="+", required=True)
    beside.add_argument("--name", default="quickstart")
    given = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if given.command == "replay":
        _replayed(given.url, given.name)
    else:
        _compared(given.plain, given.raced, given.name)


if __name__ == "__main__":
    main()
