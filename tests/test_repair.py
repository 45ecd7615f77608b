"""`dfmerge repair`: what it shows, what it mends, what it leaves alone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dfmerge_studies.storage import join_study, open_storage
from dfmerge_studies.trials.outbox import outbox_folder
from dfmerge_studies.trials.reading import counts
from tests.place import Place
from tests.project import Project

NewStorage = Callable[[str], str]
DATABASES = ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/s.db"


def place_of(project: Project, url: str, **settings: Any) -> Place:
    """A place whose study is that of the project's spec."""
    project.write(name="s", storage=url)
    return Place(project.folder, url, outbox=str(outbox_folder(project.folder, url, "s")), target=4, **settings)


def repair(project: Project, *arguments: str) -> Any:
    return project.json("repair", "spec.yaml", *arguments)


def test_a_healthy_study_has_nothing_to_mend(project: Project, url: str) -> None:
    place_of(project, url).run()
    (study,) = repair(project)["studies"]
    assert study == {"study": "s", "orphans": [], "results": [], "failures": [], "unfinished": False}
    assert "nothing is stuck" in project.cli("repair", "spec.yaml").stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", DATABASES)
def test_a_killed_workers_trial_is_shown_with_its_process_and_put_back_when_asked(
    kind: str, new_storage: NewStorage, project: Project
) -> None:
    place = place_of(project, new_storage(kind))
    worker = place.start(kill_at_call=2)
    worker.communicate(timeout=300)
    assert worker.returncode == -signal.SIGKILL
    for _ in range(2):  # looking changes nothing
        found = repair(project)
        (orphan,) = found["studies"][0]["orphans"]
        assert (orphan["trial"], orphan["pid"], orphan["host"]) == (1, worker.pid, os.uname().nodename)
        assert orphan["coefficients"] == place.settings["points"][1]
        assert orphan["last_sign_of_life"]
        assert found["mended"] is None
    assert f"process {worker.pid}" in project.cli("repair", "spec.yaml").stdout
    assert counts(place.study())["running"] == 1
    assert repair(project, "--apply")["mended"]["requeued"] == 1
    assert counts(place.study()) == {"complete": 1, "running": 0, "waiting": 2, "failed": 0, "pruned": 0}
    place.run()
    place.check_whole()


def test_a_result_that_was_never_told_is_shown_and_applied_when_asked(project: Project, url: str) -> None:
    place = place_of(project, url)
    place.run(-signal.SIGKILL, kill_at_tell=2)
    (result,) = repair(project)["studies"][0]["results"]
    assert (result["trial"], result["state"]) == (1, "ready")
    assert counts(place.study())["complete"] == 1
    assert repair(project, "--apply")["mended"]["applied"] == 1
    assert counts(place.study())["complete"] == 2
    assert repair(project)["studies"][0]["results"] == []
    place.run()
    assert len(place.evaluations()) == 4


def test_results_that_cannot_be_applied_are_shown_and_kept(project: Project, url: str) -> None:
    place = place_of(project, url)
    place.run(-signal.SIGKILL, kill_at_tell=1)
    (kept,) = Path(place.settings["outbox"]).glob("*.json")
    damaged, foreign = kept.with_name(kept.name.replace("-0-", "-7-")), kept.with_name(kept.name.replace("-0-", "-9-"))
    damaged.write_text(kept.read_text()[:30])
    foreign.write_text(kept.read_text().replace('"number": 0', '"number": 9'))
    other = outbox_folder(project.folder, "sqlite:////elsewhere.db", "s") / kept.name
    other.parent.mkdir()
    other.write_text(kept.read_text())
    found = repair(project)
    assert [r["state"] for r in found["studies"][0]["results"]] == ["ready", "damaged", "of another study or storage"]
    assert found["other_results"] == [str(other)]
    assert repair(project, "--apply")["mended"]["applied"] == 1
    states = [r["state"] for r in repair(project)["studies"][0]["results"]]
    assert sorted(states) == ["damaged", "of another study or storage"]
    assert other.exists()
    assert "results of other studies" in project.cli("repair", "spec.yaml").stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", DATABASES)
def test_a_failed_point_is_shown_and_tried_again_only_when_asked(
    kind: str, new_storage: NewStorage, project: Project
) -> None:
    place = place_of(project, new_storage(kind))
    place.run(failing=[1])
    (failure,) = repair(project)["studies"][0]["failures"]
    assert (failure["trial"], failure["place"], failure["error"]) == (1, 1, "no result at place 1")
    assert repair(project, "--apply")["mended"]["retried"] == 0
    assert counts(place.study())["failed"] == 1
    assert repair(project, "--apply", "--retry-failed")["mended"]["retried"] == 1
    assert repair(project, "--apply", "--retry-failed")["mended"]["retried"] == 0
    assert counts(place.study()) == {"complete": 4, "running": 0, "waiting": 1, "failed": 0, "pruned": 0}
    place.settings["target"] = 5
    place.run(failing=[1])
    assert counts(place.study())["failed"] == 1
    assert repair(project, "--apply", "--retry-failed")["mended"]["retried"] == 1
    place.settings["target"] = 6
    place.run()
    place.check_whole()


def test_retrying_without_apply_is_refused(project: Project, url: str) -> None:
    place_of(project, url).run(failing=[1])
    done = project.cli("repair", "spec.yaml", "--retry-failed", check=2)
    assert "--apply" in done.stderr


def test_old_temporary_files_are_deleted_young_ones_kept_and_a_moved_away_model_is_put_back(
    project: Project, url: str
) -> None:
    place_of(project, url, points=[]).run()
    cache = project.folder / ".dfmerge" / "fishers"
    cache.mkdir(parents=True)
    old = [
        project.folder / ".merged.0123456789ab.tmp",
        cache / f".{'a' * 64}.safetensors.{'b' * 32}.tmp",
        project.folder / ".second.0123456789ab.old",
        project.folder / ".only.0123456789ab.old",
    ]
    young = project.folder / ".merged.ba9876543210.tmp"
    for path in (*old, young):
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"weights")
    (project.folder / "second").mkdir()
    for path in old:
        os.utime(path, (time.time() - 7200,) * 2)
    found = repair(project)["leftovers"]
    assert {item["path"] for item in found} == {str(path) for path in old}
    assert [item["restore"] for item in found if item["restore"]] == [str(project.folder / "only")]
    assert all(path.exists() for path in old)
    assert repair(project, "--apply")["mended"]["leftovers"] == 4
    assert not any(path.exists() for path in old)
    assert young.exists()
    assert (project.folder / "only" / "model.safetensors").read_bytes() == b"weights"
    assert repair(project)["leftovers"] == []


@pytest.mark.slow
def test_a_study_whose_first_start_was_killed_is_shown_and_deleted_when_asked(project: Project, url: str) -> None:
    project.write(name="s", storage=url)
    join_study(open_storage(url), "s", directions=["maximize", "maximize"])
    assert repair(project)["studies"][0]["unfinished"] is True
    assert repair(project, "--apply")["mended"]["deleted_studies"] == 1
    assert "no study named" in project.cli("repair", "spec.yaml", check=2).stderr
    assert join_study(open_storage(url), "s", directions=["maximize"]).trials == []


def test_a_storage_that_is_not_there_is_refused_and_not_created(project: Project) -> None:
    assert "no such storage" in project.cli("repair", "spec.yaml", check=2).stderr
    assert not list(project.folder.glob("*.db"))
