"""Data sets: local files or the Hub's, through the library `datasets`."""

from __future__ import annotations

import glob
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from dfmerge_studies.boundary import check_regular, local_path, reading
from dfmerge_studies.errors import InputError, first_line
from dfmerge_studies.tasks.settings import AnyTask, HarnessTask, PromptedTask

if TYPE_CHECKING:
    from datasets import Dataset

_LOCAL_BUILDERS = ("json", "csv", "parquet", "text", "arrow")


def check_data_files(name: str, task: AnyTask, *, root: Path, spec_file: str) -> None:
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
    if isinstance(task, HarnessTask):  # the harness finds its data itself
        return
    files = _resolve_files(task.dataset, root, where).get("data_files")
    examples = task.fewshot_source if isinstance(task, PromptedTask) and task.num_fewshot else None
    for split in (task.validation_split, task.test_split, examples):
        if split is not None:
            _check_split(files, split, where)


def _check_split(files: Any, split: str, where: str) -> None:
    for part in _split_names(split):
        if isinstance(files, dict) and part not in files:
            known = ", ".join(sorted(files))
            raise InputError(f"no split {part!r} among data_files ({known})", where=where, hint="Name one of them")


def _split_names(split: str) -> list[str]:
    """The names in a split that may be a sum of slices, as in `validation[:50%]+test`."""
    return [part.partition("[")[0].strip() for part in split.split("+")]


@contextmanager
def opened_split(arguments: Mapping[str, Any], split: str, root: Path, where: str) -> Iterator[Dataset]:
    """One split of a data set; it can be read while the context lasts.

    Local files are read anew every time: the library's cache knows them by their time, archives by their path alone,
    and so would give the rows of a file that has been replaced.

    Args:
        arguments: of `datasets.load_dataset`, as the spec has them.
        split: name of the split, or a sum of slices of splits.
        root: folder that local files are relative to.
        where: file and task, for messages.

    Raises:
        InputError: a file is missing, or the data cannot be found or read.
    """
    resolved = _resolve_files(arguments, root, where)
    files = resolved.get("data_files")
    _check_split(files, split, where)
    if isinstance(files, dict):  # files of other splits may have other columns: labels, say
        files = {part: files[part] for part in _split_names(split)}
    if files is not None:
        resolved["data_files"] = _literal(files)
    with ExitStack() as stack:
        if _is_local(resolved):
            try:
                scratch = stack.enter_context(TemporaryDirectory(prefix="dfmerge-", ignore_cleanup_errors=True))
            except OSError as error:
                raise InputError(
                    f"there is no room to read the data set: {error.strerror}: {error.filename}",
                    where=f"{where}.dataset",
                    hint="Set TMPDIR to a folder that can be written",
                ) from error
            resolved |= _without_cache(resolved, scratch)
        yield _load(resolved, split, where, _describe_files(files, split))


def _is_local(resolved: Mapping[str, Any]) -> bool:
    path = str(resolved["path"])
    return path in _LOCAL_BUILDERS or "data_files" in resolved or Path(path).is_dir()


def _without_cache(resolved: Mapping[str, Any], scratch: str) -> dict[str, Any]:
    """Arguments that keep the library from taking anything of local files from its cache."""
    from datasets import DownloadConfig

    if "://" in str(resolved.get("data_files", "")) + str(resolved.get("data_dir", "")):
        download = DownloadConfig(force_extract=True)  # what was downloaded is known by the server's tag and is kept
    else:
        download = DownloadConfig(cache_dir=str(Path(scratch, "downloads")))
    return {"cache_dir": scratch, "download_config": download}


