"""A first spec from model folders and data files: what they say of themselves, and nothing asked.

Files are of one task where their names differ in the word for the split alone (`reviews.val.jsonl`,
`reviews-test.jsonl`); a task belongs to the expert whose folder has its name, or has it in its name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from dfmerge_studies.checkpoints.heads import class_names, head_kind
from dfmerge_studies.checkpoints.load import load_tokenizer
from dfmerge_studies.checkpoints.reference import Checkpoint, resolve
from dfmerge_studies.errors import InputError
from dfmerge_studies.names import NAME
from dfmerge_studies.spec.schema import SCHEMA
from dfmerge_studies.study.draft_heads import head_lines, word_columns
from dfmerge_studies.study.draft_text import yaml_flow, yaml_text
from dfmerge_studies.tasks.files import documents, opened_split
from dfmerge_studies.tasks.labels import known_names

_SPLITS = {
    **dict.fromkeys(("train", "training"), "training"),
    **dict.fromkeys(("validation", "val", "valid", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_FIRSTS = ("premise", "sentence1", "question1", "text1", "sentence_1")
_SECONDS = ("hypothesis", "sentence2", "question2", "text2", "sentence_2")
_TEXTS = ("text", "sentence", "input", "prompt", "question", "query", "content", "review", "document", *_FIRSTS)
_LABELS = (
    "label",
    "labels",
    "target",
    "answer",
    "gold",
    "class",
    "category",
    "output",
    "completion",
    "answers",
    "targets",
)
_CHOICES = ("choices", "options", "endings", "candidates")
_ROWS = 200  # that are looked at
_ROUND = 32  # tokens to a multiple of which max_length is rounded up
_MOST_CLASSES = 50
_FEW_CLASSES = 8  # up to which labels are choices, however few rows there are


@dataclass
class _DraftedTask:
    """What is known of a task."""

    files: dict[str, str] = field(default_factory=dict)  # by split
    builder: str = "json"
    rows: list[Mapping[str, Any]] = field(default_factory=list)

    @property
    def columns(self) -> list[str]:
        return list(self.rows[0]) if self.rows else []


def draft_spec(models: Sequence[str], data: Sequence[str], *, base: str | None, folder: Path) -> str:
    """The text of a spec.

    Args:
        models: folders of the experts, and of the base among them where `base` does not name it.
        data: files of rows.
        base: the model that the experts were fine-tuned from: a folder or a Hub id.
        folder: that the spec will be in, which relative paths start from.

    Raises:
        InputError: something cannot be found out; says which flag tells it.
    """
    found = {model: resolve(model, root=Path.cwd(), where=model) for model in models}
    base = base or _base_of(found)
    folders = [model for model in found if not _same(model, base)]
    experts = {_key(model): found[model] for model in folders}
    if len(experts) < len(folders):
        raise InputError(
            f"two of the models have one name: {', '.join(map(_key, folders))}", where="DIR", hint="Rename a folder"
        )
    if not experts:
        raise InputError("no expert is among the models", where="DIR", hint="Name the folders of fine-tuned models")
    tasks = _tasks(data, folder)
    for name, task in tasks.items():
        where = f"--data: {name}"
        with opened_split({"path": task.builder, "data_files": task.files}, "validation", folder, where) as split:
            task.rows = list(islice(documents(split, where), _ROWS))
    whole = resolve(base, root=Path.cwd(), where="--base")
    owners = _owners(experts, tasks)
    kind = _kind(whole, experts.values())
    tokenizer = load_tokenizer(whole)
    lines = [
        f"# yaml-language-server: $schema={SCHEMA}",
        "# Made by `dfmerge init` from the folders and files that it names. Look through it, then give it to",
        "# `dfmerge validate`. Fields that are not here have the defaults of docs/specs.md. Relative paths start from",
        "# the folder of this file.",
        "",
        f"name: {_study_name(tasks)}  # of the study in its storage",
        "",
        f"base: {yaml_text(_relative(base, folder))}  # what all experts were fine-tuned from",
        "experts:",
        *(_expert(name, model, owners.get(name), folder) for name, model in zip(experts, folders, strict=True)),
        "",
        f"tasks:  # {kind}",
    ]
    for name, task in tasks.items():
        owner = next((experts[expert] for expert, own in owners.items() if own == name), None)
        lines += _task_lines(name, task, kind, owner, tokenizer)
    return "\n".join([*lines, *_REST, ""])


_REST = [
    "",
    "method: df-merge  # or df-merge-scaled, gta, task-arithmetic, ties, fisher, averaging",
    "search:  # or `search: gradient`: every trial a step down the loss, along a coefficient per layer",
    "  trials: 60  # the total that the study should reach",
    "  # max_drop: 5  # no task may lose more points than this against its own expert",
    "baselines: [averaging]  # shown beside the winner; the verdict says whether it is better",
]


def _base_of(models: Mapping[str, Checkpoint]) -> str:
    """The base among the models, or the one that adapters name."""
    whole = [model for model, found in models.items() if not found.is_adapter]
    names = {model: Path(model).resolve().name.lower() for model in models}
    likely = [model for model in whole if names[model] in ("base", "pretrained")]
    likely = likely or [
        model for model in whole if len(models) > 1 and all(names[other].startswith(names[model]) for other in models)
    ]
    if len(likely) == 1:
        return likely[0]
    named = {found.adapter_base for found in models.values() if found.is_adapter}
    if len(named) == 1 and not whole and (name := named.pop()):
        return name
    raise InputError(
        "nothing says which model the experts were fine-tuned from", where="--base", hint="Add --base DIR, or a Hub id"
    )


def _same(model: str, base: str) -> bool:
    return model == base or (Path(base).is_dir() and Path(model).resolve() == Path(base).resolve())


def _key(model: str) -> str:
    """A name for an expert: its folder's, or the one above where that is but a checkpoint of a training."""
    path = Path(model).resolve()
    generic = re.fullmatch(r"checkpoint-\d+|model|final|best|output|adapter", path.name)
    return _plain(path.parent.name if generic else path.name)


