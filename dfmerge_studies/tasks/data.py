"""From a task's settings to rows of text: data sets, prompts, choices, labels."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfmerge_studies.errors import InputError
from dfmerge_studies.tasks.files import documents, empty_split, opened_split
from dfmerge_studies.tasks.settings import ChoiceTask, ClassificationTask
from dfmerge_studies.tasks.templates import is_there, renderer

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, slots=True)
class Row:
    """One example as text.

    Attributes:
        index: row of the split.
        text: the prompt or the text to classify.
        pair: second text, for classification of pairs.
        choices: the choices, in order; for classification the class names, or nothing.
        label: index of the right one, None where the data has no labels.
    """

    index: int
    text: str
    pair: str | None
    choices: tuple[str, ...]
    label: int | None


def load_rows(
    name: str,
    task: ChoiceTask | ClassificationTask,
    split: str,
    *,
    root: Path,
    spec_file: str,
    labelled: bool = True,
) -> list[Row]:
    """Load a split and render prompts, choices and labels.

    Args:
        name: the task's name, for messages.
        task: its settings.
        split: name of the split.
        root: folder that local data files are relative to.
        spec_file: the spec, for messages.
        labelled: whether the column of `doc_to_target` must be there; otherwise rows without it have no label.

    Raises:
        InputError: the data cannot be read, is empty, or does not fit the templates; says which row and field.
    """
    where = f"{spec_file}: tasks.{name}"
    with opened_split(task.dataset, split, root, where) as dataset:
        if len(dataset) == 0:
            raise empty_split(split, where)
        return _render(dataset, task, split, where, labelled)


def _render(
    dataset: Dataset, task: ChoiceTask | ClassificationTask, split: str, where: str, labelled: bool
) -> list[Row]:
    columns = list(dataset.column_names)
    to_text = renderer(task.doc_to_text, columns, f"{where}.doc_to_text")
    target = task.doc_to_target if labelled or is_there(task.doc_to_target, columns) else None
    to_target = renderer(target, columns, f"{where}.doc_to_target") if target is not None else None
    to_choices = _choice_renderer(task, columns, f"{where}.doc_to_choice")
    pair = task.doc_to_text_pair if isinstance(task, ClassificationTask) else None
    to_pair = renderer(pair, columns, f"{where}.doc_to_text_pair") if pair is not None else None
    rows = []
    for index, document in enumerate(documents(dataset, where)):
        choices = to_choices(document, index)
        row = Row(
            index,
            _text(to_text(document, index), f"{where}.doc_to_text", index),
            _text(to_pair(document, index), f"{where}.doc_to_text_pair", index) if to_pair else None,
            choices,
            _label(to_target(document, index), choices, f"{where}.doc_to_target", split, index) if to_target else None,
        )
        rows.append(row)
    return rows


def _choice_renderer(
    task: ChoiceTask | ClassificationTask, columns: Sequence[str], where: str
) -> Callable[[Mapping[str, Any], int], tuple[str, ...]]:
    source = task.doc_to_choice
    if source is None:
        return lambda _document, _index: ()
    if isinstance(source, list):
        parts = [
            renderer(part, columns, where) if "{{" in part or "{%" in part else (lambda _d, _i, part=part: part)
            for part in source
        ]
        return lambda document, index: _checked_choices([part(document, index) for part in parts], where, index)
    render = renderer(source, columns, where)

    def choices(document: Mapping[str, Any], index: int) -> tuple[str, ...]:
        value = render(document, index)
        if isinstance(value, str):
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError, RecursionError, MemoryError):  # the last two: nested deeply
                value = [value]
        return _checked_choices(value, where, index)

    return choices


def _checked_choices(value: Any, where: str, index: int) -> tuple[str, ...]:
    if not isinstance(value, Iterable) or isinstance(value, (str, Mapping)):
        raise InputError(f"row {index}: {value!r} is no list of choices", where=where, mend="Give a list of texts")
    choices = tuple(str(choice) for choice in value)
    if len(choices) < 2:
        raise InputError(
            f"row {index} has only {len(choices)} choice{'s' * (not choices)}",
            where=where,
            mend="Give at least two choices",
        )
    if len(set(choices)) < len(choices):
        raise InputError(
            f"row {index} has the same choice twice: {list(choices)}", where=where, mend="Make them differ"
        )
    if not all(choice.strip() for choice in choices):
        raise InputError(f"row {index} has an empty choice", where=where, mend="Give every choice a text")
    return choices


def _label(value: Any, choices: tuple[str, ...], where: str, split: str, index: int) -> int:
    """Index of the right choice, from an index or from its text."""
    if isinstance(value, str) and value in choices:
        return choices.index(value)
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = -1
    if number < 0 or (choices and number >= len(choices)) or (isinstance(value, float) and value != number):
        expected = f"an index below {len(choices)} or one of {list(choices)}" if choices else "a class number from 0 up"
        raise InputError(
            f"row {index} of the split {split!r}: label {value!r} is not among the choices, expected {expected}",
            where=where,
            mend="Correct the data or doc_to_target",
        )
    return number


def _text(value: Any, where: str, index: int) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"row {index}: {value!r} is no text", where=where, mend="Name a column with text in every row")
    return value
