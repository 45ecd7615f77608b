"""The inputs of a task: the rows of its splits, checked, and what the model sees of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from dfmerge_studies.boundary import reading
from dfmerge_studies.checkpoints.resident import Resident, head_classes
from dfmerge_studies.checkpoints.vocabulary import MEND
from dfmerge_studies.errors import InputError
from dfmerge_studies.objective.classes import Classes
from dfmerge_studies.spec import StudySpec
from dfmerge_studies.tasks.data import Row, load_rows
from dfmerge_studies.tasks.encoding import Encoded, Kind
from dfmerge_studies.tasks.harness import read_questions
from dfmerge_studies.tasks.harness_model import encode_questions
from dfmerge_studies.tasks.own import check_function
from dfmerge_studies.tasks.settings import (
    AnyTask,
    HarnessTask,
    MultiLabelTask,
    RegressionTask,
    TokenTask,
    choices_of,
)
from dfmerge_studies.tasks.splits import Split
from dfmerge_studies.tasks.tokenise import encode_rows, longest_input, prompted

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_classes(spec: StudySpec, task: str, split: Split, rows: Sequence[Row]) -> None:
    """Refuse choices that differ from row to row, where the metric compares them across rows, or that it cannot read.

    Args:
        spec: where the metric stands.
        task: name of the task.
        split: of the tasks' data.
        rows: of the split, as text.

    Raises:
        InputError: naming the first such row, or a positive class that there is not.
    """
    settings, metric = spec.tasks[task], spec.metrics(split)[task]
    check_function(metric)
    if (why := metric.unreadable(rows[0].choices)) is not None:
        raise InputError(
            f"{metric.name} cannot read the names of the classes: {why}",
            where=spec.where(f"tasks.{task}.metric"),
            hint="Name them in doc_to_choice, in the order of the head, or use another metric",
        )
    if not metric.classes:
        return
    for row in rows:
        if row.choices != rows[0].choices:
            raise InputError(
                f"{metric.name} compares classes, and row {row.index} of {split} has other choices than row "
                f"{rows[0].index}",
                where=spec.where(f"tasks.{task}.metric"),
                hint="Use accuracy or log_likelihood, or give all rows the same choices in the same order",
            )
    positive = settings.positive_class()
    if positive is not None and rows[0].choices and positive >= len(rows[0].choices):
        raise InputError(
            f"there is no choice of index {positive}: the rows have {len(rows[0].choices)}",
            where=spec.where(f"tasks.{task}.positive"),
            hint="Count from 0",
        )


def check_labels(
    spec: StudySpec, task: str, examples: Sequence[Encoded], heads: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Refuse a head of one output, or of another number of classes than the task, and labels that it has no class for.

    Args:
        spec: for messages.
        task: name of the task.
        examples: its inputs.
        heads: parameters of the heads by task.

    Raises:
        InputError: naming the row, if it is one.
    """
    if task not in heads:
        return
    settings, classes = spec.tasks[task], head_classes(heads[task])
    regression = isinstance(settings, RegressionTask)
    if (classes == 1) != regression:
        kind = "one number" if regression else "several classes"
        raise InputError(
            f"the expert's head is no head of {kind}: it has {classes} output{'s' * (classes > 1)}",
            where=spec.where(f"tasks.{task}"),
            hint=f"Name an expert with a head of {kind}",
        )
    if regression:
        return
    names = choices_of(settings)
    if isinstance(names, list) and len(names) != classes:
        raise InputError(
            f"{len(names)} classes {names}, but the expert's head has {classes}",
            where=spec.where(f"tasks.{task}.doc_to_choice"),
            hint="Name the head's classes, or the expert that was trained on these classes",
        )
    for example in examples:
        if (largest := _largest_class(settings, example.label)) >= classes:
            raise InputError(
                f"row {example.index}: label {largest} is not among the {classes} classes of the expert's head",
                where=spec.where(f"tasks.{task}.doc_to_target"),
                hint="Correct the data, or name the expert that was trained on these classes",
            )


def _largest_class(task: AnyTask, label: Any) -> int:
    """The largest class that a label names; -1 for none."""
    if label is None:
        return -1
    if isinstance(task, MultiLabelTask):
        return len(label) - 1
    return max(label) if isinstance(task, TokenTask) else int(label)


def encode_split(
    spec: StudySpec,
    task: str,
    split: Split | Literal["training"],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    kind: Kind,
    classes: Classes,
) -> list[Encoded]:
    """Read and tokenise one split of a task.

    Args:
        spec: where the task is described.
        task: its name.
        split: of the task's data; "training" is for scripts/finetune.py.
        model: whose limits and architecture count.
        tokenizer: its tokenizer.
        kind: how it answers.
        classes: of the heads, in whose order labels are to be.

    Raises:
        InputError: the split is not named, cannot be read, or does not fit the model.
    """
    return encode_read(spec, task, read_split(spec, task, split, classes), model, tokenizer, kind)


def read_split(
    spec: StudySpec,
    task: str,
    split: Split | Literal["training"],
    classes: Classes,
    *,
    remarks: list[str] | None = None,
) -> list[Row]:
    """Read one split of a task as text.

    Args:
        spec: where the task is described.
        task: its name.
        split: of the task's data; "training" is for scripts/finetune.py.
        classes: of the heads, in whose order labels are to be.
        remarks: takes a sentence on labels that could be read otherwise too.

    Raises:
        InputError: the split is not named, or cannot be read.
    """
    settings = spec.tasks[task]
    name: str | None = getattr(settings, f"{split}_split", None)
    if isinstance(settings, HarnessTask) and (name is not None or split == "validation"):
        where, trusted = spec.where(f"tasks.{task}"), spec.trust_remote_code
        return read_questions(settings, name, root=spec.root, where=where, trusted=trusted)
    if name is None or isinstance(settings, HarnessTask):
        hint = "Name one, or use --split validation" if split == "test" else "Name one"
        raise InputError(f"no {split}_split", where=spec.where(f"tasks.{task}"), hint=hint)
    labelled = split == "test" or spec.needs_labels(task)
    rows = load_rows(
        task,
        settings,
        name,
        root=spec.root,
        spec_file=str(spec.file),
        labelled=labelled,
        classes=classes.get(task, ()),
        remarks=remarks,
    )
    if split != "training":
        check_classes(spec, task, split, rows)
    return rows


