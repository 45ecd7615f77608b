"""Several workers on one study: `run --workers`, joining and leaving, deaths; and the display that follows them."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from optuna.trial import TrialState

from dfmerge_studies.errors import RunError
from dfmerge_studies.report.pace import pace
from dfmerge_studies.report.tables import pace_text
from dfmerge_studies.search import make_sampler
from dfmerge_studies.storage import join_study, load_study, open_storage
from dfmerge_studies.study.pool import MAX_RESTARTS, Notice, Orders, Pool, device_of, threads_each
from dfmerge_studies.trials.reading import counts, results
from dfmerge_studies.trials.space import Space
from tests.place import Place, wait_for
from tests.processes import Forked
from tests.project import Project
from tests.servers import STORAGES

DAY = datetime(2026, 1, 1)


def start(project: Project, *arguments: str) -> Forked:
    return project.start("run", "spec.yaml", *arguments, leader=True)


class Heard:
    """The standard error of a parent, line by line, and waiting for a line that says something."""

    def __init__(self, process: Forked) -> None:
        self.lines: list[str] = []
        self._more = threading.Condition()
        self._over = False
        threading.Thread(target=self._read, args=(process,), daemon=True).start()

    def _read(self, process: Forked) -> None:
        for line in process.stderr:
            with self._more:
                self.lines.append(line)
                self._more.notify()
        with self._more:
            self._over = True
            self._more.notify()

    def wait(self, *words: str, seconds: float = 300) -> str:
        def found() -> list[str]:
            return [line for line in self.lines if all(word in line for word in words)]

        with self._more:
            assert self._more.wait_for(lambda: found() or self._over, seconds), self.lines
            assert found(), self.lines
            return found()[0]

    def end(self) -> str:
        with self._more:
            assert self._more.wait_for(lambda: self._over, 300)
        return "".join(self.lines)


def worker_pid(line: str) -> int:
    return int(line.split("process ")[1].split(" ")[0])


def study_of(project: Project, url: str | None = None, name: str = "colours") -> optuna.Study:
    return load_study(open_storage(url or f"sqlite:///{project.folder}/colours.db", create=False), name)


def check_whole(study: optuna.Study, total: int) -> None:
    now = counts(study)
    assert now == {"complete": total, "running": 0, "waiting": 0, "failed": 0, "pruned": 0}
    assert [trial.user_attrs["place"] for trial in results(study)] == list(range(total))


@pytest.mark.slow
def test_local_workers_share_a_study_and_its_baselines_and_a_restart_does_nothing(project: Project) -> None:
    project.write(baselines=["fisher"])
    done = project.process("run", "spec.yaml", "--workers", "2", "--json")
    printed = json.loads(done.stdout)
    assert printed["trials"] == {"target": 4, "complete": 4, "running": 0, "waiting": 0, "failed": 0, "pruned": 0}
    assert len(printed["rows"]) == 4
    check_whole(study_of(project), 4)
    check_whole(study_of(project, name="colours.fisher"), 1)
    pids = {worker_pid(line) for line in done.stderr.splitlines() if ": process " in line}
    assert {trial.user_attrs["owner"]["pid"] for trial in study_of(project).trials} <= pids
    assert len(pids) == 2
    assert "on cpu, 1 thread" in done.stderr

    before = project.files()["colours.db"]
    again = project.cli("run", "spec.yaml", "--workers", "2")
    assert ": process " not in again.stderr
    assert "4 of 4 trials complete" in again.stdout
    assert project.files()["colours.db"] == before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_workers_hand_their_trials_back_when_the_parent_is_told_to_stop_or_is_killed(
    project: Project, number: signal.Signals
) -> None:
    process = start(project, "--workers", "2", "--trials", "500")
    heard = Heard(process)
    workers = [psutil.Process(worker_pid(heard.wait(f"worker {i}: process"))) for i in (1, 2)]
    heard.wait("/500  trial ")
    process.send_signal(number)
    code = process.wait(300)
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    _, alive = psutil.wait_procs(workers, timeout=300)
    assert not alive
    now = counts(study_of(project))
    assert now["running"] == 0
    assert now["failed"] == 0
    assert 0 < now["complete"] < 500
    # Each worker may have handed a trial back, or was stopped before it drew one: that place is free again.
    held = study_of(project).get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.WAITING))
    total = max(now["complete"] + 1, 1 + max(trial.user_attrs["place"] for trial in held))
    project.cli("run", "spec.yaml", "--trials", str(total), "--no-test")
    check_whole(study_of(project), total)


@pytest.mark.slow
def test_a_killed_worker_is_noticed_and_started_again_and_its_trial_taken_by_another(project: Project) -> None:
    total = 30  # more than the other worker does before the death is heard
    process = start(project, "--workers", "2", "--trials", str(total))
    heard = Heard(process)
    victim = worker_pid(heard.wait("worker 1: process"))
    heard.wait("worker 1:", "trial")
    os.kill(victim, signal.SIGKILL)
    heard.wait(f"worker 1: process {victim} died (SIGKILL)", "started again")
    assert process.wait(500) == 0, heard.lines
    assert f"{total} of {total} trials complete" in process.stdout.read()
    check_whole(study_of(project), total)


def test_workers_that_die_again_and_again_are_given_up_with_a_message() -> None:
    orders = [Orders({}, "spec.yaml", None, 1, [], index, 2) for index in range(2)]
    notices: list[Notice] = []
    deaths: list[None] = []
    death = "import os, signal, sys; sys.stdin.readline(); os.kill(os.getpid(), signal.SIGKILL)"
    pool = Pool([sys.executable, "-c", death], orders, on_notice=notices.append, on_death=lambda: deaths.append(None))
    with pytest.raises(RunError, match=r"died again and again.*SIGKILL, SIGKILL"):
        pool.run()
    for number in (1, 2):
        kinds = [notice.kind for notice in notices if notice.worker == number]
        assert kinds == ["died"] * MAX_RESTARTS + ["given up"]
    assert len(deaths) == 8


@pytest.mark.slow
def test_of_workers_with_different_settings_that_start_at_once_one_kind_is_refused(project: Project) -> None:
    seeds = [0, 1, 0, 1]
    processes = [start(project, "--seed", str(seed), "--no-test") for seed in seeds]
    codes = {0: set(), 1: set()}
    for seed, process in zip(seeds, processes, strict=True):
        _, errors = process.communicate(timeout=500)
        codes[seed].add(process.returncode)
        assert process.returncode == 0 or "search.seed" in errors
    assert sorted(codes.values(), key=max) == [{0}, {2}]
    check_whole(study_of(project), 4)


@pytest.mark.slow
def test_workers_are_refused_on_other_weights_and_the_message_comes_once(project: Project) -> None:
    project.process("run", "spec.yaml", "--trials", "1")
    project.write(experts={"red": {"model": "blue", "task": "red"}, "blue": "blue"})
    done = project.process("run", "spec.yaml", "--workers", "2", check=2)
    assert done.stderr.count("about something else") == 1
    assert "weights of expert red" in done.stderr or "red" in done.stderr
    check_whole(study_of(project), 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", STORAGES)
def test_workers_that_join_leave_and_die_reach_the_exact_total_on_every_storage(
    kind: str, new_storage: Callable[[str], str], tmp_path: Path
) -> None:
    place = Place(tmp_path / "s", target=16, seconds=0.05)
    place.settings["url"] = new_storage(kind)
    first = [place.start(), place.start(), place.start(kill_at_call=2)]
    wait_for(first[0], "completed", 2)
    late = [place.start(), place.start(target=20)]  # the last one raises the total while the others work
    first[1].send_signal(signal.SIGTERM)
    for process in (*first, *late):
        process.communicate(timeout=500)
    place.settings["target"] = 20
    assert place.run()[-1][1]["completed"] == 0
    place.check_whole()


@pytest.mark.slow
def test_a_worker_that_finds_every_place_taken_waits_and_takes_up_the_trial_of_one_that_dies(tmp_path: Path) -> None:
    place = Place(tmp_path / "s", target=2, points=[])
    holder = place.start(hang_at_call=2)
    wait_for(holder, "hanging")
    waiting = place.start()
    time.sleep(1)
    assert waiting.poll() is None
    holder.kill()
    output, errors = waiting.communicate(timeout=300)
    assert waiting.returncode == 0, errors
    assert [json.loads(line)[0] for line in output.splitlines()][:3] == ["recovered", "started", "completed"]
    holder.communicate()
    place.check_whole()


def _gp_study(tmp_path: Path) -> tuple[optuna.Study, Space]:
    space = Space(("a", "b"))
    sampler = make_sampler("gp", seed=0, study_name="s", space=space, startup_trials=3)
    study = join_study(open_storage(f"sqlite:///{tmp_path}/s.db"), "s", directions=["maximize"], sampler=sampler)
    for place, (a, b) in enumerate([(0.1, 0.2), (0.5, 0.6), (0.9, 0.3), (0.4, 0.8), (0.6, 0.5)]):
        trial = optuna.trial.create_trial(
            params={"a": a, "b": b},
            distributions=space.distributions(),
            value=-((a - 0.5) ** 2) - (b - 0.55) ** 2,
            user_attrs={"place": place},
        )
        study.add_trial(trial)
    return study, space


def _ask(study: optuna.Study, space: Space, place: int) -> dict[str, float]:
    template = optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs={"place": place})
    trial_id = study._storage.create_new_trial(study._study_id, template_trial=template)
    live = optuna.Trial(study, trial_id)
    return {name: live.suggest_float(name, space.low, space.high) for name in space.names}


def test_the_gaussian_process_keeps_away_from_points_that_still_run(tmp_path: Path) -> None:
    study, space = _gp_study(tmp_path)
    first = _ask(study, space, 5)
    second = _ask(study, space, 5)  # the same place has the same seed: only the running trial tells them apart
    assert max(abs(first[name] - second[name]) for name in space.names) > 0.01
    third = _ask(study, space, 5)
    points = [first, second, third]
    assert all(p != q for i, p in enumerate(points) for q in points[:i])


def test_each_worker_gets_its_share_of_the_cores_and_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert threads_each(1) == cores
    assert threads_each(10 * cores) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert threads_each(1) == 1
    assert [device_of("auto", index, 2) for index in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert [device_of("cuda", index, 2) for index in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert device_of("auto", 1, 1) == device_of("auto", 1, 0) == "auto"
    assert device_of("cuda:1", 0, 2) == "cuda:1"


def test_the_pace_of_a_study_leaves_pauses_out_and_counts_parallel_time_once() -> None:
    def trial(place: int, begin: int, end: int | None) -> optuna.trial.FrozenTrial:
        made = optuna.trial.create_trial(
            state=TrialState.RUNNING if end is None else TrialState.COMPLETE,
            value=None if end is None else 0.0,
            user_attrs={"place": place},
        )
        made.datetime_start = DAY + timedelta(seconds=begin)
        made.datetime_complete = None if end is None else DAY + timedelta(seconds=end)
        return made

    # Two workers for a minute, four trials of thirty seconds; a day's pause; one worker, two trials of a minute.
    spans = [(0, 30), (0, 30), (30, 60), (30, 60), (86400, 86460), (86460, 86520)]
    trials = [trial(place, *span) for place, span in enumerate(spans)]
    assert pace(trials, target=9, workers=0) == {
        "trials_per_hour": {"overall": 120.0, "recent": 120.0},
        "seconds_left": None,
    }
    assert pace([*trials, trial(6, 86520, None)], target=9, workers=1)["seconds_left"] == 90.0
    assert pace(trials, target=6, workers=0)["seconds_left"] == 0.0
    assert pace([], target=6, workers=1) == {"trials_per_hour": {"overall": None, "recent": None}, "seconds_left": None}


@pytest.mark.parametrize(("rate", "shown"), [(12096.774, "12097"), (120.0, "120"), (31.04, "31"), (0.0417, "0.0417")])
def test_rates_are_shown_in_plain_digits(rate: float, shown: str) -> None:
    summary = {"trials_per_hour": {"overall": rate, "recent": rate}, "seconds_left": None}
    assert pace_text(summary) == f"{shown} trials per hour, {shown} overall"


@pytest.mark.slow
def test_status_names_the_workers_and_watch_prints_a_line_for_every_change(tmp_path: Path, project: Project) -> None:
    process = start(project, "--trials", "6", "--no-test")
    deadline = time.monotonic() + 300
    seen: list[dict[str, Any]] = []
    while time.monotonic() < deadline and not seen and process.poll() is None:
        done = project.cli("status", "spec.yaml", "--json", check=None)
        if done.returncode == 0:
            seen = [worker for worker in json.loads(done.stdout)["workers_alive"] if worker["current"] is not None]
    watched = project.cli("status", "spec.yaml", "--watch", "--every", "0.1").stdout.splitlines()
    process.communicate(timeout=300)
    assert seen
    assert seen[0]["pid"] == process.pid
    assert watched[-1].startswith("colours: 6 of 6 complete")
    assert len(set(watched)) == len(watched)
    last = json.loads(project.cli("status", "spec.yaml", "--watch", "--json").stdout)
    assert last["workers_alive"] == []
    assert last["seconds_left"] == 0
