"""A YAML file and `--set` overrides as one mapping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dfmerge_studies import limits
from dfmerge_studies.boundary import kind_of, read_text, reading
from dfmerge_studies.errors import InputError, first_line
from dfmerge_studies.redact import masked_override
from dfmerge_studies.spec.fields import SEARCHES

_HINT = "Name a YAML file"
_SHOWN = 120  # characters of a value in a message
_LARGEST = 4 * 2**20  # bytes of a spec


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice."""


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, (str, int, float, bool)):
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} given twice", key_node.start_mark)
            seen.add(key)
    loader.flatten_mapping(node)
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as a mapping, read by a safe loader that refuses a key given twice.

    Raises:
        InputError: the file is missing, unreadable, no YAML, or no mapping.
    """
    with reading(str(path), "cannot be read", _HINT):
        missing = kind_of(path) == ""
    if missing:
        raise InputError("no such spec", where=str(path), hint="Give the path of a YAML file")
    text = read_text(path, hint=_HINT, limit=_LARGEST)
    try:
        data = yaml.load(text, Loader=_Loader)  # a subclass of SafeLoader
    except Exception as error:  # a date that there is not is a ValueError, an odd tag an AttributeError
        # Its own text shows the lines around, and they may hold a password.
        raise InputError(f"not valid YAML: {_problem(error)}", where=str(path), hint="Correct it") from None
    if not isinstance(data, dict):
        found = "the file is empty" if data is None else f"found {type(data).__name__}"
        raise InputError(
            f"{found}; expected a mapping of fields", where=str(path), hint="See docs/specs.md for a whole spec"
        )
    return data


def read_fields(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """A YAML file with overrides as one mapping of a size that can be worked with.

    Args:
        path: the file.
        overrides: `dotted.key=value` texts.

    Raises:
        InputError: the file cannot be read, an override has another form, or aliases make the whole immense.
    """
    data = read_yaml(path)
    for override in overrides:
        apply_override(data, override)
    left = limits.VALUES
    waiting: list[tuple[Any, int]] = [(data, 0)]
    while waiting:
        value, depth = waiting.pop()
        left -= 1
        if depth > limits.DEPTH or left < 0:
            what = f"fields lie {depth} deep in each other" if left >= 0 else f"more than {limits.VALUES} values"
            raise InputError(what, where=str(path), hint="Write fewer; an alias counts as often as it is used")
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, set, tuple)) else ()
        waiting += [(each, depth + 1) for each in inner]
    return data


def shortened(found: Any) -> str:
    """A value for a message, as one would write it, in at most 120 characters."""
    text = repr(found)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _problem(error: Exception) -> str:
    """What is wrong with a YAML text and where, without showing any of it."""
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or ("the text cannot be read" if mark else first_line(error))
    return f"{what} (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else what


def apply_override(data: dict[str, Any], override: str) -> None:
    """Put the value of a `dotted.key=value` text into a mapping.

    Args:
        data: what the YAML file holds; changed in place.
        override: the text; its value is YAML.

    Raises:
        InputError: the text has another form, or the key leads through something that holds no fields.
    """
    key, sign, value = override.partition("=")
    if not sign or not key.strip():
        raise InputError(
            f"{masked_override(override)!r} is not key=value", where="--set", hint="Write e.g. --set search.trials=20"
        )
    *parents, leaf = key.strip().split(".")
    target = data
    for parent in parents:
        inner = target.get(parent, {})
        if isinstance(inner, str) and parents == ["experts", parent]:
            inner = {"model": inner}
        if isinstance(inner, str) and parents == ["search"] and inner in SEARCHES:
            inner = SEARCHES[inner]
        if not isinstance(inner, Mapping):
            raise InputError(f"{parent!r} in {key!r} holds no fields", where="--set", hint="Correct the key")
        target[parent] = dict(inner)  # a copy: a YAML alias may share it with other fields
        target = target[parent]
    try:
        target[leaf] = yaml.load(value, Loader=_Loader)
    except Exception:
        raise InputError(
            f"the value of {masked_override(override)!r} is not valid YAML", where="--set", hint="Quote it"
        ) from None  # its text shows the value
