"""From a task's settings to rows of text: data sets, prompts, choices, labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfmerge_studies.errors import InputError
from dfmerge_studies.tasks.fewshot import draw_examples
from dfmerge_studies.tasks.files import documents, empty_split, opened_split
from dfmerge_studies.tasks.label_sets import read_label_sets
from dfmerge_studies.tasks.labels import class_order, known_names, read_index, read_labels
from dfmerge_studies.tasks.numbers import read_numbers
from dfmerge_studies.tasks.prompts import Example
from dfmerge_studies.tasks.readings import Convention, Question, Reading
from dfmerge_studies.tasks.settings import (
    ChosenTask,
    GenerateTask,
    HeadTask,
    MultiLabelTask,
    OwnTask,
    PromptedTask,
    RegressionTask,
    RenderedTask,
    TextTask,
    TokenTask,
    choices_of,
)
from dfmerge_studies.tasks.tags import IGNORED, read_tags, read_words
from dfmerge_studies.tasks.targets import read_targets
from dfmerge_studies.tasks.templates import (
    as_list,
    bare_column,
    empty_cell,
    is_missing,
    is_there,
    renderer,
    text_renderer,
)

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, slots=True)
class Row:
    """One example as text.

    Attributes:
        index: row of the split.
        text: the prompt or the text to classify.
        pair: second text, for heads that read pairs.
        choices: the choices, in order; for classification the class names, or nothing; for texts the text alone.
        label: as `Encoded` has it; of words a tag for each; None where the data has no labels.
        description: of the task, before everything in the prompt.
        prefix: how the answer begins.
        examples: before the text in the prompt.
        targets: of a text to be generated, the accepted ones; nothing where the data has none.
        question: of a task of lm-evaluation-harness, the document.
        words: of the text, where they get tags.
    """

    index: int
    text: str
    pair: str | None
    choices: tuple[str, ...]
    label: Any
    description: str = ""
    prefix: str = ""
    examples: tuple[Example, ...] = ()
    targets: tuple[str, ...] = ()
    question: Any = None
    words: tuple[str, ...] = ()


def load_rows(
    name: str,
    task: OwnTask,
    split: str,
    *,
    root: Path,
    spec_file: str,
    labelled: bool = True,
    classes: Sequence[str] = (),
    remarks: list[str] | None = None,
) -> list[Row]:
    """Load a split and render prompts, choices and labels.

    Args:
        name: the task's name, for messages.
        task: its settings.
        split: name of the split.
        root: folder that local data files are relative to.
        spec_file: the spec, for messages.
        labelled: whether the column of `doc_to_target` must be there; otherwise rows without it have no label.
        classes: of a classification task, the names of its head's classes, as far as they are known; labels are indices
            into them, whatever order the data's own names have.
        remarks: takes a sentence on labels that could be read otherwise too.

    Raises:
        InputError: the data cannot be read, is empty, or does not fit the templates; says which row and field.
    """
    where = f"{spec_file}: tasks.{name}"

    @cache
    def decisive() -> dict[Question, Reading]:
        """How the validation split is read; nothing where there is none, or none with labels."""
        alone = Convention()
        with suppress(InputError):
            _labelled_rows(task, task.validation_split, root, where, alone, classes=classes)
        return alone.own

    def convention(split: str) -> Convention:
        return Convention(None if split == task.validation_split else decisive, task.validation_split)

    rows = _labelled_rows(
        task, split, root, where, convention(split), labelled=labelled, classes=classes, remarks=remarks
    )
    if isinstance(task, PromptedTask) and task.num_fewshot:
        source = task.fewshot_source
        same = split == source
        pool = rows if same and labelled else _labelled_rows(task, source, root, where, convention(source))
        return _with_examples(rows, pool, task, same=same, where=where)
    return rows


def _with_examples(
    rows: Sequence[Row], pool: Sequence[Row], task: PromptedTask, *, same: bool, where: str
) -> list[Row]:
    """Rows with few-shot examples of a pool."""
    # What a row asks: not its targets, which may be worded otherwise, nor the order of its choices.
    questions, possible = ([(row.text, tuple(sorted(row.choices))) for row in side] for side in (rows, pool))
    drawn = draw_examples(
        questions,
        possible,
        task.num_fewshot,
        task.fewshot_random_seed,
        same=same,
        spare=task.fewshot_split == task.test_split,  # the harness's test, which holds too where neither is named
        where=where,
    )
    shown = [
        Example(row.text, row.targets[0] if row.targets else row.choices[row.label or 0], row.prefix) for row in pool
    ]
    return [replace(row, examples=tuple(shown[i] for i in own)) for row, own in zip(rows, drawn, strict=True)]


def _labelled_rows(
    task: OwnTask,
    split: str,
    root: Path,
    where: str,
    convention: Convention,
    *,
    labelled: bool = True,
    classes: Sequence[str] = (),
    remarks: list[str] | None = None,
) -> list[Row]:
    """The rows of a split, as `load_rows` documents them, without examples."""
    with opened_split(task.dataset, split, root, where) as dataset:
        if len(dataset) == 0:
            raise empty_split(split, where)
        columns = list(dataset.column_names)
        target = task.doc_to_target if labelled or is_there(task.doc_to_target, columns) else None
        names = _class_names(dataset, bare_column(target, columns))
        if isinstance(task, TextTask):
            return _texts(dataset, task, where)
        rows, values = _render(dataset, task, target, names or known_names(classes), where)
    if isinstance(task, GenerateTask):
        if target is None:
            return rows
        accepted = read_targets(values, task, where=f"{where}.doc_to_target", split=split)
        return [replace(row, targets=texts) for row, texts in zip(rows, accepted, strict=True)]
    if target is not None:
        at = f"{where}.doc_to_target"
        labels, remark = _labels(task, rows, values, target, names, len(classes) or None, at, split, convention)
        if remark is not None and remarks is not None:
            remarks.append(remark)
        rows = [replace(row, label=label) for row, label in zip(rows, labels, strict=True)]
    if not classes or isinstance(task, RegressionTask):
        return rows
    return [_in_order_of(classes, row, task, where) for row in rows]


def _labels(
    task: ChosenTask | HeadTask,
    rows: Sequence[Row],
    values: Sequence[Any],
    target: str | int,
    names: Sequence[str],
    number: int | None,
    where: str,
    split: str,
    convention: Convention,
) -> tuple[Sequence[Any], str | None]:
    """The label of every row, and a remark where they could be read otherwise too."""
    if isinstance(task, RegressionTask):
        return read_numbers(values, where=where, split=split), None
    if isinstance(task, MultiLabelTask):
        choices = rows[0].choices
        known = len(choices) or number
        return read_label_sets(values, choices, known, names=names, where=where, split=split, convention=convention)
    if isinstance(task, TokenTask):
        words = [row.words for row in rows]
        tags = rows[0].choices
        return read_tags(values, words, tags, names=names, where=where, split=split, convention=convention)
    choices_of_rows = [row.choices for row in rows]
    if isinstance(target, int):  # in the spec it is an index for all rows, whatever the texts of choices
        return read_index(target, choices_of_rows, where=where, split=split), None
    return read_labels(
        values, choices_of_rows, names=names, where=where, split=split, number=number, convention=convention
    )


def _texts(dataset: Dataset, task: TextTask, where: str) -> list[Row]:
    """Rows of a task that scores texts: what stands before each, and the text."""
    columns, rows = list(dataset.column_names), []
    before = renderer(task.doc_to_text, columns, f"{where}.doc_to_text") if task.doc_to_text else None
    to_target = renderer(task.doc_to_target, columns, f"{where}.doc_to_target")
    for index, document in enumerate(documents(dataset, where)):
        text = _text(to_target(document, index), task.doc_to_target, f"{where}.doc_to_target", index)
        prompt = "" if before is None else before(document, index)
        if is_missing(prompt) or not isinstance(prompt, str):
            raise empty_cell(task.doc_to_text, index, f"{where}.doc_to_text")
        rows.append(Row(index, prompt, None, (text,), 0))
    return rows


def _class_names(dataset: Dataset, column: str | None) -> tuple[str, ...]:
    """The names that the data gives to a column of class numbers; nothing for any other column."""
    from datasets import ClassLabel

    feature = dataset.features.get(column)
    feature = getattr(feature, "feature", feature)  # of a list, what it holds
    return tuple(feature.names or ()) if isinstance(feature, ClassLabel) else ()


def _in_order_of(classes: Sequence[str], row: Row, task: ChosenTask | HeadTask, where: str) -> Row:
    """A row of a task with a head, with its label in the classes of the head."""
    if not row.choices:
        return row
    order = class_order(row.choices, tuple(classes), f"{where}.doc_to_choice")
    positive = task.positive if choices_of(task) is None else None  # an index with no list that it points into
    if isinstance(positive, int) and order[positive : positive + 1] not in ([], [positive]):
        raise InputError(
            f"class {positive} is {row.choices[positive]!r} in the data and {classes[positive]!r} in the expert's head",
            where=f"{where}.positive",
            hint="Name the classes in doc_to_choice and give positive as one of these texts",
        )
    return replace(
        row,
        choices=tuple(row.choices[order.index(place)] for place in range(len(order))),
        label=None if row.label is None else reordered(task, row.label, order),
    )


def reordered(task: ChosenTask | HeadTask, label: Any, order: Sequence[int]) -> Any:
    """A label in another order of the classes.

    Args:
        task: settings of a task with a head, or with choices.
        label: as `Encoded` has it.
        order: where each class stands in the other order.
    """
    if isinstance(task, MultiLabelTask):
        return tuple(label[order.index(place)] for place in range(len(order)))
    if isinstance(task, TokenTask):
        return tuple(tag if tag == IGNORED else order[tag] for tag in label)
    return order[label]


def _render(
    dataset: Dataset, task: RenderedTask, target: str | int | None, names: Sequence[str], where: str
) -> tuple[list[Row], list[Any]]:
    """Rows without their labels, and what `doc_to_target` gives for each."""
    columns = list(dataset.column_names)
    to_text = renderer(task.doc_to_text, columns, f"{where}.doc_to_text")
    source = bare_column(target, columns) or target
    to_target = None if source is None else renderer(source, columns, f"{where}.doc_to_target")
    to_choices = _choice_renderer(task, columns, f"{where}.doc_to_choice", tuple(names))
    pair = getattr(task, "doc_to_text_pair", None)
    to_pair = None if pair is None else renderer(pair, columns, f"{where}.doc_to_text_pair")
    around = {
        field: text_renderer(getattr(task, field, None), columns, f"{where}.{field}")
        for field in ("description", "gen_prefix")
    }
    rows, values = [], []
    for index, document in enumerate(documents(dataset, where)):
        text = to_text(document, index)
        words: tuple[str, ...] = ()
        if isinstance(task, TokenTask):
            words = read_words(text, index, f"{where}.doc_to_text")
            text = " ".join(words)
        text = _text(text, task.doc_to_text, f"{where}.doc_to_text", index)
        second = _text(to_pair(document, index), pair, f"{where}.doc_to_text_pair", index) if to_pair and pair else None
        description, prefix = (render(document, index) for render in around.values())
        rows.append(Row(index, text, second, to_choices(document, index), None, description, prefix, words=words))
        values.append(to_target(document, index) if to_target else None)
    return rows, values


def _choice_renderer(
    task: RenderedTask, columns: Sequence[str], where: str, names: tuple[str, ...]
) -> Callable[[Mapping[str, Any], int], tuple[str, ...]]:
    source = choices_of(task)
    if source is None:
        return lambda _document, _index: names
    if isinstance(source, list):
        parts = [
            renderer(part, columns, where) if "{{" in part or "{%" in part else (lambda _d, _i, part=part: part)
            for part in source
        ]
        return lambda document, index: _checked_choices([part(document, index) for part in parts], where, index)
    render = renderer(source, columns, where)

    def choices(document: Mapping[str, Any], index: int) -> tuple[str, ...]:
        value = render(document, index)
        found = as_list(value)
        if found is None:
            found = [value] if isinstance(value, str) else value
        return _checked_choices(found, where, index)

    return choices


def _checked_choices(value: Any, where: str, index: int) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)):
        raise InputError(f"row {index}: {value!r} is no list of choices", where=where, hint="Give a list of texts")
    odd = next((choice for choice in value if is_missing(choice) or isinstance(choice, (Mapping, list, tuple))), "")
    if odd != "":
        raise InputError(
            f"row {index} has {'an empty cell' if is_missing(odd) else repr(odd)} among its choices: {list(value)}",
            where=where,
            hint="Give every choice a text",
        )
    choices = tuple(str(choice) for choice in value)
    if len(choices) < 2:
        raise InputError(
            f"row {index} has only {len(choices)} choice{'s' * (not choices)}",
            where=where,
            hint="Give at least two choices",
        )
    if len(set(choices)) < len(choices):
        raise InputError(
            f"row {index} has the same choice twice: {list(choices)}", where=where, hint="Make them differ"
        )
    if not all(choice.strip() for choice in choices):
        raise InputError(f"row {index} has an empty choice", where=where, hint="Give every choice a text")
    return choices


def _text(value: Any, source: str, where: str, index: int) -> str:
    if is_missing(value):
        raise empty_cell(source, index, where)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"row {index}: {value!r} is no text", where=where, hint="Name a column with text in every row")
    return value
