"""The total that a study should reach, kept in the study.

    dfmerge:target          the total that was stated last, by a spec or by --trials
    dfmerge:added:DIGITS    trials that one --add asked for on top of it, each under a name of its own
    dfmerge:from:DIGITS     trials with a result when that --add was given
    dfmerge:owed            the total of the last --trials, which is reached whatever rule would stop the study
    dfmerge:stopped         where a rule has stopped the study; null where it goes on after all

Every --add is one write of its own, so that several at one moment all count, in every storage.  A study that has
stopped has the total that it has reached, and what is added afterwards.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import optuna

from dfmerge_studies.trials.reading import counts, ended

TARGET = "dfmerge:target"
ADDED = "dfmerge:added:"
FROM = "dfmerge:from:"
OWED = "dfmerge:owed"
STOPPED = "dfmerge:stopped"


@dataclass(frozen=True)
class Asked:
    """What a study's attributes say of its total, as they were at one moment.

    Attributes:
        attributes: of the study.
    """

    attributes: Mapping[str, Any]

    @classmethod
    def of(cls, study: optuna.Study) -> Asked:
        """What they say now."""
        return cls(study.user_attrs)

    @property
    def added(self) -> int:
        """Trials that all --add together have asked for."""
        return sum(int(str(value)) for name, value in self.attributes.items() if name.startswith(ADDED))

    @property
    def stopped(self) -> Mapping[str, Any] | None:
        """Where a rule has stopped the study: `count` of its results, and what `Asked.stop` was told."""
        found: Mapping[str, Any] | None = self.attributes.get(STOPPED)
        return found

    @property
    def total(self) -> int:
        """The total, 0 for a new study."""
        if self.stopped is not None:
            return int(self.stopped["count"]) + self.added - int(self.stopped["added"])
        return int(self.attributes.get(TARGET, 0)) + self.added

    @property
    def owed(self) -> int:
        """Results that were asked for whatever rule would stop the study: by --trials, by each --add from then on."""
        reached = int(self.attributes.get(OWED, 0))
        adds = [
            (int(self.attributes.get(FROM + name.removeprefix(ADDED), 0)), int(str(more)))
            for name, more in self.attributes.items()
            if name.startswith(ADDED)
        ]
        for begun, more in sorted(adds):
            reached = max(reached, begun) + more
        return reached

    def stop(self, study: optuna.Study, count: int, **details: Any) -> dict[str, Any]:
        """Note that a rule has stopped the study; what was added since these attributes were read stays on top.

        Args:
            study: the study.
            count: its results.
            **details: what else to keep.
        """
        stopped = {"count": count, "added": self.added, **details}
        study.set_user_attr(STOPPED, stopped)
        return stopped


def stored_total(study: optuna.Study) -> int:
    """The total that a study was last asked to reach, 0 for a new one."""
    return Asked.of(study).total


def stop_of(study: optuna.Study) -> dict[str, Any] | None:
    """Where and why a rule has stopped a study; None if it has not, or if more was asked for since.

    Returns:
        `after`: how many results the rule looked at; `of`: the total that it had; `why`.
    """
    asked = Asked.of(study)
    if asked.stopped is None or asked.total > int(asked.stopped["count"]):
        return None
    return {name: asked.stopped[name] for name in ("after", "of", "why")}


def state_total(study: optuna.Study, total: int, *, lower: bool = True) -> None:
    """State a study's total.

    Args:
        study: the study.
        total: the total.
        lower: whether it may become smaller; a worker that was told a total may not undo what was added since.
    """
    asked = Asked.of(study)
    if total > asked.total or (lower and total < asked.total):
        go_on(study)
        study.set_user_attr(TARGET, total - asked.added)


def owe(study: optuna.Study, total: int) -> None:
    """Note that a total was asked for whatever rule would stop the study."""
    if Asked.of(study).attributes.get(OWED) != total:
        study.set_user_attr(OWED, total)


def go_on(study: optuna.Study) -> None:
    """Let a study that a rule has stopped go on towards its total."""
    if Asked.of(study).stopped is not None:
        study.set_user_attr(STOPPED, None)


def add_trials(study: optuna.Study, more: int, *, at_least: int) -> None:
    """Raise a study's total; of one that a rule has stopped, what it has reached.

    Args:
        study: the study.
        more: by how many trials.
        at_least: the total that the spec states, which they are added to where that is larger.
    """
    if Asked.of(study).stopped is None:
        state_total(study, at_least, lower=False)
    name = uuid.uuid4().hex
    study.set_user_attr(FROM + name, ended(counts(study)))
    study.set_user_attr(ADDED + name, more)
