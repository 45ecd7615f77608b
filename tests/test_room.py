"""Workers of one device are looked at for memory before they load: who fits, who is warned, who is refused."""

from __future__ import annotations

import os
import sys
from functools import reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from dfmerge_studies import StudySpec, load_problem
from dfmerge_studies.errors import InputError
from dfmerge_studies.objective.memory import activations_of, held_bytes, memory_of
from dfmerge_studies.objective.problem import Problem
from dfmerge_studies.study import pool, room, worker
from dfmerge_studies.study.pool import Notice, Orders, Pool
from dfmerge_studies.study.room import Need, Room, check_room, host_room
from dfmerge_studies.study.session import open_study, stored_study
from dfmerge_studies.study.startup import available_bytes
from dfmerge_studies.study.validate import Estimate, memory_estimate
from dfmerge_studies.trials.reading import results
from tests import models
from tests.processes import Worker, command
from tests.project import Project, copied, make_project

GB = 10**9
NEED = Need(held=10 * GB, peak=15 * GB)


def test_workers_that_fit_are_not_spoken_of() -> None:
    assert check_room(["cpu"] * 3, {"cpu": Room(35 * GB, 64 * GB)}, NEED) is None  # 3 x 15 - 10 that are loaded


def test_a_warning_names_what_is_needed_what_is_free_and_how_many_fit() -> None:
    warning = check_room(["cpu"] * 3, {"cpu": Room(34 * GB, 64 * GB)}, NEED)
    assert warning is not None
    for part in ("3 workers on this machine", "35.00 GB more", "34.00 GB are free", "--workers 2 fits"):
        assert part in warning


def test_what_others_hold_counts_and_not_the_size_of_the_device() -> None:
    devices = ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    rooms = {"cuda:0": Room(60 * GB, 80 * GB), "cuda:1": Room(20 * GB, 80 * GB)}
    warning = check_room(devices, rooms, NEED)
    assert warning is not None
    assert "2 workers on cuda:1 need about 30.00 GB in their trials" in warning
    assert "20.00 GB are free (--workers 3 fits)" in warning
    assert check_room(devices[:3], rooms, NEED) is None


def test_workers_whose_weights_alone_exceed_a_device_are_refused_with_the_number_that_fits() -> None:
    devices = [f"cuda:{index % 2}" for index in range(6)]
    rooms = {device: Room(70 * GB, 24 * GB) for device in ("cuda:0", "cuda:1")}
    with pytest.raises(
        InputError, match=r"3 workers on cuda:0 hold 30.00 GB .*has 24.00 GB in all. --workers 4 fits"
    ) as told:
        check_room(devices, rooms, NEED)
    assert told.value.where == "--workers"


@pytest.mark.parametrize(("free", "advice"), [(5, "one fits, without --workers"), (4, "not even one fits")])
def test_where_no_two_fit_it_is_said_whether_one_does(free: int, advice: str) -> None:
    warning = check_room(["cpu"] * 2, {"cpu": Room(free * GB, 64 * GB)}, NEED)
    assert warning is not None
    assert advice in warning


# --- what is free ----------------------------------------------------------------------------------------------------


def grouped(folder: Path, monkeypatch: pytest.MonkeyPatch, own: str, files: dict[str, str]) -> Room:
    (folder / "own").write_text(own)
    for name, content in files.items():
        file = folder / "fs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    monkeypatch.setattr(room, "_CGROUPS", folder / "fs")
    monkeypatch.setattr(room, "_OWN_GROUPS", folder / "own")
    return host_room()


def test_the_limit_of_a_container_or_a_batch_job_bounds_what_is_free(tmp_path: Path, monkeypatch) -> None:
    files = {"job/memory.max": "1000000\n", "job/memory.current": "900000\n", "job/step/memory.max": "max\n"}
    files |= {"job/step/memory.current": "5\n", "job/memory.stat": "anon 1\ninactive_file 300000\n"}
    assert grouped(tmp_path, monkeypatch, "0::/job/step\n", files) == Room(400_000, 1_000_000)


