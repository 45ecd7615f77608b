"""The models and data of one study for another one, without loading anything again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dfmerge_studies.errors import InputError
from dfmerge_studies.objective.preflight import read_indices
from dfmerge_studies.objective.problem import Problem, TaskInputs
from dfmerge_studies.objective.used_rows import fisher_rows, scored_examples
from dfmerge_studies.spec import StudySpec
from dfmerge_studies.tasks.splits import SPLITS, Split


def derive_problem(problem: Problem, spec: StudySpec, *, indices: Mapping[str, list[int]] | None = None) -> Problem:
    """A loaded problem for a study with another method, seed, `limit` or estimator.

    Both problems share one resident model, so only one of them can be at work at a time.

    Args:
        problem: what is loaded.
        spec: of the other study.
        indices: Fisher inputs that the other study has already fixed; otherwise those of `problem`, unless seed or
            settings ask for a draw of their own.

    Raises:
        InputError: the other spec names other models, tasks, device or dtype.
    """
    mine, theirs = _loaded(problem.spec), _loaded(spec)
    odd = [name for name in mine if mine[name] != theirs[name]]
    if odd:
        raise InputError(
            "the models and data in memory are those of another spec",
            where=spec.where(odd[0]),
            hint="Load this spec's own with load_problem",
        )
    redraw = _drawn_by(spec) != _drawn_by(problem.spec)
    wanted = indices or (read_indices(spec) if redraw else problem.fisher_indices())
    tasks = {}
    for name, task in problem.tasks.items():
        rows = fisher_rows(spec, name, len(task.validation), wanted)
        scored = scored_examples(spec, name, "validation", task.validation, problem.classes)
        splits = {**{name: s for name, s in task.splits.items() if name != "holdout"}, "validation": scored}
        tasks[name] = TaskInputs(splits, [task.validation[row] for row in rows], task.validation)
    other = replace(problem, spec=spec, tasks=tasks, reference_scores={}, known_digests={}, expert_answers={})
    same = [split for split in SPLITS if _rows(problem, split) == _rows(other, split)]
    answered = same if problem.spec.compute == spec.compute else []
    alike = [split for split in answered if problem.spec.metrics(split) == spec.metrics(split)]
    other.reference_scores.update({key: s for key, s in problem.reference_scores.items() if key[1] in alike})
    other.expert_answers.update({key: a for key, a in problem.expert_answers.items() if key[1] in answered})
    other.known_digests.update({split: d for split, d in problem.known_digests.items() if split in same})
    return other


def _loaded(spec: StudySpec) -> dict[str, object]:
    """What of a spec decides which models and data are in memory."""
    return {
        "base": spec.base,
        "tokenizer": spec.tokenizer,
        "experts": list(spec.experts.items()),
        "tasks": [(name, task.model_copy(update={"limit": None})) for name, task in spec.tasks.items()],
        "dtype": spec.dtype,
        "device": spec.device,
        "device_map": spec.device_map,
        "root": spec.root,
    }


def _drawn_by(spec: StudySpec) -> tuple[object, ...]:
    """What of a spec decides the Fisher inputs."""
    return spec.search.seed, spec.importance.samples, spec.importance.indices


def _rows(problem: Problem, split: Split) -> list[list[int] | None]:
    """Row numbers of every task's inputs of a split; None where it is not loaded."""
    splits = [task.splits.get(split) for task in problem.tasks.values()]
    return [None if examples is None else [e.index for e in examples] for examples in splits]
