"""Tasks whose answer is a tag for each word: reading words and tags, and what a score is.

given[i][w][c]   loss -log p(c|x_i, w) of tag c for word w of input i
wanted[i][w]     the right tag of the word, by index; `IGNORED` where it has none
names[c]         name of tag c, such as B-PER
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from dfmerge_studies.errors import InputError
from dfmerge_studies.tasks.labels import read_labels
from dfmerge_studies.tasks.ratios import of_ratios
from dfmerge_studies.tasks.readings import Convention
from dfmerge_studies.tasks.templates import as_list, is_missing

IGNORED = -100  # the tag of what is not scored, the convention of transformers
_ENTITY = re.compile(r"O|[BIES]-.+")


@dataclass(frozen=True)
class Tags:
    """What a head makes of the words of the inputs of one task, and the right tags."""

    given: Sequence[Sequence[Sequence[float]]]
    wanted: Sequence[Sequence[int]]
    names: Sequence[str] = ()

    @cached_property
    def taken(self) -> list[list[int]]:
        """Per input, the tag that the model takes for each word."""
        return taken_tags(self.given)

    @property
    def right(self) -> list[float]:
        """Per input, the share of its words that have the right tag."""
        return [fmean(one == other for one, other in pairs) for pairs in self._pairs]

    @property
    def log_probabilities(self) -> list[float]:
        """Per input, the mean over its words of the log-probability of the right tag."""
        return [
            fmean(-losses[tag] for losses, tag in zip(given, wanted, strict=True) if tag != IGNORED)
            for given, wanted in zip(self.given, self.wanted, strict=True)
        ]

    @property
    def _pairs(self) -> list[list[tuple[int, int]]]:
        """Per input, the tag that is taken and the right one, of the words that have one."""
        return [
            [(one, other) for one, other in zip(taken, wanted, strict=True) if other != IGNORED]
            for taken, wanted in zip(self.taken, self.wanted, strict=True)
        ]

    def entity_f1(self) -> float:
        """F1 over the entities that the tags spell, type and extent right, all types together: seqeval's."""
        from seqeval.metrics import f1_score

        return float(f1_score(*self._named, zero_division=0))

    def entity_f1_rows(self) -> list[float]:
        """Per input, what it makes of `entity_f1` (`ratios`)."""
        from seqeval.metrics.sequence_labeling import get_entities

        entities = ([set(get_entities(tags)) for tags in sides] for sides in zip(*self._named, strict=True))
        parts = ([(0, 2.0 * len(one & other), float(len(one) + len(other)))] for one, other in entities)
        return of_ratios(parts)

    @property
    def _named(self) -> list[list[list[str]]]:
        """The right tags by name, and those that are taken."""
        return [[[self.names[pair[side]] for pair in pairs] for pairs in self._pairs] for side in (1, 0)]

    def word_accuracy(self) -> float:
        """The share of all words that have the right tag."""
        return fmean(one == other for pairs in self._pairs for one, other in pairs)

    def word_accuracy_rows(self) -> list[float]:
        """Per input, what it makes of `word_accuracy` (`ratios`); inputs are drawn, not words."""
        parts = ([(0, float(one == other), 1.0) for one, other in pairs] for pairs in self._pairs)
        return of_ratios(parts)


def taken_tags(given: Sequence[Sequence[Sequence[float]]]) -> list[list[int]]:
    """Per input, the tag of lowest loss for each word.

    Args:
        given: per input and word, a loss per tag.
    """
    return [[min(range(len(losses)), key=losses.__getitem__) for losses in words] for words in given]


def read_words(value: Any, index: int, where: str) -> tuple[str, ...]:
    """The words of a row.

    Args:
        value: of a column or a template.
        index: of the row, for messages.
        where: file and field, for messages.

    Raises:
        InputError: it is no list of texts, or an empty one.
    """
    words = as_list(value)
    if words is None:
        what = "the cell is empty" if is_missing(value) else f"{str(value)[:60]!r} is no list of words"
        raise InputError(
            f"row {index}: {what}",
            where=where,
            hint="Name a column that holds a list of words, or write a template such as '{{ text.split() }}'",
        )
    odd = next((word for word in words if not isinstance(word, str)), None)
    if not words or odd is not None:
        what = f"{odd!r} is no word" if words else "there are no words"
        raise InputError(f"row {index}: {what}", where=where, hint="Give at least one word, each a text")
    return tuple(words)


def read_tags(
    values: Sequence[Any],
    words: Sequence[Sequence[str]],
    choices: Sequence[str],
    *,
    names: Sequence[str],
    where: str,
    split: str,
    convention: Convention | None = None,
) -> tuple[list[tuple[int, ...]], str | None]:
    """The tags of every row's words, by index; one reading for all of them, as of other labels.

    Args:
        values: of each row: a list with a name or an index for each word; `IGNORED` for words that have none.
        words: of each row.
        choices: names of the tags; nothing where they have none.
        names: texts that integers stand for, where the data says so.
        where: file and field, for messages.
        split: name of the split, for messages.
        convention: decides where tags could be names and indices.

    Returns:
        As many tags per row as words, and a remark where they could be read otherwise too.

    Raises:
        InputError: a row has no list, another number of tags than of words, or a tag that is not among the names.
    """
    lists = [_listed(values[row], row, len(own), where, split) for row, own in enumerate(words)]
    flat = [(row, word, tag) for row, tags in enumerate(lists) for word, tag in enumerate(tags) if tag != IGNORED]
    found, remark = read_labels(
        [tag for _, _, tag in flat],
        [tuple(choices)] * len(flat),
        names=names,
        where=where,
        split=split,
        places=[f"row {row}, word {word}" for row, word, _ in flat],
        convention=convention,
    )
    read = [[IGNORED] * len(tags) for tags in lists]
    for (row, word, _), tag in zip(flat, found, strict=True):
        read[row][word] = tag
    return [tuple(tags) for tags in read], remark


def _listed(value: Any, row: int, words: int, where: str, split: str) -> list[Any]:
    tags = as_list(value)
    if tags is None or len(tags) != words:
        what = f"{len(tags)} labels for {words} words" if tags is not None else f"{value!r} is no list of labels"
        raise InputError(
            f"row {row} of the split {split!r}: {what}",
            where=where,
            hint=f"Give a list with a label for every word; {IGNORED} for a word without one",
        )
    return tags


def no_entities_in(names: Sequence[str]) -> str | None:
    """Why no entities can be read from tags of these names, if so.

    Args:
        names: of the tags.
    """
    if not names:
        return "the tags have no names"
    odd = next((name for name in names if not _ENTITY.fullmatch(name)), None)
    return None if odd is None else f"{odd!r} is not O, B-TYPE, I-TYPE, E-TYPE or S-TYPE"


def no_entity(answers: Tags) -> str | None:
    """Why every model would have the same F1 of entities, if so."""
    labels = {answers.names[tag] for tags in answers.wanted for tag in tags if tag != IGNORED}
    return None if labels - {"O"} else "no row has an entity"
