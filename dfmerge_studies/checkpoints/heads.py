"""What a classifier's configuration says of its head: the names of its classes, and whether it picks one of them."""

from __future__ import annotations

from dfmerge_studies.checkpoints.reference import Checkpoint
from dfmerge_studies.errors import InputError

_OTHER_HEADS = {"multi_label_classification": "multi-label", "regression": "regression"}


def class_names(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Names of a head's classes in its order, as `id2label` has them; nothing where there is no such field.

    Args:
        checkpoint: a classifier, or an adapter, which may have no config.json.

    Raises:
        InputError: the head is no head of single-label classification.
    """
    config = checkpoint.read_config()
    labels, problem = config.get("id2label"), config.get("problem_type")
    names = labels if isinstance(labels, dict) else {}
    one = len(names) == 1 or config.get("num_labels") == 1
    kind = _OTHER_HEADS.get(str(problem)) or ("regression" if one else None)
    if kind is not None:
        found = f"problem_type {problem!r}" if str(problem) in _OTHER_HEADS else "one label"
        raise InputError(
            f"a {kind} head ({found}); tasks of type classification pick one of several classes",
            where=str(checkpoint.path / "config.json"),
            hint="Name an expert with a head of single-label classification",
        )
    try:
        return tuple(str(names[number]) for number in sorted(names, key=int))
    except ValueError as error:
        raise InputError(
            f"id2label has keys that are no class numbers: {sorted(names)}",
            where=str(checkpoint.path / "config.json"),
            hint="Number the classes from 0",
        ) from error
