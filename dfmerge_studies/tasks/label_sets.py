"""Tasks whose answer is a set of labels: reading the right sets, and what a score is.

given[i][k]    score z of label k for input i; p(k|x) = sigmoid(z), each label for itself, and it is taken where z > 0
wanted[i][k]   1 where input i has label k, else 0
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dfmerge_studies.errors import InputError
from dfmerge_studies.tasks.labels import read_labels
from dfmerge_studies.tasks.ratios import Part, of_ratios
from dfmerge_studies.tasks.readings import Convention, Reading, Way
from dfmerge_studies.tasks.templates import CSV_HINT, as_list, is_missing

Bits = tuple[int, ...]


@dataclass(frozen=True)
class LabelSets:
    """What a multi-label head makes of the inputs of one task, and the right sets."""

    given: Sequence[Sequence[float]]
    wanted: Sequence[Bits]

    @cached_property
    def taken(self) -> list[Bits]:
        """Per input, the labels that the model takes."""
        return taken_sets(self.given)

    @property
    def right(self) -> list[float]:
        """Per input, 1 where the set is the right one as a whole."""
        return [float(one == other) for one, other in zip(self.taken, self.wanted, strict=True)]

    @property
    def log_probabilities(self) -> list[float]:
        """Per input, the log-probability of its set, the sum over all labels."""
        return [
            sum(_log_sigmoid(z if bit else -z) for z, bit in zip(scores, bits, strict=True))
            for scores, bits in zip(self.given, self.wanted, strict=True)
        ]

    def micro_f1(self) -> float:
        """F1 over all pairs of input and label."""
        import numpy as np
        from sklearn.metrics import f1_score

        sides = (np.array(side) for side in (self.wanted, self.taken))
        return float(f1_score(*sides, average="micro", zero_division=0.0))

    def micro_f1_rows(self) -> list[float]:
        """Per input, what it makes of `micro_f1` (`ratios`)."""
        return of_ratios([(0, a, b) for _, a, b in parts] for parts in self.f1_parts)

    @property
    def f1_parts(self) -> list[list[Part]]:
        """Per input, what it adds to F1 of each label that it has or is given."""
        return [
            [(k, 2.0 * one * other, float(one + other)) for k, (one, other) in enumerate(bits) if one or other]
            for bits in (zip(*sides, strict=True) for sides in zip(self.wanted, self.taken, strict=True))
        ]


def taken_sets(given: Sequence[Sequence[float]]) -> list[Bits]:
    """Per input, the labels whose probability is above one half.

    Args:
        given: per input, a score per label.
    """
    return [tuple(int(z > 0) for z in scores) for scores in given]


def read_label_sets(
    values: Sequence[Any],
    choices: Sequence[str],
    number: int | None,
    *,
    names: Sequence[str],
    where: str,
    split: str,
    convention: Convention | None = None,
) -> tuple[list[Bits], str | None]:
    """The labels of every row, in one of three forms, the same for the whole split.

    Where every row has as many numbers as there are labels, each 0 or 1, they say which labels it has; otherwise its
    list names the labels that it has, by text or by index, as `read_labels` reads them.

    Args:
        values: of each row: a list.
        choices: names of the labels; nothing where they have none.
        number: of the labels, None where it is not known.
        names: texts that integers stand for, where the data says so.
        where: file and field, for messages.
        split: name of the split, for messages.
        convention: decides where rows of two labels could be both, and labels texts and indices.

    Returns:
        Per row, a bit for every label; and a remark where they could be read otherwise too.

    Raises:
        InputError: a row has no list, a label that is not among the names, or a bit for each of another number of
            labels; or nothing says how many there are.
    """
    lists = [_listed(value, row, where, split) for row, value in enumerate(values)]
    if number is None:
        raise InputError(
            "nothing says which labels there are", where=where, hint="Name them in doc_to_choice, in the head's order"
        )
    convention = convention or Convention()
    own = _forms(lists, number)
    # Of three labels or more, a row of bits has one of them twice, which no list of labels has.
    if convention.way(own, numbered=number <= 2, where=where, split=split, question="what a row has") == "bits":
        return [tuple(int(label) for label in labels) for labels in lists], None
    _refuse_bits(lists, number, where, split)
    flat = [(row, label) for row, labels in enumerate(lists) for label in labels]
    options = tuple(choices) or tuple(map(str, range(number)))
    found, remark = read_labels(
        [label for _, label in flat],
        [options] * len(flat),
        names=names,
        where=where,
        split=split,
        places=[f"row {row}" for row, _ in flat],
        convention=convention,
    )
    bits = [[0] * number for _ in lists]
    for (row, _), label in zip(flat, found, strict=True):
        bits[row][label] = 1
    return [tuple(each) for each in bits], remark


def _forms(lists: Sequence[Sequence[Any]], number: int) -> Reading:
    """Whether rows have a bit for every label, or lists of those that they have; bits where they could be both."""
    bits = [len(labels) == number and all(map(_is_bit, labels)) for labels in lists]
    twice = [len({*map(str, labels)}) < len(labels) for labels in lists]
    ways: list[Way] = ["bits"] if all(bits) else []
    if not all(bits) or not any(twice):
        ways.append("lists of labels")
    both = next((row for row in range(len(lists)) if bits[row] and not twice[row]), None)
    return Reading(tuple(ways), None if both is None else f"{list(lists[both])} of row {both}")


def no_labels(answers: LabelSets) -> str | None:
    """Why F1 would be the same for every model, if so."""
    return None if any(any(bits) for bits in answers.wanted) else "no row has a label"


def _listed(value: Any, row: int, where: str, split: str) -> list[Any]:
    labels = as_list(value)
    if labels is None:
        what = f"there are no labels{CSV_HINT}" if is_missing(value) else f"{value!r} is no list of labels"
        raise InputError(
            f"row {row} of the split {split!r}: {what}",
            where=where,
            hint="Give a list of the labels that a row has, empty for none, or a 0 or 1 for every label; a template "
            "makes one of several columns, such as '{{ [toxic, obscene] }}'",
        )
    return labels


def _refuse_bits(lists: Sequence[Sequence[Any]], number: int, where: str, split: str) -> None:
    """Refuse what looks like a bit for each of another number of labels: no index stands in a row twice."""
    for row, labels in enumerate(lists):
        if all(map(_is_bit, labels)) and len(set(labels)) < len(labels) != number:
            raise InputError(
                f"row {row} of the split {split!r}: {labels} has {len(labels)} numbers, 0 or 1, for {number} labels",
                where=where,
                hint="Give a 0 or 1 for every label in every row, or the labels that a row has, each once",
            )


def _is_bit(label: Any) -> bool:
    return isinstance(label, (bool, int, float)) and label in (0, 1)


def _log_sigmoid(z: float) -> float:
    return min(z, 0.0) - math.log1p(math.exp(-abs(z)))
