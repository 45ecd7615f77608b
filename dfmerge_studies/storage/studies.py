"""Studies of a storage: made by several processes at once, loaded by name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._rdb.models import StudyUserAttributeModel
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from sqlalchemy import select, text

from dfmerge_studies.errors import InputError
from dfmerge_studies.names import NAME
from dfmerge_studies.storage.engines import open_storage
from dfmerge_studies.storage.failures import storage_errors
from dfmerge_studies.storage.handles import backend_of, database_of, storage_of, study_id_of
from dfmerge_studies.storage.urls import storage_file


def check_name(name: str) -> None:
    """Refuse a study name that could not safely appear in paths and pages.

    Raises:
        InputError: it is empty, longer than 100 characters, starts with a dot, or has other than `A-Za-z0-9._-`.
    """
    if not NAME.fullmatch(name):
        raise InputError(
            f"{name[:120]!r} cannot be a study's name",
            hint="Use up to 100 of the characters A-Z a-z 0-9 . _ - and no dot in front",
        )


def create_study(storage: BaseStorage, name: str, *, directions: Sequence[str]) -> bool:
    """Create a study; of several processes that do so at once, one alone is told True.

    Args:
        storage: from `open_storage`.
        name: the study's name.
        directions: "maximize" or "minimize", one for each objective.

    Returns:
        Whether this call made it; False where it exists.
    """
    check_name(name)
    with storage_errors():
        try:
            storage.create_new_study([StudyDirection[direction.upper()] for direction in directions], name)
        except DuplicatedStudyError:
            return False
    return True


def join_study(
    storage: BaseStorage, name: str, *, directions: Sequence[str], sampler: BaseSampler | None = None
) -> optuna.Study:
    """Create a study, or load it if it exists; several processes may do so at once.

    Args:
        storage: from `open_storage`.
        name: the study's name.
        directions: "maximize" or "minimize", one for each objective.
        sampler: what proposes points.

    Raises:
        InputError: the name is not allowed, or the stored study has other directions.
    """
    check_name(name)
    wanted = [StudyDirection[direction.upper()] for direction in directions]
    with storage_errors():
        study = optuna.create_study(
            storage=storage, study_name=name, directions=wanted, sampler=sampler, load_if_exists=True
        )
        stored = study.directions
    if stored != wanted:
        raise InputError(
            f"the stored study has the directions {[d.name.lower() for d in stored]}, this one {list(directions)}",
            where=name,
            hint="Give the new study another name",
        )
    return study


def study_names(storage: BaseStorage) -> list[str]:
    """List the names of a storage's studies, in their order.

    Optuna reads the attributes of all studies for that; one that is no JSON any more would hide all the others.

    Args:
        storage: from `open_storage`.
    """
    backend = backend_of(storage)
    if isinstance(backend, RDBStorage):
        with backend.engine.connect() as connection:
            return [
                str(name) for (name,) in connection.execute(text("SELECT study_name FROM studies ORDER BY study_id"))
            ]
    return list(optuna.get_all_study_names(storage))


def load_study(storage: BaseStorage, name: str, *, sampler: BaseSampler | None = None) -> optuna.Study:
    """Load a study that exists.

    Args:
        storage: from `open_storage`.
        name: the study's name.
        sampler: what proposes points; Optuna's default for None.

    Raises:
        InputError: there is no study of that name; the message lists those that there are.
        RunError: the storage failed.
    """
    with storage_errors():
        names = study_names(storage)
        if name not in names:
            known = ", ".join(sorted(names)[:20]) or "none"
            raise InputError(f"there is no study named {name!r}", hint=f"Studies of this storage: {known}")
        return optuna.load_study(study_name=name, storage=storage, sampler=sampler)


def load_study_if_any(url: str, name: str) -> optuna.Study | None:
    """Load a study if its storage and the study exist; nothing is created.

    Raises:
        InputError: what the URL points to is no storage.
        RunError: the storage failed.
    """
    file = storage_file(url)
    if file is not None and not file.exists():
        return None
    with storage_errors(url):
        storage = open_storage(url, create=False)
        return load_study(storage, name) if name in study_names(storage) else None


def read_study(study: optuna.Study) -> tuple[Sequence[FrozenTrial], dict[str, Any]]:
    """Read a study's trials and its user attributes, from a database in one transaction.

    Args:
        study: the study; its trials are not to be changed.
    """
    database = database_of(storage_of(study))
    if database is None:
        return study.get_trials(deepcopy=False), study.user_attrs
    with _create_scoped_session(database.scoped_session) as session:
        asked = select(StudyUserAttributeModel.key, StudyUserAttributeModel.value_json)
        rows = session.execute(asked.where(StudyUserAttributeModel.study_id == study_id_of(study)))
        attributes = {str(key): json.loads(value) for key, value in rows}
        return study.get_trials(deepcopy=False), attributes  # in this thread's session, which is this one
