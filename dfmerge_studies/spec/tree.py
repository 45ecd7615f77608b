"""Where in the tree of a spec's settings a place lies: by fields' names alone, while pydantic names what it tried, too.

Of a union, pydantic gives the errors of every member, each with the member as a step of its place.  What stands behind
such a step belongs to that member; the step itself is no field.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from dfmerge_studies.tasks.strict import Settings, members

Model = type[BaseModel]
_KEY = "[key]"  # pydantic's step for the key of a mapping, behind the key
_WORDS = {float: ["a number"], int: ["an integer"], str: ["a text"], bool: ["true", "false"], types.NoneType: ["null"]}
_MANY = {"a number": "numbers", "an integer": "integers", "a text": "texts"}


@dataclass(frozen=True)
class Spot:
    """A place in the tree.

    Attributes:
        names: of the fields from the top down.
        kinds: the types that may stand there; none where no field is.
        owners: the models that the names lead through, each with how many names lead to it; the last one's field, or
            what should be one, is at the place or holds it.
        beside: the other models that could stand where the last one does.
        fork: how many of pydantic's steps lead to the first union of which it tried every member; None without one.
    """

    names: tuple[str, ...]
    kinds: tuple[Any, ...]
    owners: tuple[tuple[Model, int], ...]
    beside: tuple[Model, ...]
    fork: int | None


def spot(root: Model, loc: Sequence[str | int]) -> Spot:
    """The place that pydantic's steps lead to.

    Args:
        root: model of the whole.
        loc: the steps.
    """
    kinds: list[Any] = [root]
    names: list[str] = []
    owners: list[tuple[Model, int]] = [(root, 0)]
    beside: list[Model] = []
    others: list[Model] = []
    fork = None
    for index, step in enumerate(loc):
        tried = [kind for kind in kinds if kind is not types.NoneType]
        chosen = next((kind for kind in tried if step in _tags(kind)), None) if len(tried) > 1 else None
        if chosen is not None:
            if fork is None and step not in _types(chosen):  # by its type, one member alone was tried
                fork = index
            kinds, others = [chosen], [kind for kind in tried if _is_model(kind) and kind is not chosen]
            continue
        if step == _KEY and index == len(loc) - 1:
            continue
        model = next(filter(_is_model, tried), None)
        if model is not None:
            owners.append((model, len(names)))
            beside, others = others, []
        names.append(str(step))
        kinds = list(_inside(tried, step))
    return Spot(tuple(names), tuple(kinds), tuple(dict.fromkeys(owners)), tuple(beside), fork)


def _inside(kinds: Sequence[Any], step: str | int) -> Iterator[Any]:
    """The types that may stand one step further in values of some types."""
    for kind in kinds:
        origin = get_origin(kind)
        if _is_model(kind):
            yield from members(kind.model_fields[step].annotation) if step in kind.model_fields else ()
        elif origin is dict and isinstance(step, str):
            yield from members(get_args(kind)[1])
        elif origin in (list, tuple) and isinstance(step, int):
            yield from members(get_args(kind)[0])


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _types(kind: Any) -> tuple[str, ...]:
    """The values of the field `type` by which a member is chosen."""
    field = kind.model_fields.get("type") if _is_model(kind) else None
    return get_args(field.annotation) if field is not None else ()


def _tags(kind: Any) -> tuple[str, ...]:
    """What pydantic calls a member of a union."""
    if get_origin(kind) is Literal:
        return (f"literal[{','.join(map(repr, get_args(kind)))}]",)
    if get_origin(kind) is not None:
        inner = (tag for each in get_args(kind) for tag in _tags(each)[:1])
        return (f"{get_origin(kind).__name__}[{','.join(inner)}]",)
    return (getattr(kind, "__name__", str(kind)), *_types(kind))


def expected(kinds: Sequence[Any]) -> str:
    """What may stand at a place, in words."""
    wanted = [kind for kind in kinds if kind is not types.NoneType] or kinds
    found = dict.fromkeys(word for kind in wanted for word in _words(kind) if not (kind is int and float in wanted))
    *first, last = found or ["another value"]
    return f"{', '.join(first)} or {last}" if first else last


def _words(kind: Any) -> Sequence[str]:
    origin, inner = get_origin(kind), get_args(kind)
    if _is_model(kind):
        return [(kind.form if issubclass(kind, Settings) else "") or "a mapping of fields"]
    if origin is Literal:
        return [str(each) for each in inner]
    if origin is dict:
        return [f"a mapping{_of(inner[1])}"]
    if origin in (list, tuple):
        return [f"a list{_of(inner[0], ' two' if origin is tuple else '')}"]
    return _WORDS.get(kind, ["a value"])


def _of(kind: Any, count: str = "") -> str:
    """What a list or a mapping holds, where one word says it."""
    word = expected(members(kind))
    return f" of{count} {_MANY[word]}" if word in _MANY else ""


def texts(kinds: Sequence[Any]) -> list[str]:
    """The words that may stand at a place."""
    found = []
    for kind in kinds:
        found += [str(text) for text in get_args(kind)] if get_origin(kind) is Literal else []
        found += kind.words if _is_model(kind) and issubclass(kind, Settings) else []
    return found


def home(at: Spot) -> str | None:
    """Where a field that is not known at a place has its own, below or above; None where there is nothing near.

    Args:
        at: the place, whose last name is the field's.
    """
    *_, name = at.names
    owner, depth = at.owners[-1]
    path = path_to(name, owner)
    if path is not None:
        return ".".join((*at.names[:depth], path))
    above = next(((model, depth) for model, depth in reversed(at.owners[:-1]) if name in model.model_fields), None)
    return None if above is None else ".".join(at.names[: above[1]])


def path_to(name: str, model: Model) -> str | None:
    """Where below a model a field of some name has its place, the nearest first; None where there is none."""
    return next((".".join(path) for inner, path in _below(model) if name in inner.model_fields), None)


def _below(model: Model, path: tuple[str, ...] = ()) -> Iterator[tuple[Model, tuple[str, ...]]]:
    """The models that stand in a model, the nearest first, and how one gets to them."""
    found = [
        (kind, (*path, name, *steps))
        for name, field in model.model_fields.items()
        for kind, steps in _models(members(field.annotation))
    ]
    yield from found
    for kind, steps in found:
        yield from _below(kind, steps)


def _models(kinds: Sequence[Any], steps: tuple[str, ...] = ()) -> Iterator[tuple[Model, tuple[str, ...]]]:
    for kind in kinds:
        if _is_model(kind):
            yield kind, steps
        elif get_origin(kind) is dict:
            yield from _models(members(get_args(kind)[1]), (*steps, "NAME"))
        elif get_origin(kind) is list:
            yield from _models(members(get_args(kind)[0]), steps)
