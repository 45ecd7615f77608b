"""`--tracker`: trials in MLflow and TensorBoard, in real folders; a tracker that fails costs no trial."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import pytest

from dfmerge_studies import StudySpec
from dfmerge_studies.report import trackers, tracking
from dfmerge_studies.report.tracking import Tracking, record_of, wanted_trackers
from dfmerge_studies.report.view import StudyView
from dfmerge_studies.study.session import stored_study
from tests.project import Project, copied, make_project

needs_mlflow = pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not installed")


@pytest.fixture(scope="session")
def finished_plain(tmp_path_factory) -> Project:
    project = make_project(tmp_path_factory.mktemp("tracked") / "p", "llama", rows=6, samples=2, trials=3)
    project.spec["method"] = "gta"
    project.spec["search"]["max_drop"] = 90
    project.write()
    project.cli("run", "spec.yaml")
    return project


@pytest.fixture
def project(finished_plain, tmp_path) -> Project:
    return copied(finished_plain, tmp_path / "p")


def view_of(project: Project, name: str = "colours") -> StudyView:
    return StudyView.of(stored_study(StudySpec.from_yaml(project.file, [f"name={name}"])))


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Curves of a folder of TensorBoard, by name and step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, dict[int, float]] = {}
    for file in sorted(folder.glob("events.*")):
        events = EventAccumulator(str(file))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, {}).update({each.step: each.value for each in events.Scalars(tag)})
    return found


def runs_of(folder: Path, study: str) -> dict[int, Any]:
    """Runs of an experiment of MLflow, by trial."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(study)
    found = client.search_runs([experiment.experiment_id])
    assert len({run.data.tags["dfmerge.trial"] for run in found}) == len(found)
    return {int(run.data.tags["dfmerge.trial"]): run for run in found}


def test_tensorboard_has_a_point_and_a_run_for_every_trial_also_of_those_before_and_of_baselines(project):
    project.cli("run", "spec.yaml", "--tracker", "tensorboard=logs", "--trials", "4", "--set", "baselines=[averaging]")
    view = view_of(project)
    folder = project.folder / "logs" / "colours"
    curves = scalars(folder)
    assert curves["value"] == {trial.number: pytest.approx(trial.value) for trial in view.trials}
    assert len(curves["value"]) == 4
    for trial in view.trials:
        assert curves["tasks/red"][trial.number] == pytest.approx(trial.user_attrs["tasks"]["red"])
        assert curves["parameters/blue"][trial.number] == pytest.approx(trial.user_attrs["coefficients"]["blue"])
        assert curves["feasible"][trial.number] in (0.0, 1.0)
    assert {each.name for each in folder.glob("trial-*")} == {f"trial-{trial.number}" for trial in view.trials}
    assert len(scalars(project.folder / "logs" / "colours.averaging")["value"]) == 1


def test_a_run_that_goes_on_sends_no_trial_twice(project):
    for trials in (4, 4, 5):
        project.cli("run", "spec.yaml", "--tracker", "tensorboard=logs", "--trials", str(trials))
    files = list((project.folder / "logs" / "colours").glob("trial-*/events.*"))
    assert len(files) == 5


@needs_mlflow
def test_mlflow_has_an_experiment_with_a_run_for_every_trial(project):
    for trials in (4, 5):
        project.cli("run", "spec.yaml", "--tracker", "mlflow=ml", "--trials", str(trials))
    view, runs = view_of(project), runs_of(project.folder / "ml", "colours")
    assert runs.keys() == {trial.number for trial in view.trials}
    for trial in view.trials:
        data, record = runs[trial.number].data, record_of(view, trial)
        assert data.metrics == pytest.approx(dict(record.metrics))
        assert {name: float(value) for name, value in data.params.items()} == dict(record.parameters)
        assert runs[trial.number].info.status == "FINISHED"
        assert runs[trial.number].info.start_time == int(trial.datetime_start.timestamp() * 1000)
    from mlflow import MlflowClient

    tags = MlflowClient(f"sqlite:///{project.folder / 'ml' / 'mlflow.db'}").get_experiment_by_name("colours").tags
    assert tags["dfmerge.method"] == "gta"
    assert tags["dfmerge.winner"].startswith(f"trial {view.best.number}: ")
    assert "experts' mean" in tags["dfmerge.verdict"]


@pytest.mark.slow
def test_workers_trials_and_those_of_a_comparison_are_sent_by_the_process_that_shows_them(project):
    flags = ("--tracker", "tensorboard=logs")
    project.process("run", "spec.yaml", "--trials", "6", "--workers", "2", *flags)
    curves = scalars(project.folder / "logs" / "colours")
    assert len(curves["value"]) == 6
    project.cli("compare", "spec.yaml", "--methods", "averaging,gta", "--trials", "6", *flags)
    assert len(scalars(project.folder / "logs" / "colours.averaging")["value"]) == 1


class Failing:
    """A tracker that works until its second trial, as one whose server goes away."""

    sent: ClassVar[list[int]] = []

    def __init__(self, place: str, target: trackers.Target) -> None:
        self.target = target

    @classmethod
    def check(cls, place: str) -> None:
        if place == "nowhere":
            raise ConnectionError("no such host")

    def known(self) -> set[int]:
        return set()

    def add(self, record: trackers.Record) -> None:
        if self.sent:
            raise ConnectionError("the server is gone")
        self.sent.append(record.number)

    def close(self, outcome: Any) -> None:
        raise AssertionError("it was let go")


def test_a_tracker_that_fails_is_said_once_and_the_study_goes_on(project, monkeypatch):
    monkeypatch.setattr(Failing, "sent", [])
    monkeypatch.setattr(tracking, "TRACKERS", {"failing": trackers.TrackerRow(Failing, (), "a place")})
    done = project.cli("run", "spec.yaml", "--tracker", "failing", "--trials", "5")
    assert done.stderr.count("the tracker failing failed") == 1
    assert "the server is gone" in done.stderr
    assert len(view_of(project).trials) == 5
    assert len(Failing.sent) == 1
    refused = project.cli("run", "spec.yaml", "--tracker", "failing=nowhere", "--set", "name=other", check=2)
    assert "cannot be opened: " in refused.stderr
    assert "no such host" in refused.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("tensorbord",), "tensorboard"),
        (("tensorboard", "tensorboard=x"), "named twice"),
        (("tensorboard=",), "nothing stands behind"),
        (("tensorboard=spec.yaml",), "cannot be opened"),
    ],
)
def test_trackers_that_cannot_be_are_refused_before_anything_is_loaded(project, flags, words):
    arguments = [part for flag in flags for part in ("--tracker", flag)]
    told = project.cli("run", "spec.yaml", "--set", "name=other", *arguments, check=2).stderr
    assert "--tracker" in told
    assert words in told


def test_a_tracker_whose_package_is_missing_says_which_extra_brings_it(monkeypatch):
    monkeypatch.setattr(tracking, "installed", lambda package: False)
    with pytest.raises(Exception, match=r"wandb needs the package wandb.*dfmerge-studies\[wandb\]"):
        wanted_trackers(["wandb=mine"])


def test_nothing_is_opened_where_nothing_is_asked_for(project):
    with Tracking([], warn=print) as nothing:
        nothing.follow(view_of(project).study)
        nothing.completed("colours", 0)
    assert json.loads(project.cli("status", "spec.yaml", "--json").stdout)["study"] == "colours"
