"""Choices and classes that a model takes, and the scores of them that compare classes: scikit-learn's.

losses[i][c]   loss of choice or class c of input i, as in `scoring`
wanted[i]      the right one of input i, by index
taken[i]       the one that the model takes: the one of lowest loss, the first of them when several are equal
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from dfmerge_studies.tasks.label_sets import LabelSets
from dfmerge_studies.tasks.ratios import Part, of_correlation, of_ratios


def predict(losses: Iterable[Sequence[float]]) -> list[int]:
    """Index of the lowest loss of every input, the first of equal ones.

    Args:
        losses: per input, a loss per choice or class.
    """
    return [min(range(len(row)), key=row.__getitem__) for row in losses]


@dataclass(frozen=True)
class Answers:
    """What a model makes of the inputs of one task that has choices or classes.

    Attributes:
        losses: per input, a loss per choice or class.
        wanted: per input, the right one.
        positive: the class that `f1` is about.
    """

    losses: Sequence[Sequence[float]]
    wanted: Sequence[int]
    positive: int | None = None

    @cached_property
    def taken(self) -> list[int]:
        """Per input, the choice or class that the model takes."""
        return predict(self.losses)

    @property
    def given(self) -> Sequence[Sequence[float]]:
        """Per input, the losses."""
        return self.losses

    @property
    def log_probabilities(self) -> list[float]:
        """Per input, log p(wanted|x), where p is the softmax over the choices of minus their losses."""
        return [-row[right] - _log_sum(row) for row, right in zip(self.losses, self.wanted, strict=True)]

    @property
    def right(self) -> list[bool]:
        """Per input, whether the model takes the right one."""
        return [one == other for one, other in zip(self.taken, self.wanted, strict=True)]


def _log_sum(losses: Sequence[float]) -> float:
    """Log Σ exp(-l) without overflow."""
    lowest = min(losses)
    return math.log(sum(math.exp(lowest - loss) for loss in losses)) - lowest


def balanced_accuracy(answers: Answers) -> float:
    """Mean recall over the classes that the labels have: `balanced_accuracy_score`, which would warn of others."""
    from sklearn.metrics import recall_score

    present = sorted(set(answers.wanted))
    return float(recall_score(answers.wanted, answers.taken, labels=present, average="macro", zero_division=0.0))


def balanced_accuracy_rows(answers: Answers) -> list[float]:
    """Per input, what it makes of `balanced_accuracy` (`ratios`)."""
    parts = ([(one, float(one == other), 1.0)] for one, other in zip(answers.wanted, answers.taken, strict=True))
    return of_ratios(parts)


def f1(answers: Answers) -> float:
    """F1 of the positive class against all others."""
    from sklearn.metrics import f1_score

    sides = ([each == answers.positive for each in side] for side in (answers.wanted, answers.taken))
    return float(f1_score(*sides, zero_division=0.0))


def f1_rows(answers: Answers) -> list[float]:
    """Per input, what it makes of `f1` (`ratios`)."""
    return of_ratios([p for p in parts if p[0] == answers.positive] for parts in _f1_parts(answers))


def macro_f1(answers: Answers | LabelSets) -> float:
    """Mean of F1 over the classes that the labels or the answers have."""
    import numpy as np
    from sklearn.metrics import f1_score

    sides = (np.array(side) for side in (answers.wanted, answers.taken))
    return float(f1_score(*sides, average="macro", zero_division=np.nan))  # what neither side has does not count


def macro_f1_rows(answers: Answers | LabelSets) -> list[float]:
    """Per input, what it makes of `macro_f1` (`ratios`)."""
    parts = answers.f1_parts if isinstance(answers, LabelSets) else _f1_parts(answers)
    return of_ratios(parts)


def _f1_parts(answers: Answers) -> list[list[Part]]:
    """Of an input, its right class and the one that is taken; a hit is twice there."""
    pairs = zip(answers.wanted, answers.taken, strict=True)
    return [[(each, float(one == other), 1.0) for each in (one, other)] for one, other in pairs]


def mcc(answers: Answers) -> float:
    """Matthews's correlation coefficient."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(answers.wanted, answers.taken))


def mcc_rows(answers: Answers) -> list[float]:
    """Per input, what it makes of `mcc` (`ratios`)."""
    return of_correlation(answers.wanted, answers.taken)


def no_positive(answers: Answers) -> str | None:
    """Why F1 would be the same for every model, if so."""
    return None if answers.positive in answers.wanted else f"no row is of the positive class {answers.positive}"


def one_class(answers: Answers) -> str | None:
    """Why a correlation would be the same for every model, if so."""
    return None if len(set(answers.wanted)) > 1 else "all rows are of one class"
