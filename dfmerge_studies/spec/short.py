"""Short forms that a spec may have, written out: the fields that they mean. The schema of editors knows them, too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dfmerge_studies.spec.fields import search_of


def full_experts(value: Any) -> Any:
    """`name: path` means `name: {model: path, task: name}`; a long form without `task` too."""
    if not isinstance(value, Mapping):
        return value
    full = {}
    for name, entry in value.items():
        if isinstance(entry, str):
            full[name] = {"model": entry, "task": name}
        elif isinstance(entry, Mapping):
            full[name] = {"task": name, **entry}
        else:
            full[name] = entry
    return full


def full_tasks(value: Any) -> Any:
    """A task without `type` is of the type choice; of lm_eval, if it has that field."""
    if not isinstance(value, Mapping):
        return value
    return {
        name: {"type": "lm_eval" if "lm_eval" in task else "choice", **task} if isinstance(task, Mapping) else task
        for name, task in value.items()
    }


def full_objective(value: Any) -> Any:
    """`objective: min` means `objective: {kind: min}`."""
    return {"kind": value} if isinstance(value, str) else value


def full_search(value: Any) -> Any:
    """A word means all fields of a search."""
    return search_of(value) if isinstance(value, str) else value
