"""Which rows of a task are used: those that are scored, those held out, those that importance is computed from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dfmerge_studies.errors import InputError
from dfmerge_studies.objective.classes import Classes, named_classes
from dfmerge_studies.spec import StudySpec
from dfmerge_studies.tasks.answers import judged
from dfmerge_studies.tasks.encoding import Encoded
from dfmerge_studies.tasks.metrics import Metric
from dfmerge_studies.tasks.sampling import divided_first_rows, divided_rows, draw_rows, seeded_generator
from dfmerge_studies.tasks.settings import HarnessTask
from dfmerge_studies.tasks.splits import Split


def scored_examples(
    spec: StudySpec, task: str, split: Split, examples: Sequence[Encoded], classes: Classes
) -> list[Encoded]:
    """The inputs that a model is scored on: of validation those that `limit` leaves, drawn with the study's seed.

    Args:
        spec: where limit and seed stand.
        task: name of the task.
        split: of the tasks' data.
        examples: all inputs of the split.
        classes: of the heads.

    Raises:
        InputError: every model would have the same score on them.
    """
    metric = spec.metrics(split)[task]
    if split == "validation":
        seen, held = _divided(spec, task, len(examples))
        if not seen:
            raise InputError(
                f"it holds back all {len(held)} validation rows of the task {task}",
                where=spec.where("search.holdout"),
                hint="Leave rows to the search: give a smaller number, or a fraction",
            )
        examples = [examples[row] for row in seen]
    reason = _pointless(spec, task, metric, examples, classes)
    if reason is not None:
        raise InputError(
            f"{metric.name} on {split} would be the same for every model: {reason}",
            where=spec.where(f"tasks.{task}.metric"),
            hint="Give more rows, correct the labels, or use another metric",
        )
    return list(examples)


def held_out_examples(
    spec: StudySpec, task: str, examples: Sequence[Encoded], classes: Classes, share: float
) -> list[Encoded]:
    """Inputs of the validation split that the search does not see, for the choice of the winner.

    Args:
        spec: where limit, holdout and seed stand.
        task: name of the task.
        examples: all inputs of the split.
        classes: of the heads.
        share: how many, as a share of those that the search sees; as many as there are where that is more.

    Returns:
        They in the order of their draw; none where every model would have the same score on them.
    """
    seen, held = _divided(spec, task, len(examples))
    found = [examples[row] for row in held[: max(1, int(share * len(seen)))]]
    metric = spec.metrics("holdout")[task]
    return [] if _pointless(spec, task, metric, found, classes) is not None else found


def _pointless(spec: StudySpec, task: str, metric: Metric, examples: Sequence[Encoded], classes: Classes) -> str | None:
    """Why every model would have the same score on some inputs, if so."""
    if not metric.labels or isinstance(spec.tasks[task], HarnessTask):
        return None
    wanted = _wanted(examples)
    return metric.pointless(judged(spec.tasks[task], (), wanted, *named_classes(spec, task, classes)))


def _wanted(examples: Sequence[Encoded]) -> list[Any]:
    """What the data says is right, as far as it does: accepted texts, or indices of choices and classes."""
    known = [example.targets or example.label for example in examples]
    return [each for each in known if each is not None]


def _divided(spec: StudySpec, task: str, total: int) -> tuple[list[int], list[int]]:
    """Rows of a task's validation split that the search sees, and the others."""
    generator, settings = seeded_generator(spec.search.seed, "limit", task), spec.tasks[task]
    divided = divided_first_rows if isinstance(settings, HarnessTask) else divided_rows
    return divided(total, settings.limit, spec.search.holdout, generator)


def fisher_rows(spec: StudySpec, task: str, total: int, wanted: Mapping[str, list[int]] | None) -> list[int]:
    """The rows of the validation split that a task's importance is estimated on; none of a guard.

    Args:
        spec: where their number and the seed stand.
        task: name of the task.
        total: rows of the whole split.
        wanted: rows by task; a task that is not among them, or None, gets a seeded draw.

    Raises:
        InputError: the rows that are wanted are not there.
    """
    if spec.tasks[task].guard:  # no expert stands for it
        return []
    if wanted is None or task not in wanted:
        return draw_rows(total, spec.importance.samples, seeded_generator(spec.search.seed, "fisher", task))
    rows = wanted[task]
    bad = [row for row in rows if not 0 <= row < total]
    if bad or not rows or len(set(rows)) < len(rows):
        what = f"row {bad[0]} of a split with {total} rows" if bad else "rows missing or given twice"
        raise InputError(
            what, where=spec.where(f"importance.indices.{task}"), hint=f"Name different rows from 0 to {total - 1}"
        )
    return list(rows)
