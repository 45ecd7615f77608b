"""The splits of a task's data that models are scored on."""

from __future__ import annotations

from typing import Literal

from dfmerge_studies.errors import InputError

# "validation": trials are scored on it, and Fisher inputs come from it.  "holdout": rows of the validation split that
# the search does not see, on which the winner is chosen.  "test": only ever reported.
Split = Literal["validation", "holdout", "test"]
SPLITS: tuple[Split, ...] = ("validation", "test")  # those that tables show


def as_split(text: str, where: str) -> Split:
    """A user's word for a split.

    Args:
        text: the word.
        where: what to name as the place at fault.

    Raises:
        InputError: it is another word.
    """
    for split in SPLITS:
        if split == text:
            return split
    raise InputError(f"unknown split {text!r}", where=where, hint=f"Use {' or '.join(SPLITS)}")
