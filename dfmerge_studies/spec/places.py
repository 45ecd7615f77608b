"""Where in a spec something is wrong: the fields that are known at each place, and several problems as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from pydantic import BaseModel, ValidationError

from dfmerge_studies.errors import InputError
from dfmerge_studies.spec.fields import (
    ExpertSettings,
    Granularity,
    ImportanceSettings,
    ObjectiveSettings,
    ProtectSettings,
    Racing,
    SearchSettings,
    WarmStart,
)
from dfmerge_studies.spec.messages import Wrong, explain
from dfmerge_studies.tasks.filters import Filter, Step
from dfmerge_studies.tasks.settings import AnyTask, GenerationKwargs

_BELOW: Mapping[str, Sequence[type[BaseModel]]] = {
    "experts": [ExpertSettings],
    "tasks": [*get_args(AnyTask), GenerationKwargs, Filter, Step],
    "importance": [ImportanceSettings],
    "search": [SearchSettings, WarmStart, Granularity, Racing],
    "objective": [ObjectiveSettings],
    "protect": [ProtectSettings],
}


def explained(error: ValidationError, path: Path, whole: type[BaseModel]) -> list[Wrong]:
    """Every problem of a spec's validation.

    Args:
        error: what pydantic found.
        path: the spec's file.
        whole: the model of a whole spec.
    """
    return explain(error, path, {"": [whole], **_BELOW})


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
