"""From a task's settings to rows of text: data sets, prompts, choices, labels."""

from __future__ import annotations

import ast
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from dfmerge_studies.errors import InputError, did_you_mean, first_line
from dfmerge_studies.tasks.settings import ChoiceTask, ClassificationTask

if TYPE_CHECKING:
    from datasets import Dataset

_LOCAL_BUILDERS = ("json", "csv", "parquet", "text", "arrow", "pandas")
_TEMPLATES = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)


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
    dataset = _load_split(task.dataset, split, root, where)
    if len(dataset) == 0:
        raise _empty(split, where)
    columns = list(dataset.column_names)
    to_text = _renderer(task.doc_to_text, columns, f"{where}.doc_to_text")
    target = task.doc_to_target if labelled or _is_there(task.doc_to_target, columns) else None
    to_target = _renderer(target, columns, f"{where}.doc_to_target") if target is not None else None
    to_choices = _choice_renderer(task, columns, f"{where}.doc_to_choice")
    pair = task.doc_to_text_pair if isinstance(task, ClassificationTask) else None
    to_pair = _renderer(pair, columns, f"{where}.doc_to_text_pair") if pair is not None else None
    rows = []
    for index, document in enumerate(dataset):
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


def check_data_files(name: str, task: ChoiceTask | ClassificationTask, *, root: Path, spec_file: str) -> None:
    """Check that local data files exist, without reading them.

    Args:
        name: the task's name, for messages.
        task: its settings.
        root: folder that local data files are relative to.
        spec_file: the spec, for messages.

    Raises:
        InputError: a file is missing or has no bytes, or a split names none.
    """
    where = f"{spec_file}: tasks.{name}"
    files = _resolve_files(task.dataset, root, where).get("data_files")
    for split in (task.validation_split, task.test_split):
        if split is not None:
            _check_split(files, split, where)


def _check_split(files: Any, split: str, where: str) -> None:
    for part in _split_names(split):
        if isinstance(files, dict) and part not in files:
            known = ", ".join(sorted(files))
            raise InputError(f"no split {part!r} among data_files ({known})", where=where, mend="Name one of them")


def _split_names(split: str) -> list[str]:
    """The names in a split that may be a sum of slices, as in `validation[:50%]+test`."""
    return [part.partition("[")[0].strip() for part in split.split("+")]


def _load_split(arguments: Mapping[str, Any], split: str, root: Path, where: str) -> Dataset:
    import datasets
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    resolved = _resolve_files(arguments, root, where)
    files = resolved.get("data_files")
    _check_split(files, split, where)
    if isinstance(files, dict):  # files of other splits may have other columns: labels, say
        resolved["data_files"] = {part: files[part] for part in _split_names(split)}
    datasets.disable_progress_bars()
    try:
        with _silent_datasets(counted=str(arguments["path"]) not in _LOCAL_BUILDERS):
            loaded = datasets.load_dataset(**resolved, split=split)
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
        raise InputError(
            f"the data set {arguments['path']!r} cannot be found: {first_line(error)}",
            where=f"{where}.dataset",
            mend="Correct the path or the Hub id, or check the connection",
        ) from error
    except (DatasetGenerationError, ValueError, TypeError, OSError, RuntimeError) as error:
        cause = error.__cause__ or error
        if "corresponds to no data" in str(error):  # how the loader reports a file with a header alone
            raise _empty(split, where) from error
        raise InputError(
            f"the data set cannot be read: {first_line(cause)}",
            where=f"{where}.dataset ({_describe_files(files, split)})",
            mend="Check the files, the format named in 'path', and the split",
        ) from error
    return loaded


def _empty(split: str, where: str) -> InputError:
    return InputError(f"the split {split!r} is empty", where=f"{where}.dataset", mend="Give it at least one row")


@contextmanager
def _silent_datasets(*, counted: bool) -> Iterator[None]:
    """Keep the library from logging, besides, what it raises, and from counting reads of local files on the net."""
    from datasets import config

    logger = logging.getLogger("datasets")
    level, counting = logger.level, config.HF_UPDATE_DOWNLOAD_COUNTS
    logger.setLevel(logging.CRITICAL)
    config.HF_UPDATE_DOWNLOAD_COUNTS = counting and counted
    try:
        yield
    finally:
        logger.setLevel(level)
        config.HF_UPDATE_DOWNLOAD_COUNTS = counting


