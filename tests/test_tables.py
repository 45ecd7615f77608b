"""A method with a parameter, a metric and a figure that are rows of their tables and nothing else, in the commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
import pytest
import torch
from matplotlib.figure import Figure as StaticFigure

from dfmerge_studies import StudySpec
from dfmerge_studies.methods import METHODS, Coefficients, Importance, Method, Parameter
from dfmerge_studies.params import TaskVector
from dfmerge_studies.report.figures import FIGURES, Figure
from dfmerge_studies.report.figures.base import Drawing, blank
from dfmerge_studies.report.view import StudyView
from dfmerge_studies.study.session import stored_study
from dfmerge_studies.tasks.choices import Answers
from dfmerge_studies.tasks.metrics import METRICS, Metric
from dfmerge_studies.transforms import TRANSFORMS, Prepared, Streams, Transform
from tests.project import Project, load_parameters
from tests.test_study import completed

TASKS = ("red", "blue")


def scale_all(task_vectors: Sequence[TaskVector], streams: Streams) -> Prepared:
    """Phi(tau)_i = stretch * tau_i."""

    def prepared(parameters: Mapping[str, float]) -> Sequence[TaskVector]:
        by = parameters["stretch"]
        return [TaskVector(v.expert, {name: by * delta for name, delta in v.deltas.items()}) for v in task_vectors]

    return prepared


def wrong(answers: Answers) -> list[float]:
    return [float(taken != wanted) for taken, wanted in zip(answers.taken, answers.wanted, strict=True)]


@dataclass(frozen=True)
class Dots(Drawing):
    """Score of every trial."""

    scores: list[float]

    def plotly(self) -> go.Figure:
        return go.Figure(go.Scatter(y=self.scores), layout={"height": 300})

    def static(self) -> StaticFigure:
        figure, axes = blank(size=(4, 3))
        axes.plot(self.scores, "o")
        return figure


def dots(view: StudyView) -> list[Drawing]:
    return [Dots("dots", "Dots", "One dot a trial.", [view.value(trial) for trial in view.trials])]


@pytest.fixture
def extended(project_of, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project of a method, a metric and a figure of its own, each a row of its table and nothing else."""
    stretch = Parameter("stretch", "what task vectors are multiplied with", 0.0, 9.0, default=1.0, bounds=(0.5, 2.0))
    policies = (Importance.UNIFORM, Coefficients.PER_EXPERT)
    row = Method("stretched", *policies, "https://example.org", transform="scale", parameters=(stretch,))
    monkeypatch.setitem(METHODS, "stretched", row)
    monkeypatch.setitem(TRANSFORMS, "scale", Transform(scale_all))
    monkeypatch.setitem(METRICS, "error", Metric("error", of_rows=wrong, higher_is_better=False))
    monkeypatch.setitem(FIGURES, "dots", Figure("dots", dots))
    project = project_of("bert")
    tasks = {name: {**task, "metric": "error"} for name, task in project.spec["tasks"].items()}
    project.spec.update(method="stretched", tasks=tasks, search={"trials": 5, "startup_trials": 2})
    project.write()
    return project


@pytest.mark.slow
def test_a_new_method_and_its_parameter_are_validated_searched_shown_and_merged(extended):
    assert extended.json("validate", "spec.yaml")["ok"]
    refused = extended.cli("validate", "spec.yaml", "--set", "parameters.stretched.stretch=10", check=2).stderr
    assert "parameters.stretched: the stretch is 10.0, outside [0, 9]" in refused
    assert (
        "has no squeeze" in extended.cli("run", "spec.yaml", "--set", "parameters.stretched.squeeze=1", check=2).stderr
    )
    printed = extended.json("run", "spec.yaml")
    trials = stored_study(StudySpec.from_yaml(extended.file)).trials
    values = [trial.params["stretch"] for trial in trials]
    assert values[0] == 1.0
    assert len(set(values)) > 2
    assert all(0.5 <= value <= 2 for value in values)
    assert [trial.user_attrs["stretch"] for trial in trials] == values
    best = printed["best"]
    assert printed["rows"][-1]["stretch"] == best["stretch"] == trials[best["number"]].params["stretch"]
    assert f"stretch {best['stretch']:g}" in extended.cli("run", "spec.yaml").stdout
    assert "stretch" in extended.cli("status", "spec.yaml").stdout
    extended.json("export", "spec.yaml", "--out", "merged")
    assert f"--stretch {best['stretch']!r}" in (extended.folder / "merged/README.md").read_text()
    base, merged = (load_parameters(extended.folder / name) for name in ("base", "merged"))
    experts = {name: load_parameters(extended.folder / name) for name in TASKS}
    for name in base:
        steps = [best["coefficients"][e] * best["stretch"] * (experts[e][name] - base[name]) for e in TASKS]
        torch.testing.assert_close(merged[name], base[name] + sum(steps), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_new_metric_whose_lower_scores_are_better_decides_what_is_best_everywhere(extended):
    printed = extended.json("run", "spec.yaml")
    assert printed["task_metrics"] == dict.fromkeys(TASKS, "error")
    scores = [sum(trial["tasks"].values()) / 2 for trial in attributes(extended)]
    assert sum(printed["best"]["tasks"].values()) / 2 == min(scores)
    assert printed["best"]["value"] == pytest.approx(-min(scores))
    shown = extended.cli("run", "spec.yaml").stdout
    assert "validation error in percent" in shown
    assert f"{100 * min(scores):.1f} (error)" in shown
    table = extended.json("compare", "spec.yaml", "--methods", "stretched,averaging", "--split", "validation")
    means = {row["method"]: row["mean"] for row in table["rows"] if row["merged"]}
    best = {row["method"] for row in table["rows"] if row["ranks"].get("mean") == 1}
    assert best == {method for method, mean in means.items() if mean == min(means.values())}
    rows = {row["method"]: {t: cell["mean"] for t, cell in row["tasks"].items()} for row in table["rows"]}
    for row in table["rows"]:
        if row["merged"]:
            lost = [100 * (rows[row["method"]][task] - rows["fine-tuned"][task]) for task in TASKS]
            assert row["drop"]["points"] == pytest.approx(max(lost))


@pytest.mark.slow
def test_a_new_figure_is_drawn_and_named(extended):
    extended.cli("run", "spec.yaml", "--no-test")
    report = extended.json("report", "spec.yaml", "--figures", "dots")
    assert [file.rpartition("/")[2] for file in report["figures"]] == ["dots.png", "dots.svg", "dots.json"]
    assert "One dot a trial." in (extended.folder / report["page"]).read_text()
    assert "dots" in extended.cli("report", "spec.yaml", "--figures", "dot", check=2).stderr


@pytest.mark.slow
def test_a_study_of_them_that_was_cut_is_resumed_as_if_it_had_not_been(extended):
    for total in ("2", "5"):
        extended.json("run", "spec.yaml", "--no-test", "--trials", total)
    cut = completed(extended)
    (extended.folder / "colours.db").unlink()
    extended.json("run", "spec.yaml", "--no-test")
    assert completed(extended) == cut
    other = extended.cli("run", "spec.yaml", "--set", "parameters.stretched.stretch=2", check=2).stderr
    assert "parameters: the study has {}, this run has {'stretch': 2.0}" in other


def attributes(project: Project) -> list[dict]:
    return [trial.user_attrs for trial in stored_study(StudySpec.from_yaml(project.file)).trials]