def test_the_limits_of_the_first_version_of_control_groups_are_read_too(tmp_path: Path, monkeypatch) -> None:
    # As a container sees it: its own group is mounted as the root, and the path is one of the host's.
    files = {"memory/memory.limit_in_bytes": "2000000\n", "memory/memory.usage_in_bytes": "500000\n"}
    assert grouped(tmp_path, monkeypatch, "5:cpu:/\n4:memory:/docker/f00\n", files) == Room(1_500_000, 2_000_000)


@pytest.mark.parametrize("limit", ["max", str(2**63 - 4096)])
def test_without_a_limit_the_machine_is_the_limit(tmp_path: Path, monkeypatch, limit: str) -> None:
    found = grouped(tmp_path, monkeypatch, "0::/\n", {"memory.max": limit, "memory.current": "5"})
    assert found.total == psutil.virtual_memory().total
    assert 0 < found.free <= found.total
    monkeypatch.setattr(room, "_OWN_GROUPS", tmp_path / "none")
    assert host_room().total == found.total


# --- real workers ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """An encoder of 3.6 MB, of which a worker holds four times as much: model, base values and two task vectors."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"hidden_size": 96, "intermediate_size": 384}.items():
            patch.setitem(models._BERT, name, value)
        return make_project(tmp_path_factory.mktemp("room") / "project", "bert", rows=8, samples=3, layers=8)


def _begin_small(arguments: list[str]) -> None:
    """A worker that finds a machine of 20 MB."""
    vars(worker)["host_room"] = lambda: Room(0, 20_000_000)
    command(arguments)


def _begin_full(arguments: list[str]) -> None:
    """A worker that finds a large machine, of which little is free."""
    vars(worker)["host_room"] = lambda: Room(1_000_000, 20 * GB)
    command(arguments)


def _begin_tight(arguments: list[str]) -> None:
    """A worker that finds a machine with so much free, and says whether it merges in parts."""
    vars(worker)["host_room"] = lambda: Room(int(os.environ["FREE"]), 20 * GB)

    def told(problem: Problem) -> Estimate:
        print("merged in parts" if len(problem.parts()) > 1 else "merged at a time", file=sys.stderr)
        return memory_estimate(problem)

    vars(worker)["memory_estimate"] = told
    command(arguments)


class Tight(Worker):
    begins = staticmethod(_begin_tight)


class Small(Worker):
    begins = staticmethod(_begin_small)


class Full(Worker):
    begins = staticmethod(_begin_full)


def run(project: Project, workers: type[Worker], monkeypatch: pytest.MonkeyPatch, check: int) -> str:
    monkeypatch.setattr(pool, "subprocess", SimpleNamespace(Popen=workers, PIPE=-1))
    return project.cli("run", "spec.yaml", "--workers", "2", "--trials", "2", "--no-test", check=check).stderr


@pytest.mark.slow
def test_workers_that_cannot_all_be_held_are_refused_before_anything_is_created(deep: Project, monkeypatch) -> None:
    before = deep.files().keys()
    told = run(deep, Small, monkeypatch, check=2)
    assert "2 workers on this machine hold 0.0" in told
    assert "has 0.02 GB in all. one fits, without --workers; dtype: bfloat16 takes half" in told
    assert deep.files().keys() == before


@pytest.mark.slow
def test_workers_for_which_little_is_free_are_warned_and_work(deep: Project, monkeypatch) -> None:
    told = run(deep, Full, monkeypatch, check=0)
    assert told.count("memory may run out: 2 workers on this machine need about 0.0") == 1
    assert deep.json("status", "spec.yaml")["trials"]["complete"] == 2


