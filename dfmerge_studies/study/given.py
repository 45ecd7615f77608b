"""Settings that a caller of `optimize_merge` gives: validated like those of a spec, and what needs a spec refused."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from dfmerge_studies.errors import InputError
from dfmerge_studies.spec import TRACED, ObjectiveSettings, SearchSettings
from dfmerge_studies.spec.messages import explained
from dfmerge_studies.tasks.strict import Settings

Kind = TypeVar("Kind", bound=Settings)


def given_search(fields: Mapping[str, Any], trials: int) -> SearchSettings:
    """How coefficients are searched.

    Args:
        fields: of a spec's `search`.
        trials: total of the study.

    Raises:
        InputError: a value is not allowed, or needs the rows, slopes or layers that a scoring function does not give.
    """
    settings = _settings(SearchSettings, {**fields, "trials": trials})
    if settings.stop == "gain":
        what = "how noisy the numbers of a scoring function are is not known, so no gain can be told from noise"
        raise InputError(what, where="stop", hint="Use patience: it counts every gain")
    if settings.granularity is not None:
        hint = "Leave it out: every expert has one coefficient here"
        raise InputError("groups of parameters need the models of a spec", where="granularity", hint=hint)
    if settings.holdout is not None:
        hint = "Score the best trials on other rows yourself: they are in the study"
        raise InputError("rows are those of `score`: none can be held back here", where="holdout", hint=hint)
    if settings.race is not None:
        what = "`score` gives numbers of whole models: rows that a trial could be stopped on are not known"
        raise InputError(what, where="racing", hint="Leave it out")
    if settings.descends:
        field, _, value = settings.descent_text.partition(": ")
        what = f"`score` gives numbers and no slopes, and {value} needs them"
        raise InputError(what, where=field, hint="Use sampler auto, gp or random, and startup uniform or none")
    if TRACED in settings.enqueue:
        raise InputError("random tokens need the models of a spec", where="enqueue", hint=f"Leave {TRACED!r} out")
    return settings


def given_objective(objective: str | Mapping[str, Any]) -> ObjectiveSettings:
    """How task scores become one value.

    Args:
        objective: as a spec has it.

    Raises:
        InputError: there is no such objective, or it needs the tasks of a spec.
    """
    how = _settings(ObjectiveSettings, {"kind": objective} if isinstance(objective, str) else dict(objective))
    if how.kind == "agreement":
        raise InputError("agreement needs the tasks of a spec", where="objective", hint="Let `score` compute it")
    return how


def check_weights(objective: ObjectiveSettings, tasks: Sequence[str]) -> None:
    """Refuse weights of tasks that are not scored.

    Args:
        objective: of the search.
        tasks: that are scored.

    Raises:
        InputError: naming the task.
    """
    _check_scored(objective.weights or {}, tasks, "objective.weights")


def check_guards(
    guards: Mapping[str, float], tasks: Sequence[str], experts: Collection[str], objective: ObjectiveSettings
) -> None:
    """Refuse guards that cannot be.

    Args:
        guards: points that each may lose.
        tasks: that are scored.
        experts: by name.
        objective: of the search.

    Raises:
        InputError: naming the guard.
    """
    _check_scored(guards, tasks, "guards")
    for name, points in guards.items():
        if name in experts:
            what = f"the expert {name!r} stands for this task, and a guard is one that no expert stands for"
            raise InputError(what, where="guards", hint="Leave it out, or use max_drop")
        if isinstance(points, bool) or not isinstance(points, (int, float)) or not 0 <= points < math.inf:
            raise InputError(f"{points!r} is no number of points", where=f"guards: {name}", hint="Give 0 or more")
        if name in (objective.weights or {}):
            what = f"{name!r} is a guard, which is no part of the objective"
            raise InputError(what, where="objective", hint=f"Leave {name} out of the weights")
    if set(guards) >= set(tasks):
        raise InputError("all tasks are guards, so nothing is left to search for", where="guards")


def _check_scored(names: Collection[str], tasks: Sequence[str], where: str) -> None:
    for name in names:
        if name not in tasks:
            raise InputError(f"there is no task {name!r}", where=where, hint=f"The tasks are {', '.join(tasks)}")


def _settings(kind: type[Kind], given: Mapping[str, Any]) -> Kind:
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise explained(error, Path("optimize_merge"), kind)[0].problem from None
