"""What is wrong with the fields of a spec, each in a sentence that names the field and what it should hold."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dfmerge_studies.errors import InputError, did_you_mean
from dfmerge_studies.redact import is_secret, masked_url
from dfmerge_studies.spec.reading import shortened
from dfmerge_studies.spec.tree import Spot, expected, home, path_to, spot, texts
from dfmerge_studies.tasks.strict import BOOLEAN

_UNWRITABLE = re.compile("[\\x00\\ud800-\\udfff]")
_NO_TEXT = "has a character that no text has"
_MAPPINGS = ("model_type", "model_attributes_type", "dict_type")
_LISTS = ("list_type", "tuple_type")
_PLAIN = ("bool", "int", "float", "string")
# Errors that say no more than that a value has another type: what is expected, the place says better.
_OF_TYPE = (
    *(f"{kind}_{what}" for kind in _PLAIN for what in ("type", "parsing")),
    "int_from_float",
    "literal_error",
    *_MAPPINGS,
    *_LISTS,
)


_Found = tuple[ErrorDetails, Spot]


@dataclass(frozen=True)
class Wrong:
    """What is wrong with a field.

    Attributes:
        place: the field's names from the top of the spec down.
        problem: one sentence.
    """

    place: tuple[str, ...]
    problem: InputError


def explained(error: ValidationError, path: Path, whole: type[BaseModel]) -> list[Wrong]:
    """Every problem of a validation.

    Args:
        error: what pydantic found.
        path: the spec's file.
        whole: the model that was validated.
    """
    waiting = [(each, spot(whole, each["loc"])) for each in _whole_lists(error.errors())]
    told = []
    while waiting:
        (first, at), *rest = waiting
        if at.fork is None:
            told.append(Wrong(at.names, _sentence(first, at, path)))
            waiting = rest
            continue
        outer = first["loc"][: at.fork]
        same = [each for each in waiting if each[1].fork == at.fork and each[0]["loc"][: at.fork] == outer]
        told += [Wrong(place.names, _sentence(each, place, path)) for each, place in _meant(same, at.fork, whole)]
        waiting = [each for each in rest if each not in same]
    return told


def _whole_lists(errors: Sequence[ErrorDetails]) -> Iterator[ErrorDetails]:
    """The errors, those of a list's length as one of the list: pydantic tells them of each place that is not there."""
    last = None
    for each in errors:
        lacking = each["type"] == "missing" and isinstance(each["loc"][-1], int)
        if lacking or (each["type"] == "too_long" and each["ctx"]["field_type"] == "Tuple"):
            loc = each["loc"][:-1] if lacking else each["loc"]
            if loc != last:
                yield {**each, "type": "tuple_type", "loc": loc}
            last = loc
        else:
            yield each


def _meant(tried: Sequence[_Found], fork: int, whole: type[BaseModel]) -> list[_Found]:
    """The errors to tell of those of a union's members: those inside the member that goes deepest into the value."""
    deepest = max(tried, key=lambda each: len(each[0]["loc"]))[0]["loc"]
    if len(deepest) > fork + 1:
        return [each for each in tried if each[0]["loc"][fork] == deepest[fork] and len(each[0]["loc"]) > fork + 1]
    fitting = [each for each in tried if each[0]["type"] not in _OF_TYPE]
    if fitting:  # the type is right for this member
        return fitting[:1]
    return [(tried[0][0], spot(whole, deepest[:fork]))]


