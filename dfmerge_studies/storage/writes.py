"""A trial's beginning, its attributes and parameters, its result: each written to a database in one transaction.

Optuna has one call for each attribute and parameter, and each begins a transaction and reads the trial first.  Together
they are five statements at most, and a process that dies leaves all or nothing of them.  Storages that are no database
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
from sqlalchemy import func, literal, select, union_all, update
from sqlalchemy.dialects import postgresql, sqlite

from dfmerge_studies.storage.handles import database_of, storage_of, study_id_of

_INSERTS: Mapping[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
_ROWS = 100  # in one selection; SQLite takes up to 500, and 999 values in a statement before 3.32


@dataclass(frozen=True)
class TrialWrite:
    """What to write on a running trial.

    Attributes:
        attributes: user attributes by name; JSON values; what is there is replaced.
        params: internal value and distribution of parameters that the trial does not have yet, by name.
        early: user attributes that are there wherever a parameter is.
        constraints: by name; one that is there is left alone.
        values: objectives, which end the trial; None: it goes on running.
        pruned: whether they are estimates from a part of the rows, so that it ends as pruned and not as complete.
        intermediate: estimates of the objective on the way, by step.
    """

    attributes: Mapping[str, Any] = field(default_factory=dict)
    params: Mapping[str, tuple[float, BaseDistribution]] = field(default_factory=dict)
    early: Mapping[str, Any] = field(default_factory=dict)
    constraints: Mapping[str, float] = field(default_factory=dict)
    values: Sequence[float] | None = None
    pruned: bool = False
    intermediate: Mapping[int, float] = field(default_factory=dict)

    @property
    def state(self) -> TrialState:
        """The state in which `values` end the trial."""
        return TrialState.PRUNED if self.pruned else TrialState.COMPLETE


def begin_trial(study: optuna.Study, attributes: Mapping[str, Any]) -> FrozenTrial:
    """Create a running trial that has its attributes, and in a database a sign of life, from its first moment.

    Args:
        study: the study.
        attributes: user attributes by name; JSON values.

    Returns:
        The trial; its number is how many trials the study had before.
    """
    storage, study_id = storage_of(study), study_id_of(study)
    database = database_of(storage)
    trial = create_trial(state=TrialState.RUNNING, user_attrs=dict(attributes))
    if database is None:
        return storage.get_trial(storage.create_new_trial(study_id, template_trial=trial))
    insert = _INSERTS[database.engine.name]
    with _create_scoped_session(database.scoped_session) as session:
        # Numbers are given one after the other: the study's row is locked, as Optuna does it; SQLite has no locks of
        # rows, and lets one process at a time count and insert.
        if database.engine.name != "sqlite":
            models.StudyModel.find_or_raise_by_id(study_id, session, for_update=True)
        trial._trial_id, trial.number = _inserted(session, database, study_id, trial)
        session.execute(insert(models.TrialUserAttributeModel).values(_attributes(trial._trial_id, attributes)))
        _put_heartbeat(session, database, trial._trial_id)
    return trial


def _inserted(session: Any, database: RDBStorage, study_id: int, trial: FrozenTrial) -> tuple[int, int]:
    """Insert the row of a trial, and return its id and number."""
    table = models.TrialModel.__table__
    number = select(func.count()).where(table.c.study_id == study_id).scalar_subquery()
    values = {"study_id": study_id, "state": trial.state, "datetime_start": trial.datetime_start, "number": number}
    row = _INSERTS[database.engine.name](table).values(values)
    if database.engine.dialect.insert_returning:
        trial_id, given = session.execute(row.returning(table.c.trial_id, table.c.number)).one()
    else:  # SQLite before 3.35
        (trial_id,) = session.execute(row).inserted_primary_key
        given = session.execute(select(table.c.number).where(table.c.trial_id == trial_id)).scalar_one()
    return trial_id, given


def take_trial(study: optuna.Study, trial_id: int, attributes: Mapping[str, Any]) -> bool:
    """Set a waiting trial running, with attributes that are there from that moment; only one process can.

    In a database whoever comes second changes nothing, and the trial has a sign of life from that moment.  On other
    storages the attributes come first, so that a process that is killed in between leaves them, and one that comes
    within that moment may replace them.

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
    database = database_of(storage)
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
        _put_heartbeat(session, database, trial_id)
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
    database = database_of(storage)
    if database is not None:
        _write_at_once(database, trial_id, write)
    else:
        _write_one_by_one(study, storage, trial_id, write)


