"""The storage behind a study, and its ids, which Optuna keeps private."""

from __future__ import annotations

import optuna
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial


def storage_of(study: optuna.Study) -> BaseStorage:
    """Return the storage behind a study; Optuna has no public way to set attributes of a trial by its id."""
    return study._storage


def backend_of(storage: BaseStorage) -> BaseStorage:
    """Return the storage itself of one that a study wraps in a cache.

    Args:
        storage: from `open_storage`, or from `storage_of`.
    """
    return getattr(storage, "_backend", storage)


def database_of(storage: BaseStorage) -> RDBStorage | None:
    """Return the database behind a storage, if it is one whose tables this package writes itself."""
    backend = backend_of(storage)
    return backend if isinstance(backend, RDBStorage) and backend.engine.name in ("sqlite", "postgresql") else None


def study_id_of(study: optuna.Study) -> int:
    """Return the storage's id of a study."""
    return study._study_id


def id_of(trial: FrozenTrial) -> int:
    """Return the storage's id of a trial."""
    return trial._trial_id
