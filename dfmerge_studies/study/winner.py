"""Which trial of a study is the winner, and what the study keeps of how it was named.

The best of many noisy scores is partly luck.  When a run has its total, the few trials that cannot be told from the
best are compared again (`selection.py`), and the one that is named is kept in the study.  Studies of several objectives
and those that have gone on since have no such record: their winner is the best trial of the search.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import optuna
from optuna.trial import FrozenTrial

from dfmerge_studies.errors import InputError, RunError
from dfmerge_studies.spec import ObjectiveSettings, StudySpec
from dfmerge_studies.study.value import best_trial
from dfmerge_studies.trials.reading import pruned_of, results

_WINNER = "dfmerge:winner"  # study attribute


@dataclass(frozen=True)
class Rescored:
    """A trial on all rows that the choice rests on: those that the search saw, and further ones.

    Attributes:
        value: what it is worth on them, as the value of a trial.
        tasks: score by task.
        further: score by task on the further rows alone.
        drops: points against each task's expert, or a guard's base, on all rows, where these were scored on them.
    """

    value: float
    tasks: Mapping[str, float]
    further: Mapping[str, float] = field(default_factory=dict)
    drops: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Selection:
    """How a study's winner was named.

    Attributes:
        winner: number of the trial.
        among: completed trials that there were; where a study has others now, the record is out of date.
        tied: numbers of the trials that cannot be told from the best on the rows of the search, the best first.
        rows: validation rows that the choice rests on, by task.
        further_rows: of them those that the search did not see; 0 where there were none.
        scored: of the tied trials those that were scored on the further rows, by number; empty where there were none.
        data: digests of the further rows, by task.
    """

    winner: int
    among: int
    tied: Sequence[int]
    rows: Mapping[str, int]
    further_rows: Mapping[str, int]
    scored: Mapping[int, Rescored] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)

    @property
    def rescored(self) -> Rescored | None:
        """The winner on all rows, None where no further ones were there."""
        return self.scored.get(self.winner)

    def described(self) -> dict[str, Any]:
        """The same for `--json`: the winner on all rows, and what it was chosen among."""
        again = self.rescored
        return {
            "value": again.value if again is not None else None,
            "tasks": dict(again.tasks) if again is not None else None,
            "rows": dict(self.rows),
            "further_rows": dict(self.further_rows),
            "tied": list(self.tied),
            "scored": {str(number): entry.value for number, entry in self.scored.items()},
        }

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> Self:
        """The record that `kept` made JSON of."""
        scored = {int(number): Rescored(**entry) for number, entry in kept["scored"].items()}
        return cls(**{**kept, "scored": scored})

    def kept(self) -> dict[str, Any]:
        """The record as JSON."""
        fields = asdict(self)
        return {**fields, "scored": {str(number): entry for number, entry in fields["scored"].items()}}


def stored_selection(study: optuna.Study) -> Selection | None:
    """What a study keeps of how its winner was named, out of date or not."""
    kept = study.user_attrs.get(_WINNER)
    return Selection.of(kept) if kept is not None else None


def keep_selection(study: optuna.Study, selection: Selection) -> None:
    """Write how a study's winner was named."""
    study.set_user_attr(_WINNER, selection.kept())


def selection_of(study: optuna.Study, completed: Sequence[FrozenTrial]) -> Selection | None:
    """How a study's winner was named, None where it was not, or not among these trials.

    Args:
        study: from its storage.
        completed: its completed trials.
    """
    found = stored_selection(study)
    return found if found is not None and found.among == len(completed) else None


def winner_of(
    study: optuna.Study, objective: ObjectiveSettings, completed: Sequence[FrozenTrial] | None = None
) -> FrozenTrial | None:
    """The trial that is exported and shown: the one that was named, or else the best of the search.

    Args:
        study: from its storage.
        objective: what makes one trial better than another.
        completed: its completed trials, in the order of their places, where they have been read already.
    """
    completed = results(study) if completed is None else completed
    selection = selection_of(study, completed)
    if selection is not None:
        named = next((trial for trial in completed if trial.number == selection.winner), None)
        if named is not None:
            return named
    return best_trial(completed, objective)


def find_trial(study: optuna.Study, spec: StudySpec, number: int | None) -> FrozenTrial:
    """The winner, or the completed trial of a given number.

    Args:
        study: an open study.
        spec: its name and objective.
        number: Optuna's number of the trial; None for the winner.

    Raises:
        InputError: the number is not that of a completed trial.
        RunError: no trial has completed yet.
    """
    completed = results(study)
    if number is None:
        best = winner_of(study, spec.objective, completed)
        if best is None:
            raise RunError(f"the study {spec.name!r} has no completed trial yet", hint="Run it first")
        return best
    for trial in completed:
        if trial.number == number:
            return trial
    if any(trial.number == number for trial in pruned_of(study.get_trials(deepcopy=False))):
        what = f"trial {number} was stopped on a part of its rows, so it has no score of its own"
        raise InputError(what, where="--trial", hint="`dfmerge merge` takes its coefficients")
    known = ", ".join(str(trial.number) for trial in completed[:20]) or "none"
    raise InputError(f"no completed trial {number}", where="--trial", hint=f"Completed trials: {known}")