def _load(resolved: Mapping[str, Any], split: str, where: str, files: str) -> Dataset:
    import datasets
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    datasets.disable_progress_bars()
    hint = "Check the files, the format named in 'path', and the split"
    with (
        reading(f"{where}.dataset ({files})", "the data set cannot be read", hint),
        _silent_datasets(counted=str(resolved["path"]) not in _LOCAL_BUILDERS),
    ):
        try:
            return datasets.load_dataset(**resolved, split=split)
        except (DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
            raise InputError(
                f"the data set {resolved['path']!r} cannot be found: {first_line(error)}",
                where=f"{where}.dataset",
                hint="Correct the path or the Hub id, or check the connection",
            ) from error
        except (DatasetGenerationError, ValueError) as error:
            if "corresponds to no data" in str(error):  # how the loader reports a file with a header alone
                raise empty_split(split, where) from error
            raise (error.__cause__ or error) from None  # the loader's own words are only that something failed


def documents(dataset: Dataset, where: str) -> Iterator[Mapping[str, Any]]:
    """The rows of a split, as columns by name.

    Args:
        dataset: from `opened_split`.
        where: file and task, for messages.

    Raises:
        InputError: a row cannot be read.
    """
    rows = iter(dataset)
    for index in count():
        with reading(f"{where}.dataset", f"row {index} cannot be read", "Correct the data"):
            document = next(rows, None)
        if document is None:
            return
        yield document


def empty_split(split: str, where: str) -> InputError:
    """The error of a split without rows."""
    return InputError(f"the split {split!r} is empty", where=f"{where}.dataset", hint="Give it at least one row")


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
    resolved = deepcopy(dict(arguments))  # datasets writes into storage_options
    path = str(arguments["path"])
    if path not in _LOCAL_BUILDERS and local_path(path, root, f"{where}.dataset.path").is_dir():
        resolved["path"] = _plain_folder(path, root, f"{where}.dataset.path")
    if "data_files" in arguments:
        resolved["data_files"] = _absolute(arguments["data_files"], root, f"{where}.dataset.data_files")
    elif path in _LOCAL_BUILDERS and "data_dir" not in arguments:
        raise InputError(
            f"'path: {path}' needs data_files", where=f"{where}.dataset", hint="Add data_files: {validation: FILE}"
        )
    field = f"{where}.dataset.data_dir"
    if "data_dir" in arguments and local_path(str(arguments["data_dir"]), root, field).is_dir():
        resolved["data_dir"] = _plain_folder(str(arguments["data_dir"]), root, field)
    return resolved


def _plain_folder(text: str, root: Path, where: str) -> str:
    """A folder whose files the loader finds by patterns, to which it puts the folder's own name."""
    folder = str(local_path(text, root, where))
    if glob.has_magic(folder):
        raise InputError(
            f"{folder} has one of the signs *?[ in its name, which the loader of data sets takes for a pattern",
            where=where,
            hint="Name the files with data_files, or move the folder",
        )
    return folder


def _absolute(files: Any, root: Path, where: str) -> Any:
    """The same structure with absolute paths; a pattern becomes the list of the files that match."""
    if isinstance(files, dict) and files:
        return {str(split): _absolute(value, root, f"{where}.{split}") for split, value in files.items()}
    if files in ([], {}, "", None):
        raise InputError("it names no file", where=where, hint="Name at least one")
    if isinstance(files, list):
        found = [_absolute(value, root, where) for value in files]
        return [path for one in found for path in (one if isinstance(one, list) else [one])]
    if "://" in str(files):
        return files
    path = local_path(str(files), root, where)
    if glob.has_magic(str(files)) and not path.exists():
        pattern = str(Path(glob.escape(str(root))) / Path(str(files)).expanduser())
        matched = [local_path(one, root, where) for one in glob.glob(pattern, recursive=True)]  # noqa: PTH207
        if not any(one.is_file() for one in matched):
            raise InputError(f"no file matches {root / str(files)}", where=where, hint="Correct the pattern")
        return sorted(str(one) for one in matched if one.is_file())
    check_regular(path, where, "Correct the path; it is relative to the spec")
    if not path.exists():
        raise InputError(f"no such file: {path}", where=where, hint="Correct the path; it is relative to the spec")
    if path.stat().st_size == 0:
        raise InputError(f"the data set is empty: {path} has no bytes", where=where, hint="Give it at least one row")
    return str(path)


def _literal(files: Any) -> Any:
    """Files for the loader, which takes every path for a pattern."""
    if isinstance(files, dict):
        return {split: _literal(value) for split, value in files.items()}
    if isinstance(files, list):
        return [_literal(value) for value in files]
    return files if "://" in str(files) else glob.escape(str(files))


def _describe_files(files: Any, split: str) -> str:
    if not isinstance(files, dict):
        return str(files or split)
    return ", ".join(str(files[part]) for part in _split_names(split))
