"""What a sampler expected of its proposals: kept on the trial, shown by status, figures and notes."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import optuna
import pytest

from dfmerge_studies.report.expectations import expectation_text, gain_left
from dfmerge_studies.report.figures.trajectory import Trajectory, trajectory
from dfmerge_studies.report.kinds import kinds_of
from dfmerge_studies.report.notes import study_note, trial_note
from dfmerge_studies.report.view import StudyView
from dfmerge_studies.search import make_sampler
from dfmerge_studies.tasks.metrics import Metrics
from dfmerge_studies.trials.marks import PROPOSAL
from dfmerge_studies.trials.queue import put_back
from dfmerge_studies.trials.space import Space
from dfmerge_studies.trust_region import Goal
from tests.project import Project
from tests.test_report import study_of
from tests.test_trust_region import run
from tests.test_trust_region import study_of as auto_study

METRICS = Metrics.named({"a": "accuracy", "b": "accuracy"})


@pytest.mark.slow
def test_every_proposal_of_auto_keeps_what_was_expected_per_task_and_where_it_looked() -> None:
    study = auto_study()
    run(study, 9)
    assert all(PROPOSAL not in trial.user_attrs for trial in study.trials[:5])  # drawn at random
    for trial in study.trials[5:]:
        expected = trial.user_attrs[PROPOSAL]
        means = [mean for mean, _ in expected["tasks"].values()]
        assert list(expected["tasks"]) == ["first", "second"]
        assert expected["mean"] == pytest.approx(sum(means) / 2, abs=4 * expected["deviation"] / 512**0.5)
        assert 0 <= expected["gain"] < 1
        region = expected["region"]
        assert region["number"] == 1
        assert all(abs(trial.params[n] - c) <= region["half_width"] + 1e-9 for n, c in region["centre"].items())
    last = study.trials[-1]  # a smooth surface: four proposals in, expectations are near
    assert last.user_attrs[PROPOSAL]["mean"] == pytest.approx(last.value, abs=0.05)


@pytest.mark.slow
def test_the_gain_to_come_shrinks_while_the_optimum_is_found() -> None:
    study = auto_study()
    run(study, 16)
    gains = [trial.user_attrs[PROPOSAL]["gain"] for trial in study.trials[5:]]
    assert max(gains[-3:]) < 0.2 * gains[0]
    assert gain_left(study.trials[::-1]) == {"trial": 15, "gain": gains[-1]}


def test_a_score_of_which_lower_is_better_is_expected_in_its_own_unit() -> None:
    study = auto_study(goal=Goal(points={"first": -0.01, "second": -0.01}))
    run(study, 7)  # the study still maximises: only what is kept is looked at
    for mean, _ in study.trials[-1].user_attrs[PROPOSAL]["tasks"].values():
        assert 0 < mean < 1.1


def test_a_proposal_of_gp_keeps_what_was_expected_of_the_value() -> None:
    space = Space(("a", "b"))
    sampler = make_sampler("gp", seed=0, study_name="s", space=space, startup_trials=5)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for _ in range(12):
        trial = study.ask(space.distributions())
        study.tell(trial, 10.0 - (trial.params["a"] - 0.3) ** 2 - (trial.params["b"] - 0.6) ** 2)
    assert PROPOSAL not in study.trials[4].user_attrs
    first, last = (study.trials[number].user_attrs[PROPOSAL] for number in (5, 11))
    assert last["mean"] == pytest.approx(study.trials[11].value, abs=0.05)
    assert 0 <= last["gain"] < first["gain"] < 1
    assert last["deviation"] > 0


# What is shown


def proposed(number: int, half_width: float, mean: float = 0.75) -> dict[str, Any]:
    region = {"number": number, "centre": {"a": 0.25, "b": 0.5}, "half_width": half_width}
    return {"mean": mean, "deviation": 0.01, "gain": 0.002, "tasks": {}, "region": region}


def with_proposals(expected: list[dict[str, Any] | None]) -> StudyView:
    """A stored study whose trials keep expectations, or none."""
    plain = study_of({}, lambda point: point["a"], len(expected))
    study = optuna.create_study(direction="maximize")
    for name, value in plain.user_attrs.items():
        study.set_user_attr(name, value)
    for trial, kept in zip(plain.trials, expected, strict=True):
        trial.user_attrs = {**trial.user_attrs, **({PROPOSAL: kept} if kept is not None else {})}
        study.add_trial(trial)
    return StudyView.of(study)


def test_the_trajectory_shows_expectations_regions_and_restarts() -> None:
    view = with_proposals([None, None, proposed(1, 0.4), proposed(1, 0.2), proposed(2, 0.4), proposed(2, 0.4)])
    drawn = trajectory(view)
    assert isinstance(drawn, Trajectory)
    assert drawn.expected == [None, None, 0.75, 0.75, 0.75, 0.75]
    assert drawn.half_widths == [None, None, 0.4, 0.2, 0.4, 0.4]
    assert drawn.restarts == [4]
    assert "restarts" in drawn.caption
    (bars,) = [trace for trace in drawn.plotly().data if trace.name == "expected ± deviation"]
    assert list(bars.x) == [2, 3, 4, 5]
    assert list(bars.y) == pytest.approx([75.0] * 4)
    assert list(bars.error_y.array) == pytest.approx([1.0] * 4)
    region = drawn.static().axes[2]
    assert region.get_ylabel() == "trust region"
    assert [text.get_text() for text in region.get_legend().get_texts()] == ["half width", "restart"]
    lines = drawn.plotly().layout.shapes
    assert [(line.name, line.x0, line.yref) for line in lines] == [
        ("restart", 4, f"{panel} domain") for panel in ("y", "y2", "y3")
    ]
    assert [line.showlegend for line in lines] == [False, False, True]


STEP = {"from": 0}


def test_the_caption_says_what_steps_are_where_there_are_any() -> None:
    drawn = trajectory(with_proposals([None, STEP, STEP, proposed(1, 0.4)]))
    assert isinstance(drawn, Trajectory)
    assert drawn.kinds == ["startup", "step", "step", "search"]
    assert "Triangles: steps down the loss" in drawn.caption
    other = trajectory(with_proposals([None, None, None, proposed(1, 0.4)]))
    assert isinstance(other, Trajectory)
    assert "Triangles" not in other.caption


def test_a_draw_of_a_worker_that_began_before_the_startup_was_over_is_not_shown_as_proposed() -> None:
    """Startup is three trials; the fourth began while the third was running."""
    study, began = study_of({}, lambda point: point["a"], 0), datetime(2026, 1, 1)
    space = {name: optuna.distributions.FloatDistribution(0, 1) for name in "ab"}
    for place, (start, end) in enumerate([(0, 1), (1, 2), (2, 4), (3, 5), (6, 7)]):
        trial = optuna.trial.create_trial(
            params={"a": 0.5, "b": 0.1 * place},
            distributions=space,
            value=0.5,
            user_attrs={"place": place, "tasks": {"a": 0.5, "b": 0.5}},
        )
        trial.datetime_start, trial.datetime_complete = (began + timedelta(minutes=each) for each in (start, end))
        study.add_trial(trial)
    assert kinds_of(StudyView.of(study)) == ["startup", "startup", "startup", "startup", "search"]


def test_a_trial_that_was_cut_and_repeated_is_shown_as_what_it_was_at_first() -> None:
    study = study_of({}, lambda point: point["a"], 0)
    study.enqueue_trial({"a": 0.5, "b": 0.5}, user_attrs={"place": 0})
    space = {name: optuna.distributions.FloatDistribution(0, 1) for name in "ab"}
    for place, kept in enumerate([None, None, STEP, proposed(1, 0.4)]):
        first = study.ask(space)
        for name, value in {"place": place, "drawn": True, **({PROPOSAL: kept} if kept else {})}.items():
            first.set_user_attr(name, value)
        put_back(study, first._trial_id)
        again = study.ask(space)
        again.set_user_attr("tasks", {"a": 0.5, "b": 0.5})
        study.tell(again, 0.5)
    view = StudyView.of(study)
    assert [trial.user_attrs["retry_of"] for trial in view.trials] == [0, 2, 4, 6]
    assert kinds_of(view) == ["known", "startup", "step", "search"]


def test_the_trajectory_of_trials_without_expectations_is_as_it_was() -> None:
    drawn = trajectory(with_proposals([None] * 4))
    assert isinstance(drawn, Trajectory)
    assert len(drawn.static().axes) == 2
    assert "expected" not in drawn.caption + "".join(str(trace.name) for trace in drawn.plotly().data)
    gp = trajectory(with_proposals([None, None, {"mean": 0.7, "deviation": 0.1, "gain": 0.01}]))
    assert isinstance(gp, Trajectory)
    assert not gp.has_regions
    assert gp.expected == [None, None, 0.7]


def test_notes_say_what_was_expected_where_it_was_looked_for_and_what_is_to_come() -> None:
    view = with_proposals([None, None, proposed(2, 0.2)])
    trial = view.trials[2]
    text = expectation_text(trial, METRICS)
    assert text is not None
    assert text.startswith(f"Expected 75.0 ± 1.0, found {100 * trial.value:.1f}; trust region 2: half width 0.2")
    assert "trust region 2" in trial_note(view, trial, 1)
    assert "Gain to come: 0.20 points at most, when trial 2 was proposed" in study_note(view).replace("\\", "")
    assert expectation_text(view.trials[0], METRICS) is None
    assert "Gain to come" not in study_note(with_proposals([None] * 3))


@pytest.mark.slow
def test_status_says_how_much_gain_is_still_expected(project: Project) -> None:
    settings = {"trials": 4, "startup_trials": 2, "sampler": "auto", "step": 0.25}
    project.write(search=settings)
    run = project.json("run", "spec.yaml", "--no-test")
    study = optuna.load_study(study_name="colours", storage=f"sqlite:///{project.folder}/colours.db")
    kept = study.trials[3].user_attrs[PROPOSAL]["gain"]
    assert run["expected_gain"] == project.json("status", "spec.yaml")["expected_gain"] == {"trial": 3, "gain": kept}
    shown = project.cli("status", "spec.yaml").stdout
    assert f"{100 * kept:.2f} points at most, when trial 3 was proposed" in shown