def encode_read(
    spec: StudySpec,
    task: str,
    rows: Sequence[Row],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    kind: Kind,
) -> list[Encoded]:
    """Tokenise rows of a task that have been read.

    Args:
        spec: where the task is described.
        task: its name.
        rows: of `read_split`.
        model: whose limits and architecture count.
        tokenizer: its tokenizer.
        kind: how it answers.

    Raises:
        InputError: a row does not fit the model.
    """
    return _encoded(spec, task, prompted_rows(spec, task, rows, tokenizer), model, tokenizer, kind)


def prompted_rows(spec: StudySpec, task: str, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """Rows of a task with their whole prompts as text.

    Args:
        spec: where the task is described.
        task: its name.
        rows: of `read_split`.
        tokenizer: whose chat template is applied.

    Raises:
        InputError: a row does not fit the chat template, or there is none.
    """
    settings = spec.tasks[task]
    if isinstance(settings, HarnessTask):  # the harness writes them itself
        return list(rows)
    return prompted(rows, settings, tokenizer, where=spec.where(f"tasks.{task}"))


def _encoded(
    spec: StudySpec,
    task: str,
    rows: Sequence[Row],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    kind: Kind,
    template: PreTrainedTokenizerBase | None = None,
) -> list[Encoded]:
    """Tokenise rows that have their whole prompts; those of the harness get them here, by the template's tokenizer."""
    settings = spec.tasks[task]
    if isinstance(settings, HarnessTask):
        return encode_questions(rows, kind, model, tokenizer, template)
    longest = longest_input(model.config, tokenizer)
    where = spec.where(f"tasks.{task}")
    hint = "Save the tokenizer into the base's directory with tokenizer.save_pretrained"
    with reading(where, f"the tokenizer of {spec.base} fails on a row", hint):
        encoded = encode_rows(rows, settings, kind, tokenizer, longest=longest, where=where)
    _check_ids(spec, task, encoded, model)
    return encoded


def _check_ids(spec: StudySpec, task: str, examples: Sequence[Encoded], model: PreTrainedModel) -> None:
    """Refuse tokens that the model has no embedding of: its vocabulary is not that of its tokenizer."""
    known = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if known is None:
        return
    for example in examples:
        largest = max(token for ids in (example.input_ids, *example.choices) for token in ids)
        if largest >= known:
            raise InputError(
                f"row {example.index} has the token {largest}, but the base {spec.base} has {known} embeddings",
                where=spec.where(f"tasks.{task}"),
                hint="Save the tokenizer that belongs to the base into its directory",
            )


def encode_for_all(spec: StudySpec, task: str, rows: Sequence[Row], resident: Resident, kind: Kind) -> list[Encoded]:
    """Tokenise rows of a task, and refuse experts whose own tokenizer reads one of them otherwise.

    Args:
        spec: where the task is described.
        task: its name.
        rows: of `read_split`.
        resident: the base, and the tokenizers of experts that differ from its own.
        kind: how they answer.

    Raises:
        InputError: a row does not fit the model, or is read otherwise: names the expert, the row, and a token that only
            one of the two has, if there is one.
    """
    prompts = prompted_rows(spec, task, rows, resident.tokenizer)  # chat templates of experts are not used
    encoded = _encoded(spec, task, prompts, resident.model, resident.tokenizer, kind)
    union = resident.union
    for expert, tokenizer in resident.other_tokenizers.items():
        if union is not None and spec.experts[expert].task not in (None, task):
            continue  # other experts' tokens are none of its own
        try:
            theirs = _encoded(spec, task, prompts, resident.model, tokenizer, kind, resident.tokenizer)
        except InputError:  # rows that the base's tokenizer takes
            theirs = []
        if union is not None:
            ids = union.renumbered(expert)
            theirs = [_renumbered(item, ids) for item in theirs]
        odd = next((i for i, item in enumerate(encoded) if i >= len(theirs) or theirs[i] != item), None)
        if odd is None:
            continue
        text = "\n".join((prompts[odd].text, rows[odd].pair or "", *rows[odd].choices))
        unshared = sorted(tokenizer.get_vocab().keys() ^ resident.tokenizer.get_vocab().keys())
        token = next((f": the text has {token!r}" for token in unshared if token in text), "")
        raise InputError(
            f"its tokenizer reads row {rows[odd].index} of the task {task} otherwise than the base's{token}",
            where=spec.where(f"experts.{expert}"),
            hint=MEND,
        )
    return encoded


def _renumbered(item: Encoded, ids: Mapping[int, int]) -> Encoded:
    """An input with the ids of another vocabulary, as far as they differ."""
    return replace(
        item,
        input_ids=tuple(ids.get(token, token) for token in item.input_ids),
        choices=tuple(tuple(ids.get(token, token) for token in choice) for choice in item.choices),
    )


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that pads batches; it is masked, so any will do where a tokenizer has none.

    Args:
        tokenizer: its padding token comes first, then its end of sequence, then id 0.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0
