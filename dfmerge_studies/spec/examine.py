"""Everything that is wrong with a spec at once, and what is left of it to look further.

A field that is wrong is left out or filled with something harmless, and the rest is validated again, so that a slip in
one place hides nothing in another.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from dfmerge_studies.errors import InputError
from dfmerge_studies.spec.messages import Wrong

Place = tuple[str, ...]
Spec = TypeVar("Spec")

_TASK: Mapping[str, Any] = {"dataset": {"path": "json"}, "doc_to_text": "-", "doc_to_target": "-"}
_CHOICES = {"doc_to_choice": ["a", "b"]}
# What stands for a required field that is wrong, by its place; "*" is any name.
_HARMLESS: Mapping[Place, Any] = {
    ("name",): "spec",
    ("base",): ".",
    ("experts",): {},
    ("tasks",): {},
    ("experts", "*"): {"model": ".", "task": None},
    ("experts", "*", "model"): ".",
    ("tasks", "*"): {**_TASK, **_CHOICES},
    **{("tasks", "*", name): value for name, value in {**_TASK, **_CHOICES}.items()},
}
_DEPTH = {"experts": 3, "tasks": 3, "importance": 2, "search": 2, "objective": 2}


@dataclass
class Examined(Generic[Spec]):
    """A spec that may be wrong.

    Attributes:
        problems: what is wrong, in the order of the fields.
        spec: what is left of it; None where nothing is.
        spoiled: the places that were left out or filled.
    """

    problems: list[InputError] = field(default_factory=list)
    spec: Spec | None = None
    spoiled: list[Place] = field(default_factory=list)

    def is_sound(self, name: str) -> bool:
        """Whether a field stands in `spec` as it was written: neither it nor a part of it was left out or filled."""
        place = tuple(name.split("."))
        return not any(place[: len(bad)] == bad or bad[: len(place)] == place for bad in self.spoiled)


def examine_(
    found: Examined[Spec],
    data: dict[str, Any],
    validated: Callable[[dict[str, Any]], tuple[Spec | None, list[Wrong]]],
) -> None:
    """Validate a mapping again and again, without what is wrong.

    Args:
        found: gains the problems, the places and what is left.
        data: what the YAML file holds.
        validated: from a mapping to the spec that it means, or to the places and messages of what is wrong.
    """
    data = copy.deepcopy(data)
    while True:
        spec, wrong = validated(data)
        found.problems += [each.problem for each in wrong]
        places = [_mend_(data, each.place) for each in wrong]
        if spec is not None or set(places) <= set(found.spoiled):  # the latter: leaving out does not help
            found.spec = spec
            return
        found.spoiled += places


def _mend_(data: dict[str, Any], place: Sequence[str]) -> Place:
    """Leave out or fill the field at a place; returns the place of that field."""
    place = tuple(place)[: _DEPTH.get(place[0], 1)] if place else ("objective",)  # of the whole: objectives and sampler
    if place[0] == "objective" and not isinstance(data.get("objective"), Mapping):
        place = ("objective",)
    target: Any = data
    for depth, name in enumerate(place[:-1], 1):
        inner = target.get(name)
        if isinstance(inner, str) and place[0] == "experts" and depth == 2:
            inner = target[name] = {"model": inner, "task": name}  # the short form
        if not isinstance(inner, dict):
            place = place[:depth]
            break
        target = inner
    pattern = place if len(place) < 2 or place[0] not in ("experts", "tasks") else (place[0], "*", *place[2:])
    if pattern in _HARMLESS:
        target[place[-1]] = copy.deepcopy(_HARMLESS[pattern])
    else:
        target.pop(place[-1], None)
    return place
