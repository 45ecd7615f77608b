"""Merged models as directories: one trial of a study, or a merge at given coefficients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from dfmerge_studies.checkpoints.digest import model_digest
from dfmerge_studies.checkpoints.reference import Checkpoint
from dfmerge_studies.checkpoints.write import PROVENANCE, SHARD_SIZE, write_model
from dfmerge_studies.methods import Point
from dfmerge_studies.objective.merger import Merger
from dfmerge_studies.report.card import CARD, Merged, model_card, provenance_json
from dfmerge_studies.report.outputs import model_target
from dfmerge_studies.spec import StudySpec
from dfmerge_studies.study.session import Session
from dfmerge_studies.study.value import trial_value
from dfmerge_studies.study.winner import selection_of
from dfmerge_studies.trials.reading import results


@dataclass(frozen=True)
class Exported:
    """What a model directory was made of.

    Attributes:
        digest: of the written model's content.
        point: what it was merged at.
        fishers: how many were `computed`, and `cached`.
        value: what its trial is worth, None outside a study; for several objectives their mean.
        metric: what the scores behind the value are.
    """

    digest: str
    point: Point
    fishers: Mapping[str, int]
    value: float | None = None
    metric: str | None = None

    def described(self) -> dict[str, Any]:
        """The same for `--json`, each of the method's parameters by its name."""
        worth = {} if self.value is None else {"value": self.value, "metric": self.metric}
        return {
            **worth,
            "coefficients": dict(self.point.coefficients),
            **self.point.parameters,
            "digest": self.digest,
            "fishers": dict(self.fishers),
        }


def export_merge(
    merger: Merger, spec: StudySpec, merged: Merged, out: Path, *, force: bool = False, shard_size: str = SHARD_SIZE
) -> Exported:
    """Merge at the given coefficients and write the model directory with its card and provenance.

    Args:
        merger: holds the models.
        spec: the settings.
        merged: coefficients, and what is known of them.
        out: directory to make.
        force: replace an export of ours that is there.
        shard_size: largest size of one weights file.

    Raises:
        InputError: the directory exists and may not be replaced.
        RunError: it cannot be written.
    """
    place = model_target(spec, out, force=force)
    problem = merger.problem
    outcome = merger.merge_(merged.point)
    write_model(
        problem.resident.model,
        problem.resident.tokenizer,
        place,
        source=problem.checkpoints.base.path,
        heads=problem.resident.heads,
        classes=problem.classes,
        texts={CARD: model_card(problem, spec, merged), PROVENANCE: provenance_json(problem, spec, merged)},
        force=force,
        shard_size=shard_size,
    )
    fishers = {"computed": outcome.computed, "cached": outcome.cached}
    return Exported(model_digest(Checkpoint(str(out), place)), merged.point, fishers)


def export_trial(
    session: Session, trial: FrozenTrial, out: Path, *, force: bool = False, shard_size: str = SHARD_SIZE
) -> Exported:
    """Write a completed trial of a study as a model directory.

    Args:
        session: the open study.
        trial: the trial.
        out: directory to make.
        force: replace an export of ours that is there.
        shard_size: largest size of one weights file.

    Raises:
        InputError: the directory exists and may not be replaced.
        RunError: it cannot be written.
    """
    scores = session.trial_scores(trial, "validation")
    value = trial_value(trial)
    selection = selection_of(session.study, results(session.study))
    merged = Merged(
        method=session.spec.method,
        point=session.point(trial),
        trial=trial.number,
        value=value,
        scores={"validation": scores, **session.kept_scores(trial, "test")},
        expert_scores={
            "validation": session.reference_scores("experts", "validation"),
            **session.kept_scores("experts", "test"),
        },
        selection=selection if selection is not None and selection.winner == trial.number else None,
    )
    exported = export_merge(session.merger, session.spec, merged, out, force=force, shard_size=shard_size)
    return replace(exported, value=value, metric=session.spec.metrics("validation").text)
