"""Storages by URL: what opens, what is refused before anything is created, and what messages may say."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import BaseStorage
from optuna.trial import TrialState
from sqlalchemy import exc

from dfmerge_studies.errors import InputError, RunError
from dfmerge_studies.storage import (
    check_constraints,
    join_study,
    load_study,
    load_study_if_any,
    network_file_system,
    open_storage,
    resolve_url,
    safe_url,
    storage_errors,
    storage_file,
    storage_identity,
)
from tests.processes import Forked, context
from tests.servers import STORAGES

needs_permissions = pytest.mark.skipif(
    getattr(os, "geteuid", lambda: 1)() == 0, reason="the superuser may write everywhere"
)


@pytest.fixture(params=STORAGES)
def url(request: pytest.FixtureRequest, new_storage: Callable[[str], str]) -> str:
    return new_storage(request.param)


# The contract of every storage


def test_a_study_is_found_again_with_its_values_and_attributes(url: str) -> None:
    study = join_study(open_storage(url), "s", directions=["maximize"])
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    trial.set_user_attr("tasks", {"t": 0.1 + 0.2})
    study.tell(trial, 1 / 3)
    study.set_user_attr("spec", {"ü": ["…"]})

    again = load_study(open_storage(url, create=False), "s")
    assert again.trials[0].values == [1 / 3]
    assert again.trials[0].params == trial.params
    assert again.trials[0].user_attrs == {"tasks": {"t": 0.1 + 0.2}}
    assert again.user_attrs == {"spec": {"ü": ["…"]}}


def test_looking_for_a_study_that_is_not_there_finds_none_and_creates_nothing(url: str) -> None:
    assert load_study_if_any(url, "s") is None
    file = storage_file(url)
    assert file is None or not file.exists()
    join_study(open_storage(url), "s", directions=["maximize"])
    assert load_study_if_any(url, "another") is None
    found = load_study_if_any(url, "s")
    assert found is not None
    assert found.study_name == "s"


def test_all_spellings_of_a_postgres_url_name_one_storage_whatever_the_password() -> None:
    names = ("postgres://u:a@h/d", "postgresql://u:b@h/d", "postgresql+psycopg://u:c@h/d")
    assert len({storage_identity(url) for url in names}) == 1
    assert storage_identity("postgresql://u:a@h/e") != storage_identity("postgresql://u:a@h/d")


def test_several_constraints_are_refused_by_the_proxy_alone() -> None:
    check_constraints("grpc://h:1", 1)
    check_constraints("sqlite:////s.db", 2)
    with pytest.raises(InputError, match="does not keep several constraints in order"):
        check_constraints("grpc://h:1", 2)


def test_coefficients_and_values_come_back_to_the_last_bit(url: str) -> None:
    study = join_study(open_storage(url), "s", directions=["maximize", "minimize"])
    points = [1 / 3, 0.1, 5e-324, 1 - 2**-53]
    for point in points:
        study.enqueue_trial({"x": point})
        trial = study.ask()
        trial.suggest_float("x", 0, 1)
        study.tell(trial, [point, -point])
    again = load_study(open_storage(url), "s")
    assert [t.params["x"] for t in again.trials] == points
    assert [t.values for t in again.trials] == [[p, -p] for p in points]


def test_joining_with_other_directions_is_refused(url: str) -> None:
    join_study(open_storage(url), "s", directions=["maximize"])
    for directions in (["minimize"], ["maximize", "maximize"]):
        with pytest.raises(InputError, match="directions"):
            join_study(open_storage(url), "s", directions=directions)


def test_loading_an_unknown_study_names_those_that_there_are(url: str) -> None:
    join_study(open_storage(url), "one", directions=["maximize"])
    with pytest.raises(InputError, match="Studies of this storage: one"):
        load_study(open_storage(url), "two")


@pytest.mark.parametrize("name", ["", "../x", ".x", "a/b", "a\0b", "<b>", "x" * 101, "a b", "a\n"])
def test_study_names_that_are_unsafe_in_paths_or_pages_are_refused(name: str, tmp_path: Path) -> None:
    storage = open_storage(f"sqlite:///{tmp_path}/s.db")
    with pytest.raises(InputError):
        join_study(storage, name, directions=["maximize"])
    assert optuna.get_all_study_names(storage) == []


def _join_and_take(url: str, start: Any, found: Any) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    start.wait()
    study = join_study(open_storage(url), "s", directions=["maximize"])
    start.wait()
    storage = study._storage
    for trial in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        if storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
            found.put(trial.number)
    found.put(None)


@pytest.mark.slow
def test_processes_that_join_an_empty_storage_at_once_all_start_and_share_the_queue(url: str) -> None:
    workers, queued = 6, 12
    start, found = context().Barrier(workers + 1), context().Queue()
    processes = [context().Process(target=_join_and_take, args=(url, start, found)) for _ in range(workers)]
    for process in processes:
        process.start()
    start.wait()
    study = join_study(open_storage(url), "s", directions=["maximize"])
    for _ in range(queued):
        study.enqueue_trial({"x": 0.5})
    start.wait()
    taken: list[int] = []
    for _ in range(workers):
        taken.extend(iter(found.get, None))
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * workers
    assert sorted(taken) == list(range(queued))


# SQLite


def _add_a_trial(url: str) -> None:
    study = load_study(open_storage(url), "s")
    study.add_trial(optuna.trial.create_trial(value=float(len(study.trials))))


def test_a_storage_opened_twice_in_one_process_stays_shared_with_others(url: str) -> None:
    def elsewhere() -> None:
        assert Forked(_add_a_trial, url).wait(300) == 0

    first = join_study(open_storage(url), "s", directions=["maximize"])
    second = load_study(open_storage(url), "s")
    assert first.trials == second.trials == []
    elsewhere()
    first.add_trial(optuna.trial.create_trial(value=1.0))
    elsewhere()
    for study in (first, second, load_study(open_storage(url), "s")):
        assert [trial.value for trial in study.trials] == [0.0, 1.0, 2.0]


def test_sqlite_uses_a_write_ahead_log_and_immediate_transactions(tmp_path: Path) -> None:
    storage: Any = open_storage(f"sqlite:///{tmp_path}/s.db")
    with storage.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 1
        other = sqlite3.connect(tmp_path / "s.db", timeout=0)
        with pytest.raises(sqlite3.OperationalError, match="locked"):  # though nothing has been written yet
            other.execute("BEGIN IMMEDIATE")
        other.close()


def _enqueue_a_trial(url: str) -> None:
    join_study(open_storage(url), "s", directions=["maximize"]).enqueue_trial({"x": 0.5})


def test_opening_a_database_again_does_not_cut_this_process_off_from_what_others_write(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    study = join_study(open_storage(url), "s", directions=["maximize"])
    open_storage(url)  # as `run` does; closing any descriptor of the file would drop the locks of the first
    for count in (1, 2):
        assert Forked(_enqueue_a_trial, url).wait(300) == 0
        assert (tmp_path / "s.db-wal").exists()
        assert len(study.trials) == count


def test_sqlite_paths_may_hold_braces_percents_and_spaces(tmp_path: Path) -> None:
    folder = tmp_path / "a {b} 100% ü"
    folder.mkdir()
    open_storage(f"sqlite:///{folder}/s.db")
    assert (folder / "s.db").is_file()


def test_heartbeat_arguments_reach_the_storage(tmp_path: Path) -> None:
    storage: Any = open_storage(f"sqlite:///{tmp_path}/s.db", heartbeat=7, grace=20)
    assert (storage.heartbeat_interval, storage.grace_period) == (7, 20)


def _database_of_other_software(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE invoices (x)")


def _truncated_database(path: Path) -> None:
    storage: Any = open_storage(f"sqlite:///{path}")
    storage.engine.dispose()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 + 100])


BAD_FILES: dict[str, tuple[Any, str]] = {
    "garbage": (lambda path: path.write_bytes(b"not a database at all" * 100), "not an SQLite database"),
    "short garbage": (lambda path: path.write_bytes(b"x"), "not an SQLite database"),
    "only the first bytes right": (
        lambda path: path.write_bytes(b"SQLite format 3\x00" + os.urandom(4096)),
        "not an SQLite database",
    ),
    "another program's database": (_database_of_other_software, "a table named invoices"),
    "truncated": (_truncated_database, "damaged|not an SQLite database"),
    "a folder": (lambda path: path.mkdir(), "a folder, not a file"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_that_is_no_database_of_ours_is_refused_and_left_as_it_was(kind: str, tmp_path: Path) -> None:
    make, words = BAD_FILES[kind]
    path = tmp_path / "s.db"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(InputError, match=words) as caught:
        open_storage(f"sqlite:///{path}")
    assert "s.db" in str(caught.value)
    assert caught.value.hint
    assert (path.read_bytes() if path.is_file() else None) == before
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith("s.db")] == []


@pytest.mark.parametrize("scheme", ["sqlite", "journal"])
def test_a_missing_folder_is_refused_and_not_created(scheme: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        open_storage(f"{scheme}:///{tmp_path}/missing/s.db")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["sqlite:///{}/s.db", "journal:///{}/s.log"], ids=["sqlite", "journal"])
def test_reading_a_storage_that_does_not_exist_creates_nothing(url: str, tmp_path: Path) -> None:
    url = url.format(tmp_path)
    with pytest.raises(InputError, match="no such storage"):
        open_storage(url, create=False)
    assert list(tmp_path.iterdir()) == []


@needs_permissions
def test_a_folder_without_write_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(InputError, match="cannot be written"):
            open_storage(f"sqlite:///{tmp_path}/s.db")
    finally:
        tmp_path.chmod(0o700)


def test_a_database_of_another_optuna_version_is_refused(tmp_path: Path) -> None:
    storage: Any = open_storage(f"sqlite:///{tmp_path}/s.db")
    storage.engine.dispose()
    with sqlite3.connect(tmp_path / "s.db") as database:
        database.execute("UPDATE alembic_version SET version_num = 'v9.9.9'")
    with pytest.raises(InputError, match="another version of Optuna"):
        open_storage(f"sqlite:///{tmp_path}/s.db")


def test_an_empty_file_becomes_a_database(tmp_path: Path) -> None:
    (tmp_path / "s.db").touch()
    assert isinstance(open_storage(f"sqlite:///{tmp_path}/s.db"), BaseStorage)


def test_network_file_systems_are_told_by_the_mount_table() -> None:
    mounts = "/dev/a / ext4 rw 0 0\nserver:/x /home nfs4 rw 0 0\n/dev/b /home/local\\040disk xfs rw 0 0\nbad line\n"
    assert network_file_system(Path("/home/me/s.db"), mounts) == "nfs4"
    assert network_file_system(Path("/home/local disk/s.db"), mounts) is None
    assert network_file_system(Path("/homework/s.db"), mounts) is None
    assert network_file_system(Path("/home/me/s.db"), "") is None


# Journal


def test_a_journal_whose_last_line_was_cut_short_opens_without_that_line(tmp_path: Path) -> None:
    url, path = f"journal:///{tmp_path}/s.log", tmp_path / "s.log"
    study = join_study(open_storage(url), "s", directions=["maximize"])
    study.tell(study.ask(), 1.0)
    with path.open("ab") as file:
        file.write(b'{"op_code": 4, "wor')
    again = load_study(open_storage(url), "s")
    again.tell(again.ask(), 2.0)
    assert [t.value for t in load_study(open_storage(url), "s").trials] == [1.0, 2.0]
    assert all(json.loads(line) for line in path.read_bytes().splitlines())


def test_a_line_that_another_process_wrote_in_part_does_not_spoil_the_next_one(tmp_path: Path) -> None:
    url, path = f"journal:///{tmp_path}/s.log", tmp_path / "s.log"
    study = join_study(open_storage(url), "s", directions=["maximize"])
    with path.open("ab") as file:  # another worker, killed while it wrote; this one has the file open already
        file.write(b'{"op_code": 4, "wor' + b"x" * 100_000)
    study.tell(study.ask(), 1.0)
    assert [t.value for t in load_study(open_storage(url), "s").trials] == [1.0]
    assert all(json.loads(line) for line in path.read_bytes().splitlines())


def test_a_file_that_is_no_journal_is_refused(tmp_path: Path) -> None:
    for text in ("hello\n", "[1]\n", "3\n", '{"x": 1}\n'):
        (tmp_path / "s.log").write_text(text)
        with pytest.raises(InputError, match="not an Optuna journal"):
            open_storage(f"journal:///{tmp_path}/s.log")
        assert (tmp_path / "s.log").read_text() == text


# URLs


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("", "not a storage URL"),
        ("study.db", "not a storage URL"),
        ("mysql://u@h/d", "not supported"),
        ("redis://h", "not supported"),
        ("sqlite://", "memory"),
        ("sqlite:///:memory:", "memory"),
        ("journal://", "names no file"),
        ("postgresql://u@h/d?password=geheim", "password"),
        ("postgresql://u@h/d?sslpassword=geheim", "password"),
        ("postgresql://u:geheim@h:port/d", "not a storage URL"),
    ],
)
def test_urls_that_cannot_be_used_are_refused_without_their_password(url: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        open_storage(url)
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "safe"),
    [
        ("sqlite:////a/b.db", "sqlite:////a/b.db"),
        ("postgresql+psycopg://u:geheim@h:5432/d", "postgresql+psycopg://u:***@h:5432/d"),
        ("postgresql://u@h/d?password=geheim", "postgresql://u@h/d?password=%2A%2A%2A"),
        ("postgresql://u:geheim@h:port/d", "postgresql://***@h:port/d"),
    ],
)
def test_safe_urls_mask_passwords(url: str, safe: str) -> None:
    assert safe_url(url) == safe


def test_relative_paths_are_resolved_below_the_given_folder(tmp_path: Path) -> None:
    assert resolve_url("sqlite:///s.db", tmp_path) == f"sqlite:///{tmp_path}/s.db"
    assert resolve_url("journal:///x/s.log", tmp_path) == f"journal:///{tmp_path}/x/s.log"
    for url in (f"sqlite:////{tmp_path}/s.db", "postgresql://h/d", "sqlite://", "sqlite:///:memory:"):
        assert resolve_url(url, Path("/elsewhere")).endswith(url.partition("://")[2].lstrip("/"))


ODD_NAMES = (
    "what?",
    "a?b=c",
    "?",
    "100%",
    "100%41",
    "%3F",
    "x#y",
    "a b",
    "ü",
    "x:y",
    "a@b",
    "{o}",
    "a&b=c",
    "x?timeout=1",
)


@pytest.mark.parametrize("name", ODD_NAMES)
@pytest.mark.parametrize("scheme", ["sqlite", "journal"])
def test_a_storage_is_in_its_folder_whatever_that_is_called(scheme: str, name: str, tmp_path: Path) -> None:
    folder, other = tmp_path / name / "deep", tmp_path / f"{name}2" / "deep"
    for place in (folder, other):
        place.mkdir(parents=True)
        url = resolve_url(f"{scheme}:///s.db", place)
        join_study(open_storage(url), f"of-{place.parent.name.count('2')}", directions=["maximize"])
        assert storage_file(url) == place / "s.db"
        assert (place / "s.db").stat().st_size > 0
        assert [s.study_name for s in open_storage(safe_url(url), create=False).get_all_studies()] == [
            f"of-{place.parent.name.count('2')}"
        ]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, f"{name}2"])


def test_a_question_mark_in_a_url_that_starts_no_parameters_is_part_of_the_path(tmp_path: Path) -> None:
    (tmp_path / "what?").mkdir()
    open_storage(f"sqlite:///{tmp_path}/what?/s.db")
    assert [path.name for path in tmp_path.iterdir()] == ["what?"]
    assert open_storage(f"sqlite:///{tmp_path}/what?/s.db?timeout=5", create=False).get_all_studies() == []
    with pytest.raises(InputError, match="unknown parameter 'timeuot'"):
        open_storage(f"sqlite:///{tmp_path}/s.db?timeuot=5")
    assert not (tmp_path / "s.db").exists()


def test_database_errors_become_run_errors_without_the_password() -> None:
    url = "postgresql+psycopg://u:geheim@h/d"
    with pytest.raises(RunError, match="refused") as caught, storage_errors(url):
        raise exc.OperationalError("SELECT", {}, ConnectionError("connection to u:geheim@h refused"))
    assert "geheim" not in str(caught.value)
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("scheme", ["postgresql+psycopg", "postgresql", "postgres"])
def test_postgres_without_psycopg_names_the_extra(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)  # Python's own way to make an import fail
    with pytest.raises(InputError, match=r"\[postgres\]") as caught:
        open_storage(f"{scheme}://u:ge{{heim@h/d")
    assert "heim" not in str(caught.value)


@pytest.mark.skipif(importlib.util.find_spec("psycopg") is None, reason="psycopg is not installed")
def test_a_postgres_that_does_not_answer_is_a_run_error_without_the_password() -> None:
    with pytest.raises(RunError) as caught:
        open_storage("postgresql://u:ge{heim@127.0.0.1:1/d")
    assert "heim" not in str(caught.value)


def test_the_storage_proxy_without_grpc_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grpc", None)
    with pytest.raises(InputError, match="grpcio"):
        open_storage("grpc://localhost:13000")
