"""Names of the classes of each task's head, in whose order labels are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dfmerge_studies.checkpoints.heads import class_names
from dfmerge_studies.checkpoints.reference import Checkpoint
from dfmerge_studies.spec import StudySpec
from dfmerge_studies.tasks.encoding import HEADED
from dfmerge_studies.tasks.labels import class_order, known_names
from dfmerge_studies.tasks.settings import choices_of

Classes = Mapping[str, Sequence[str]]  # by task; a task without names of classes is left out


def classes_of_experts(spec: StudySpec, experts: Mapping[str, Checkpoint]) -> dict[str, tuple[str, ...]]:
    """Names of the classes of the heads that a spec's experts bring.

    Args:
        spec: which expert has which task.
        experts: the experts by name.

    Raises:
        InputError: a head is of another kind than its task's.
    """
    classes: dict[str, tuple[str, ...]] = {}
    for name, expert in spec.experts.items():
        if expert.task in spec.tasks and spec.tasks[expert.task].type in HEADED:
            classes.setdefault(expert.task, class_names(experts[name], spec.tasks[expert.task].type))
    return {task: names for task, names in classes.items() if names}


def positive_class(spec: StudySpec, task: str, classes: Classes) -> int | None:
    """The class that the task's metric counts, as a label; None where the metric has none."""
    settings = spec.tasks[task]
    index, names = settings.positive_class(), choices_of(settings)
    if index is None or task not in classes or not isinstance(names, list):
        return index
    return class_order(tuple(names), tuple(classes[task]), spec.where(f"tasks.{task}.doc_to_choice"))[index]


def head_labels(spec: StudySpec, task: str, classes: Classes, number: int) -> list[str]:
    """Names of a head's classes for its configuration: its own, else those of the data, else transformers' numbers.

    Args:
        spec: whose task it is.
        task: its name.
        classes: names of the classes of each task's head, as far as they are known.
        number: of the head's classes.
    """
    own, choices = known_names(classes.get(task, ())), choices_of(spec.tasks[task])
    if len(own) == number:
        return list(own)
    if isinstance(choices, list) and len(choices) == number:
        return list(choices)
    return [f"LABEL_{index}" for index in range(number)]
