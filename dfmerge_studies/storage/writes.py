"""A trial's beginning, its attributes and parameters, its result: each written to a database in one transaction.

Optuna has one call for each attribute and parameter, and each begins a transaction and reads the trial first.  Together
they are six statements at most, and a process that dies leaves all or nothing of them.  Storages that are no database
that this module knows get Optuna's calls one by one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._rdb import models
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.study._constrained_optimization import _CONSTRAINTS_KEY
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.dialects import postgresql, sqlite

from dfmerge_studies.storage.handles import backend_of, storage_of, study_id_of

_INSERTS: Mapping[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}


@dataclass(frozen=True)
class TrialWrite:
    """What to write on a running trial.

    Attributes:
        attributes: user attributes by name; JSON values; what is there is replaced.
        params: internal value and distribution of parameters that the trial does not have yet, by name.
        constraints: by name; one that is there is left alone.
        values: objectives, which end the trial; None: it goes on running.
        pruned: whether they are estimates from a part of the rows, so that it ends as pruned and not as complete.
        intermediate: estimates of the objective on the way, by step.
    """

    attributes: Mapping[str, Any] = field(default_factory=dict)
    params: Mapping[str, tuple[float, BaseDistribution]] = field(default_factory=dict)
    constraints: Mapping[str, float] = field(default_factory=dict)
    values: Sequence[float] | None = None
    pruned: bool = False
    intermediate: Mapping[int, float] = field(default_factory=dict)

    @property
    def state(self) -> TrialState:
        """The state in which `values` end the trial."""
        return TrialState.PRUNED if self.pruned else TrialState.COMPLETE


def begin_trial(study: optuna.Study, attributes: Mapping[str, Any]) -> FrozenTrial:
    """Create a running trial that has its attributes from its first moment.

    Args:
        study: the study.
        attributes: user attributes by name; JSON values.

    Returns:
        The trial; its number is how many trials the study had before.
    """
    storage, study_id = storage_of(study), study_id_of(study)
    database = _database(storage)
    trial = create_trial(state=TrialState.RUNNING, user_attrs=dict(attributes))
    if database is None:
        return storage.get_trial(storage.create_new_trial(study_id, template_trial=trial))
    insert = _INSERTS[database.engine.name]
    with _create_scoped_session(database.scoped_session) as session:
        # The study's row is locked, as Optuna does it: numbers are given one after the other.
        models.StudyModel.find_or_raise_by_id(study_id, session, for_update=True)
        row: Any = models.TrialModel(study_id=study_id, state=TrialState.RUNNING)
        row.datetime_start = trial.datetime_start
        row.number = session.query(models.TrialModel.trial_id).filter_by(study_id=study_id).count()
        session.add(row)
        session.flush()
        session.execute(insert(models.TrialUserAttributeModel).values(_attributes(row.trial_id, attributes)))
        trial.number, trial._trial_id = row.number, row.trial_id
    return trial


def take_trial(study: optuna.Study, trial_id: int, attributes: Mapping[str, Any]) -> bool:
    """Set a waiting trial running, with attributes that are there from that moment; only one process can.

    In a database whoever comes second changes nothing.  On other storages the attributes come first, so that a process
    that is killed in between leaves them, and one that comes within that moment may replace them.

    Args:
        study: the trial's study.
        trial_id: the storage's id of the trial.
        attributes: user attributes by name; JSON values.

    Returns:
        Whether it was waiting.

    Raises:
        optuna.exceptions.UpdateFinishedTrialError: it has finished.
    """
    storage = storage_of(study)
    database = _database(storage)
    if database is None:
        state = storage.get_trial(trial_id).state
        storage.check_trial_is_updatable(trial_id, state)
        if state != TrialState.WAITING:
            return False
        _write_one_by_one(study, storage, trial_id, TrialWrite(attributes))
        return storage.set_trial_state_values(trial_id, TrialState.RUNNING)
    with _create_scoped_session(database.scoped_session) as session:
        trial = _locked(session, database, trial_id)
        if trial.state != TrialState.WAITING:
            return False
        _put_attributes(session, database, trial_id, attributes)
        trial.state = TrialState.RUNNING
        trial.datetime_start = datetime.now()
    return True


def write_trial(study: optuna.Study, trial_id: int, write: TrialWrite) -> None:
    """Write on a trial that has not finished.

    Args:
        study: the trial's study.
        trial_id: the storage's id of the trial.
        write: what.

    Raises:
        optuna.exceptions.UpdateFinishedTrialError: it has finished; nothing is written then.
    """
    storage = storage_of(study)
    database = _database(storage)
    if database is not None:
        _write_at_once(database, trial_id, write)
    else:
        _write_one_by_one(study, storage, trial_id, write)


def _database(storage: BaseStorage) -> RDBStorage | None:
    """The database behind a storage, if it is one that this module knows."""
    backend = backend_of(storage)
    return backend if isinstance(backend, RDBStorage) and backend.engine.name in _INSERTS else None


def _locked(session: Any, database: RDBStorage, trial_id: int) -> Any:
    """The row of a trial that has not finished, for this transaction alone."""
    trial: Any = models.TrialModel.find_or_raise_by_id(trial_id, session, for_update=True)
    database.check_trial_is_updatable(trial_id, trial.state)
    return trial


def _write_at_once(database: RDBStorage, trial_id: int, write: TrialWrite) -> None:
    insert = _INSERTS[database.engine.name]
    with _create_scoped_session(database.scoped_session) as session:
        trial = _locked(session, database, trial_id)
        if write.params:
            session.execute(insert(models.TrialParamModel).values(_params(trial_id, write.params)))
        if write.attributes:
            _put_attributes(session, database, trial_id, write.attributes)
        if write.constraints:
            rows = _attributes(trial_id, {_constraint_key(name): value for name, value in write.constraints.items()})
            session.execute(insert(models.TrialSystemAttributeModel).values(rows).on_conflict_do_nothing())
        if write.intermediate:
            rows = _intermediate(trial_id, write.intermediate)
            session.execute(insert(models.TrialIntermediateValueModel).values(rows).on_conflict_do_nothing())
        if write.values is not None:
            put = insert(models.TrialValueModel).values(_values(trial_id, write.values))
            changed = {"value": put.excluded.value, "value_type": put.excluded.value_type}
            session.execute(put.on_conflict_do_update(index_elements=["trial_id", "objective"], set_=changed))
            trial.state = write.state
            trial.datetime_complete = datetime.now()


def _put_attributes(session: Any, database: RDBStorage, trial_id: int, attributes: Mapping[str, Any]) -> None:
    put = _INSERTS[database.engine.name](models.TrialUserAttributeModel).values(_attributes(trial_id, attributes))
    changed = {"value_json": put.excluded.value_json}
    session.execute(put.on_conflict_do_update(index_elements=["trial_id", "key"], set_=changed))


def _write_one_by_one(study: optuna.Study, storage: BaseStorage, trial_id: int, write: TrialWrite) -> None:
    for name, (value, distribution) in write.params.items():
        storage.set_trial_param(trial_id, name, value, distribution)
    for key, attribute in write.attributes.items():
        storage.set_trial_user_attr(trial_id, key, attribute)
    if write.constraints:
        live = optuna.Trial(study, trial_id)
        stored = live.constraints
        for name, constraint in write.constraints.items():
            if name not in stored:
                live.set_constraint(name, constraint)
    for step, value in write.intermediate.items():
        storage.set_trial_intermediate_value(trial_id, step, value)
    if write.values is not None:
        storage.set_trial_state_values(trial_id, write.state, write.values)


def _constraint_key(name: str) -> str:
    """The system attribute in which Optuna keeps a constraint."""
    return f"{_CONSTRAINTS_KEY}:{name}"


def _params(trial_id: int, params: Mapping[str, tuple[float, BaseDistribution]]) -> list[dict[str, Any]]:
    return [
        {
            "trial_id": trial_id,
            "param_name": name,
            "param_value": value,
            "distribution_json": distribution_to_json(distribution),
        }
        for name, (value, distribution) in params.items()
    ]


def _attributes(trial_id: int, attributes: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"trial_id": trial_id, "key": key, "value_json": json.dumps(value)} for key, value in attributes.items()]


def _values(trial_id: int, values: Sequence[float]) -> list[dict[str, Any]]:
    rows = []
    for objective, each in enumerate(values):
        value, kind = models.TrialValueModel.value_to_stored_repr(each)
        rows.append({"trial_id": trial_id, "objective": objective, "value": value, "value_type": kind})
    return rows


def _intermediate(trial_id: int, intermediate: Mapping[int, float]) -> list[dict[str, Any]]:
    rows = []
    for step, each in intermediate.items():
        value, kind = models.TrialIntermediateValueModel.intermediate_value_to_stored_repr(each)
        rows.append({"trial_id": trial_id, "step": step, "intermediate_value": value, "intermediate_value_type": kind})
    return rows
