"""Merged models as directories: one trial of a study, or a merge at given coefficients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from dfmerge_studies.checkpoints.digest import model_digest
from dfmerge_studies.checkpoints.heads import problem_type
from dfmerge_studies.checkpoints.in_place import put_head_on_
from dfmerge_studies.checkpoints.low_rank import lora_rank
from dfmerge_studies.checkpoints.precision import in_precision, rounded, written_dtype
from dfmerge_studies.checkpoints.reference import Checkpoint
from dfmerge_studies.checkpoints.resident import head_classes
from dfmerge_studies.checkpoints.write import (
    PROVENANCE,
    new_directory,
    save_classifier,
    save_model,
    write_texts,
)
from dfmerge_studies.objective.classes import head_labels
from dfmerge_studies.objective.evaluate import evaluate_model
from dfmerge_studies.objective.merger import Merger
from dfmerge_studies.objective.problem import Problem
from dfmerge_studies.points import Point
from dfmerge_studies.report.adapters import AdapterExport, write_adapters
from dfmerge_studies.report.card import CARD, Merged, model_card, provenance_json
from dfmerge_studies.report.checked import Checked
from dfmerge_studies.report.forms import Form, check_form
from dfmerge_studies.report.outputs import model_target
from dfmerge_studies.report.verdict import verdict_of
from dfmerge_studies.report.view import StudyView
from dfmerge_studies.spec import StudySpec
from dfmerge_studies.study.scores import results_by_split
from dfmerge_studies.study.session import Session
from dfmerge_studies.study.value import trial_value
from dfmerge_studies.study.winner import selection_of
from dfmerge_studies.tasks.metrics import Guarded, TaskScore, guarded
from dfmerge_studies.tasks.splits import SPLITS
from dfmerge_studies.trials.reading import results

_PLAIN = Form()


@dataclass(frozen=True)
class Exported:
    """What a model directory was made of.

    Attributes:
        digest: of the written model's content.
        point: what it was merged at.
        fishers: how many were `computed`, and `cached`.
        value: what its trial is worth, None outside a study; for several objectives their mean.
        metric: what the scores behind the value are.
        dtype: that the weights are stored in.
        checked: scores of what was written, where it is not what the merge was scored as.
        adapter: what an adapter keeps of the merge, None for a whole model.
        guards: how the merge stands to the guards.
    """

    digest: str
    point: Point
    fishers: Mapping[str, int]
    value: float | None = None
    metric: str | None = None
    dtype: str = "float32"
    checked: Checked | None = None
    adapter: AdapterExport | None = None
    guards: Mapping[str, Guarded] = field(default_factory=dict)

    def described(self) -> dict[str, Any]:
        """The same for `--json`, each of the method's parameters by its name."""
        worth = {} if self.value is None else {"value": self.value, "metric": self.metric}
        adapter = {} if self.adapter is None else {"adapter": self.adapter.described()}
        return {
            **worth,
            **self.point.described(),
            "digest": self.digest,
            "fishers": dict(self.fishers),
            "dtype": self.dtype,
            "checked": self.checked.described() if self.checked is not None else None,
            **adapter,
            **({"guards": {task: each.described() for task, each in self.guards.items()}} if self.guards else {}),
        }


def export_merge(
    merger: Merger,
    spec: StudySpec,
    merged: Merged,
    out: Path,
    form: Form = _PLAIN,
    *,
    force: bool = False,
) -> Exported:
    """Merge at the given coefficients and write the model directory with its card and provenance.

    Where weights are stored in another type than they were merged in, what was written is scored once more.

    Args:
        merger: holds the models.
        spec: the settings.
        merged: coefficients, and what is known of them.
        out: directory to make.
        form: how it is written.
        force: replace an export of ours that is there.

    Raises:
        InputError: the directory exists and may not be replaced, or the form does not fit the models.
        RunError: it cannot be written.
    """
    place = model_target(spec, out, force=force)
    check_form(spec, form)
    problem = merger.problem
    dtype = written_dtype(form.precision, problem.checkpoints.base)
    rank = (form.rank or lora_rank(problem.checkpoints.experts)) if form.adapter else None
    again = dtype != spec.dtype or form.adapter
    if again:
        merger.ask_experts_("validation")
    guards = list(spec.metrics("validation").guards) if merged.trial is None else []
    of_base = merger.base_results("validation", guards) if guards else {}
    outcome = merger.merge_(merged.point)
    kept = _guarded(merger.results("validation", guards) if guards else {}, of_base, spec)
    before = merger.results("validation") if again else {}
    checked, adapter = None, None
    with new_directory(place, force=force) as folder:
        if rank is not None:
            adapter = write_adapters(problem, folder, rank, dtype)
            first = scored_folder(folder, problem, form)
            checked = _checked(merger, spec, first, f"an adapter of rank {adapter.rank}", before)
        else:
            _save(problem, folder, dtype, form)
            compute = spec.compute if dtype == "float32" else "auto"  # other weights use their own
            written = spec.derive(dtype=dtype, compute=compute)
            checked = _checked(merger, written, folder, dtype, before) if again else None
        merged = replace(merged, dtype=dtype, checked=checked, adapter=adapter)
        texts = {CARD: model_card(problem, spec, merged), PROVENANCE: provenance_json(problem, spec, merged)}
        write_texts(folder, texts)
        for task in problem.resident.heads if form.split_heads or form.adapter else ():
            write_texts(folder / task, {**texts, CARD: model_card(problem, spec, merged, task)})
    fishers = {"computed": outcome.computed, "cached": outcome.cached}
    digest = model_digest(Checkpoint(str(out), scored_folder(place, problem, form)))
    return Exported(digest, merged.point, fishers, dtype=dtype, checked=checked, adapter=adapter, guards=kept)


