"""From the labels of a split, in whatever form its files have them, to indices of choices.

One rule for a whole split and for all kinds of file: where the text of every label is a choice, labels are texts; else,
where every label is an index, they are indices; anything else is refused.  Where both fit, a split is read as the
task's validation split is (`readings.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from decimal import Decimal
from functools import lru_cache
from typing import Any

from dfmerge_studies.errors import InputError
from dfmerge_studies.tasks.readings import Convention, Reading, Way
from dfmerge_studies.tasks.templates import CSV_HINT, is_missing

# Files and YAML write booleans in these words, and a reader of CSV makes booleans of the first three.
_TRUE, _FALSE = ("True", "true", "TRUE", "yes", "Yes", "YES"), ("False", "false", "FALSE", "no", "No", "NO")
_MIXED = "Write every label as the text of a choice, or every label as an index from 0, with a template if need be"


def read_labels(
    values: Sequence[Any],
    choices: Sequence[tuple[str, ...]],
    *,
    names: Sequence[str] = (),
    where: str,
    split: str,
    places: Sequence[str] | None = None,
    number: int | None = None,
    convention: Convention | None = None,
) -> tuple[list[int], str | None]:
    """The index of every row's right choice.

    Args:
        values: one per row: text, integer, float, boolean.
        choices: the choices of each row; empty where classes have no names.
        names: texts that integers among the values stand for, where the data says so (`ClassLabel`).
        where: file and field, for messages.
        split: name of the split, for messages.
        places: where each of the values stands, such as "row 3"; by default they are one per row.
        number: of the classes where they have no names, None where it is not known.
        convention: decides where labels could be both; alone a split is read as texts.

    Returns:
        One index per row, and a remark where the labels could be read otherwise too.

    Raises:
        InputError: a label is missing, is no choice and no index, or some labels are texts and others indices.
    """
    if places is None:
        places = [f"row {row}" for row in range(len(values))]
    texts = [_by_text(value, options, names) for value, options in zip(values, choices, strict=True)]
    numbers = [_bynumber_of(value, options, number) for value, options in zip(values, choices, strict=True)]
    read_as_texts = [index for index in texts if index is not None]
    read_as_numbers = [index for index in numbers if index is not None]
    ways: list[Way] = []
    if len(read_as_texts) == len(values):
        ways.append("texts")
    if len(read_as_numbers) == len(values):
        ways.append("indices")
    if not ways:
        raise _refused(values, choices, texts, numbers, places, where, split)
    doubt = _twofold(values, choices, texts, numbers, names, places)
    own = Reading(tuple(ways), doubt)
    way = (convention or Convention()).way(own, numbered=bool(names) or _numbered(choices), where=where, split=split)
    if way == "texts":
        return read_as_texts, _remark_on_texts(doubt) if doubt is not None and len(ways) > 1 else None
    if len(ways) == 1:
        _check_names(values, choices, texts, read_as_numbers, names, where)
    return read_as_numbers, _remark_on_booleans(values, choices)


def read_index(value: int, choices: Sequence[tuple[str, ...]], *, where: str, split: str) -> list[int]:
    """One index that the spec gives for all rows.

    Raises:
        InputError: a row has no such choice.
    """
    indices = [_bynumber_of(value, options) for options in choices]
    if None in indices:
        places = [f"row {row}" for row in range(len(choices))]
        raise _refused([value] * len(choices), choices, [None] * len(choices), indices, places, where, split)
    return [value] * len(choices)


def known_names(classes: Sequence[str]) -> tuple[str, ...]:
    """Names of classes; nothing where they are mere numbers, as LABEL_0 and LABEL_1 are.

    Args:
        classes: the names, in the order of the classes.
    """
    numbered = all(re.fullmatch(r"(?i:label|class)[ _-]?\d+", name) or name == str(i) for i, name in enumerate(classes))
    return () if numbered else tuple(classes)


@lru_cache
def class_order(ours: tuple[str, ...], head: tuple[str, ...], where: str) -> list[int]:
    """The class of a head that each of the data's classes is: by name, or by number where either has no names.

    Args:
        ours: names of the data's classes, in its order.
        head: names of the head's classes, in its order.
        where: file and field, for messages.

    Raises:
        InputError: they differ in number, or not every name has the same name on the other side.
    """
    hint = "Name the head's classes, in any order, or the expert that was trained on these classes"
    if len(ours) != len(head):
        raise InputError(
            f"{len(ours)} classes {list(ours)}, but the expert's head has {len(head)}: {list(head)}",
            where=where,
            hint=hint,
        )
    if not known_names(ours) or not known_names(head):
        return list(range(len(ours)))
    for form in (str, plain_name):
        places = {form(name): place for place, name in enumerate(head)}
        if len(places) == len(head) and {form(name) for name in ours} == set(places):
            return [places[form(name)] for name in ours]
    raise InputError(
        f"the classes {list(ours)} are not those of the expert's head: {list(head)} (id2label of its config.json)",
        where=where,
        hint=hint,
    )


def _by_text(value: Any, choices: tuple[str, ...], names: Sequence[str]) -> int | None:
    """Index of the choice that a label's text is: the text itself, else the same number, else the same class name."""
    if names and isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value < len(names):
            return None
        exact = _only(choices, names[value], str)
        return exact if exact is not None else _only(choices, names[value], plain_name)
    if isinstance(value, bool):
        return next((choices.index(word) for word in (_TRUE if value else _FALSE) if word in choices), None)
    if isinstance(value, (str, int)) and str(value) in choices:
        return choices.index(str(value))
    return None if number_of(value) is None else _only(choices, value, number_of)


