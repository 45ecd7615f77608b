"""What is wrong with the fields of a spec, each in a sentence that names the field and what it should hold."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dfmerge_studies.errors import InputError, did_you_mean
from dfmerge_studies.redact import is_secret, masked_url
from dfmerge_studies.spec.reading import shortened
from dfmerge_studies.tasks.strict import BOOLEAN

_UNWRITABLE = re.compile("[\\x00\\ud800-\\udfff]")
_NO_TEXT = "has a character that no text has"
_UNION_MEMBERS = (
    "choice",
    "classification",
    "regression",
    "multi-label-classification",
    "token-classification",
    "text",
    "generate",
    "lm_eval",
    "float",
    "literal['fisher-trace']",
    "int",
    "str",
    "list[str]",
    "list[float]",
    "dict[str,float]",
    "[key]",
)


@dataclass(frozen=True)
class Wrong:
    """What is wrong with a field.

    Attributes:
        place: the field's names from the top of the spec down.
        problem: one sentence.
    """

    place: tuple[str, ...]
    problem: InputError


def explain(error: ValidationError, path: Path, fields_at: Mapping[str, Sequence[type[BaseModel]]]) -> list[Wrong]:
    """Every problem of a validation.

    Args:
        error: what pydantic found.
        path: the spec's file.
        fields_at: which fields are known, by the top-level field that they stand below ("" for the top).
    """
    errors = error.errors()
    told = []
    while errors:
        nearest, errors = _nearest(errors)
        # Pydantic names the member of a union, too, which is no field.
        loc = nearest["loc"]  # a field may have the name of a member: what stands behind that is the field
        place = tuple(str(p) for i, p in enumerate(loc) if i < 2 or p not in _UNION_MEMBERS or p == loc[i - 1])
        told.append(Wrong(place, _sentence(nearest, place, path, fields_at)))
    return told


def _sentence(
    error: ErrorDetails, place: tuple[str, ...], path: Path, fields_at: Mapping[str, Sequence[type[BaseModel]]]
) -> InputError:
    field = ".".join(place) or "spec"
    found = error.get("input")
    if error["type"] == "extra_forbidden":
        classes = fields_at.get(place[0] if len(place) > 1 else "", [])
        known = sorted({name for model in classes for name in model.model_fields})
        hint = did_you_mean(place[-1], known) or f"Known fields: {', '.join(known)}"
        if place[-1] in known:
            hint = _belongs(place[-1], classes)
        return InputError("unknown key", where=f"{path}: {field}", hint=hint)
    if error["type"] == "missing":
        return InputError("this field is required", where=f"{path}: {field}", hint="Add it")
    if error["type"] == BOOLEAN:
        return InputError(error["msg"], where=f"{path}: {field}", hint=error["ctx"]["mend"])
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if isinstance(found, (str, int, float, bool)) or found is None:
        shown = masked_url(found) if isinstance(found, str) else found
        message = f"found {'***' if any(map(is_secret, place)) else shortened(shown)}; {message}"
    hint = "Correct the value; docs/specs.md describes every field"
    if error["type"] == "string_type" and isinstance(found, (int, float)):
        hint = f"Write it in quotes: '{found}'"
    return InputError(message, where=f"{path}: {field}", hint=hint)


def _belongs(field: str, classes: Sequence[type[BaseModel]]) -> str:
    """Where a field that is known, and not here, would have its place."""
    owners = [model for model in classes if field in model.model_fields]
    types = [
        str(get_args(model.model_fields["type"].annotation)[0]) for model in owners if "type" in model.model_fields
    ]
    return f"It goes with type: {', '.join(types)}" if types else "It has its place elsewhere; docs/specs.md says where"


def _nearest(errors: Sequence[ErrorDetails]) -> tuple[ErrorDetails, list[ErrorDetails]]:
    """The first error, and those that are about something else.

    Of a union's members, the error that goes deepest into the value is the one to tell, since that member was meant.
    """
    first, *rest = errors
    if first["loc"][-1:] and first["loc"][-1] in _UNION_MEMBERS:
        outer = first["loc"][:-1]
        same = [e for e in errors if e["loc"][: len(outer)] == outer]
        return max(same, key=lambda e: len(e["loc"])), [e for e in rest if e not in same]
    return first, rest


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