def _guarded(scores: Mapping[str, TaskScore], base: Mapping[str, TaskScore], spec: StudySpec) -> dict[str, Guarded]:
    ours, theirs = ({task: found.score for task, found in each.items()} for each in (scores, base))
    return guarded(ours, theirs, spec.metrics("validation"))


def scored_folder(place: Path, problem: Problem, form: Form) -> Path:
    """The folder whose weights stand for the whole: of adapters of classifiers, the first task's.

    Args:
        place: the exported directory.
        problem: models in memory.
        form: how it was written.
    """
    return place / next(iter(problem.resident.heads), "") if form.adapter else place


def _save(problem: Problem, folder: Path, dtype: str, form: Form) -> None:
    """The merge as a whole model, and as a whole classifier per task where that is wanted."""
    resident = problem.resident
    with in_precision(resident.model, dtype):
        save_model(
            folder,
            resident.model,
            resident.tokenizer,
            source=problem.checkpoints.base.path,
            heads={task: rounded(head, dtype) for task, head in resident.heads.items()},
            classes=problem.classes,
            shard_size=form.shard_size,
        )
        if form.split_heads:
            _save_classifiers(problem, folder, dtype, form.shard_size)


def _save_classifiers(problem: Problem, folder: Path, dtype: str, shard_size: str) -> None:
    """A folder for every task, with the merged encoder and the task's head."""
    resident = problem.resident
    for task, head in resident.heads.items():
        put_head_on_(resident.model, rounded(head, dtype))
        save_classifier(
            folder / task,
            resident.model,
            resident.tokenizer,
            source=problem.checkpoints.base.path,
            labels=head_labels(problem.spec, task, problem.classes, head_classes(head)),
            problem_type=problem_type(problem.kinds[task]),
            shard_size=shard_size,
        )


def _checked(merger: Merger, spec: StudySpec, folder: Path, form: str, before: Mapping[str, TaskScore]) -> Checked:
    """Score a directory as who loads it gets it."""
    found = evaluate_model(spec, str(folder), "validation", progress=merger.progress)
    return Checked(form, spec.metrics("validation"), found, before)


def export_trial(
    session: Session,
    trial: FrozenTrial,
    out: Path,
    form: Form = _PLAIN,
    *,
    force: bool = False,
) -> Exported:
    """Write a completed trial of a study as a model directory.

    Args:
        session: the open study.
        trial: the trial.
        out: directory to make.
        form: how it is written.
        force: replace an export of ours that is there.

    Raises:
        InputError: the directory exists and may not be replaced, or the form does not fit the models.
        RunError: it cannot be written.
    """
    scores = session.trial_scores(trial, "validation")
    selection = selection_of(session.study, results(session.study))
    value, verdict = trial_value(trial), verdict_of(StudyView.of(session.study))
    merged = Merged(
        method=session.method.name,
        point=session.point(trial),
        trial=trial.number,
        value=value,
        scores={"validation": scores, **session.kept_scores(trial, "test")},
        expert_scores={
            "validation": session.reference_scores("experts", "validation"),
            **session.kept_scores("experts", "test"),
        },
        base_scores={
            "validation": session.reference_scores("base", "validation"),
            **session.kept_scores("base", "test"),
        }
        if session.spec.metrics("validation").guards
        else {},
        selection=selection if selection is not None and selection.winner == trial.number else None,
        results=results_by_split(session.study, trial, SPLITS),
        verdict=verdict.lines if verdict is not None and verdict.trial == trial.number else (),
    )
    exported = export_merge(session.merger, session.spec, merged, out, form, force=force)
    metrics = session.spec.metrics("validation")
    guards = guarded(scores, merged.base_scores.get("validation", {}), metrics)
    return replace(exported, value=value, metric=metrics.text, guards=guards)
