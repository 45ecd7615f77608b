"""What pydantic finds wrong, as one sentence that names the field and what it should hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dfmerge_studies.errors import InputError, did_you_mean
from dfmerge_studies.spec.reading import masked
from dfmerge_studies.tasks.strict import BOOLEAN

_UNION_MEMBERS = ("choice", "classification", "float", "int", "str", "list[str]", "dict[str,float]")


def explain(error: ValidationError, path: Path, fields_at: Mapping[str, Sequence[type[BaseModel]]]) -> InputError:
    """The first problem of a validation as one sentence.

    Args:
        error: what pydantic found.
        path: the spec's file.
        fields_at: which fields are known, by the top-level field that they stand below ("" for the top).
    """
    first = _nearest(error.errors())
    # Pydantic names the member of a union, too, which is no field.
    location = [str(part) for index, part in enumerate(first["loc"]) if index < 2 or part not in _UNION_MEMBERS]
    field = ".".join(location) or "spec"
    found = first.get("input")
    if first["type"] == "extra_forbidden":
        classes = fields_at.get(location[0] if len(location) > 1 else "", [])
        known = sorted({name for model in classes for name in model.model_fields})
        mend = did_you_mean(location[-1], known) or f"Known fields: {', '.join(known)}"
        return InputError("unknown key", where=f"{path}: {field}", mend=mend)
    if first["type"] == "missing":
        return InputError("this field is required", where=f"{path}: {field}", mend="Add it")
    if first["type"] == BOOLEAN:
        return InputError(first["msg"], where=f"{path}: {field}", mend=first["ctx"]["mend"])
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if isinstance(found, (str, int, float, bool)) or found is None:
        message = f"found {masked(found)!r}; {message}"
    mend = "Correct the value; docs/specs.md describes every field"
    if first["type"] == "string_type" and isinstance(found, (int, float)):
        mend = f"Write it in quotes: '{found}'"
    return InputError(message, where=f"{path}: {field}", mend=mend)


def _nearest(errors: Sequence[ErrorDetails]) -> ErrorDetails:
    """The first error; of a union's members, the one that goes deepest into the value, since that member was meant."""
    first = errors[0]
    if first["loc"][-1:] and first["loc"][-1] in _UNION_MEMBERS:
        depth = len(first["loc"]) - 1
        return max((e for e in errors if e["loc"][:depth] == first["loc"][:depth]), key=lambda e: len(e["loc"]))
    return first
