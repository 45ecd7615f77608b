"""Tasks whose answer is a number: reading the right ones, and what a score is.

given[i]    number that the model gives for input i
wanted[i]   the right one
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import pvariance
from typing import Any

from dfmerge_studies.errors import InputError
from dfmerge_studies.tasks.labels import number_of
from dfmerge_studies.tasks.templates import CSV_HINT, is_missing


@dataclass(frozen=True)
class Numbers:
    """What a regression head makes of the inputs of one task, and the right numbers."""

    given: Sequence[float]
    wanted: Sequence[float]


def read_numbers(values: Sequence[Any], *, where: str, split: str) -> list[float]:
    """The right number of every row.

    Args:
        values: one per row: numbers, or texts of numbers.
        where: file and field, for messages.
        split: name of the split, for messages.

    Raises:
        InputError: naming the first row that has none.
    """
    numbers = [None if isinstance(value, bool) else number_of(value) for value in values]
    for row, (value, number) in enumerate(zip(values, numbers, strict=True)):
        if number is None:
            what = "there is no label" if is_missing(value) else f"label {value!r} is not a finite number"
            raise InputError(
                f"row {row} of the split {split!r}: {what}",
                where=where,
                hint=f"Give a number in every row, or use type: classification for classes{CSV_HINT}",
            )
    return [float(number) for number in numbers if number is not None]


def pearson(answers: Numbers) -> float:
    """Pearson's correlation; 0 where a side is constant, which has none."""
    from scipy.stats import pearsonr

    return float(pearsonr(answers.given, answers.wanted).statistic) if _varies(answers) else 0.0


def spearman(answers: Numbers) -> float:
    """Spearman's rank correlation, equal numbers having their mean rank; 0 where a side is constant."""
    from scipy.stats import spearmanr

    return float(spearmanr(answers.given, answers.wanted).statistic) if _varies(answers) else 0.0


def squared_errors(answers: Numbers) -> list[float]:
    """Of every input."""
    return [(given - wanted) ** 2 for given, wanted in zip(answers.given, answers.wanted, strict=True)]


def all_equal(answers: Numbers) -> str | None:
    """Why every model would have the same correlation, if so."""
    return None if len(set(answers.wanted)) > 1 else "all rows have the same number"


def _varies(answers: Numbers) -> bool:
    return all(pvariance(side) > 0 for side in (answers.given, answers.wanted))
