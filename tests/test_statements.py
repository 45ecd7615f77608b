"""What a trial asks of a database: a ceiling of statements, and writes that are there whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState
from sqlalchemy import event

from dfmerge_studies.search import make_sampler
from dfmerge_studies.storage import (
    DrawnStorage,
    TrialWrite,
    begin_trial,
    drawn_from,
    id_of,
    join_study,
    last_heartbeat,
    open_storage,
    storage_of,
    take_trial,
    write_trial,
)
from dfmerge_studies.storage.handles import backend_of, database_of
from dfmerge_studies.trials.loop import work
from dfmerge_studies.trials.results import TrialResult, tell
from dfmerge_studies.trials.space import Space
from tests.servers import STORAGES

SPACE = Space(tuple(f"expert{number}" for number in range(6)))
RANGES = SPACE.distributions()


@pytest.fixture(params=STORAGES)
def study(request: pytest.FixtureRequest, new_storage: Callable[[str], str]) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return _study(new_storage(request.param))


def _study(url: str, sampler: str = "random") -> optuna.Study:
    proposer = make_sampler(sampler, seed=0, study_name="s", space=SPACE)
    return join_study(open_storage(url), "s", directions=["maximize"], sampler=proposer)


def evaluated(point: dict[str, float], place: int) -> TrialResult:
    attributes = dict.fromkeys(("coefficients", "tasks", "seconds", "fishers", "drops", "rows"), point)
    return TrialResult((sum(point.values()),), attributes)


@contextmanager
def counted(study: optuna.Study) -> Iterator[list[str]]:
    """The statements that a study's database gets."""
    statements: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        statements.append(statement)

    engine: Any = backend_of(storage_of(study))
    event.listen(engine.engine, "before_cursor_execute", note)
    try:
        yield statements
    finally:
        event.remove(engine.engine, "before_cursor_execute", note)


@pytest.mark.parametrize("sampler", ["random", "gp", "auto"])
def test_a_trial_takes_at_most_twenty_statements(tmp_path: Path, sampler: str) -> None:
    study = _study(f"sqlite:///{tmp_path}/s.db", sampler)
    work(study, SPACE, evaluated, target=3)
    with counted(study) as few:
        work(study, SPACE, evaluated, target=4)
    with counted(study) as many:
        work(study, SPACE, evaluated, target=14)  # the last four are proposed by a model
    assert (len(many) - len(few)) / 9 <= 20  # what a run does once is in both


@pytest.mark.parametrize("constraints", [(), (-1.0, 2.0)], ids=["no constraint", "two constraints"])
def test_a_result_takes_at_most_five_statements_however_much_it_holds(
    tmp_path: Path, constraints: tuple[float, ...]
) -> None:
    study = _study(f"sqlite:///{tmp_path}/s.db")
    trial = begin_trial(study, {"place": 0})
    result = TrialResult((1.0,), {f"attribute {number}": number for number in range(40)}, constraints)
    with counted(study) as statements:
        tell(study, id_of(trial), result)
    assert len(statements) <= 5
    [stored] = study.get_trials()
    assert (stored.state, stored.values, stored.user_attrs) == (
        TrialState.COMPLETE,
        [1.0],
        {"place": 0, **result.attributes},
    )
    assert tuple(stored.constraints.values()) == constraints
    assert stored.duration is not None
    assert 0 <= stored.duration.total_seconds() < 600


def test_a_begun_trial_has_its_attributes_and_the_next_number(study: optuna.Study) -> None:
    for number in range(3):
        trial = begin_trial(study, {"place": number, "owner": {"pid": 1}})
        stored = study.get_trials()[number]
        for each in (trial, stored):
            assert (each.number, each.state) == (number, TrialState.RUNNING)
            assert each.user_attrs == {"place": number, "owner": {"pid": 1}}
        assert id_of(trial) == id_of(stored)
        assert stored.datetime_start is not None


def test_a_begun_trial_has_the_next_number_where_an_insert_returns_nothing(tmp_path: Path) -> None:
    study = _study(f"sqlite:///{tmp_path}/s.db")
    database = database_of(storage_of(study))
    assert database is not None
    database.engine.dialect.insert_returning = False  # SQLite before 3.35
    begun = [begin_trial(study, {"place": number}) for number in range(3)]
    assert [(t.number, id_of(t)) for t in begun] == [(t.number, id_of(t)) for t in study.get_trials()]


def test_a_trial_of_a_database_is_alive_from_its_first_moment(tmp_path: Path) -> None:
    study = _study(f"sqlite:///{tmp_path}/s.db")
    study.enqueue_trial({"expert0": 0.5})
    (waiting,) = study.get_trials()
    assert last_heartbeat(study, waiting) is None
    assert take_trial(study, id_of(waiting), {"place": 0})
    for trial in (waiting, begin_trial(study, {"place": 1})):
        assert last_heartbeat(study, trial) is not None


