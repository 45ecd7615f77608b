"""One way to read the labels of all splits of a task, which its validation split decides.

A label such as 1 may be the text of a choice, an index, or one of several bits.  Where a split could be read in two
ways it is read as the validation split is; where it could not, and some label would mean another choice, it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from dfmerge_studies.errors import InputError

Way = Literal["texts", "indices", "bits", "lists of labels"]
Question = Literal["what a label is", "what a row has"]


@dataclass(frozen=True)
class Reading:
    """How the labels of one split could be read.

    Attributes:
        ways: in which all of its labels make sense, the preferred one first.
        twofold: a label that would be one choice in one way and another one in another, and where it stands; None where
            there is none.
    """

    ways: tuple[Way, ...]
    twofold: str | None = None


class Convention:
    """Decides how a split is read.

    Args:
        decisive: the readings of the validation split, asked for where they matter; None where a split stands alone.
        name: of the validation split.

    Attributes:
        own: how the split that was read last could be read.
    """

    def __init__(
        self, decisive: Callable[[], Mapping[Question, Reading]] | None = None, name: str = "validation"
    ) -> None:
        self._decisive = decisive
        self._name = name
        self.own: dict[Question, Reading] = {}

    def way(
        self, own: Reading, *, numbered: bool, where: str, split: str, question: Question = "what a label is"
    ) -> Way:
        """The way to read a split.

        Args:
            own: how it could be read.
            numbered: whether labels of another split may be twofold though none of this one is.
            where: file and field, for messages.
            split: name of the split, for messages.
            question: what is to be decided.

        Raises:
            InputError: it cannot be read as the validation split is, and a label of one of them is twofold.
        """
        self.own[question] = own
        if self._decisive is None or not (own.twofold or numbered):
            return own.ways[0]
        decisive = self._decisive().get(question)
        if decisive is None or decisive.ways[0] == own.ways[0]:
            return own.ways[0]
        doubt = own.twofold or decisive.twofold
        if doubt is None:
            return own.ways[0]
        if decisive.ways[0] in own.ways:
            return decisive.ways[0]
        raise InputError(
            f"labels of the split {split!r} can only be {own.ways[0]}, and those of {self._name!r} are "
            f"{decisive.ways[0]}, though some label would mean another choice so: {doubt}",
            where=where,
            hint="Write the labels of all splits in one form, or name the choice itself, as in '{{ options[label] }}'",
        )
