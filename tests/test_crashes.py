"""Workers killed at many random moments, servers that go away and come back, disks that are full."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dfmerge_studies.trials.reading import counts
from dfmerge_studies.trials.recovery import recover
from tests.loop_child import limit_files
from tests.place import Crowd, Place, wait_for
from tests.processes import Forked, command
from tests.project import Project, cli_environment
from tests.servers import PostgresServer, ProxyServer

NewStorage = Callable[[str], str]
DATABASES = ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", DATABASES)
def test_workers_killed_at_twenty_five_random_moments_lose_and_repeat_nothing(
    kind: str, new_storage: NewStorage, tmp_path: Path
) -> None:
    place, moments = Place(tmp_path / "s", new_storage(kind), target=4, seconds=0.2), random.Random(0)
    with Crowd(place, 3) as crowd:
        crowd.start(target=1).join()  # the first one also waits for what the others are forked from
        begun = time.monotonic()
        crowd.start().join()
        life = time.monotonic() - begun  # of a worker that does three trials, on this machine as busy as it is
        for _ in range(25):
            crowd.fill()
            time.sleep(moments.uniform(0, life / 2))
            crowd.kill(moments)
        crowd.fill()
        crowd.wait()
    place.check_whole(deaths=True)
    lost = len(place.evaluations()) - counts(place.study())["complete"]
    assert 0 < lost <= 25


@pytest.mark.slow
@pytest.mark.postgres
@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_workers_outlive_a_restart_of_postgres_and_lose_nothing(
    mode: str, postgres: str, postgres_server: PostgresServer, tmp_path: Path
) -> None:
    place = Place(tmp_path / "s", postgres, target=24, seconds=0.05)
    workers = [place.start() for _ in range(2)]
    for worker in workers:
        wait_for(worker, "completed", 2)
    postgres_server.stop(mode)
    time.sleep(1)
    postgres_server.start()
    for worker in workers:
        output, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, (output, errors)
    place.check_whole()


@pytest.mark.slow
@pytest.mark.postgres
def test_a_worker_whose_postgres_stays_away_keeps_its_result_for_the_next_run(
    postgres: str, postgres_server: PostgresServer, tmp_path: Path
) -> None:
    place = Place(tmp_path / "s", postgres, target=4)
    worker = place.start(hang_at_call=2, patience=0, tell_delays=[0.2])
    wait_for(worker, "hanging")
    postgres_server.stop()
    place.release()
    try:
        output, errors = worker.communicate(timeout=300)
    finally:
        postgres_server.start()
    assert worker.returncode == 1
    kind, message = json.loads(output.splitlines()[-1])
    assert kind == "error"
    assert "run again to apply it" in message
    assert "Traceback" not in errors
    assert [event[0] for event in place.run()].count("applied") == 1
    place.check_whole()
    assert len(place.evaluations()) == 4


@pytest.mark.slow
def test_workers_outlive_a_storage_proxy_that_is_killed_and_started_again(
    new_proxy: Callable[[str], ProxyServer], tmp_path: Path
) -> None:
    proxy = new_proxy(f"sqlite:///{tmp_path}/proxy.db")
    place = Place(tmp_path / "s", proxy.url, target=24, seconds=0.05)
    workers = [place.start() for _ in range(2)]
    for worker in workers:
        wait_for(worker, "completed", 2)
    proxy.kill()
    time.sleep(1)
    proxy.start()
    for worker in workers:
        output, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, (output, errors)
    place.check_whole()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_a_full_disk_ends_the_run_with_a_message_and_costs_no_result(
    kind: str, new_storage: NewStorage, tmp_path: Path
) -> None:
    place = Place(tmp_path / "s", new_storage(kind), target=8, patience=1, tell_delays=[0.2])
    place.run(target=2)
    largest = max(file.stat().st_size for file in tmp_path.iterdir() if file.is_file())
    worker = place.start(target=500, file_limit=largest + 20_000)
    output, errors = worker.communicate(timeout=300)
    assert worker.returncode == 1, (output, errors)
    kind, message = json.loads(output.splitlines()[-1])
    assert kind == "error"
    assert any(words in message for words in ("full", "I/O error", "File too large"))
    assert "Traceback" not in errors
    finished = [json.loads(line)[0] for line in output.splitlines()].count("completed")
    place.settings["target"] = counts(place.study())["complete"] + 4
    events = [event[0] for event in place.run()]
    place.check_whole()
    # The result in flight was applied, or its trial repeated if not even the outbox could be written.
    assert len(place.evaluations()) <= place.settings["target"] + 1 - events.count("applied")
    assert counts(place.study())["complete"] >= 2 + finished


def _with_little_space(size: int, words: list[str]) -> None:
    limit_files(size)
    command(words)


@pytest.mark.slow
def test_a_full_disk_leaves_nothing_of_an_export_and_the_next_one_succeeds(project: Project) -> None:
    project.cli("run", "spec.yaml", "--trials", "1", "--no-test")
    project.cli("export", "spec.yaml", "--out", "whole")
    before = sorted(project.folder.iterdir())
    size = (project.folder / "whole" / "model.safetensors").stat().st_size
    words = ["export", "spec.yaml", "--out", "merged"]
    process = Forked(_with_little_space, size - 1, words, folder=project.folder, environment=cli_environment())
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1, errors
    assert "merged: cannot be written" in errors
    assert "Free space" in errors
    assert sorted(project.folder.iterdir()) == before
    project.cli("export", "spec.yaml", "--out", "merged")
    assert (project.folder / "merged" / "model.safetensors").stat().st_size == size


@pytest.mark.slow
@pytest.mark.parametrize("kind", DATABASES)
def test_a_worker_that_slept_past_its_grace_finds_its_trial_taken_and_goes_on(
    kind: str, new_storage: NewStorage, tmp_path: Path
) -> None:
    place = Place(tmp_path / "s", new_storage(kind), target=3, heartbeat=1, grace=2)
    sleeper = place.start(hang_at_call=1)
    wait_for(sleeper, "hanging")
    sleeper.send_signal(signal.SIGSTOP)
    try:
        for _ in range(600):
            if recover(place.study()):
                break
            time.sleep(0.1)
        place.run(target=2)
    finally:
        place.release()
        sleeper.send_signal(signal.SIGCONT)
    output, errors = sleeper.communicate(timeout=60)
    assert sleeper.returncode == 0, errors
    kinds = [json.loads(line)[0] for line in output.splitlines()]
    assert kinds == ["superseded", "started", "completed", "summary"]
    place.check_whole()
