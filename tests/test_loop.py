"""The loop of one worker, in this process: totals, queues, failures, events."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from dfmerge_studies.errors import InputError, RunError
from dfmerge_studies.search import grid_rows, make_sampler
from dfmerge_studies.storage import id_of, join_study, open_storage, storage_of
from dfmerge_studies.trials.loop import work
from dfmerge_studies.trials.marks import mark
from dfmerge_studies.trials.outbox import Outbox
from dfmerge_studies.trials.owner import is_dead, working
from dfmerge_studies.trials.queue import enqueue
from dfmerge_studies.trials.reading import MAX_RETRIES, counts, results
from dfmerge_studies.trials.results import Event, TrialResult
from dfmerge_studies.trials.space import Space
from tests.servers import STORAGES

SPACE = Space(("a", "b"))
MakeStudy = Callable[..., optuna.Study]


@pytest.fixture(params=STORAGES)
def make_study(request: pytest.FixtureRequest, new_storage: Callable[[str], str]) -> MakeStudy:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    url = new_storage(request.param)

    def make(objectives: int = 1, sampler: str = "random", **settings: Any) -> optuna.Study:
        storage = open_storage(url)
        proposer = make_sampler(sampler, seed=0, study_name="s", space=SPACE, **settings)
        return join_study(storage, "s", directions=["maximize"] * objectives, sampler=proposer)

    return make


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = make_sampler("random", seed=0, study_name="s", space=SPACE)
    return join_study(open_storage(f"sqlite:///{tmp_path}/s.db"), "s", directions=["maximize"], sampler=sampler)


def evaluate(point: dict[str, float], place: int) -> TrialResult:
    return TrialResult((point["a"] - point["b"] ** 2,), {"tasks": {"t": point["a"]}, "seconds": place})


def rows(study: optuna.Study) -> list[tuple[Any, ...]]:
    return [(t.params, t.values, t.constraints) for t in results(study)]


def test_a_run_reaches_its_total_exactly_and_stores_what_evaluation_gave(make_study: MakeStudy, tmp_path: Path) -> None:
    study, events = make_study(), list[Event]()
    summary = work(study, SPACE, evaluate, target=5, outbox=tmp_path / "out", on_event=events.append)
    assert summary.counts == {"complete": 5, "running": 0, "waiting": 0, "failed": 0, "pruned": 0}
    assert (summary.completed, summary.failed, summary.interrupted, summary.exhausted) == (5, 0, False, False)
    assert [(e.kind, e.place) for e in events] == [(k, p) for p in range(5) for k in ("started", "completed")]
    for place, trial in enumerate(results(make_study())):
        assert trial.values == list(evaluate(trial.params, place).values)
        assert trial.user_attrs["tasks"] == {"t": trial.params["a"]}
        assert trial.user_attrs["seconds"] == place
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("sampler", ["random", "gp"])
def test_a_run_extended_in_steps_equals_one_long_run(sampler: str, tmp_path: Path) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    runs = []
    for name, targets in {"long": [9], "steps": [1, 5, 5, 9]}.items():
        for target in targets:
            proposer = make_sampler(sampler, seed=1, study_name="s", space=SPACE, startup_trials=3)
            storage = open_storage(f"sqlite:///{tmp_path}/{name}.db")
            study = join_study(storage, "s", directions=["maximize"], sampler=proposer)
            enqueue(study, SPACE, [{"a": 0.5, "b": 0.5}])
            work(study, SPACE, evaluate, target=target)
            assert counts(study)["complete"] == target
        runs.append(rows(study))
    assert runs[0] == runs[1]


def test_a_run_whose_total_is_reached_evaluates_nothing(make_study: MakeStudy) -> None:
    work(make_study(), SPACE, evaluate, target=2)
    assert work(make_study(), SPACE, _never, target=2).completed == 0
    assert work(make_study(), SPACE, _never, target=1).counts["complete"] == 2


def _never(point: dict[str, float], place: int) -> TrialResult:
    raise AssertionError(f"evaluated {point} at {place}")


# The queue


def test_known_points_come_first_in_their_order_and_only_once(make_study: MakeStudy) -> None:
    points = [{"a": 1 / 3, "b": 1 / 3}, {"a": 1, "b": 0}, {"a": 0.1, "b": 0.2}]
    assert enqueue(make_study(), SPACE, points) == 3
    assert enqueue(make_study(), SPACE, points) == 0
    work(make_study(), SPACE, evaluate, target=2)
    assert enqueue(make_study(), SPACE, points) == 0
    assert counts(make_study())["waiting"] == 1
    study = make_study()
    work(study, SPACE, evaluate, target=4)
    assert [t.params for t in results(study)[:3]] == points
    assert [t.user_attrs["place"] for t in results(study)] == [0, 1, 2, 3]


def test_a_known_point_outside_the_space_is_refused_and_none_is_queued(study: optuna.Study) -> None:
    with pytest.raises(InputError, match=r"coefficient of 'b' is 7, outside the bounds \[0, 1\]"):
        enqueue(study, SPACE, [{"a": 0.5, "b": 0.5}, {"a": 0.5, "b": 7}])
    assert study.trials == []


def test_points_that_several_processes_queued_at_once_run_once(study: optuna.Study) -> None:
    for _ in range(4):  # what four processes do when each looks before the others have written
        study.enqueue_trial({"a": 0.25, "b": 0.5}, user_attrs={"place": 0})
    seen = []
    work(study, SPACE, lambda p, n: seen.append(p) or evaluate(p, n), target=3)  # type: ignore[func-returns-value]
    assert seen.count({"a": 0.25, "b": 0.5}) == 1
    assert counts(study) == {"complete": 3, "running": 0, "waiting": 0, "failed": 0, "pruned": 0}


def test_a_point_that_other_software_queued_outside_the_space_fails_and_the_run_goes_on(study: optuna.Study) -> None:
    study.enqueue_trial({"a": 7.0, "b": 0.5})
    with pytest.warns(UserWarning, match="out of range"):
        summary = work(study, SPACE, evaluate, target=2)
    assert summary.failed == 1
    assert summary.counts["complete"] == 2
    assert "coefficient of 'a' is 7.0" in study.trials[0].user_attrs["error"]


def test_a_point_that_other_software_queued_is_evaluated(study: optuna.Study) -> None:
    study.enqueue_trial({"a": 0.5})
    work(study, SPACE, evaluate, target=1)
    assert study.trials[0].params["a"] == 0.5
    assert set(study.trials[0].params) == {"a", "b"}


def test_a_grid_is_exhausted_exactly_and_a_second_run_finds_nothing_to_do(make_study: MakeStudy) -> None:
    grid = {"a": [0.0, 0.5, 1.0], "b": [0.25, 0.75]}
    work(make_study(sampler="grid", grid=grid), SPACE, evaluate, target=4)
    study = make_study(sampler="grid", grid=grid)
    enqueue(study, SPACE, [{"a": 1.0, "b": 0.75}, {"a": 0.0, "b": 0.25}])
    summary = work(study, SPACE, evaluate, target=100)
    assert summary.exhausted
    assert summary.counts == {"complete": 6, "running": 0, "waiting": 0, "failed": 0, "pruned": 0}
    points = [t.params for t in results(study)]
    assert all(points.count(row) == 1 for row in grid_rows(SPACE, grid))
    assert work(make_study(sampler="grid", grid=grid), SPACE, _never, target=100).completed == 0


# Several objectives, constraints


def test_several_objectives_and_constraints_are_stored_in_order(make_study: MakeStudy) -> None:
    study = make_study(objectives=2, sampler="gp", startup_trials=3)

    def many(point: dict[str, float], place: int) -> TrialResult:
        limits = tuple(point["a"] - index for index in range(12))
        return TrialResult((point["a"], point["b"]), {}, limits)

    work(study, SPACE, many, target=5)
    for trial in results(make_study(objectives=2)):
        assert trial.values == [trial.params["a"], trial.params["b"]]
        # Optuna's gRPC proxy gives attributes in no order, so constraints are refused there (`test_bad_input.py`).
        assert [trial.constraints[name] for name in sorted(trial.constraints)] == [
            trial.params["a"] - index for index in range(12)
        ]


def test_a_trial_with_another_number_of_constraints_fails_and_spares_the_study(make_study: MakeStudy) -> None:
    study = make_study(sampler="gp", startup_trials=2)

    def uneven(point: dict[str, float], place: int) -> TrialResult:
        return TrialResult((point["a"],), {}, (0.0,) * (2 if place == 1 else 1))

    summary = work(study, SPACE, uneven, target=4)
    assert (summary.completed, summary.failed) == (4, 1)
    assert "2 constraints, earlier ones 1" in study.trials[1].user_attrs["error"]


# Failures


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_fails_its_trial_and_never_completes(make_study: MakeStudy, value: float) -> None:
    study = make_study()

    def sometimes(point: dict[str, float], place: int) -> TrialResult:
        return TrialResult((value,)) if place == 1 else evaluate(point, place)

    summary = work(study, SPACE, sometimes, target=3)
    assert (summary.completed, summary.failed) == (3, 1)
    assert study.trials[1].state == TrialState.FAIL
    assert "not finite" in study.trials[1].user_attrs["error"]
    assert all(math.isfinite(trial.value or 0) for trial in results(study))


def test_a_constraint_that_is_not_finite_fails_its_trial(study: optuna.Study) -> None:
    def broken(point: dict[str, float], place: int) -> TrialResult:
        return TrialResult((0.0,), {}, (math.nan,) if place == 0 else (0.0,))

    assert work(study, SPACE, broken, target=1).failed == 1


@pytest.mark.parametrize(
    ("error", "message"), [(RunError("no space left"), "no space left"), (MemoryError(), "out of memory")]
)
def test_a_failed_trial_is_recorded_and_the_run_goes_on_at_other_coefficients(
    make_study: MakeStudy, error: Exception, message: str
) -> None:
    study, events = make_study(), list[Event]()

    def sometimes(point: dict[str, float], place: int) -> TrialResult:
        if place in (0, 1, 3):
            raise error
        return evaluate(point, place)

    summary = work(study, SPACE, sometimes, target=3, on_event=events.append)
    assert (summary.completed, summary.failed) == (3, 3)
    assert summary.counts == {"complete": 3, "running": 0, "waiting": 0, "failed": 3, "pruned": 0}
    assert study.trials[0].user_attrs["error"].startswith(message)
    assert [e.message for e in events if e.kind == "failed"] == [study.trials[0].user_attrs["error"]] * 3
    assert len({json.dumps(t.params) for t in study.trials}) == 6
    work(make_study(), SPACE, evaluate, target=4)
    assert [t.user_attrs["place"] for t in results(make_study())] == [2, 4, 5, 6]


def test_three_failures_in_a_row_end_the_run_and_are_named(make_study: MakeStudy) -> None:
    study = make_study()

    def broken(point: dict[str, float], place: int) -> TrialResult:
        raise RunError(f"no result at place {place}")

    with pytest.raises(RunError) as caught:
        work(study, SPACE, broken, target=10)
    assert "3 trials in a row" in str(caught.value)
    assert all(f"trial {n}: no result at place {n}" in str(caught.value) for n in range(3))
    assert counts(study)["failed"] == 3
    assert work(make_study(), SPACE, evaluate, target=2).counts["complete"] == 2


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), InputError("a file is gone"), SystemExit(3)])
def test_any_other_exception_passes_and_its_trial_is_repeated_by_the_next_run(
    make_study: MakeStudy, error: BaseException
) -> None:
    def broken(point: dict[str, float], place: int) -> TrialResult:
        if place == 1:
            raise error
        return evaluate(point, place)

    with pytest.raises(type(error)):
        work(make_study(), SPACE, broken, target=3)
    study = make_study()
    assert counts(study) == {"complete": 1, "running": 0, "waiting": 1, "failed": 0, "pruned": 0}
    lost = study.trials[1].params
    assert work(study, SPACE, evaluate, target=3).counts["complete"] == 3
    assert results(study)[1].params == lost


def test_a_wrong_number_of_values_and_reserved_attributes_are_refused(study: optuna.Study) -> None:
    with pytest.raises(ValueError, match="2 values for 1 objectives"):
        work(study, SPACE, lambda p, n: TrialResult((0.0, 1.0)), target=1)
    with pytest.raises(RunError, match="reserved names"):
        work(study, SPACE, lambda p, n: TrialResult((0.0,), {"place": 3}), target=1)
    with pytest.raises(TypeError):
        work(study, SPACE, lambda p, n: TrialResult((0.0,), {"x": object()}), target=1)


def test_a_failing_run_leaves_no_handlers_and_no_threads_behind(study: optuna.Study) -> None:
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    threads = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        work(study, SPACE, lambda p, n: TrialResult((1 / 0,)), target=1)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert threading.active_count() == threads


def test_work_runs_outside_the_main_thread(make_study: MakeStudy) -> None:
    done = []
    thread = threading.Thread(target=lambda: done.append(work(make_study(), SPACE, evaluate, target=2)))
    thread.start()
    thread.join()
    assert done[0].counts["complete"] == 2


# Dead owners


def test_a_process_that_ended_a_pid_come_round_again_and_another_machine_are_told_apart() -> None:
    with working() as owner:
        assert is_dead(owner) is False
        assert is_dead({**owner, "started": "1"}) is True
        assert is_dead({**owner, "pid": 2**22 + 1}) is True
        assert is_dead({**owner, "boot": "earlier"}) is True
        assert is_dead({**owner, "host": "elsewhere"}) is None
        assert is_dead({**owner, "space": "container"}) is None
    assert is_dead(owner) is True  # this process lives, but the call of `work` has ended


def test_a_child_that_was_killed_and_not_yet_waited_for_is_dead() -> None:
    pid = os.fork() if hasattr(os, "fork") else pytest.skip("no fork")
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    with working() as owner:
        started = _started(pid)
        assert is_dead({**owner, "pid": pid, "started": started}) is False
        os.kill(pid, signal.SIGKILL)
        while Path(f"/proc/{pid}/stat").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text():
            time.sleep(0.01)
        assert is_dead({**owner, "pid": pid, "started": started}) is True
    os.waitpid(pid, 0)


def _started(pid: int) -> str | None:
    from dfmerge_studies.trials.owner import _start_of

    return _start_of(pid)


def _foreign(study: optuna.Study, *, place: int = 0, whose: dict[str, Any] | None = None, **attributes: Any) -> None:
    """Add a running trial whose owner differs from this process: by its machine, unless something else is said."""
    with working() as owner:
        foreign = {**owner, **(whose or {"host": "elsewhere"})}
    template = create_trial(state=TrialState.RUNNING, user_attrs={"place": place, "owner": foreign, **attributes})
    study.add_trial(template)


@pytest.mark.slow
def test_a_worker_draws_after_one_that_began_before_it_so_that_its_model_knows_that_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def proposed(name: str, seconds: float | None) -> dict[str, float]:
        """What a worker proposes beside a rival that stores its coefficients so much later, or never."""
        sampler = make_sampler("gp", seed=0, study_name="s", space=SPACE, startup_trials=2)
        storage = open_storage(f"sqlite:///{tmp_path}/{name}.db")
        study = join_study(storage, "s", directions=["maximize"], sampler=sampler)
        work(study, SPACE, evaluate, target=4)
        _foreign(study, place=4, beat=time.time())
        rival = id_of(study.get_trials()[-1])

        def draw() -> None:
            for axis, value in {"a": 1.0, "b": 0.0}.items():  # where the model would go
                storage.set_trial_param(rival, axis, value, SPACE.distributions()[axis])
            mark(study, rival, {"drawn": True})

        if seconds is not None:
            threading.Timer(seconds, draw).start()
        points = list[dict[str, float]]()

        def stop(event: Event) -> None:
            points.append({**event.coefficients})
            if len(points) == 1:
                signal.raise_signal(signal.SIGINT)

        work(study, SPACE, evaluate, target=6, on_event=stop)
        return points[0]

    late = proposed("late", 1.0)
    monkeypatch.setattr("dfmerge_studies.trials.turns._TURN_SECONDS", 0.0)  # now it draws at once, whoever was first
    assert late != proposed("never", None)
    monkeypatch.undo()
    assert late == proposed("at once", 0.0)


def test_a_worker_does_not_wait_for_its_turn_behind_one_that_has_died(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    rival = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    _foreign(study, whose={"pid": rival.pid, "started": _started(rival.pid), "worker": "rival"})
    threading.Timer(0.5, rival.kill).start()
    monkeypatch.setattr("dfmerge_studies.trials.turns._TURN_SECONDS", math.inf)
    assert work(study, SPACE, evaluate, target=3).counts["complete"] == 3
    rival.communicate()


def test_a_worker_waits_for_its_turn_behind_a_silent_machine_once(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    _foreign(study, beat=time.time())
    monkeypatch.setattr("dfmerge_studies.trials.turns._TURN_SECONDS", 0.2)

    def patient(event: Event) -> None:
        monkeypatch.setattr("dfmerge_studies.trials.turns._TURN_SECONDS", math.inf)
        if counts(study)["complete"] == 2:
            signal.raise_signal(signal.SIGINT)

    assert work(study, SPACE, evaluate, target=3, on_event=patient).counts["complete"] == 2


def test_a_running_trial_of_another_machine_keeps_its_place(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study()
    _foreign(study, beat=time.time())
    monkeypatch.setattr("dfmerge_studies.trials.turns._TURN_SECONDS", 0.2)

    def stop(event: Event) -> None:
        if counts(study)["complete"] == 2:  # only the other's trial is left, and a worker would wait for it
            signal.raise_signal(signal.SIGINT)

    summary = work(study, SPACE, evaluate, target=3, on_event=stop)
    assert summary.interrupted
    assert summary.counts == {"complete": 2, "running": 1, "waiting": 0, "failed": 0, "pruned": 0}


def test_a_signal_that_comes_with_the_last_trial_is_told_to_who_would_go_on(make_study: MakeStudy) -> None:
    study = make_study()

    def stop(event: Event) -> None:
        if event.kind == "completed" and counts(study)["complete"] == 3:
            signal.raise_signal(signal.SIGINT)

    summary = work(study, SPACE, evaluate, target=3, on_event=stop)
    assert summary.interrupted
    assert summary.counts["complete"] == 3


def test_a_trial_of_another_machine_without_sign_of_life_is_given_up(make_study: MakeStudy) -> None:
    study = make_study()
    _foreign(study, beat=time.time() - 1000)
    assert work(study, SPACE, evaluate, target=3).counts["complete"] == 3


def test_coefficients_on_which_processes_die_again_and_again_become_a_failure(study: optuna.Study) -> None:
    enqueue(study, SPACE, [{"a": 0.5, "b": 0.5}])
    events: list[Event] = []
    for _ in range(MAX_RETRIES + 1):
        with pytest.raises(ZeroDivisionError):
            _die(study)
    summary = work(study, SPACE, evaluate, target=2, on_event=events.append)
    assert summary.counts == {"complete": 2, "running": 0, "waiting": 0, "failed": 1, "pruned": 0}
    assert {"a": 0.5, "b": 0.5} not in [t.params for t in results(study)]
    assert "died 4 times" in next(t for t in study.trials if "error" in t.user_attrs).user_attrs["error"]


def _die(study: optuna.Study) -> None:
    """Leave a running trial of a dead owner, as a killed process does."""
    from dfmerge_studies.trials.recovery import recover

    recover(study)
    with working() as owner:
        (trial,) = study.get_trials(states=(TrialState.WAITING,))
        mark(study, id_of(trial), {"owner": owner})
        assert storage_of(study).set_trial_state_values(id_of(trial), TrialState.RUNNING)
        1 / 0  # noqa: B018


# The outbox


def test_a_result_of_another_database_with_a_study_of_the_same_name_is_left_alone(tmp_path: Path) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    outbox = tmp_path / "out"
    outbox.mkdir()
    studies = []
    for name in ("one", "two"):
        sampler = make_sampler("random", seed=0, study_name="s", space=SPACE)
        storage = open_storage(f"sqlite:///{tmp_path}/{name}.db")
        studies.append(join_study(storage, "s", directions=["maximize"], sampler=sampler))
    work(studies[0], SPACE, evaluate, target=1)
    kept = Outbox(outbox, studies[0]).write(0, {"worker": "w"}, TrialResult((5.0,)))
    work(studies[1], SPACE, evaluate, target=1, outbox=outbox)
    assert kept is not None
    assert kept.exists()
    assert results(studies[1])[0].values != [5.0]


def test_a_damaged_file_in_the_outbox_is_set_aside(study: optuna.Study, tmp_path: Path) -> None:
    kept = Outbox(tmp_path, study).write(0, {"worker": "w"}, TrialResult((5.0,)))
    assert kept is not None
    kept.write_text(kept.read_text()[:20])
    work(study, SPACE, evaluate, target=1, outbox=tmp_path)
    assert kept.with_suffix(".damaged").exists()
    assert not kept.exists()


def test_an_outbox_that_cannot_be_written_does_not_stop_the_run(study: optuna.Study, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert work(study, SPACE, evaluate, target=2, outbox=tmp_path / "file").counts["complete"] == 2