def tight(project: Project) -> tuple[StudySpec, int]:
    """A spec whose activations are few, and a share that holds what a trial has all the time and half of the rest."""
    search = {"trials": 2, "startup_trials": 2, "sampler": "random"}
    importance = {"samples": 3, "dtype": "float32", "row_budget": 1}
    spec = StudySpec.from_yaml(
        project.write(name="tight", importance=importance, token_budget=1, cache="none", search=search)
    )
    problem = load_problem(spec)
    return spec, int((memory_of(problem, activations_of(problem)).device.total + held_bytes(problem)) / 2 / 0.9)


def test_a_share_of_the_machine_bounds_what_memory_auto_takes(deep: Project, tmp_path: Path) -> None:
    spec, share = tight(copied(deep, tmp_path / "p"))
    shared = load_problem(spec, share=share)
    assert len(shared.parts()) > 1
    assert memory_of(shared, activations_of(shared)).device.total <= 0.9 * share
    assert available_bytes(shared) == share
    assert len(load_problem(spec, share=3 * share).parts()) == 1
    assert len(load_problem(spec).parts()) == 1  # alone on a machine nothing is bounded
    assert len(load_problem(spec.derive(memory="1GB"), share=share).parts()) == 1  # who names a size has it


@pytest.mark.parametrize("fields", [{"importance": {"estimator": "mask-nodes"}}, {}], ids=["mask-nodes", "too small"])
def test_what_parts_do_not_help_is_left_to_the_warning_on_a_machine(
    deep: Project, tmp_path: Path, fields: dict[str, Any]
) -> None:
    spec, share = tight(copied(deep, tmp_path / "p"))
    problem = load_problem(spec.derive(**fields), share=share if fields else share // 8)
    assert len(problem.parts()) == 1


@pytest.mark.slow
def test_workers_of_one_machine_merge_in_parts_what_does_not_fit_into_their_shares(
    deep: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = copied(deep, tmp_path / "p")
    spec, share = tight(project)
    monkeypatch.setenv("FREE", str(2 * share))
    told = run(project, Tight, monkeypatch, check=0)
    assert "merged in parts" in told
    assert "memory may run out" not in told
    session = open_study(spec.derive(storage="sqlite:///alone.db"))
    session.run()
    for ours, theirs in zip(results(stored_study(spec)), results(session.study), strict=True):
        assert ours.params == theirs.params
        assert ours.values == pytest.approx(theirs.values)


class Stop(Exception):
    """Ends a worker where it would load."""


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_a_worker_of_several_cards_says_what_is_free_on_its_own(project: Project, monkeypatch, wanted: str) -> None:
    fields = StudySpec.from_yaml(project.write(device=wanted)).model_dump(mode="json")
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7 + device.index, 80))
    said: list[dict[str, Any]] = []

    def wait() -> None:
        raise Stop

    leave = SimpleNamespace(wait=wait)
    for index in range(3):
        orders = Orders(fields, str(project.file), None, 1, [], index, 3)
        with pytest.raises(Stop):
            worker.serve(orders, lambda kind, **content: said.append({"kind": kind, **content}), leave)
    assert [each["device"] for each in said] == ["cuda:0", "cuda:1", "cuda:0"]
    assert [(each["kind"], each["free"], each["total"]) for each in said] == [
        ("ready", 7, 80),
        ("ready", 8, 80),
        ("ready", 7, 80),
    ]
    assert [device.index for device in chosen] == [0, 1, 0]


# A worker without models: what it does is said on standard error, as "log".
SCRIPT = """
import json, sys
index = json.loads(sys.stdin.readline())["index"]
def go_on():
    line = sys.stdin.readline()
    if not line: sys.exit(130)
    return line.strip()
def say(kind, **content): print(json.dumps({"kind": kind, **content}), flush=True)
room = {"device": f"cuda:{index % 2}", "free": FREE, "total": TOTAL}
say("ready", **room)
print("loads", go_on(), file=sys.stderr, flush=True)
held = 10_000_000_000
needs = {"held": held, "peak": 15_000_000_000, "beside": 1_000_000_000}
say("loaded", **needs, **{**room, "free": FREE - held}, host={"free": HOST, "total": HOST})
go_on()
if index == DYING: sys.exit(3)
say("joined", threads=1, device=room["device"])
"""