def _plain(text: str) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip(".-") or "task"
    return name if NAME.fullmatch(name) else name[:100]


def _tasks(data: Sequence[str], folder: Path) -> dict[str, _DraftedTask]:
    """Files by task and split."""
    tasks: dict[str, _DraftedTask] = {}
    for file in data:
        path = Path(file)
        builder = _BUILDERS.get(path.suffix.lower())
        if builder is None:
            known = ", ".join(_BUILDERS)
            raise InputError(f"no data file by its ending ({known})", where=f"--data {file}", hint="Name such a file")
        words = [word for word in re.split(r"[._\-\s]+", path.stem) if word]
        splits = [_SPLITS[word.lower()] for word in words if word.lower() in _SPLITS]
        rest = [word for word in words if word.lower() not in _SPLITS]
        name = _plain("-".join(rest) or path.resolve().parent.name)
        task = tasks.setdefault(name, _DraftedTask(builder=builder))
        split = splits[0] if splits else "validation"
        if split in task.files or task.builder != builder:
            raise InputError(
                f"the task {name} has two files of the split {split}, or files of two kinds",
                where=f"--data {file}",
                hint="Name one file of each split",
            )
        task.files[split] = _relative(file, folder)
    for name, task in tasks.items():
        if "validation" not in task.files:
            raise InputError(
                f"the task {name} has no validation file, only {', '.join(task.files)}",
                where="--data",
                hint="Add one whose name says validation, val or dev",
            )
    if not tasks:
        raise InputError("no data files", where="--data", hint="Name the validation file of every task")
    return tasks


def _relative(path: str, folder: Path) -> str:
    """A path as it is written in a spec of that folder; a Hub id as it is."""
    return Path(os.path.relpath(Path(path).resolve(), folder.resolve())).as_posix() if Path(path).exists() else path


