"""What can be refused at once, before torch is imported: models and data that are missing, cut short or unreadable."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dfmerge_studies.boundary import local_path, read_json
from dfmerge_studies.checkpoints.files import check_files
from dfmerge_studies.checkpoints.reference import resolve
from dfmerge_studies.errors import InputError
from dfmerge_studies.spec import StudySpec
from dfmerge_studies.tasks.files import check_data_files
from dfmerge_studies.tasks.settings import HarnessTask

_UCB_NEEDS = ("botorch", "optuna_integration")


def model_problems(spec: StudySpec, wanted: Callable[[str], bool] = lambda _field: True) -> Iterator[InputError]:
    """What is wrong with the files of the base and the experts, as far as names, configs and headers tell.

    Args:
        spec: what to check; Hub models are downloaded.
        wanted: whether the model that a field names is looked at.
    """
    named = {"base": spec.base, **{f"experts.{name}": expert.model for name, expert in spec.experts.items()}}
    for field, reference in named.items():
        if not wanted(field):
            continue
        try:
            check_model(reference, root=spec.root, where=spec.where(field))
        except InputError as error:
            yield error


def check_model(reference: str, *, root: Path, where: str) -> None:
    """Refuse a model whose files are not there or not whole.

    Args:
        reference: as for `resolve`.
        root: folder that relative paths start from.
        where: what names it, for messages.

    Raises:
        InputError: what is wrong.
    """
    check_files(resolve(reference, root=root, where=where))


def installed(module: str) -> bool:
    """Whether a package can be imported.

    Args:
        module: its name; one that has been imported already need not have a spec any more.
    """
    return sys.modules.get(module) is not None or find_spec(module) is not None


def check_extras(spec: StudySpec) -> None:
    """Refuse a search and tasks that need packages which are not installed.

    Raises:
        InputError: naming the extra that brings them.
    """
    missing = [name for name in _UCB_NEEDS if not installed(name)]
    if spec.search.acquisition == "ucb" and missing:
        raise InputError(
            f"acquisition: ucb needs {' and '.join(missing)}",
            where=spec.where("search.acquisition"),
            hint="pip install 'dfmerge-studies[ucb]', or use acquisition: ei",
        )
    theirs = next((name for name, task in spec.tasks.items() if isinstance(task, HarnessTask)), None)
    if theirs is not None and not installed("lm_eval"):
        raise InputError(
            "tasks of lm-evaluation-harness need lm_eval",
            where=spec.where(f"tasks.{theirs}"),
            hint="pip install 'dfmerge-studies[lm-eval]'",
        )


def check_inputs(spec: StudySpec) -> None:
    """Refuse a spec whose local files are not there or not whole, without loading any.

    Raises:
        InputError: the first problem.
    """
    for name, task in spec.tasks.items():
        check_data_files(name, task, root=spec.root, spec_file=str(spec.file))
    read_indices(spec)
    for problem in model_problems(spec):
        raise problem


def read_indices(spec: StudySpec) -> Mapping[str, list[int]] | None:
    """Fisher inputs that the spec names, from itself or from its JSON file.

    Args:
        spec: where `importance.indices` stands.

    Raises:
        InputError: the file is missing, is not JSON, or holds no rows by task.
    """
    given = spec.importance.indices
    if not isinstance(given, str):
        return given
    where = spec.where("importance.indices")
    file = local_path(given, spec.root, where)
    if not file.exists():
        raise InputError(f"no such file: {file}", where=where, hint="Correct the path")
    content: Any = read_json(file, where=f"{where} ({file})", hint="Correct it")
    if isinstance(content, dict) and "fisher_indices" in content:  # a dfmerge.json that export wrote
        content = content["fisher_indices"]
    rows_by_task = isinstance(content, dict) and all(
        isinstance(rows, list) and all(type(row) is int for row in rows) for rows in content.values()
    )
    if not rows_by_task:
        raise InputError(f"{file} holds no rows by task", where=where, hint="Expected {task: [row, ...]}")
    if odd := sorted(content.keys() - spec.tasks.keys()):
        raise InputError(
            f"unknown task {odd[0]!r} in {file}", where=where, hint=f"The tasks are {', '.join(spec.tasks)}"
        )
    return content  # type: ignore[no-any-return]  # checked above