Scripted = tuple[list[Notice], Pool]


def scripted(
    free: int, total: int, *, host: int = 64 * GB, dying: int = -1, workers: int = 5
) -> tuple[list[Notice], Pool]:
    orders = [Orders({}, "spec.yaml", None, 1, [], index, workers) for index in range(workers)]
    notices: list[Notice] = []
    values = {"FREE": free, "TOTAL": total, "HOST": host, "DYING": dying}
    script = reduce(lambda text, name: text.replace(name, str(values[name])), values, SCRIPT)
    made = Pool([sys.executable, "-c", script], orders, on_notice=notices.append, on_death=lambda: None)
    return notices, made


def kinds(notices: list[Notice]) -> list[tuple[str, int]]:
    return [(notice.kind, notice.worker) for notice in notices]


def test_on_several_cards_the_first_worker_loads_alone_and_the_fullest_card_decides() -> None:
    notices, made = scripted(44 * GB, 80 * GB)  # three workers on cuda:0 need 45
    made.run()
    said: dict[str, Any] = {notice.kind: notice.content for notice in notices}
    assert "3 workers on cuda:0 need about 35.00 GB more" in said["memory"]["text"]
    assert "(--workers 4 fits; memory: 14666MB bounds each)" in said["memory"]["text"]
    order = kinds(notices)
    assert {worker for kind, worker in order if kind == "log"} == {1, 2, 3, 4, 5}
    assert all(order.index(("memory", 1)) < order.index(("log", each)) for each in (2, 3, 4, 5))


def test_each_worker_is_told_its_share_of_what_was_free_before_any_had_loaded() -> None:
    notices, made = scripted(44 * GB, 80 * GB)
    made.run()
    loaded = {notice.worker: notice.content["text"] for notice in notices if notice.kind == "log"}
    third, half = f"loads {44 * GB // 3}", f"loads {22 * GB}"
    assert loaded == {1: third, 2: half, 3: third, 4: half, 5: third}


def test_one_worker_on_a_card_shares_with_nobody_and_one_that_is_started_again_has_the_share_that_it_had() -> None:
    notices, made = scripted(79 * GB, 80 * GB, workers=2)
    made.run()
    assert {notice.content["text"] for notice in notices if notice.kind == "log"} == {"loads"}
    notices, made = scripted(79 * GB, 80 * GB, dying=2, workers=3)
    made.run()
    told = [(notice.worker, notice.content["text"]) for notice in notices if notice.kind == "log"]
    assert told.count((3, f"loads {79 * GB // 2}")) == 1 + pool.MAX_RESTARTS


def test_workers_that_a_card_cannot_hold_are_refused_and_none_but_the_first_has_loaded() -> None:
    notices, made = scripted(23 * GB, 24 * GB, workers=6)
    with pytest.raises(InputError, match=r"3 workers on cuda:0 hold 30.00 GB.*has 24.00 GB in all. --workers 4 fits"):
        made.run()
    assert kinds(notices) == [("log", 1)]


def test_what_workers_of_cards_need_beside_them_is_looked_at_too() -> None:
    notices, made = scripted(79 * GB, 80 * GB, host=3 * GB, workers=5)
    made.run()
    told = [notice.content["text"] for notice in notices if notice.kind == "memory"]
    assert len(told) == 1
    assert "5 workers need about 4.00 GB more of this machine, and 3.00 GB are free" in told[0]


def test_a_worker_that_dies_and_is_started_again_loads_without_being_asked_anew() -> None:
    notices, made = scripted(79 * GB, 80 * GB, dying=1, workers=2)
    made.run()
    assert kinds(notices).count(("died", 2)) == pool.MAX_RESTARTS
    assert ("joined", 1) in kinds(notices)
    assert "memory" not in {notice.kind for notice in notices}