def _owners(experts: Mapping[str, Checkpoint], tasks: Mapping[str, _DraftedTask]) -> dict[str, str]:
    """The task of each expert, by their names."""
    if len(experts) == len(tasks) == 1:
        return dict(zip(experts, tasks, strict=True))
    owners = {}
    for name in experts:
        exact = [task for task in tasks if task.lower() == name.lower()]
        inside = [task for task in tasks if _letters(task) in _letters(name) or _letters(name) in _letters(task)]
        chosen = exact or inside
        if len(chosen) == 1:
            owners[name] = chosen[0]
    if without := [task for task in tasks if task not in owners.values()]:
        raise InputError(
            f"no expert has the task {without[0]} in its name ({', '.join(experts)})",
            where="--data",
            hint="Name files as the experts' folders are named, or leave this file out",
        )
    return owners


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _kind(base: Checkpoint, experts: Iterable[Checkpoint]) -> str:
    """How the models answer: `classification` (all heads on whole texts), `token-classification` or by language."""
    for expert in experts:
        architectures = expert.read_config().get("architectures") or []
        kind = expert.read_adapter_config().get("task_type") if expert.is_adapter else None
        if kind == "SEQ_CLS" or any("ForSequenceClassification" in str(name) for name in architectures):
            return "classification"
        if kind == "TOKEN_CLS" or any("ForTokenClassification" in str(name) for name in architectures):
            return "token-classification"
    return "text-to-text" if base.read_config().get("is_encoder_decoder") else "causal"


def _study_name(tasks: Mapping[str, _DraftedTask]) -> str:
    return "-and-".join(tasks)[:80].strip(".-")


def _expert(name: str, model: str, task: str | None, folder: Path) -> str:
    path = yaml_text(_relative(model, folder))
    if task == name:
        return f"  {yaml_text(name)}: {path}  # its task has its name"
    return f"  {yaml_text(name)}: {{model: {path}, task: {'null' if task is None else yaml_text(task)}}}"


def _task_lines(name: str, task: _DraftedTask, kind: str, owner: Checkpoint | None, tokenizer: Any) -> list[str]:
    columns, where = task.columns, f"--data: {name}"
    if kind == "token-classification":
        first, label = word_columns(task.rows, where)
        second = None
    else:
        first, second = _text_columns(task.rows, columns, where)
        label = _named(columns, _LABELS) or next((c for c in reversed(columns) if c not in (first, second)), None)
    classifier = kind in ("classification", "token-classification")
    head = head_kind(owner, kind) if classifier and owner is not None else kind
    pair = second is not None and classifier
    text = first if second is None or pair else f"{{{{{first}}}}} {{{{{second}}}}}"
    written = _is_written(task.rows, columns, label, classifier)
    shown = json.dumps({column: _cut(task.rows[0][column]) for column in columns}, ensure_ascii=False)
    return [
        f"  {yaml_text(name)}:",
        *([f"    type: {head}"] if classifier else ["    type: generate"] if written else []),
        f"    dataset: {{path: {task.builder}, data_files: {yaml_flow(task.files)}}}",
        f"    # One row: {shown}",
        f"    doc_to_text: {yaml_text(text)}  # a column, or a Jinja2 template over the columns",
        *([f"    doc_to_text_pair: {yaml_text(second)}"] if pair and second is not None else []),
        *(
            _written_lines(task.rows, label, tokenizer)
            if written and label is not None
            else head_lines(head, task.rows, label, owner)
            if classifier and owner is not None and head != "classification"
            else _chosen_lines(task, label, _classes(owner) if classifier else None, where)
        ),
        *(["    training_split: training"] if "training" in task.files else []),
        *(["    test_split: test  # only ever reported"] if "test" in task.files else []),
        f"    max_length: {_length(task.rows, first, second, tokenizer)}  # tokens; longer inputs are cut",
    ]


def _text_columns(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], where: str) -> tuple[str, str | None]:
    """The column of the input, and the second of a pair."""
    a, b = _named(columns, _FIRSTS), _named(columns, _SECONDS)
    if a is not None and b is not None:
        return a, b
    texts = [c for c in columns if c not in _LABELS and rows and all(isinstance(row[c], str) for row in rows)]
    if not texts:
        raise InputError(
            f"no column holds texts: {', '.join(columns) or 'there are no rows'}",
            where=where,
            hint="Write the spec by hand: studies/example.yaml has every field",
        )
    longest = max(texts, key=lambda column: sum(len(row[column]) for row in rows))
    return _named(texts, _TEXTS) or longest, None


def _named(columns: Sequence[str], names: Sequence[str]) -> str | None:
    return next((column for name in names for column in columns if column.lower() == name), None)


