"""From what `doc_to_target` gives for the rows of a `generate` task to the texts that are accepted as answers."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from dfmerge_studies.errors import InputError
from dfmerge_studies.tasks.settings import GenerateTask, metric_of
from dfmerge_studies.tasks.templates import CSV_HINT, is_missing


def read_targets(values: Sequence[Any], task: GenerateTask, *, where: str, split: str) -> list[tuple[str, ...]]:
    """The accepted texts of every row, in the order of the data.

    A template that renders a list in Python's writing means that list, as in lm-evaluation-harness.

    Args:
        values: one per row: a text, a number, or a list of them.
        task: whose metric they are for.
        where: file and field, for messages.
        split: name of the split, for messages.

    Raises:
        InputError: a row has no target, or one that is no text, or that the metric cannot compare with.
    """
    rendered = task.doc_to_target is not None and any(sign in task.doc_to_target for sign in ("{{", "{%"))
    metric = metric_of(task)
    found = []
    for index, value in enumerate(values):
        row = f"row {index} of the split {split!r}"
        targets = tuple(_text(each, row, where) for each in _several(value, rendered))
        if not targets:
            raise InputError(f"{row}: the list of targets is empty", where=where, hint="Give it at least one text")
        for target in targets:
            if fault := metric.fault(target):
                hint = "Correct the data, or let a template of doc_to_target give the number alone"
                raise InputError(f"{row}: the target {target[:60]!r} does not fit: {fault}", where=where, hint=hint)
        found.append(targets)
    return found


def _several(value: Any, rendered: bool) -> Sequence[Any]:
    """The targets that a value stands for."""
    if rendered and isinstance(value, str) and value.strip().startswith("[") and value.strip().endswith("]"):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):  # the last two: nested deeply
            return [value]
    return value if isinstance(value, (list, tuple)) else [value]


def _text(value: Any, row: str, where: str) -> str:
    if is_missing(value):
        raise InputError(f"{row}: there is no target", where=where, hint=f"Fill it, or remove the row{CSV_HINT}")
    if isinstance(value, (Mapping, list, tuple, bytes)):
        hint = "Name a part of it, as in '{{ answers.text }}'" if isinstance(value, Mapping) else "Give texts"
        raise InputError(f"{row}: the target {str(value)[:60]} is no text", where=where, hint=hint)
    return str(value)
