"""Lines of a first spec for tasks of encoders with a head: what the expert's head and the columns of the data say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dfmerge_studies.checkpoints.heads import class_names
from dfmerge_studies.checkpoints.reference import Checkpoint
from dfmerge_studies.errors import InputError
from dfmerge_studies.study.draft_text import yaml_flow, yaml_text
from dfmerge_studies.tasks.labels import known_names

_WORDS = ("tokens", "words", "text", "sentence", "input")
_TAGS = ("ner_tags", "tags", "labels", "pos_tags", "label", "target")


def word_columns(rows: Sequence[Mapping[str, Any]], where: str) -> tuple[str, str | None]:
    """The columns of the words of a task of tags, and of their tags.

    Args:
        rows: of the data.
        where: for messages.

    Raises:
        InputError: no column holds lists of words.
    """
    columns = list(rows[0]) if rows else []
    lists = [column for column in columns if all(isinstance(row[column], list) and row[column] for row in rows)]
    texts = [column for column in lists if all(isinstance(each, str) for row in rows for each in row[column])]
    words = _first(texts, _WORDS) or next((column for column in texts if column not in _TAGS), None)
    if words is None:
        raise InputError(
            f"no column holds lists of words, which a head of tags needs: {', '.join(columns) or 'there are no rows'}",
            where=where,
            hint="Write the spec by hand: docs/specs.md has the fields of token-classification",
        )
    others = [column for column in lists if column != words]
    return words, _first(others, _TAGS) or next(iter(others), None)


def head_lines(kind: str, rows: Sequence[Mapping[str, Any]], label: str | None, owner: Checkpoint) -> list[str]:
    """The lines of classes and labels.

    Args:
        kind: type of the task, any but classification.
        rows: of the data.
        label: the column of the labels, if one was found.
        owner: the expert whose head it is.
    """
    if kind == "regression":
        return [f"    doc_to_target: {yaml_text(label)}  # the right number"] if label is not None else []
    names = list(known_names(class_names(owner, kind)))
    what = "tags" if kind == "token-classification" else "labels"
    lines = [f"    doc_to_choice: {yaml_flow(names)}  # the {what} of the expert's head, in its order"] if names else []
    columns = list(rows[0]) if rows else []
    if kind == "multi-label-classification" and names and set(names) <= set(columns):
        target = "{{ [" + ", ".join(names) + "] }}"
        return [*lines, f'    doc_to_target: "{target}"  # a column of 0 and 1 for each label']
    if label is not None:
        lines.append(f"    doc_to_target: {yaml_text(label)}  # a list of the {what}, by name or index")
    if kind == "token-classification":
        spelt = all(name == "O" or name[1:2] == "-" for name in names) and bool(names)
        lines.append(f"    metric: {'entity_f1' if spelt else 'word_accuracy'}")
    return lines


def _first(columns: Sequence[str], names: Sequence[str]) -> str | None:
    return next((column for name in names for column in columns if column.lower() == name), None)
