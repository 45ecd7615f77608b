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


def classes_of_heads(
    spec: StudySpec, base: Checkpoint, experts: Mapping[str, Checkpoint]
) -> dict[str, tuple[str, ...]]:
    """Names of the classes of the heads that a spec's experts bring, and for guards of the base's own.

    Args:
        spec: which expert has which task.
        base: the base.
        experts: the experts by name.

    Raises:
        InputError: a head is of another kind than its task's.
    """
    classes: dict[str, tuple[str, ...]] = {}
    for name, task in spec.tasks.items():
        owner = head_owner(spec, name, base, experts)
        if owner is not None and task.type in HEADED:
            classes[name] = class_names(owner, task.type)
    return {task: names for task, names in classes.items() if names}


def head_owner(spec: StudySpec, task: str, base: Checkpoint, experts: Mapping[str, Checkpoint]) -> Checkpoint | None:
    """The model whose head answers a task: its first expert, of a guard the base; None where no expert has it.

    Args:
        spec: which expert has which task.
        task: its name.
        base: the base.
        experts: the experts by name.
    """
    if spec.tasks[task].guard:
        return base
    return next((experts[name] for name, expert in spec.experts.items() if expert.task == task), None)


def positive_class(spec: StudySpec, task: str, classes: Classes) -> int | None:
    """The class that the task's metric counts, as a label; None where the metric has none."""
    settings = spec.tasks[task]
    index, names = settings.positive_class(), choices_of(settings)
    if index is None or task not in classes or not isinstance(names, list):
        return index
    return class_order(tuple(names), tuple(classes[task]), spec.where(f"tasks.{task}.doc_to_choice"))[index]


def named_classes(spec: StudySpec, task: str, classes: Classes) -> tuple[int | None, list[str]]:
    """What a metric may have to know of a task's classes: the one that counts, and the names of all."""
    return positive_class(spec, task, classes), class_names_of(spec, task, classes)


def class_names_of(spec: StudySpec, task: str, classes: Classes) -> list[str]:
    """Names of a task's classes in the order of its head; nothing where they have none.

    Args:
        spec: whose task it is.
        task: its name.
        classes: names of the classes of each task's head, as far as they are known.
    """
    own, choices = known_names(classes.get(task, ())), choices_of(spec.tasks[task])
    return list(own) or (list(choices) if isinstance(choices, list) else [])


def head_labels(spec: StudySpec, task: str, classes: Classes, number: int) -> list[str]:
    """Names of a head's classes for its configuration: its own, else those of the data, else transformers' numbers.

    Args:
        spec: whose task it is.
        task: its name.
        classes: names of the classes of each task's head, as far as they are known.
        number: of the head's classes.
    """
    names = class_names_of(spec, task, classes)
    return names if len(names) == number else [f"LABEL_{index}" for index in range(number)]
