"""A study in numbers, as `--json` prints it; needs the storage only, no model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna

from dfmerge_studies.errors import InputError
from dfmerge_studies.points import GROUPS
from dfmerge_studies.report.expectations import descent_of, gain_left
from dfmerge_studies.report.pace import pace, workers_alive
from dfmerge_studies.report.races import races_of
from dfmerge_studies.report.verdict import verdict_of
from dfmerge_studies.report.view import StudyView
from dfmerge_studies.storage import study_names
from dfmerge_studies.study import provenance
from dfmerge_studies.study.plan import Plan
from dfmerge_studies.study.totals import stop_of, stored_total
from dfmerge_studies.study.value import trial_value
from dfmerge_studies.study.winner import Selection, selection_of, winner_of
from dfmerge_studies.trials.marks import COEFFICIENTS, DROPS, FISHERS, SECONDS, TASKS
from dfmerge_studies.trials.reading import counts, counts_of, ended, results_of, violation


def study_summary(study: optuna.Study, plan: Plan, former: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Trials by state, the best one, Fishers computed and found, seconds per trial.

    Args:
        study: the stored study.
        plan: of the spec that it belongs to.
        former: of an earlier look, whose verdict still holds where no trial has completed since.
    """
    spec = plan.spec
    trials = study.get_trials(deepcopy=False)
    completed, counted = results_of(trials), counts_of(trials)
    best = winner_of(study, spec.objective, completed)
    target = stored_total(study) or plan.total()
    metrics = spec.metrics("validation")
    alive = workers_alive(trials, complete=ended(counted) >= target)
    return {
        "study": study.study_name,
        "verdict": _verdict(study, len(completed), former),
        "method": spec.row.name,
        "search": plan.joined(study).search,
        "warm_start": study.user_attrs.get(provenance.WARM_START),
        "trials": {"target": target, **counted},
        "stopped": stop_of(study),
        "racing": races_of(trials),
        "expected_gain": gain_left(trials),
        "descent": descent_of(trials),
        "metric": metrics.text,
        "task_metrics": metrics.names,
        "guards": metrics.guards,
        "best": _best(best, plan, selection_of(study, completed)) if best is not None else None,
        "storage": plan.place,
        "workers": sum(worker["current"] is not None for worker in alive),
        "workers_alive": alive,
        **pace(trials, target=target, workers=len(alive)),
        "fishers": {
            kind: sum(trial.user_attrs[FISHERS][kind] for trial in completed) for kind in ("computed", "cached")
        },
        "seconds_per_trial": {
            phase: round(sum(trial.user_attrs[SECONDS].get(phase, 0.0) for trial in completed) / len(completed), 4)
            for phase in (completed[0].user_attrs[SECONDS] if completed else ())
        },
    }


def _verdict(study: optuna.Study, completed: int, former: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if former is not None and former["trials"]["complete"] == completed:
        known: dict[str, Any] | None = former["verdict"]
        return known
    verdict = verdict_of(StudyView.of(study)) if completed else None
    return verdict.described() if verdict is not None else None


def _best(best: optuna.trial.FrozenTrial, plan: Plan, selection: Selection | None) -> dict[str, Any]:
    scores = best.user_attrs[TASKS]
    described: dict[str, Any] = {
        "number": best.number,
        "value": trial_value(best),
        "coefficients": best.user_attrs[COEFFICIENTS],
        **({GROUPS: best.user_attrs[GROUPS]} if GROUPS in best.user_attrs else {}),
        **plan.method.stored_parameters(best.user_attrs),
        "tasks": scores,
        "selection": selection.described() if selection is not None else None,
    }
    if len(best.values) > 1:
        described["values"] = best.values
    if plan.spec.allowed:
        described["drops"] = best.user_attrs[DROPS]
        described["feasible"] = violation(best) == 0
    return described


def storage_summary(storage: optuna.storages.BaseStorage) -> list[dict[str, Any]]:
    """One entry per study of a storage; studies that this program did not make have no method.

    One that cannot be read has a `problem` and nothing else.
    """
    entries = []
    for name in sorted(study_names(storage)):
        try:
            with provenance.reading_study(name):
                entries.append(_entry(optuna.load_study(study_name=name, storage=storage)))
        except InputError as error:  # the others are listed all the same
            entries.append(_unreadable(name, error))
    return entries


def _entry(study: optuna.Study) -> dict[str, Any]:
    fingerprint = provenance.stored_fingerprint(study)
    best = winner_of(study, provenance.stored_spec_objective(study)) if fingerprint is not None else None
    metrics = provenance.stored_metrics(study, "validation") if fingerprint is not None else None
    return {
        "study": study.study_name,
        "method": fingerprint["method"] if fingerprint is not None else None,
        "trials": {"target": stored_total(study) or None, **counts(study)},
        "stopped": stop_of(study),
        "best_value": trial_value(best) if best is not None else None,
        "metric": metrics.text if metrics is not None else None,
        "task_metrics": metrics.names if metrics is not None else None,
        "guards": metrics.guards if metrics is not None else None,
    }


def _unreadable(name: str, error: InputError) -> dict[str, Any]:
    """What stands in the list for a study that cannot be read."""
    trials = dict.fromkeys(("target", "complete", "running", "waiting", "failed", "pruned"))
    nothing = dict.fromkeys(("method", "stopped", "best_value", "metric", "task_metrics", "guards"))
    return {"study": name, **nothing, "trials": trials, "problem": str(error)}
