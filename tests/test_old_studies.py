"""Studies that an earlier version wrote (`old/project.zip`; `old/make.py` says how it was made) go on in this one."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import zipfile
from pathlib import Path

import pytest
import yaml
from optuna.trial import FrozenTrial

from dfmerge_studies.storage import load_study, open_storage
from dfmerge_studies.study.fingerprint import SAMPLER
from dfmerge_studies.study.provenance import FINGERPRINT, SPEC
from dfmerge_studies.trials.marks import RETRY_OF, place_of
from dfmerge_studies.trials.reading import results
from tests.project import Project

PACKED = Path(__file__).with_name("old") / "project.zip"
CUT = ("--set", "storage=sqlite:///cut.db")
WAITING = 4  # number of the trial whose result waits in the outbox


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """The project where it lies now: an outbox is named by its database's absolute path, so it is renamed."""
    folder = tmp_path / "p"
    with zipfile.ZipFile(PACKED) as packed:
        packed.extractall(folder)
    for name in ("done", "cut"):
        with sqlite3.connect(folder / f"{name}.db") as database:
            database.executescript((folder / f"{name}.sql").read_text())
    (outbox,) = (folder / ".dfmerge" / "outbox").iterdir()
    outbox.rename(outbox.with_name(hashlib.sha256(f"sqlite:///{folder}/cut.db\ncolours".encode()).hexdigest()[:16]))
    return Project(folder, "t5", yaml.safe_load((folder / "spec.yaml").read_text()))


def completed(project: Project, database: str) -> list[FrozenTrial]:
    return results(load_study(open_storage(f"sqlite:///{project.folder}/{database}.db"), "colours"))


def test_studies_of_an_earlier_version_are_listed_and_shown(project: Project) -> None:
    (listed,) = project.json("list", "spec.yaml")
    assert listed == {
        "study": "colours",
        "method": "df-merge",
        "trials": {"target": 5, "complete": 5, "running": 0, "waiting": 0, "failed": 0, "pruned": 0},
        "stopped": None,
        "best_value": pytest.approx(5 / 12),
        "metric": "accuracy",
        "task_metrics": {"red": "accuracy", "blue": "accuracy"},
        "guards": {},
    }
    status = project.json("status", "spec.yaml")
    assert status["best"]["coefficients"] == {"red": 0.0, "blue": 0.0}
    assert status["best"]["tasks"] == {"red": pytest.approx(1 / 2), "blue": pytest.approx(1 / 3)}


@pytest.mark.slow
def test_a_finished_study_of_an_earlier_version_is_joined_without_a_new_trial_and_can_be_extended(
    project: Project,
) -> None:
    before = [trial.user_attrs for trial in completed(project, "done")]
    run = project.json("run", "spec.yaml")
    assert run["trials"]["complete"] == 5
    assert [trial.user_attrs for trial in completed(project, "done")] == before
    assert project.json("run", "spec.yaml", "--add", "1")["trials"]["complete"] == 6


@pytest.mark.slow
def test_a_cut_study_of_an_earlier_version_ends_as_the_uncut_one_did(project: Project) -> None:
    (entry,) = project.json("repair", "spec.yaml", *CUT)["studies"]
    assert [result["state"] for result in entry["results"]] == ["ready"]
    run = project.json("run", "spec.yaml", *CUT)
    assert run["trials"] == {"target": 5, "complete": 5, "running": 0, "waiting": 0, "failed": 0, "pruned": 0}
    assert not list(project.folder.glob(".dfmerge/outbox/*/*.json"))
    cut, done = completed(project, "cut"), completed(project, "done")
    assert (cut[2].number, cut[2].user_attrs[RETRY_OF]) == (WAITING, WAITING - 1)
    for ours, theirs in zip(cut, done, strict=True):
        assert place_of(ours) == place_of(theirs)
        assert ours.params == pytest.approx(theirs.params)
        assert ours.user_attrs["tasks"] == pytest.approx(theirs.user_attrs["tasks"])


@pytest.mark.slow
@pytest.mark.parametrize("stated", [True, False], ids=["stored", "of a version before the field"])
def test_a_study_keeps_the_sampler_that_it_has_whatever_a_new_one_would_have(project: Project, stated: bool) -> None:
    study = load_study(open_storage(f"sqlite:///{project.folder}/done.db"), "colours")
    about = dict(study.user_attrs[FINGERPRINT])
    assert about[SAMPLER] == "gp"
    if not stated:
        del about[SAMPLER]
        study.set_user_attr(FINGERPRINT, about)
    assert project.json("status", "spec.yaml")["search"]["sampler"] == "gp"
    assert project.json("validate", "spec.yaml")["search"]["sampler"] == "gp"
    run = project.cli("run", "spec.yaml", "--add", "1", "--json")
    assert "goes on with the sampler gp" in run.stderr
    assert json.loads(run.stdout)["search"]["sampler"] == "gp"
    proposed = completed(project, "done")[-1]
    refused = project.cli("run", "spec.yaml", "--set", "search.sampler=auto", check=2)
    assert "search.sampler: the study has 'gp', this run has 'auto'" in refused.stderr
    project.cli("run", "spec.yaml", "--add", "1", "--set", "search.sampler=gp", *CUT, "--json")
    assert completed(project, "cut")[5].params == pytest.approx(proposed.params)


@pytest.mark.slow
def test_a_new_study_states_the_sampler_that_a_spec_leaves_open(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = ("spec.yaml", "--set", "name=new")
    assert project.json("validate", *new)["search"]["sampler"] == "auto"
    project.json("run", *new, "--trials", "1")
    study = load_study(open_storage(f"sqlite:///{project.folder}/done.db"), "new")
    assert study.user_attrs[FINGERPRINT][SAMPLER] == study.user_attrs[SPEC]["search"]["sampler"] == "auto"
    monkeypatch.setattr("dfmerge_studies.study.plan.DEFAULT_SAMPLER", "gp")
    assert project.json("status", *new)["search"]["sampler"] == "auto"


def test_a_study_of_an_earlier_version_is_not_joined_by_a_spec_about_something_else(project: Project) -> None:
    refused = project.cli("run", "spec.yaml", "--set", "search.seed=4", check=2)
    assert "search.seed: the study has 3, this run has 4" in refused.stderr