def _only(choices: tuple[str, ...], value: Any, form: Any) -> int | None:
    """Index of the only choice that has the same form as a value."""
    found = [index for index, choice in enumerate(choices) if form(choice) == form(value)]
    return found[0] if len(found) == 1 else None


def _bynumber_of(value: Any, choices: tuple[str, ...], classes: int | None = None) -> int | None:
    """A label as an index; a boolean only where there are two choices, or classes, false being the first."""
    if isinstance(value, bool):
        return int(value) if (len(choices) or classes or 2) == 2 else None
    number = number_of(value)
    if number is None or number != int(number) or not 0 <= number < (len(choices) or math.inf):
        return None
    return int(number)


def number_of(value: Any) -> float | int | None:
    """A number, or the number that a text reads as; None where there is none, or none that is finite.

    Args:
        value: of a cell.
    """
    if isinstance(value, str):
        for kind in (int, float):
            with suppress(ValueError):
                return number_of(kind(value))
        return None
    if isinstance(value, Decimal):  # of a parquet file
        value = float(value)
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def plain_name(name: str) -> str:
    """A class's name without what differs between writers of one name: case, blanks, underscores, hyphens."""
    return "".join(sign for sign in name.casefold() if sign not in " _-")


def _twofold(
    values: Sequence[Any],
    choices: Sequence[tuple[str, ...]],
    texts: Sequence[int | None],
    numbers: Sequence[int | None],
    names: Sequence[str],
    places: Sequence[str],
) -> str | None:
    """The first label that is the text of one choice and the index of another, in words."""
    for value, options, text, number, place in zip(values, choices, texts, numbers, places, strict=True):
        if text is not None and number is not None and text != number:
            shown = f"{value!r} ({names[value]})" if names and isinstance(value, int) else repr(value)
            return f"{shown} of {place} is the choice {options[text]!r}; as an index it would be {options[number]!r}"
    return None


def _numbered(choices: Sequence[tuple[str, ...]]) -> bool:
    """Whether the text of some choice could be an index, and of another choice."""
    return any(
        _bynumber_of(text, options) not in (None, place)
        for options in dict.fromkeys(choices)
        for place, text in enumerate(options)
    )


def _remark_on_texts(doubt: str) -> str:
    """What to say where every label is an index too, and one of them another choice's."""
    meant = "If indices are meant, name the choice itself, as in '{{ options[label] }}'"
    return f"labels are read as texts: {doubt}. {meant}"


def _remark_on_booleans(values: Sequence[Any], choices: Sequence[tuple[str, ...]]) -> str | None:
    if not any(isinstance(value, bool) for value in values):
        return None
    first, second = map(repr, choices[0]) if choices[0] else ("class 0", "class 1")
    return f"labels are booleans: false is read as {first}, true as {second}"


def _check_names(
    values: Sequence[Any],
    choices: Sequence[tuple[str, ...]],
    texts: Sequence[int | None],
    numbers: Sequence[int],
    names: Sequence[str],
    where: str,
) -> None:
    """Refuse names of classes some of which are choices, but at other places."""
    if not names or len(set(choices)) > 1:
        return
    for value, text, number in zip(values, texts, numbers, strict=True):
        if text is not None and text != number:
            raise InputError(
                f"the data's class {value} is {names[value]!r}, which is choice {text} of {list(choices[0])}, while "
                f"other classes of {list(names)} are no choices",
                where=where,
                hint="Give the choices in the order of the data's classes, or name all of its classes among them",
            )


def _refused(
    values: Sequence[Any],
    choices: Sequence[tuple[str, ...]],
    texts: Sequence[int | None],
    numbers: Sequence[int | None],
    places: Sequence[str],
    where: str,
    split: str,
) -> InputError:
    for row, value in enumerate(values):
        if texts[row] is None and numbers[row] is None:
            options = choices[row]
            some = f"an index below {len(options)} or one of {list(options)}" if options else "a class number from 0 up"
            return InputError(
                f"{places[row]} of the split {split!r}: "
                + ("there is no label" if is_missing(value) else f"label {value!r} is not among the choices")
                + f", expected {some}",
                where=where,
                hint=f"Correct the data or doc_to_target{CSV_HINT if is_missing(value) else ''}",
            )
    text = next(row for row, number in enumerate(numbers) if number is None)
    number = next(row for row, index in enumerate(texts) if index is None)
    return InputError(
        f"labels of the split {split!r} are mixed: {values[text]!r} of {places[text]} is the text of a choice and no "
        f"index, {values[number]!r} of {places[number]} is an index and the text of no choice",
        where=where,
        hint=_MIXED,
    )
