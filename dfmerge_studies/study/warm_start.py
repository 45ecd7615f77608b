"""`search.warm_start`: what a study tries first of another study, and where it is from.

    dfmerge:warm_start    the other study, and of each point that is taken over its trial, value and coefficients

The points are chosen when the study first needs them and kept in it, so that a run that goes on tries the same ones,
whatever has become of the other study meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from dfmerge_studies.errors import InputError
from dfmerge_studies.spec import ObjectiveSettings, WarmStart
from dfmerge_studies.storage import check_url, load_study, open_storage, resolve_url, safe_url, storage_errors
from dfmerge_studies.study import provenance
from dfmerge_studies.study.plan import Plan
from dfmerge_studies.study.proposals import inside
from dfmerge_studies.study.value import best_first, trial_value
from dfmerge_studies.trials.marks import COEFFICIENTS
from dfmerge_studies.trials.reading import results
from dfmerge_studies.trials.space import Space

NEAR = 0.1  # of its range, that some coefficient must differ by from every better point that is taken over
FIELD = "search.warm_start"
_ASKED = ("study", "storage", "asked")


def taken_over(plan: Plan, stored: optuna.Study | None) -> dict[str, Any] | None:
    """What the study of a spec starts from: what it has chosen before, or what it would choose now.

    Args:
        plan: of the study.
        stored: the study, if it is there already.

    Returns:
        The value of its attribute; None where it starts from nothing: nothing is asked for, the method does not search,
        or the study is the very one to start from, as a baseline of the spec may be.

    Raises:
        InputError: the other study is not there, has no result, or is about other experts.
    """
    settings, spec = plan.spec.search.warm_start, plan.spec
    if settings is None or not plan.method.searches:
        return None
    url = plan.url if settings.storage is None else resolve_url(settings.storage, spec.workdir)
    if (url, settings.study) == (plan.url, spec.name):
        return None
    try:
        return chosen(settings, stored, plan.space, list(spec.experts), url)
    except InputError as error:
        elsewhere = "If it is kept elsewhere, write {study: NAME, storage: URL}"
        hint = ". ".join(each for each in (error.hint, elsewhere if settings.storage is None else None) if each)
        raise InputError(f"{error.what} ({safe_url(url)})", where=spec.where(FIELD), hint=hint) from None


def chosen(
    settings: WarmStart,
    stored: optuna.Study | None,
    space: Space,
    experts: Sequence[str],
    source: str | BaseStorage,
) -> dict[str, Any]:
    """What a study has chosen of another one before, or what it would choose now.

    Args:
        settings: which one, and how many points.
        stored: the study that starts, if it is there already.
        space: what it searches.
        experts: its experts.
        source: the URL of the other one's storage, or the storage.

    Raises:
        InputError: the other study is not there, has no result, or is about other experts.
    """
    place = safe_url(source) if isinstance(source, str) else None
    asked = {"study": settings.study, "storage": place, "asked": settings.points}
    kept = stored.user_attrs.get(provenance.WARM_START) if stored is not None else None
    if kept and all(kept[name] == asked[name] for name in _ASKED):
        return dict(kept)
    if isinstance(source, str):
        check_url(source, create=False)
    with storage_errors(source if isinstance(source, str) else None):
        storage = open_storage(source, create=False) if isinstance(source, str) else source
        return {**asked, "points": best_points(load_study(storage, settings.study), space, experts, settings)}


def agreed(study: optuna.Study, warm: dict[str, Any] | None) -> dict[str, Any] | None:
    """What all runs of a study start from: what it keeps, or else what this one has chosen, which it keeps now.

    Args:
        study: created or joined.
        warm: from `taken_over`.
    """
    if warm is None:
        return None
    kept = study.user_attrs.get(provenance.WARM_START)
    if kept and all(kept[name] == warm[name] for name in _ASKED):
        return dict(kept)
    study.set_user_attr(provenance.WARM_START, warm)
    return warm


def origin_text(warm: Mapping[str, Any]) -> str:
    """Which points of which study are tried first, in a few words."""
    trials = ", ".join(f"{each['trial']}" for each in warm["points"])
    return f"trial{'s' * (len(warm['points']) > 1)} {trials} of {warm['study']}"


def points_of(warm: Mapping[str, Any] | None) -> list[Mapping[str, float]]:
    """The points to try first."""
    return [each["point"] for each in warm["points"]] if warm is not None else []


def best_points(
    source: optuna.Study, space: Space, experts: Sequence[str], settings: WarmStart
) -> list[dict[str, Any]]:
    """The best distinct points of a study, best first, moved into a space.

    Best by the other study's own objective and constraints, as `best_trial` has it; of several objectives only points
    that no other one dominates.  A point that lies near a better one teaches little and is left out.

    Args:
        source: the other study.
        space: what will be searched; a name that the other study lacks gets 1/M.
        experts: all M of them.
        settings: how many points.

    Returns:
        Of each the other study's `trial`, its `value` there, and the `point` in `space`.

    Raises:
        InputError: the other study is not one of this program, has no result, or shares no expert.
    """
    fingerprint = provenance.stored_fingerprint(source)
    trials = [trial for trial in results(source) if COEFFICIENTS in trial.user_attrs]
    name = source.study_name
    if fingerprint is None:
        raise InputError(f"the study {name!r} was not made by this program", hint="Name another study")
    if not trials:
        raise InputError(f"the study {name!r} has no completed trial yet", hint="Run it first, or name another study")
    theirs = list(trials[0].user_attrs[COEFFICIENTS])
    if not set(theirs) & set(experts):
        raise InputError(
            f"the study {name!r} shares no expert with this one: it has {', '.join(theirs)}",
            hint=f"Name a study with some of {', '.join(experts)}",
        )
    chosen: list[dict[str, Any]] = []
    for trial in _best_first(trials, ObjectiveSettings.model_validate(fingerprint.get("objective", {}))):
        point = moved(trial, space, len(experts))
        if all(_far(point, other["point"], space) for other in chosen):
            chosen.append({"trial": trial.number, "value": trial_value(trial), "point": point})
        if len(chosen) == settings.points:
            break
    return chosen


def moved(trial: FrozenTrial, space: Space, count: int) -> dict[str, float]:
    """A trial's point in another space: inside the bounds and on the step, 1/M for every name that the trial lacks.

    Args:
        trial: of a study of other experts, method or bounds.
        space: where to.
        count: M, the number of experts there.
    """
    known: Mapping[str, Any] = {**trial.params, **trial.user_attrs, **trial.user_attrs[COEFFICIENTS]}
    default = 1.0 / count
    return {n: inside(space, n, float(known.get(n, known.get(space.tied.get(n, n), default)))) for n in space.names}


def _best_first(trials: Sequence[FrozenTrial], objective: ObjectiveSettings) -> list[FrozenTrial]:
    if len(trials[0].values) > 1:
        trials = [trial for trial in trials if not any(_dominates(other, trial) for other in trials)]
    return best_first(trials, objective)


def _dominates(one: FrozenTrial, other: FrozenTrial) -> bool:
    pairs = list(zip(one.values, other.values, strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def _far(one: Mapping[str, float], other: Mapping[str, float], space: Space) -> bool:
    """Whether two points differ by enough in some coefficient."""
    return any(
        abs(one[name] - other[name]) >= NEAR * (high - low)
        for name, (low, high) in ((name, space.range_of(name)) for name in space.names)
    )
