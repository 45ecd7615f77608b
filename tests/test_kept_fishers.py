"""What a study keeps of its Fishers: those that will be asked for again, beside the trials, within a limit."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

from dfmerge_studies.importance.cache import (
    FisherKey,
    LocalCache,
    Shelf,
    default_limit,
    load_fisher,
    save_fisher,
)
from dfmerge_studies.importance.cache.file import STRONG, read_metadata
from dfmerge_studies.importance.cache.shelf import SMALL
from dfmerge_studies.importance.cache.writer import CacheWriter, size_of
from dfmerge_studies.spec import StudySpec
from dfmerge_studies.study.fishers import cache_limit, spec_cache
from dfmerge_studies.study.plan import Plan
from dfmerge_studies.study.provenance import FINGERPRINT
from dfmerge_studies.study.recurrence import Recurrence
from tests.processes import Forked
from tests.project import Project
from tests.test_cache import KEY, same, values

BIG = {"w": torch.zeros(SMALL)}  # four times as many bytes as an entry that is always kept


def key(number: int) -> FisherKey:
    return dataclasses.replace(KEY, expert=f"{number:064x}")


@pytest.fixture
def cache(tmp_path: Path) -> LocalCache:
    return LocalCache(tmp_path / "fishers")


# Files


def test_a_file_of_an_earlier_version_is_read(cache: LocalCache) -> None:
    earlier = dataclasses.replace(KEY, format_version=1)
    save_fisher(cache.file_of(earlier.digest), values(), {"expert_name": "red"}, checksum_kind=STRONG)
    assert same(cache.get(KEY), values())


def test_a_damaged_file_of_an_earlier_version_is_set_aside(cache: LocalCache, caplog: pytest.LogCaptureFixture) -> None:
    earlier = dataclasses.replace(KEY, format_version=1)
    file = cache.file_of(earlier.digest)
    save_fisher(file, values(), {}, checksum_kind=STRONG)
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    assert cache.get(KEY) is None
    assert "damaged" in caplog.text
    assert not file.exists()


def test_local_entries_have_the_fast_checksum_and_files_that_people_get_the_strong_one(
    cache: LocalCache, tmp_path: Path
) -> None:
    cache.put(KEY, values())
    assert {"xxh3_128"} == {"xxh3_128", "sha256"} & set(read_metadata(cache.file_of(KEY.digest)))
    save_fisher(tmp_path / "out.safetensors", values(), {})
    assert {"sha256"} == {"xxh3_128", "sha256"} & set(load_fisher(tmp_path / "out.safetensors")[1])


# What is kept


def test_of_a_trial_without_known_uses_only_the_best_is_written(cache: LocalCache) -> None:
    shelf = Shelf(cache, "auto")
    for number, best in enumerate((True, False, True)):
        with shelf.trial() as trial:
            shelf.put(key(number), values(number), seconds=1.0, uses=0.0)
            if best:
                trial.keep()
    shelf.flush()
    assert cache.digests() == {key(0).digest, key(2).digest}
    assert (shelf.tally.kept[0], shelf.tally.unasked[0]) == (2, 1)


def test_what_recurs_is_written_whatever_its_trial_is_worth(cache: LocalCache) -> None:
    shelf = Shelf(cache, "auto")
    with shelf.trial():
        shelf.put(KEY, values(), seconds=1.0, uses=3.0)
    shelf.flush()
    assert same(cache.get(KEY), values())


def test_all_keeps_all(cache: LocalCache) -> None:
    shelf = Shelf(cache, "all")
    with shelf.trial():
        shelf.put(key(0), BIG, seconds=0.0, uses=0.0)
        shelf.put(key(1), values(), seconds=0.0, uses=0.0)
    shelf.flush()
    assert cache.digests() == {key(0).digest, key(1).digest}


def test_what_was_asked_for_by_name_is_there_at_once(cache: LocalCache) -> None:
    Shelf(cache, "auto").put(KEY, BIG, seconds=0.0, uses=0.0)
    assert cache.digests() == {KEY.digest}


@pytest.mark.parametrize(("seconds", "uses", "kept"), [(60.0, 0.0, 1), (0.001, 1.0, 0), (0.1, 1.0, 0), (0.1, 60.0, 1)])
def test_a_large_entry_is_kept_if_writing_and_reading_it_is_quicker_than_computing(
    cache: LocalCache, seconds: float, uses: float, kept: int
) -> None:
    shelf = Shelf(cache, "auto")  # nothing measured yet: 32 MB are 0.16 s to write and 0.03 s to read
    with shelf.trial() as trial:
        shelf.put(KEY, BIG, seconds=seconds, uses=uses)
        trial.keep()
    shelf.flush()
    assert len(cache.digests()) == shelf.tally.kept[0] == kept
    assert shelf.tally.cheaper == [1 - kept, (1 - kept) * size_of(BIG)]
    assert ("quicker" in shelf.tally.text()) == (not kept)


def test_a_trial_s_fishers_that_the_limit_cannot_hold_together_are_not_written(tmp_path: Path) -> None:
    cache = LocalCache(tmp_path, limit=3 * size_of(values()) - 1)
    shelf = Shelf(cache, "auto", together=3)
    with shelf.trial():
        shelf.put(KEY, values(), seconds=9.0, uses=9.0)
    shelf.flush()
    assert cache.digests() == set()
    assert shelf.tally.no_room[0] == 1


# The writer


class SlowCache(LocalCache):
    """A disk that writes when it is told to."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.go = threading.Event()

    def save(self, *arguments: Any) -> None:
        assert self.go.wait(60)
        super().save(*arguments)


