"""Names inside a spec that must match each other, and coefficients that must fit it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dfmerge_studies.errors import InputError
from dfmerge_studies.names import NAME
from dfmerge_studies.trials.space import Space

if TYPE_CHECKING:
    from dfmerge_studies.spec.study import StudySpec


def check_references(spec: StudySpec) -> None:
    """Names inside the spec that must match each other.

    Args:
        spec: the spec, each field valid by itself.

    Raises:
        InputError: no expert or task, a name that is unusable or unknown, mixed task types, or a point or baseline that
            does not fit.
    """
    if not spec.experts:
        raise InputError("no experts", where=spec.where("experts"), mend="Name at least one fine-tuned model")
    if not spec.tasks:
        raise InputError("no tasks", where=spec.where("tasks"), mend="Name at least one task to score on")
    for kind, names in (("experts", spec.experts), ("tasks", spec.tasks)):
        for name in names:
            if not NAME.fullmatch(name):
                raise InputError(
                    f"{name!r} is no usable name", where=spec.where(kind), mend="Use letters, digits, '.', '_' and '-'"
                )
    for name, expert in spec.experts.items():
        if expert.task is not None and expert.task not in spec.tasks:
            raise InputError(
                f"the expert has no task: {expert.task!r} is not among the tasks ({', '.join(spec.tasks)})",
                where=spec.where(f"experts.{name}"),
                mend="Name its task, or write 'task: null' to weigh it by all tasks",
            )
    types = {task.type for task in spec.tasks.values()}
    if len(types) > 1:
        raise InputError(
            "tasks of type choice and classification cannot be mixed: one model answers them all",
            where=spec.where("tasks"),
            mend="Use one type",
        )
    check_labels_needed(spec)
    _check_points(spec)
    _check_baselines(spec)
    for field, named in (
        ("objective.weights", spec.objective.weights),
        ("importance.indices", spec.importance.indices),
    ):
        if isinstance(named, dict) and (odd := sorted(set(named) - set(spec.tasks))):
            raise InputError(
                f"unknown task {odd[0]!r}", where=spec.where(field), mend=f"The tasks are {', '.join(spec.tasks)}"
            )


def check_labels_needed(spec: StudySpec) -> None:
    """Refuse tasks that the objective cannot score: without a label, or for agreement without an expert.

    Args:
        spec: the spec.

    Raises:
        InputError: naming the task.
    """
    with_expert = {expert.task for expert in spec.experts.values()}
    for name, task in spec.tasks.items():
        if spec.needs_labels and task.doc_to_target is None:
            raise InputError(
                "this field is required",
                where=spec.where(f"tasks.{name}.doc_to_target"),
                mend="Add it; without labels use objective: agreement, and no estimator that needs them",
            )
        if spec.objective.kind == "agreement" and name not in with_expert:
            raise InputError(
                "no expert has this task, and objective: agreement compares with the task's expert",
                where=spec.where(f"tasks.{name}"),
                mend="Add an expert with this task, or remove the task",
            )


def _check_baselines(spec: StudySpec) -> None:
    for baseline in spec.baselines:
        if spec.baselines.count(baseline) > 1 or baseline == spec.method:
            raise InputError(
                f"{baseline!r} is {'the method itself' if baseline == spec.method else 'named twice'}",
                where=spec.where("baselines"),
                mend="Name every other method once",
            )
        if not NAME.fullmatch(f"{spec.name}.{baseline}"):
            raise InputError(
                f"the name is too long for a baseline's study {spec.name}.{baseline}",
                where=spec.where("name"),
                mend="Choose a shorter one",
            )


def _check_points(spec: StudySpec) -> None:
    for point in spec.search.enqueue:
        given = dict.fromkeys(spec.experts, point) if isinstance(point, float) else point
        check_coefficients(spec, given, "search.enqueue", step=spec.search.step)


def check_coefficients(
    spec: StudySpec,
    point: Mapping[str, float],
    field: str,
    *,
    bounds: tuple[float, float] | None = None,
    step: float | None = None,
) -> dict[str, float]:
    """A coefficient for every expert, each inside the bounds, in the order of the experts.

    Args:
        spec: names the experts and the bounds.
        point: coefficient per expert.
        field: where the point stands, for messages: a field of the spec, or a flag with its dashes.
        bounds: range of a method whose coefficients may lie elsewhere than `search.bounds`.
        step: distance between allowed values; any value of the range by default, since a merge needs no step.

    Raises:
        InputError: as `Space.check` has it.
    """
    space = Space(tuple(spec.experts), *(bounds or spec.search.bounds), step)
    space.check(point, where=field if field.startswith("-") else spec.where(field))
    return {name: float(point[name]) for name in spec.experts}