def _locked(session: Any, database: RDBStorage, trial_id: int) -> Any:
    """The row of a trial that has not finished, for this transaction alone."""
    trial: Any = models.TrialModel.find_or_raise_by_id(trial_id, session, for_update=True)
    database.check_trial_is_updatable(trial_id, trial.state)
    return trial


def _write_at_once(database: RDBStorage, trial_id: int, write: TrialWrite) -> None:
    insert = _INSERTS[database.engine.name]
    with _create_scoped_session(database.scoped_session) as session:
        _write_if_unfinished(session, database, trial_id, write)
        if attributes := {**write.early, **write.attributes}:
            _put_attributes(session, database, trial_id, attributes)
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


def _write_if_unfinished(session: Any, database: RDBStorage, trial_id: int, write: TrialWrite) -> None:
    """Put the parameters and end the trial, which see for themselves that it has not finished.

    Raises:
        optuna.exceptions.UpdateFinishedTrialError: it has finished.
    """
    trial, statements = models.TrialModel, list[Any]()
    unfinished = (trial.trial_id == trial_id, trial.state.in_((TrialState.RUNNING, TrialState.WAITING)))
    if write.params:
        param = models.TrialParamModel.__table__
        columns = [param.c.param_name, param.c.param_value, param.c.distribution_json]
        rows = [
            select(trial.trial_id, *(literal(v, c.type) for v, c in zip(row, columns, strict=True))).where(*unfinished)
            for row in _params(write.params)
        ]
        insert = _INSERTS[database.engine.name](param)
        parts = (rows[start : start + _ROWS] for start in range(0, len(rows), _ROWS))
        statements += [insert.from_select([param.c.trial_id, *columns], union_all(*part)) for part in parts]
    if write.values is not None:
        end = {"state": write.state, "datetime_complete": datetime.now()}
        statements.append(update(models.TrialModel.__table__).where(*unfinished).values(end))
    if not statements:
        _locked(session, database, trial_id)
    for each in statements:
        if session.execute(each.execution_options(preserve_rowcount=True)).rowcount == 0:
            _locked(session, database, trial_id)
            raise AssertionError("a trial that has not finished was not written on")


def _put_attributes(session: Any, database: RDBStorage, trial_id: int, attributes: Mapping[str, Any]) -> None:
    put = _INSERTS[database.engine.name](models.TrialUserAttributeModel).values(_attributes(trial_id, attributes))
    changed = {"value_json": put.excluded.value_json}
    session.execute(put.on_conflict_do_update(index_elements=["trial_id", "key"], set_=changed))


def _put_heartbeat(session: Any, database: RDBStorage, trial_id: int) -> None:
    """The first sign of life of a trial that begins to run; `heartbeats.py` has the others."""
    if database.get_heartbeat_interval() is None:
        return
    now = {"heartbeat": func.current_timestamp()}
    put = _INSERTS[database.engine.name](models.TrialHeartbeatModel).values(trial_id=trial_id, **now)
    session.execute(put.on_conflict_do_update(index_elements=["trial_id"], set_=now))


def _write_one_by_one(study: optuna.Study, storage: BaseStorage, trial_id: int, write: TrialWrite) -> None:
    for key, attribute in write.early.items():
        storage.set_trial_user_attr(trial_id, key, attribute)
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


def _params(params: Mapping[str, tuple[float, BaseDistribution]]) -> list[tuple[str, float, str]]:
    return [(name, value, distribution_to_json(distribution)) for name, (value, distribution) in params.items()]


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