def test_of_two_workers_that_want_a_waiting_trial_the_one_that_gets_it_stands_on_it(study: optuna.Study) -> None:
    study.enqueue_trial({"a": 0.5})
    (waiting,) = study.get_trials()
    assert take_trial(study, id_of(waiting), {"owner": "first"})
    assert not take_trial(study, id_of(waiting), {"owner": "second"})
    (taken,) = study.get_trials()
    assert (taken.state, taken.user_attrs["owner"]) == (TrialState.RUNNING, "first")
    assert taken.datetime_start is not None
    study.tell(taken.number, 1.0)
    with pytest.raises(UpdateFinishedTrialError):
        take_trial(study, id_of(waiting), {"owner": "third"})


def test_parameters_attributes_and_a_result_come_back_as_they_were_written(study: optuna.Study) -> None:
    trial_id = id_of(begin_trial(study, {"place": 0}))
    point = {name: 0.1 + number / 7 for number, name in enumerate(RANGES)}
    params = {name: (value, RANGES[name]) for name, value in point.items()}
    write_trial(study, trial_id, TrialWrite({"place": 5, "drawn": True}, params))
    write_trial(study, trial_id, TrialWrite({"tasks": {"a": 1e-300}}, values=(1 / 3,)))
    [stored] = study.get_trials()
    assert (stored.params, stored.distributions) == (point, RANGES)
    assert stored.user_attrs == {"place": 5, "drawn": True, "tasks": {"a": 1e-300}}
    assert (stored.state, stored.values) == (TrialState.COMPLETE, [1 / 3])


def test_a_trial_may_have_more_parameters_than_a_statement_takes(study: optuna.Study) -> None:
    trial_id = id_of(begin_trial(study, {"place": 0}))
    point = {f"expert.{number}": number / 700 for number in range(700)}
    write_trial(study, trial_id, TrialWrite(params={name: (at, FloatDistribution(0, 1)) for name, at in point.items()}))
    assert study.get_trials()[0].params == point


def test_nothing_is_written_on_a_trial_that_has_finished(study: optuna.Study) -> None:
    trial_id = id_of(begin_trial(study, {"place": 0}))
    write_trial(study, trial_id, TrialWrite(values=(1.0,)))
    point = {"expert0": (0.5, RANGES["expert0"])}
    for late in (
        TrialWrite({"place": 9}),
        TrialWrite(params=point),
        TrialWrite(values=(2.0,)),
        TrialWrite({"more": 1}, values=(2.0,)),
    ):
        with pytest.raises(UpdateFinishedTrialError):
            write_trial(study, trial_id, late)
    [stored] = study.get_trials()
    assert (stored.values, stored.user_attrs, stored.params) == ([1.0], {"place": 0}, {})


def test_a_write_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    study = _study(f"sqlite:///{tmp_path}/s.db")
    trial_id = id_of(begin_trial(study, {"place": 0}))
    with pytest.raises(TypeError):
        write_trial(study, trial_id, TrialWrite({"tasks": 1}, constraints={"000": object()}, values=(1.0,)))  # type: ignore[dict-item]
    [stored] = study.get_trials()
    assert (stored.state, stored.user_attrs) == (TrialState.RUNNING, {"place": 0})


def test_a_constraint_that_is_there_is_left_alone(tmp_path: Path) -> None:
    study = _study(f"sqlite:///{tmp_path}/s.db")
    trial_id = id_of(begin_trial(study, {"place": 0}))
    write_trial(study, trial_id, TrialWrite(constraints={"000": 1.0}))
    write_trial(study, trial_id, TrialWrite(constraints={"000": 2.0, "001": 3.0}))
    assert study.get_trials()[0].constraints == {"000": 1.0, "001": 3.0}


@pytest.mark.slow
def test_a_trial_is_drawn_from_what_was_read_and_no_trials_are_read_again(tmp_path: Path) -> None:
    study = _study(f"sqlite:///{tmp_path}/s.db", "gp")
    work(study, SPACE, evaluated, target=12)  # past the startup trials: the model proposes
    trial_id = id_of(begin_trial(study, {"place": 12}))
    trials = study.get_trials(deepcopy=False)
    with counted(study) as statements:
        live = optuna.Trial(drawn_from(study, DrawnStorage(study, trials)), trial_id)
        point = {name: live.suggest_float(name, 0.0, 1.0) for name in RANGES}
    assert not statements
    twin = _study(f"sqlite:///{tmp_path}/twin.db", "gp")
    work(twin, SPACE, evaluated, target=13)
    assert point == twin.get_trials()[12].params


def test_a_name_that_meant_something_else_in_the_study_is_refused(tmp_path: Path) -> None:
    study = _study(f"sqlite:///{tmp_path}/s.db")
    study.add_trial(
        optuna.trial.create_trial(params={"expert0": 1}, distributions={"expert0": IntDistribution(0, 3)}, value=1.0)
    )
    drawing = DrawnStorage(study, study.get_trials())
    with pytest.raises(ValueError, match="distribution"):
        drawing.set_trial_param(1, "expert0", 0.5, FloatDistribution(0, 1))
