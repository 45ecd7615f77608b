"""The total that a study should reach, kept in the study.

    dfmerge:target          the total that was stated last, by a spec or by --trials
    dfmerge:added:DIGITS    trials that one --add asked for on top of it, each under a name of its own

Every --add is one write of its own, so that several at one moment all count, in every storage.
"""

from __future__ import annotations

import uuid

import optuna

TARGET = "dfmerge:target"
ADDED = "dfmerge:added:"


def stored_total(study: optuna.Study) -> int:
    """The total that a study was last asked to reach, 0 for a new one."""
    attributes = study.user_attrs
    return int(attributes.get(TARGET, 0)) + _added(attributes)


def state_total(study: optuna.Study, total: int, *, lower: bool = True) -> None:
    """State a study's total.

    Args:
        study: the study.
        total: the total.
        lower: whether it may become smaller; a worker that was told a total may not undo what was added since.
    """
    attributes = study.user_attrs
    stored = int(attributes.get(TARGET, 0)) + _added(attributes)
    if total > stored or (lower and total < stored):
        study.set_user_attr(TARGET, total - _added(attributes))


def add_trials(study: optuna.Study, more: int, *, at_least: int) -> None:
    """Raise a study's total.

    Args:
        study: the study.
        more: by how many trials.
        at_least: the total that the spec states, which they are added to where that is larger.
    """
    state_total(study, at_least, lower=False)
    study.set_user_attr(f"{ADDED}{uuid.uuid4().hex}", more)


def _added(attributes: dict[str, object]) -> int:
    return sum(int(str(value)) for name, value in attributes.items() if name.startswith(ADDED))
