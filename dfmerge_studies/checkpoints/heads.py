"""What a model's configuration says of its head: the names of its classes, and how it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dfmerge_studies.checkpoints.reference import Checkpoint
from dfmerge_studies.errors import InputError


@dataclass(frozen=True)
class _Head:
    """A kind of head.

    Attributes:
        problem: transformers' name, as `problem_type` of a configuration; None where a class of models is for it alone.
        words: what such a head is called.
        answers: what it does, after "tasks of type ...".
    """

    problem: str | None
    words: str
    answers: str


_HEADS: Mapping[str, _Head] = {  # by type of the tasks that need it
    "classification": _Head("single_label_classification", "single-label", "pick one of several classes"),
    "regression": _Head("regression", "regression", "have a head that gives one number"),
    "multi-label-classification": _Head(
        "multi_label_classification", "multi-label", "have a head that says yes or no to each label"
    ),
    "token-classification": _Head(None, "token classification", "have a head that tags every token"),
}
_WORDS = {head.problem: head.words for head in _HEADS.values() if head.problem is not None}
_OF_TOKENS = "ForTokenClassification"  # end of a class's name


def problem_type(kind: str) -> str | None:
    """Transformers' name of a kind of head.

    Args:
        kind: type of the tasks that need it.
    """
    return _HEADS[kind].problem


def head_kind(checkpoint: Checkpoint, otherwise: str) -> str:
    """The type of tasks that a head is for, as far as its configuration says.

    Args:
        checkpoint: a model with a head, or an adapter.
        otherwise: what it is where nothing says more.
    """
    config = checkpoint.read_config()
    labels = config.get("id2label")
    named = [
        kind for kind, head in _HEADS.items() if head.problem is not None and head.problem == config.get("problem_type")
    ]
    if otherwise == "classification" and not named and isinstance(labels, dict) and len(labels) == 1:
        return "regression"
    return named[0] if named and otherwise == "classification" else otherwise


def class_names(checkpoint: Checkpoint, kind: str) -> tuple[str, ...]:
    """Names of a head's classes in its order, as `id2label` has them; nothing where there is no such field.

    Args:
        checkpoint: a model with a head, or an adapter, which may have no config.json.
        kind: type of the task that needs it.

    Raises:
        InputError: the head is of another kind.
    """
    config = checkpoint.read_config()
    names = _names(kind, checkpoint, config)
    outputs = len(names) or config.get("num_labels")
    other = _other_class(kind, checkpoint, config) or _other_kind(kind, config.get("problem_type"), outputs)
    if other is not None:
        raise InputError(
            f"a {other}; tasks of type {kind} {_HEADS[kind].answers}",
            where=str(checkpoint.path / "config.json"),
            hint=f"Name an expert with a {_HEADS[kind].words} head, or give the task the type of its head",
        )
    try:
        return tuple(str(names[number]) for number in sorted(names, key=int))
    except ValueError as error:
        raise InputError(
            f"id2label has keys that are no class numbers: {sorted(names)}",
            where=str(checkpoint.path / "config.json"),
            hint="Number the classes from 0",
        ) from error


def _names(kind: str, checkpoint: Checkpoint, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Names of a head's classes by their numbers, as far as the configuration says them."""
    labels = config.get("id2label")
    if isinstance(labels, dict):
        return labels
    whole = bool(config) and not checkpoint.is_adapter and kind != "classification"
    # Two labels without names are transformers' default, which it does not write.
    return {"0": "LABEL_0", "1": "LABEL_1"} if whole and config.get("num_labels") in (None, 2) else {}


def _other_class(kind: str, checkpoint: Checkpoint, config: Mapping[str, Any]) -> str | None:
    """The class that a model was saved as, where it reads whole texts and the tasks single words, or the reverse."""
    written = config.get("architectures")
    classes = [str(name) for name in written] if isinstance(written, list) else []
    wrong = [name for name in classes if name.endswith(_OF_TOKENS) != (_HEADS[kind].problem is None)]
    return wrong[0] if wrong and not checkpoint.is_adapter else None


def _other_kind(kind: str, problem: object, outputs: object) -> str | None:
    """What a head is that cannot be of a kind; None where it can.

    Args:
        kind: type of the task.
        problem: `problem_type` of the configuration.
        outputs: of the head, as far as the configuration says.
    """
    if problem in _WORDS and problem != _HEADS[kind].problem:
        return f"{_WORDS[str(problem)]} head (problem_type {problem!r})"
    if kind == "regression":
        return f"head of {outputs} outputs" if isinstance(outputs, int) and outputs != 1 else None
    return "regression head (one label)" if outputs == 1 else None