def _is_written(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], label: str | None, classifier: bool) -> bool:
    """Whether answers are texts of their own: nothing to choose from, and lists or many different texts as labels."""
    if classifier or label is None or not rows or _named(columns, _CHOICES) is not None:
        return False
    values = [row[label] for row in rows]
    if all(isinstance(value, (list, tuple)) and value for value in values):
        return all(isinstance(text, str) for value in values for text in value)
    different = len(set(values)) if all(isinstance(value, str) for value in values) else 0
    return different > _MOST_CLASSES or (different > _FEW_CLASSES and 2 * different > len(rows))


def _written_lines(rows: Sequence[Mapping[str, Any]], label: str, tokenizer: Any) -> list[str]:
    texts = [text for row in rows for text in ([row[label]] if isinstance(row[label], str) else row[label])]
    longest = max(len(ids) for ids in tokenizer(texts)["input_ids"])
    most = min(-(-longest // _ROUND) * _ROUND, tokenizer.model_max_length // 2)
    return [
        f"    doc_to_target: {yaml_text(label)}  # the accepted text, or a list of them",
        f"    generation_kwargs: {{max_gen_toks: {most}}}  # the longest answer that was looked at, and some room",
        "    metric: exact_match  # or token_f1, rouge, numeric",
    ]


def _chosen_lines(task: _DraftedTask, label: str | None, classes: Sequence[str] | None, where: str) -> list[str]:
    """What is chosen from, and which column says what is right."""
    target = [f"    doc_to_target: {yaml_text(label)}  # the right one, by its text or its index"] if label else []
    return [_choice_line(task, label, classes, where), *target]


def _classes(owner: Checkpoint | None) -> list[str]:
    """Names of the classes of an expert's head, none where it says none."""
    return list(known_names(class_names(owner, "classification"))) if owner is not None else []


def _choice_line(task: _DraftedTask, label: str | None, classes: Sequence[str] | None, where: str) -> str:
    """What is chosen from; `classes` are those of the expert's head as far as it names them, None without a head."""
    if classes:
        return f"    doc_to_choice: {yaml_flow(list(classes))}  # the classes of the expert's head, in its order"
    headed = classes is not None
    lists = [c for c in task.columns if all(isinstance(row[c], (list, tuple)) for row in task.rows)]
    chosen = None if headed else _named(task.columns, _CHOICES) or next(iter(lists), None)
    if chosen is not None:
        return f"    doc_to_choice: {yaml_text(chosen)}  # a column that holds a list"
    values = {row[label] for row in task.rows if isinstance(row[label], (str, int))} if label is not None else set()
    words = sorted(value for value in values if isinstance(value, str))
    if headed and not words:
        return "    # doc_to_choice: [name, …]  # names of the classes, in the order of the head"
    if not words and values:
        words = [str(number) for number in range(max(int(value) for value in values) + 1)]
    if not words or len(words) > _MOST_CLASSES:
        raise InputError(
            f"nothing says what the choices are: no column {' or '.join(_CHOICES)}, and {len(words)} different labels",
            where=where,
            hint="Add a column `choices` with a list of texts",
        )
    note = "the labels of the data" + (", to be put into the order of the expert's head" if headed else "")
    return f"    doc_to_choice: {yaml_flow(words)}  # {note}"


def _length(rows: Sequence[Mapping[str, Any]], first: str, second: str | None, tokenizer: Any) -> int:
    """Tokens of the longest input that was looked at, rounded up; no more than the model takes."""
    rows = [{**row, first: " ".join(row[first]) if isinstance(row[first], list) else row[first]} for row in rows]
    texts = [str(row[first]) if second is None else f"{row[first]} {row[second]}" for row in rows]
    longest = max(len(ids) for ids in tokenizer(texts)["input_ids"]) + (2 if second is not None else 0)
    return int(min(-(-longest // _ROUND) * _ROUND, tokenizer.model_max_length))


def _cut(value: Any) -> Any:
    return (
        f"{value[:40]}…"
        if isinstance(value, str) and len(value) > 40
        else value
        if not isinstance(value, bytes)
        else "…"
    )