def _sentence(error: ErrorDetails, at: Spot, path: Path) -> InputError:
    field = ".".join(at.names) or "spec"
    found = error.get("input")
    if error["type"] == "extra_forbidden":
        return InputError("unknown key", where=f"{path}: {field}", hint=_known(at))
    if error["type"] == "missing":
        return InputError("this field is required", where=f"{path}: {field}", hint="Add it")
    if error["type"] == BOOLEAN:
        return InputError(error["msg"], where=f"{path}: {field}", hint=error["ctx"]["mend"])
    if error["type"] == "union_tag_invalid":
        known = error["ctx"]["expected_tags"]
        hint = did_you_mean(error["ctx"]["tag"], known.strip("'").split("', '")) or "Use one of them"
        what = f"found {_shown(error['input']['type'])}; expected one of {known}"
        return InputError(what, where=f"{path}: {field}.type", hint=hint)
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    forms = len([kind for kind in at.kinds if kind is not NoneType])
    if error["type"] in (*_MAPPINGS, *_LISTS) or (error["type"] in _OF_TYPE and forms > 1):
        message = f"expected {expected(at.kinds)}"
    if any(map(is_secret, at.names)):
        message = f"found ***; {message}"
    elif not isinstance(found, (dict, list, tuple)):
        message = f"found {_shown(found)}; {message}"
    elif error["type"] in _OF_TYPE:
        message = f"found a {'mapping' if isinstance(found, dict) else 'list'}; {message}"
    near = did_you_mean(found, texts(at.kinds)) if isinstance(found, str) else None
    hint = near or "Correct the value; docs/specs.md describes every field"
    if error["type"] == "string_type" and isinstance(found, (int, float)):
        hint = f"Write it in quotes: '{found}'"
    return InputError(message, where=f"{path}: {field}", hint=hint)


def _shown(found: Any) -> str:
    """A value as YAML has it."""
    if found is None or isinstance(found, bool):
        return "null" if found is None else str(found).lower()
    return shortened(masked_url(found) if isinstance(found, str) else found)


def _known(at: Spot) -> str:
    """What to do about a key that a model does not know: where it would have its place, or which fields there are."""
    name, owner = at.names[-1], at.owners[-1][0]
    types = [_type(model) for model in at.beside if name in model.model_fields]
    if types:
        return f"It goes with type: {', '.join(types)}"
    place = home(at)
    if place is not None:
        return f"It is a field of {place}" if place else "Its place is at the top of the spec"
    for model in at.beside:
        path = path_to(name, model)
        if path is not None:
            return f"It is a field of {path}, which goes with type: {_type(model)}"
    known = sorted(owner.model_fields)
    return did_you_mean(name, known) or f"Known fields: {', '.join(known)}"


def _type(model: type[BaseModel]) -> str:
    """The value of `type` that settings are chosen by; their name where there is none."""
    field = model.model_fields.get("type")
    return str(get_args(field.annotation)[0]) if field is not None else model.__name__


def the_first(problems: Sequence[InputError]) -> InputError:
    """The first of some problems, with a word on the others."""
    first, *others = problems
    if not others:
        return first
    return InputError(
        first.what,
        where=first.where,
        hint=f"{first.hint}. {len(others)} more problem{'s' * (len(others) > 1)}: `dfmerge validate` lists all",
    )


def odd_values(data: Mapping[str, Any], path: Path) -> Iterator[Wrong]:
    """Values that YAML knows and a spec does not: dates, bytes, sets, texts that are no text, immense numbers.

    Yields:
        What is wrong, value by value.
    """
    waiting: deque[tuple[tuple[str, ...], Any]] = deque([((), data)])
    while waiting:
        place, value = waiting.popleft()
        if isinstance(value, dict):
            waiting += [((*place, str(key)), each) for key, each in value.items()]
            what = next((f"the key {key!r} {_NO_TEXT}" for key in value if _UNWRITABLE.search(str(key))), None)
        elif isinstance(value, list):
            waiting += [((*place, str(index)), each) for index, each in enumerate(value)]
            what = None
        else:
            what = _odd(value)
        if what is not None:
            field = ".".join(place) or "spec"
            yield Wrong(place, InputError(what, where=f"{path}: {field}", hint="Write a text in quotes, or a number"))


def _odd(value: Any) -> str | None:
    if isinstance(value, str):
        return f"the text {_NO_TEXT}" if _UNWRITABLE.search(value) else None
    if isinstance(value, int):
        digits = round(value.bit_length() * math.log10(2)) + 1
        return f"found an integer of about {digits} digits; expected at most 19" if abs(value) >= 2**64 else None
    if isinstance(value, float) or value is None:
        return None
    kind = {"date": "a date", "datetime": "a date", "bytes": "bytes", "set": "a set"}
    return f"found {kind.get(type(value).__name__, 'a value of an unknown kind')}; expected a text or a number"
