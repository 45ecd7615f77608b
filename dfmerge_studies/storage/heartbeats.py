"""Signs of life of running trials: Optuna's heartbeats, which only some storages have.

The first one of a trial in a database is written with it, see `writes.py`.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import optuna
from optuna.storages._rdb.models import TrialHeartbeatModel
from optuna.trial import FrozenTrial
from sqlalchemy import select

from dfmerge_studies.storage.handles import database_of, id_of, storage_of, study_id_of


def record_heartbeat(study: optuna.Study, trial_id: int) -> float | None:
    """Record that a trial is alive.

    Returns:
        Seconds until the next is due; None, and nothing recorded, where the storage has no heartbeats.
    """
    storage: Any = storage_of(study)
    seconds = _interval(storage)
    if seconds is not None:
        storage.record_heartbeat(trial_id)
    return seconds


def heartbeat_after_beginning(study: optuna.Study) -> float | None:
    """Seconds until a trial that has just begun needs its next sign of life; None: it has none yet."""
    database = database_of(storage_of(study))
    return None if database is None else database.get_heartbeat_interval()


def stale_ids(study: optuna.Study) -> set[int]:
    """Storage ids of running trials whose heartbeat is older than the grace; none where there are no heartbeats."""
    storage: Any = storage_of(study)
    return set() if _interval(storage) is None else set(storage._get_stale_trial_ids(study_id_of(study)))


def last_heartbeat(study: optuna.Study, trial: FrozenTrial) -> datetime | None:
    """When a running trial's last heartbeat was, in the local time of the storage; None if there is none."""
    engine = getattr(getattr(storage_of(study), "_backend", None), "engine", None)
    if engine is None:
        return None
    with engine.connect() as connection:
        asked = select(TrialHeartbeatModel.heartbeat).where(TrialHeartbeatModel.trial_id == id_of(trial))
        found: datetime | None = connection.execute(asked).scalar()
    return found


def _interval(storage: Any) -> float | None:
    interval = getattr(storage, "get_heartbeat_interval", None)
    return None if interval is None else interval()
