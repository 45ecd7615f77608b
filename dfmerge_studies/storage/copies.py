"""A study as a process knows it, written into a new file."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from sqlalchemy.engine import URL

from dfmerge_studies.storage.engines import open_storage
from dfmerge_studies.storage.urls import write_url


@dataclass
class Known:
    """What a process knows of a study.

    Attributes:
        name: of the study.
        directions: of its objectives.
        metrics: their names, None if it has none.
        attributes: user attributes.
        trials: all, in the order of their numbers.
    """

    name: str
    directions: Sequence[StudyDirection]
    metrics: Sequence[str] | None
    attributes: Mapping[str, Any] = field(default_factory=dict)
    trials: Sequence[FrozenTrial] = ()


def write_study(known: Known, file: Path, *, journal: bool) -> None:
    """Write a study into a new file.

    Args:
        known: the study.
        file: which does not exist.
        journal: whether it is to be a journal instead of an SQLite database.

    Raises:
        failures.STORAGE_FAILURES: it cannot be written.
    """
    storage = open_storage(write_url(URL.create("journal" if journal else "sqlite", database=str(file))))
    study = optuna.create_study(storage=storage, study_name=known.name, directions=list(known.directions))
    for name, value in known.attributes.items():
        study.set_user_attr(name, value)
    if known.metrics is not None:
        study.set_metric_names(list(known.metrics))
    study.add_trials(known.trials)
    if isinstance(storage, RDBStorage):
        storage.engine.dispose()
        with contextlib.closing(sqlite3.connect(file)) as database:
            database.execute("PRAGMA journal_mode=DELETE")  # one file, without a log beside it
