"""Looking at a storage: one damaged or foreign study does not hide the others; what cannot be written can be read."""

from __future__ import annotations

import contextlib
import gc
import json
import sqlite3
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import optuna
import pytest

from dfmerge_studies.report.notes import study_note
from dfmerge_studies.report.serving import Publisher, dashboard_server
from dfmerge_studies.report.view import StudyView
from dfmerge_studies.storage import is_read_only, open_storage
from tests.project import Project
from tests.rights import without_rights


@pytest.fixture
def file(finished: Project) -> Path:
    """The database of the finished study."""
    (found,) = finished.folder.glob("*.db")
    return found


@pytest.fixture
def crowded(finished: Project, file: Path, name: str) -> Project:
    """A finished study beside one of another program and three whose attributes are damaged."""
    storage = optuna.storages.RDBStorage(f"sqlite:///{file}")
    foreign = optuna.create_study(storage=storage, study_name="foreign", directions=["minimize", "maximize"])
    foreign.optimize(lambda trial: (trial.suggest_float("x", 0, 1), 1.0), n_trials=2)
    for other, fingerprint in ((f"{name}.averaging", {"method": 3}), ("odd", "no mapping")):
        damaged = optuna.create_study(storage=storage, study_name=other)
        damaged.set_user_attr("dfmerge:science", fingerprint)
        damaged.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    optuna.create_study(storage=storage, study_name=f"{name}.broken").set_user_attr("dfmerge:science", {})
    with contextlib.closing(sqlite3.connect(file)) as database, database:
        database.execute("UPDATE study_user_attributes SET value_json = '{cut' WHERE value_json = '{}'")
    return finished


@pytest.fixture
def name(finished: Project) -> str:
    return str(json.loads(finished.cli("status", "--json", "spec.yaml").stdout)["study"])


def test_the_list_has_every_study_and_says_which_cannot_be_read(crowded: Project, name: str) -> None:
    done = crowded.cli("list", "spec.yaml", "--json")
    listed = {entry["study"]: entry for entry in json.loads(done.stdout)}
    assert set(listed) == {name, "foreign", "odd", f"{name}.averaging", f"{name}.broken"}
    assert listed[name]["trials"]["complete"] > 0
    assert listed["foreign"]["method"] is None
    assert "problem" not in listed["foreign"]
    for damaged in ("odd", f"{name}.broken", f"{name}.averaging"):
        assert damaged in listed[damaged]["problem"]
        assert listed[damaged]["best_value"] is None
        assert f"warning: the study '{damaged}' cannot be read" in done.stderr
    assert "cannot be read" in crowded.cli("list", "spec.yaml").stdout


def test_status_and_repair_of_one_study_do_not_mind_the_others(crowded: Project, name: str) -> None:
    assert json.loads(crowded.cli("status", "spec.yaml", "--json").stdout)["study"] == name
    done = crowded.cli("repair", "spec.yaml", "--json")
    assert name in [study["study"] for study in json.loads(done.stdout)["studies"]]


def test_the_dashboard_publishes_the_good_studies(
    crowded: Project, file: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    storage = open_storage(f"sqlite:///{file}")
    Publisher(storage).publish()
    study = optuna.load_study(study_name=name, storage=storage)
    assert "dfmerge:published" in study.user_attrs
    assert "'odd' cannot be read" in caplog.text


@pytest.mark.slow
def test_the_note_says_that_the_dashboards_best_ignores_constraints(project: Project) -> None:
    project.cli("run", "spec.yaml", "--trials", "3", "--set", "search.max_drop=5", "--set", "name=bound")
    study = optuna.load_study(study_name="bound", storage=f"sqlite:///{project.folder}/bound.db")
    assert "*Best Trial* does not look at constraints" in study_note(StudyView.of(study))


# A storage that cannot be written to


@pytest.fixture
def shown(finished: Project) -> Iterator[Project]:
    """A finished project whose folder and files may be read and not written."""
    gc.collect()  # the last connection takes the log with it
    yield finished
    for path in (finished.folder, *finished.folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def close(project: Project) -> None:
    """Forbid to write to a project's files and folders."""
    for path in (*project.folder.rglob("*"), project.folder):
        path.chmod(0o555 if path.is_dir() else 0o444)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["status", "list"])
def test_a_database_that_cannot_be_written_can_be_looked_at(shown: Project, command: str) -> None:
    before = json.loads(shown.cli(command, "spec.yaml", "--json").stdout)
    gc.collect()
    close(shown)
    content = {str(path): path.read_bytes() for path in shown.folder.glob("*.db*")}
    assert without_rights(lambda: json.loads(shown.cli(command, "spec.yaml", "--json").stdout)) == before
    assert {str(path): path.read_bytes() for path in shown.folder.glob("*.db*")} == content


@pytest.mark.slow
def test_a_database_whose_log_another_process_still_has_is_read_with_it(shown: Project, file: Path, name: str) -> None:
    held = open_storage(f"sqlite:///{file}")
    optuna.load_study(study_name=name, storage=held).set_user_attr("seen", "in the log")
    close(shown)

    def look() -> list[Any]:
        looked = open_storage(f"sqlite:///{file}", create=False)
        return [is_read_only(looked), optuna.load_study(study_name=name, storage=looked).user_attrs["seen"]]

    assert without_rights(look) == [True, "in the log"]


@pytest.mark.slow
def test_a_run_on_it_is_refused_by_name(shown: Project) -> None:
    close(shown)
    assert "cannot be written to" in without_rights(lambda: shown.cli("run", "spec.yaml", check=2).stderr)


@pytest.mark.slow
def test_its_winner_is_exported_to_another_place(shown: Project, tmp_path: Path) -> None:
    close(shown)
    content = {str(path): path.read_bytes() for path in shown.folder.glob("*.db*")}
    done = without_rights(lambda: shown.cli("export", "spec.yaml", "--out", str(tmp_path / "merged")).stderr)
    assert "does not keep the model's card" in done
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert {str(path): path.read_bytes() for path in shown.folder.glob("*.db*")} == content


@pytest.mark.slow
def test_its_dashboard_is_served_and_writes_nothing(shown: Project, file: Path) -> None:
    (shown.folder / ".dfmerge/artifacts").mkdir(parents=True, exist_ok=True)
    close(shown)
    content = file.read_bytes()

    def serve() -> Any:
        storage = open_storage(f"sqlite:///{file}", create=False)
        server = dashboard_server(storage, shown.folder / ".dfmerge/artifacts", port=0)
        with Publisher(storage):
            thread = Thread(target=server.handle_request)
            thread.start()
            with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/api/studies", timeout=60) as answer:
                found = json.load(answer)["study_summaries"]
            thread.join()
        return found

    assert without_rights(serve)
    assert file.read_bytes() == content
