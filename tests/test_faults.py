"""Workers that are killed, stopped and interrupted at real moments: nothing is lost, nothing is repeated."""

from __future__ import annotations

import json
import random
import signal
import sqlite3
import time
from pathlib import Path

import pytest
from optuna.trial import TrialState

from dfmerge_studies.trials.reading import counts, results
from dfmerge_studies.trials.recovery import recover
from tests.place import POINTS, Place, wait_for


@pytest.fixture(scope="module", params=["random", "gp"])
def uninterrupted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(tmp_path_factory.mktemp("whole"), sampler=request.param, constraints=1)
    place.seconds = place.run()[-1][1]["seconds"]  # of work on this machine, without starting Python
    assert place.rows()[0][0] == POINTS[0]
    return place


@pytest.fixture
def cut(uninterrupted: Place, tmp_path: Path) -> Place:
    """A place with the settings of the uninterrupted run, to be run with interruptions."""
    same = {key: uninterrupted.settings[key] for key in ("sampler", "constraints")}
    return Place(tmp_path / "cut", **same)


@pytest.mark.slow
def test_a_run_killed_at_random_moments_and_resumed_equals_an_uninterrupted_one(
    uninterrupted: Place, cut: Place
) -> None:
    moments, kills, idle = random.Random(0), 0, 0
    for _ in range(12):
        # The ten trials sleep for a second in all; a first, cold run may have taken twice what this one does.
        moment = {"kill_after": moments.uniform(0.0, (uninterrupted.seconds + 1) / 2)}
        # Four deaths on one point are a failure by design, so the third in a row comes after a trial.
        process = cut.start(seconds=0.1, **(moment if idle < 2 else {"kill_at_call": 2}))
        output, errors = process.communicate(timeout=300)
        idle = 0 if '"completed"' in output else idle + 1
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, (output, errors)
        kills += 1
    else:
        cut.run()
    assert kills > 0
    assert cut.rows() == uninterrupted.rows()
    assert len(cut.evaluations()) <= 10 + kills
    cut.check_whole()


@pytest.mark.slow
def test_a_run_killed_in_every_third_trial_equals_an_uninterrupted_one(uninterrupted: Place, cut: Place) -> None:
    for _ in range(4):
        cut.run(-signal.SIGKILL, kill_at_call=3)
    cut.run()
    assert cut.rows() == uninterrupted.rows()
    cut.check_whole()


@pytest.mark.slow
def test_a_search_by_ucb_that_was_killed_in_a_proposed_trial_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, cut = (Place(tmp_path / name, sampler="ucb", constraints=1, target=7) for name in ("whole", "cut"))
    whole.filters = cut.filters = [("error", Warning), ("ignore", DeprecationWarning)]  # botorch's dependencies warn
    whole.run()
    cut.run(-signal.SIGKILL, kill_at_call=6)
    cut.run()
    assert cut.rows() == whole.rows()
    cut.check_whole()


@pytest.mark.slow
def test_a_result_that_was_not_told_before_the_kill_is_applied_and_not_computed_again(
    uninterrupted: Place, cut: Place
) -> None:
    cut.run(-signal.SIGKILL, kill_at_tell=1)
    cut.run(-signal.SIGKILL, kill_at_tell=3)
    recover(cut.study())  # what `status` does in between: the trial is put back before its result is found
    events = cut.run()
    assert [event[0] for event in events].count("applied") == 1
    assert cut.rows() == uninterrupted.rows()
    assert len(cut.evaluations()) == 10
    cut.check_whole()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_mid_trial_ends_the_run_in_good_order_and_loses_nothing(
    uninterrupted: Place, cut: Place, number: signal.Signals
) -> None:
    for calls in (1, 3):
        process = cut.start(hang_at_call=calls)
        wait_for(process, "started", calls)
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        summary = json.loads(output.splitlines()[-1])[1]
        assert summary["interrupted"] is True
        assert summary["counts"]["running"] == 0
        assert summary["counts"]["failed"] == 0
        assert "Traceback" not in errors
    cut.run()
    assert cut.rows() == uninterrupted.rows()
    cut.check_whole()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process_at_once_and_the_next_run_recovers(
    tmp_path: Path, number: signal.Signals
) -> None:
    place = Place(tmp_path / "s", target=3)
    process = place.start(hang_at_call=2, stubborn=True)
    wait_for(process, "hanging")
    process.send_signal(number)
    wait_for(process, "stubborn")
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == -number
    assert [event[0] for event in place.run()].count("recovered") == 1
    place.check_whole()


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["sqlite:///{}/s.db", "journal:///{}/s.log"], ids=["sqlite", "journal"])
def test_four_processes_joining_an_empty_storage_reach_the_total_together_and_repeat_nothing(
    storage: str, tmp_path: Path
) -> None:
    place = Place(tmp_path / "s", storage, target=14, seconds=0.02)
    workers = [place.start() for _ in range(4)]
    for worker in workers:
        output, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, (output, errors)
    place.run()
    place.check_whole()
    assert len(place.evaluations()) == 14
    assert len({json.dumps(point) for _, point in place.evaluations()}) == 14


