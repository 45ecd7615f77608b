"""How the points of a study's trials came about."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping

from optuna.trial import FrozenTrial

from dfmerge_studies.methods import Coefficients
from dfmerge_studies.report.expectations import expected_of, is_step
from dfmerge_studies.report.view import StudyView
from dfmerge_studies.study.fingerprint import sampler_of
from dfmerge_studies.trials.marks import FIXED, RETRY_OF, place_of


def kinds_of(view: StudyView) -> list[str]:
    """How the point of each completed trial came about.

    Args:
        view: the study.

    Returns:
        For each of `view.trials`: "known" (it was given), "grid" (of the method's grid), "step" (down the loss),
        "startup" (drawn at random) or "search" (proposed from what earlier trials scored).
    """
    every = {trial.number: trial for trial in view.study.get_trials(deepcopy=False)}
    ends = sorted(trial.datetime_complete for trial in (*view.trials, *view.pruned) if trial.datetime_complete)
    drawn = sampler_of(view.fingerprint) in ("random", "gradient")
    startup = max(1, int(view.fingerprint.get("search.startup_trials", 1)))
    found = []
    for trial in view.trials:
        first = _first_try(trial, every)
        # Workers begin together: what has a late place may have begun before the startup was over.
        results = place_of(trial) if first.datetime_start is None else bisect_right(ends, first.datetime_start)
        if FIXED in first.system_attrs:
            found.append("known")
        elif view.policy is Coefficients.SHARED_GRID:
            found.append("grid")
        elif is_step(trial):
            found.append("step")
        elif expected_of(trial):
            found.append("search")
        else:
            found.append("startup" if drawn or min(place_of(trial), results) < startup else "search")
    return found


def _first_try(trial: FrozenTrial, every: Mapping[int, FrozenTrial]) -> FrozenTrial:
    """The trial whose coefficients one repeats that was put back in the queue; itself, where it repeats none."""
    while (earlier := every.get(trial.user_attrs.get(RETRY_OF, -1))) is not None:
        trial = earlier
    return trial