def test_a_fisher_that_is_being_written_is_found_in_memory(tmp_path: Path) -> None:
    cache = SlowCache(tmp_path)
    shelf = Shelf(cache, "auto")
    with shelf.trial():
        shelf.put(KEY, values(), seconds=1.0, uses=1.0)  # comes back while the disk stands still
    assert cache.digests() == set()
    assert same(dict(shelf.get(KEY) or {}), values())
    cache.go.set()
    shelf.flush()
    assert cache.digests() == {KEY.digest}


def test_what_waits_is_bounded_and_no_trial_waits_for_a_slow_disk(tmp_path: Path) -> None:
    cache = SlowCache(tmp_path)
    writer = CacheWriter(cache, 2 * size_of(values()), lambda size, seconds: None)
    taken = [writer.put(key(number), values(number), wait=False) for number in range(4)]
    assert taken == [True, True, False, False]
    cache.go.set()
    writer.flush()
    assert cache.digests() == {key(0).digest, key(1).digest}


def test_a_writer_that_keeps_all_waits_for_room(tmp_path: Path) -> None:
    cache = SlowCache(tmp_path)
    writer = CacheWriter(cache, size_of(values()), lambda size, seconds: None)
    threading.Timer(0.2, cache.go.set).start()
    assert all(writer.put(key(number), values(number), wait=True) for number in range(4))
    writer.flush()
    assert len(cache.digests()) == 4


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("a fault")])
def test_whatever_goes_wrong_in_the_writer_is_said_and_costs_no_trial(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    class Broken(LocalCache):
        def save(self, *arguments: Any) -> None:
            raise error

    shelf = Shelf(Broken(tmp_path), "auto")
    with shelf.trial():
        shelf.put(KEY, values(), seconds=1.0, uses=1.0)
    shelf.flush()
    assert str(error) in caplog.text
    assert shelf.get(KEY) is None


def _write_until_killed(folder: str) -> None:
    shelf, number = Shelf(LocalCache(Path(folder)), "all"), 0
    while True:
        with shelf.trial():
            shelf.put(key(number), values(number, size=20_000), seconds=1.0, uses=1.0)
        number += 1


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_writes_leaves_whole_entries_only(cache: LocalCache) -> None:
    for _ in range(3):
        process, before = Forked(_write_until_killed, str(cache.folder)), len(cache.digests())
        while len(cache.digests()) < before + 3:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert cache.verify() == []


# Studies


def entries(project: Project) -> int:
    return len(list((project.folder / ".dfmerge/fishers").glob("*.safetensors")))


def trials(project: Project) -> list[tuple[Any, ...]]:
    study = optuna.load_study(study_name="colours", storage=f"sqlite:///{project.folder / 'colours.db'}")
    return [(t.user_attrs["coefficients"], t.user_attrs["tasks"], t.values) for t in study.get_trials()]


SEARCH = {"trials": 4, "startup_trials": 4}


@pytest.mark.slow
def test_the_best_trial_s_fishers_are_kept_and_most_others_are_not(project: Project) -> None:
    project.write(search=SEARCH)
    printed = project.json("run", "spec.yaml")
    kept, left = printed["cache"]["kept"], printed["cache"]["unasked"]
    assert kept[0] + left[0] == 8
    assert entries(project) == kept[0] < 8
    exported = project.json("export", "spec.yaml", "--out", "merged")
    assert exported["fishers"] == {"computed": 0, "cached": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "files"),
    [
        ({"cache": "all"}, 8),
        ({"cache": ".dfmerge/fishers"}, 8),  # as specs have always said it
        ({"cache": "none"}, 0),
        ({"method": "df-merge-static"}, 2),
        ({"search": {**SEARCH, "bounds": [0.5, 1.0], "step": 0.5}}, 4),
    ],
    ids=["all", "a folder", "none", "static", "step"],
)
def test_other_policies_and_what_recurs_are_kept_and_validate_says_how_much(
    project: Project, changes: dict[str, Any], files: int
) -> None:
    project.write(**{"search": SEARCH, **changes})
    estimate = project.json("validate", "spec.yaml")["estimate"]
    assert estimate["cache"]["fishers"] == files
    assert estimate["cache"]["bytes"] == files * estimate["fisher_bytes"]
    project.json("run", "spec.yaml", "--no-test")
    assert entries(project) == files