@pytest.mark.slow
def test_workers_beside_one_that_is_killed_finish_its_trial(tmp_path: Path) -> None:
    place = Place(tmp_path / "s", target=14)
    workers = [place.start(kill_at_call=2, seconds=0.1), *(place.start(seconds=0.1) for _ in range(2))]
    codes = [worker.communicate(timeout=300) and worker.returncode for worker in workers]
    assert codes == [-signal.SIGKILL, 0, 0]
    place.run()
    place.check_whole()
    assert len(place.evaluations()) <= 15


def test_a_grid_shared_by_several_processes_is_exhausted_exactly(tmp_path: Path) -> None:
    grid = {"a": [0.0, 0.5, 1.0], "b": [0.0, 1.0], "c": [0.5, 1.0]}
    place = Place(tmp_path / "s", sampler="grid", grid=grid, target=99, points=[{"a": 0.5, "b": 0.0, "c": 0.5}])
    place.run(-signal.SIGKILL, kill_at_call=3)
    for worker in [place.start() for _ in range(3)]:
        assert json.loads(worker.communicate(timeout=300)[0].splitlines()[-1])[1]["exhausted"] is True
    place.run()
    points = [json.dumps(t.params, sort_keys=True) for t in results(place.study())]
    assert len(points) == len(set(points)) == 12
    assert counts(place.study())["complete"] == 12


@pytest.mark.slow
def test_a_database_overwritten_in_mid_trial_costs_no_result_once_it_is_restored(tmp_path: Path) -> None:
    place = Place(tmp_path / "s", target=4)
    process = place.start(hang_at_call=3)
    wait_for(process, "hanging")
    path, copy = place.folder / "s.db", place.folder / "copy"
    with sqlite3.connect(path) as source, sqlite3.connect(copy) as target:
        source.backup(target)
    for file in place.folder.glob("s.db*"):
        file.write_bytes(b"garbage" * (file.stat().st_size // 7 + 1))
    place.release()
    output, errors = process.communicate(timeout=120)
    assert process.returncode in (1, 2), (output, errors)
    kind, message = json.loads(output.splitlines()[-1])
    assert kind == "error"
    assert "run again to go on" in message
    assert "Traceback" not in errors
    assert json.loads(place.start().communicate(timeout=60)[0])[0] == "error"  # refused while it is garbage
    assert path.read_bytes().startswith(b"garbage")

    for file in place.folder.glob("s.db*"):
        file.unlink()
    copy.replace(path)
    assert [event[0] for event in place.run()].count("applied") == 1
    place.check_whole()
    assert len(place.evaluations()) == 4


@pytest.mark.slow
def test_a_database_held_by_another_process_is_waited_for(tmp_path: Path) -> None:
    place = Place(tmp_path / "s", target=3)
    place.run(target=1)
    other = sqlite3.connect(place.folder / "s.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    process = place.start()
    time.sleep(1.5)  # long enough for it to meet the lock on most machines; the result is the same if it does not
    other.execute("ROLLBACK")
    other.close()
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, (output, errors)
    place.check_whole()


@pytest.mark.slow
def test_trials_that_give_no_number_fail_through_a_real_worker(tmp_path: Path) -> None:
    for value in ("nan", "inf"):
        place = Place(tmp_path / value, value=value)
        events = place.run(1)
        assert [event[0] for event in events if event[0] != "started"] == ["failed"] * 3 + ["error"]
        assert "3 trials in a row failed" in events[-1][1]
        assert {t.state for t in place.study().trials if t.number < 3} == {TrialState.FAIL}
        assert place.run(target=1, value="")[-1][1]["completed"] == 0 or counts(place.study())["complete"] == 1