def _resolve_files(arguments: Mapping[str, Any], root: Path, where: str) -> dict[str, Any]:
    """Make local paths absolute and check that they exist, since the loader's own message names no field."""
    resolved = dict(arguments)
    path = str(arguments["path"])
    if path not in _LOCAL_BUILDERS and (root / path).is_dir():
        resolved["path"] = str((root / path).resolve())
    if "data_files" in arguments:
        resolved["data_files"] = _absolute(arguments["data_files"], root, f"{where}.dataset.data_files")
    elif path in _LOCAL_BUILDERS and "data_dir" not in arguments:
        raise InputError(
            f"'path: {path}' needs data_files", where=f"{where}.dataset", mend="Add data_files: {validation: FILE}"
        )
    if "data_dir" in arguments and (root / str(arguments["data_dir"])).is_dir():
        resolved["data_dir"] = str((root / str(arguments["data_dir"])).resolve())
    return resolved


def _absolute(files: Any, root: Path, where: str) -> Any:
    if isinstance(files, dict) and files:
        return {split: _absolute(value, root, f"{where}.{split}") for split, value in files.items()}
    if files in ([], {}, "", None):
        raise InputError("it names no file", where=where, mend="Name at least one")
    if isinstance(files, list):
        return [_absolute(value, root, where) for value in files]
    if "://" in str(files):
        return files
    path = root / str(files)
    if any(sign in str(files) for sign in "*?["):
        if not any(root.glob(str(files))):
            raise InputError(f"no file matches {path}", where=where, mend="Correct the pattern")
    elif not path.is_file():
        raise InputError(f"no such file: {path}", where=where, mend="Correct the path; it is relative to the spec")
    elif path.stat().st_size == 0:
        raise InputError(f"the data set is empty: {path} has no bytes", where=where, mend="Give it at least one row")
    return str(path.resolve()) if path.is_file() else str(path)


def _describe_files(files: Any, split: str) -> str:
    if not isinstance(files, dict):
        return str(files or split)
    return ", ".join(str(files[part]) for part in _split_names(split))


Renderer = Callable[[Mapping[str, Any], int], Any]


def _renderer(source: str | int, columns: Sequence[str], where: str) -> Renderer:
    """A function from a document to a column's value or to a rendered template."""
    if isinstance(source, int):
        return lambda _document, _index: source
    if source in columns:
        return lambda document, _index: document[source]
    if "{{" not in source and "{%" not in source:
        raise InputError(
            f"{source!r} is neither a column ({', '.join(columns)}) nor a template",
            where=where,
            mend=did_you_mean(source, columns) or "Name a column, or write a template such as '{{text}}'",
        )
    try:
        template = _TEMPLATES.from_string(source)
    except TemplateError as error:
        raise InputError(f"not a valid Jinja2 template: {error}", where=where, mend="Correct the template") from error

    def render(document: Mapping[str, Any], index: int) -> str:
        try:
            return template.render(**document)
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise InputError(
                f"the template fails on row {index}: {error} (columns: {', '.join(columns)})",
                where=where,
                mend="Use only columns that the data has",
            ) from error

    return render


def _is_there(source: str | int | None, columns: Sequence[str]) -> bool:
    """Whether a source is anything but the name of a column that the data lacks."""
    return not isinstance(source, str) or source in columns or "{{" in source or "{%" in source


def _choice_renderer(
    task: ChoiceTask | ClassificationTask, columns: Sequence[str], where: str
) -> Callable[[Mapping[str, Any], int], tuple[str, ...]]:
    source = task.doc_to_choice
    if source is None:
        return lambda _document, _index: ()
    if isinstance(source, list):
        parts = [
            _renderer(part, columns, where) if "{{" in part or "{%" in part else (lambda _d, _i, part=part: part)
            for part in source
        ]
        return lambda document, index: _checked_choices([part(document, index) for part in parts], where, index)
    render = _renderer(source, columns, where)

    def choices(document: Mapping[str, Any], index: int) -> tuple[str, ...]:
        value = render(document, index)
        if isinstance(value, str):
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError):
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