def test_validate_says_what_a_continuous_study_writes_under_each_policy(project: Project) -> None:
    project.write(search={"trials": 60})
    estimate = project.json("validate", "spec.yaml")["estimate"]
    said, size = estimate["cache"], estimate["fisher_bytes"]
    assert (said["policy"], said["fishers"], said["bytes"]) == ("auto", 2 * 5, 2 * 5 * size)  # 1/M, and about 4 bests
    assert said["all_bytes"] == 2 * 60 * size
    assert 0 < said["limit"] <= 10_000_000_000
    assert "Fisher cache (auto): a whole study writes about 10 Fishers" in project.cli("validate", "spec.yaml").stdout


@pytest.mark.slow
def test_no_policy_changes_a_trial_and_a_cut_study_goes_on_the_same(
    make_copy: Callable[..., Project], tmp_path: Path
) -> None:
    found = []
    for name, changes in (("auto", {}), ("all", {"cache": "all"}), ("none", {"cache": None})):
        project = make_copy("t5", tmp_path / name)
        project.write(search={"trials": 4, "startup_trials": 2, "sampler": "gp"}, **changes)
        for total in (2, 4) if name == "auto" else (4,):
            project.json("run", "spec.yaml", "--trials", total, "--no-test")
        found.append(trials(project))
    assert found[0] == found[1] == found[2]


def test_the_points_that_recur_are_bounds_steps_and_known_ones(project: Project) -> None:
    def uses(coefficient: float, **changes: Any) -> float:
        search = {"enqueue": [{"red": 0.3, "blue": 0.7}], **changes.pop("search", {})}
        plan = Plan.of(StudySpec.from_yaml(project.write(**changes, search=search)))
        return Recurrence(plan).uses(0, coefficient)

    assert [uses(at) for at in (0.0, 1.0, 0.5, 0.3, 0.31)] == [1.0, 1.0, 1.0, 1.0, 0.0]
    assert uses(0.31, method="df-merge-static") == 60.0
    assert uses(0.31, search={"step": 0.1}) == pytest.approx(60 / 11)


# Rounding


@pytest.mark.slow
def test_fishers_are_rounded_to_bfloat16_unless_asked_otherwise(project: Project) -> None:
    fingerprints = {}
    for name, importance in (("auto", {}), ("float32", {"dtype": "float32"})):
        project.write(name=name, importance={"samples": 6, **importance}, cache=f"{name}.fishers", search=SEARCH)
        project.json("run", "spec.yaml", "--trials", 1)
        [_, some] = sorted(Path(project.folder, f"{name}.fishers").iterdir())
        assert {value.dtype for value in load_fisher(some)[0].values()} == {
            torch.bfloat16 if name == "auto" else torch.float32
        }
        study = optuna.load_study(study_name=name, storage=f"sqlite:///{project.folder / name}.db")
        fingerprints[name] = study.user_attrs[FINGERPRINT]["importance.dtype"]
    assert fingerprints == {"auto": "bfloat16", "float32": "float32"}


@pytest.mark.slow
def test_a_study_that_an_earlier_version_began_in_float32_goes_on_in_float32(
    make_copy: Callable[..., Project], tmp_path: Path
) -> None:
    found = []
    for name, later in (("stated", {"dtype": "float32"}), ("unstated", {})):
        project = make_copy("t5", tmp_path / name)
        project.write(importance={"samples": 6, "dtype": "float32"})  # its default, in the earlier version
        project.json("run", "spec.yaml", "--trials", 2)
        project.write(importance={"samples": 6, **later})
        assert project.json("validate", "spec.yaml")["ok"]
        project.json("run", "spec.yaml", "--trials", 3)
        found.append(trials(project))
    assert found[0] == found[1]
    refused = project.cli("run", "spec.yaml", "--set", "importance.dtype=bfloat16", check=2).stderr
    assert "importance.dtype: the study has 'float32'" in refused


# The limit

Disk = namedtuple("Disk", "total used free")


@pytest.mark.parametrize(("free", "limit"), [(10**9, 10**8), (10**12, 10**10)], ids=["a small disk", "a large disk"])
def test_the_default_limit_is_a_tenth_of_the_free_disk_and_at_most_ten_gigabytes(
    project: Project, monkeypatch: pytest.MonkeyPatch, free: int, limit: int
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda place: Disk(free, 0, free))
    assert cache_limit(StudySpec.from_yaml(project.file)) == limit
    for stated, expected in (("cache_limit=null", None), ("cache_limit=3MB", 3_000_000), ("cache=all", None)):
        assert cache_limit(StudySpec.from_yaml(project.file, [stated])) == expected


def test_the_default_limit_does_not_sink_while_the_cache_grows(
    cache: LocalCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 1_000_000
    monkeypatch.setattr("shutil.disk_usage", lambda place: Disk(free, 0, free))
    before = default_limit(str(cache.folder), Path("/"))
    cache.put(KEY, values())
    free -= sum(entry.size for entry in cache.entries())
    assert default_limit(str(cache.folder), Path("/")) == before == 100_000


def test_a_place_of_one_s_own_keeps_all_unless_cache_keep_says_otherwise(project: Project) -> None:
    spec = StudySpec.from_yaml(project.file, ["cache=/data/fishers"])
    assert (spec.cache_place, spec.cache_policy) == ("/data/fishers", "all")
    spec = StudySpec.from_yaml(project.file, ["cache=/data/fishers", "cache_keep=auto"])
    assert (spec.cache_place, spec.cache_policy) == ("/data/fishers", "auto")
    assert spec_cache(StudySpec.from_yaml(project.file, ["cache=none"])) is None
    refused = project.cli("run", "spec.yaml", "--set", "cache=none", "--set", "cache_keep=all", check=2).stderr
    assert "cache_keep goes with a folder or URL" in refused
