"""`search.startup`: the startup trials of the sampler `auto` are steps down the loss, or uniform draws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import yaml
from optuna.trial import FrozenTrial, TrialState, create_trial

from dfmerge_studies import InputError, RunError, StudySpec, optimize_merge
from dfmerge_studies.report.kinds import kinds_of
from dfmerge_studies.report.view import StudyView
from dfmerge_studies.search import make_sampler
from dfmerge_studies.spec import DEFAULT_STARTUP, ObjectiveSettings, SearchSettings
from dfmerge_studies.storage import load_study, open_storage
from dfmerge_studies.study.proposals import new_startup
from dfmerge_studies.study.provenance import FINGERPRINT, stored_fingerprint
from dfmerge_studies.study.session import Session, open_study
from dfmerge_studies.study.stopping import Noise, Rule
from dfmerge_studies.tasks.metrics import Metrics
from dfmerge_studies.tasks.supervised import answer_losses
from dfmerge_studies.trials.marks import DRAWN, GRADIENT, PLACE, PROPOSAL, TASKS
from dfmerge_studies.trials.reading import results
from dfmerge_studies.trials.space import Space
from tests import ranks_child
from tests.project import Project, run_cut_at, start_ranks
from tests.test_in_memory import target_score, toys
from tests.test_lm_eval import CASES, harness_project

optuna.logging.set_verbosity(optuna.logging.ERROR)
SPACE = Space(("a", "b"))
TWO = {"groups": {"attention": "attention|Attention|attn", "mlp": "DenseReluDense|mlp|intermediate"}}


def starting(project: Project, **changes: Any) -> StudySpec:
    """A spec that leaves `startup` open unless it is given."""
    search = {"trials": 6, "startup_trials": 4, "sampler": "auto", "gradient_rows": 6, **changes.pop("search", {})}
    return StudySpec.from_yaml(project.write(**{"method": "gta", "search": search, **changes}))


def ran(spec: StudySpec) -> Session:
    session = open_study(spec)
    session.run()
    return session


def points(session: Session) -> list[dict[str, float]]:
    return [trial.params for trial in results(session.study)]


def studied(project: Project, name: str) -> optuna.Study:
    return load_study(open_storage(f"sqlite:///{project.folder}/{name.partition('.')[0]}.db", create=False), name)


# The trials


def test_startup_trials_are_the_steps_of_a_study_that_descends_and_then_the_trust_region_proposes(
    project: Project,
) -> None:
    session = ran(starting(project, search={"startup": "descent"}))
    steps = ran(starting(project, name="steps", search={"sampler": "gradient", "trials": 4}))
    assert points(session)[:4] == points(steps)
    trials = results(session.study)
    assert [set(trial.user_attrs.get(PROPOSAL, {})) & {"from", "region"} for trial in trials] == [
        set(), {"from"}, {"from"}, {"from"}, {"region"}, {"region"},
    ]  # fmt: skip
    assert kinds_of(StudyView.of(session.study)) == ["known", "step", "step", "step", "search", "search"]


def test_status_of_a_study_that_still_descends_says_from_when_on_a_gain_is_expected(project: Project) -> None:
    starting(project, search={"startup": "descent"})
    project.json("run", "spec.yaml", "--trials", "2", "--no-test")
    shown = " ".join(project.cli("status", "spec.yaml").stdout.split())
    assert "auto (steps down the loss, then one Gaussian process per task in a trust region)" in shown
    assert "gain to come known once a trial is proposed, after 4 trials" in shown


def test_slopes_are_taken_where_a_later_step_follows_from_them_and_nowhere_else(project: Project) -> None:
    trials = results(ran(starting(project, search={"startup": "descent"})).study)
    assert [GRADIENT in trial.user_attrs for trial in trials] == [True, True, True, False, False, False]


def test_the_first_region_stands_around_the_best_startup_trial(project: Project) -> None:
    trials = results(ran(starting(project, search={"startup": "descent", "trials": 5})).study)
    best = max(trials[:4], key=lambda trial: (trial.values[0], -trial.number))
    assert trials[4].user_attrs[PROPOSAL]["region"]["centre"] == pytest.approx(best.params)


def test_a_study_that_is_cut_goes_on_as_the_uncut_one(project: Project) -> None:
    fields = {"startup": "descent", "startup_trials": 3, "trials": 4}
    whole = ran(starting(project, search=fields))
    cut = starting(project, storage="sqlite:///cut.db", search=fields)
    run_cut_at(cut, 2, 3)
    assert points(ran(cut)) == points(whole)


@pytest.mark.slow
def test_two_ranks_start_a_study_as_one_process_does(project: Project) -> None:
    alone = ran(starting(project, storage="sqlite:///alone.db", search={"startup": "descent", "trials": 3}))
    starting(project, search={"startup": "descent", "trials": 3})
    for rank in start_ranks(ranks_child.study, project.folder, folder=project.folder, DFMERGE_RANK_TIMEOUT="60"):
        output, errors = rank.communicate(timeout=300)
        assert rank.returncode == 0, (output, errors)
    found = json.loads((project.folder / "points.json").read_text())
    assert found == [pytest.approx(point, abs=1e-5) for point in points(alone)]


def test_the_path_starts_at_the_best_of_what_was_given(project: Project) -> None:
    session = ran(starting(project, search={"startup": "descent", "trials": 4, "enqueue": [0.25, 0.9]}))
    trials = results(session.study)
    best = max(trials[:3], key=lambda trial: (trial.values[0], -trial.number))
    assert trials[3].user_attrs[PROPOSAL] == {"from": best.number}


def test_a_descent_along_groups_is_the_model_wise_one_for_half_of_the_trials_and_then_along_all(
    project: Project,
) -> None:
    """The slope along a tied coefficient is the sum of those of its groups."""
    fields = {"startup": "descent", "trials": 6, "startup_trials": 6}
    trials = results(ran(starting(project, name="s", search={**fields, "granularity": TWO})).study)
    model = ran(starting(project, name="s", storage="sqlite:///model.db", search={**fields, "trials": 3}))
    for trial, point in zip(trials, points(model), strict=False):
        for name, value in trial.params.items():
            assert value == pytest.approx(point[name.partition(".")[0]], abs=1e-6)
    assert [trial.params["red.attention"] == trial.params["red.mlp"] for trial in trials] == [True] * 3 + [False] * 3
    assert [trial.user_attrs.get(PROPOSAL) for trial in trials] == [None, *[{"from": 0}] * 5]


def test_a_trial_whose_slope_has_no_memory_is_scored_without_one(
    project: Project, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two rows fit, those of the rehearsal; a trial's do not."""

    def full(model: Any, kind: Any, batch: Any, **more: Any) -> torch.Tensor:
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return answer_losses(model, kind, batch, **more)

    monkeypatch.setattr("dfmerge_studies.objective.slopes.answer_losses", full)
    trials = results(ran(starting(project, search={"startup": "descent", "trials": 3})).study)
    uniform = ran(starting(project, storage="sqlite:///uniform.db", search={"startup": "uniform", "trials": 3}))
    assert [trial.params for trial in trials] == points(uniform)
    assert not any(GRADIENT in trial.user_attrs for trial in trials)
    assert "a trial without a slope of the loss: out of memory" in caplog.text
    with pytest.raises(RunError):
        ran(starting(project, name="steps", search={"sampler": "gradient"}))


def trial(place: int, **changes: Any) -> FrozenTrial:
    state = changes.pop("state", TrialState.COMPLETE)
    done = state is TrialState.COMPLETE
    kept = {PROPOSAL: {"from": 0}} if place else {}
    scored = {GRADIENT: {"loss": 1.0, "slopes": {"a": 1.0, "b": -1.0}}, TASKS: {"t": 0.5 + place / 100}} if done else {}
    return create_trial(
        state=state,
        params={"a": 0.5 - 0.05 * place, "b": 0.5 + 0.05 * place},
        distributions=SPACE.distributions(),
        values=[0.5 + place / 100] if done else None,
        user_attrs={PLACE: place, DRAWN: True, **kept, **scored},
    )


def proposed(*trials: FrozenTrial) -> tuple[dict[str, float], Any]:
    study = optuna.create_study(direction="maximize")
    study.add_trials(trials)
    asked = study.ask()
    sampler = make_sampler("auto", seed=0, study_name="s", space=SPACE, startup_trials=3, descends=True)
    point = sampler.sample_relative(study, study.trials[asked.number], {**SPACE.distributions()})
    return point, study.trials[asked.number].user_attrs.get(PROPOSAL)


def test_workers_go_further_in_the_same_direction_until_enough_trials_have_completed() -> None:
    running = [trial(place, state=TrialState.RUNNING) for place in (2, 3)]
    point, kept = proposed(trial(0), trial(1), *running)
    assert point == pytest.approx({"a": 0.3, "b": 0.7})
    assert kept == {"from": 0}
    _, kept = proposed(trial(0), trial(1), trial(2), *running[1:])
    assert "region" in kept


# What a study has where the spec leaves it open


def test_a_new_study_descends() -> None:
    assert DEFAULT_STARTUP == "descent"


@pytest.fixture
def by_descent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new study descends where it can, whatever the default of the day is."""
    monkeypatch.setattr("dfmerge_studies.study.proposals.DEFAULT_STARTUP", "descent")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, DEFAULT_STARTUP),
        ({"search": {"sampler": None}}, DEFAULT_STARTUP),
        ({"search": {"granularity": "layers", "max_drop": 5, "stop": "gain"}}, DEFAULT_STARTUP),
        ({"objective": {"kind": "weighted", "weights": {"red": 1, "blue": 2}}}, DEFAULT_STARTUP),
        ({"objective": "min"}, "uniform"),
        ({"objective": "pareto"}, "uniform"),
        ({"objective": "agreement"}, "uniform"),
        ({"method": "df-merge-kfac"}, "uniform"),
        ({"method": {"transform": "dare", "importance": "uniform", "coefficients": "per-expert"}}, "uniform"),
        ({"search": {"step": 0.1}}, "uniform"),
        ({"search": {"racing": True}}, DEFAULT_STARTUP),
        ({"search": {"startup": "uniform"}}, "uniform"),
        ({"search": {"sampler": "gp"}}, None),
        ({"search": {"sampler": "random"}}, None),
        ({"search": {"sampler": "gradient"}}, None),
        ({"search": "paper"}, None),
        ({"method": "ties"}, None),
        ({"method": "averaging"}, None),
    ],
)
def test_it_starts_by_a_descent_wherever_the_spec_lets_it_have_slopes(
    project: Project, changes: dict[str, Any], expected: str | None
) -> None:
    search = changes.pop("search", {})
    search = search if isinstance(search, str) else {"sampler": "auto", **search}
    project.write(search=search, **changes)
    assert new_startup(StudySpec.from_yaml(project.file)) == expected


def test_validate_status_and_run_say_what_it_has(project: Project) -> None:
    spec = starting(project, search={"startup": None, "trials": 2})
    words = {"descent": "steps down the loss", "uniform": "uniform draws"}[DEFAULT_STARTUP]
    shown = f"auto ({words}, then one Gaussian process per task in a trust region)"
    assert shown in project.cli("validate", "spec.yaml").stdout
    assert project.json("validate", "spec.yaml")["search"]["startup"] == DEFAULT_STARTUP
    found = project.json("run", "spec.yaml", "--no-test")
    assert found["search"] == {
        "sampler": "auto", "acquisition": None, "startup": DEFAULT_STARTUP, "startup_trials": 4,
    }  # fmt: skip
    assert shown in project.cli("status", "spec.yaml").stdout
    assert stored_fingerprint(studied(project, spec.name))["search.startup"] == DEFAULT_STARTUP


def test_a_study_of_before_there_was_a_descent_goes_on_uniformly_draw_for_draw(project: Project) -> None:
    whole = ran(starting(project, storage="sqlite:///whole.db", search={"startup": "uniform"}))
    study = ran(starting(project, search={"startup": "uniform", "trials": 2})).study
    former = {name: value for name, value in stored_fingerprint(study).items() if name != "search.startup"}
    study.set_user_attr(FINGERPRINT, former)
    going_on = ran(starting(project))
    assert points(going_on) == points(whole)
    assert not any(GRADIENT in trial.user_attrs for trial in results(going_on.study))
    assert project.json("status", "spec.yaml")["search"]["startup"] == "uniform"
    with pytest.raises(InputError, match="the study has 'uniform', this run has 'descent'"):
        open_study(starting(project, search={"startup": "descent"}))


def test_a_study_that_began_with_a_descent_goes_on_with_it_whatever_a_spec_leaves_open(project: Project) -> None:
    ran(starting(project, search={"startup": "descent", "trials": 2}))
    assert GRADIENT in results(ran(starting(project, search={"trials": 3})).study)[2].user_attrs
    for changes, message in (
        ({"startup": "uniform"}, "search.startup: the study has 'descent', this run has 'uniform'"),
        ({"rate": 0.1}, "search.rate: the study has 0.05, this run has 0.1"),
        ({"step": 0.1}, "search.step: the study has None, this run has 0.1"),
        ({"sampler": "gp"}, "search.sampler: the study has 'auto', this run has 'gp'"),
    ):
        with pytest.raises(InputError, match=message):
            open_study(starting(project, search=changes))


@pytest.mark.usefixtures("by_descent")
def test_rows_without_an_answer_make_it_uniform_unless_a_descent_was_asked_for(tmp_path: Path) -> None:
    project = harness_project(tmp_path / "p", shots=CASES["shots"][0], written=CASES["written"][0])
    task = project.folder / "tasks" / "tiny_written.yaml"
    task.write_text(yaml.safe_dump({**yaml.safe_load(task.read_text()), "doc_to_target": ""}))
    session = ran(starting(project, search={"trials": 2}))
    assert session.plan.startup == "uniform"
    assert project.json("status", "spec.yaml")["search"]["startup"] == "uniform"
    with pytest.raises(InputError, match="no target text"):
        open_study(starting(project, name="asked", search={"startup": "descent"}))


@pytest.mark.usefixtures("by_descent")
def test_memory_for_a_trial_and_not_for_its_slopes_makes_it_uniform(project: Project) -> None:
    def validated(**changes: Any) -> Any:
        starting(project, method="df-merge", **changes)
        return project.json("validate", "spec.yaml")

    without = validated(search={"startup": "uniform"})["estimate"]
    left_open = validated()
    assert left_open["search"]["startup"] == "descent"
    assert left_open["estimate"]["peak_bytes"] > without["peak_bytes"]
    enough = f"{without['peak_bytes'] / 1000 + 1:.3f}kB"
    found = validated(memory=enough)
    assert found["search"]["startup"] == "uniform"
    assert found["estimate"]["memory"]["parts"] == 1


@pytest.mark.usefixtures("by_descent")
def test_who_finds_the_study_founded_takes_what_its_founder_decided(project: Project) -> None:
    other = starting(project, search={"startup": "uniform"})
    session = open_study(starting(project), on_loaded=lambda problem: open_study(other) and None)
    session.run(target=3)
    assert session.plan.startup == session.problem.spec.search.startup == "uniform"
    assert not any(GRADIENT in trial.user_attrs for trial in results(session.study))


# What is refused


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"search": {"sampler": "gp"}}, ["startup: descent goes with sampler: auto", "sampler: gp"]),
        ({"search": {"sampler": "random"}}, ["startup: descent goes with sampler: auto", "sampler: random"]),
        ({"search": {"sampler": "gradient"}}, ["startup: descent goes with sampler: auto", "sampler: gradient"]),
        (
            {"search": {"sampler": None, "acquisition": "ucb"}},
            ["startup: descent goes with sampler: auto", "acquisition: ucb"],
        ),
        ({"search": {"sampler": "gradient", "startup": "uniform"}}, ["gradient descends from its first trial on"]),
        ({"search": {"step": 0.1}}, ["startup: descent takes steps of any length; leave step out"]),
        ({"objective": "min"}, ["startup: descent descends a mean", "is min", "or startup: uniform"]),
        ({"objective": "pareto"}, ["objective", "is pareto"]),
        ({"method": "df-merge-kfac"}, ["importance in blocks", "Use startup: uniform"]),
        (
            {"method": {"transform": "dare", "importance": "uniform", "coefficients": "per-expert"}},
            ["slopes of coefficients only", "drop_rate"],
        ),
    ],
)
def test_a_descent_that_cannot_be_is_refused_with_the_field_and_the_way_out(
    project: Project, changes: dict[str, Any], messages: list[str]
) -> None:
    search = {"sampler": "auto", "startup": "descent", **changes.pop("search", {})}
    project.write(search=search, **changes)
    refused = project.cli("validate", "spec.yaml", check=2).stderr
    for message in messages:
        assert message in refused


def test_a_scoring_function_of_one_s_own_has_no_slopes_and_starts_uniformly() -> None:
    base, experts = toys("a", "b")
    fields: dict[str, Any] = {"method": "gta", "trials": 3, "seed": 1}
    with pytest.raises(InputError, match="no slopes"):
        optimize_merge(base, experts, target_score, startup="descent", **fields)
    left_open = optimize_merge(base, experts, target_score, **fields)
    uniform = optimize_merge(base, experts, target_score, startup="uniform", **fields)
    assert [trial.params for trial in left_open.study.trials] == [trial.params for trial in uniform.study.trials]


# Beside others


def test_a_comparison_that_is_told_to_descend_says_which_methods_cannot(
    project: Project,
) -> None:
    methods = "gta,df-merge-agreement,averaging,df-merge-gp"
    starting(project, method="df-merge", search={"trials": 2, "startup": "descent"}, name="told")
    told = project.cli("compare", "spec.yaml", "--methods", methods, "--split", "test", "--json")
    found = {}
    for method in methods.split(","):
        found[method] = stored_fingerprint(studied(project, f"told.{method}")).get("search.startup")
    assert found == {"gta": "descent", "df-merge-agreement": "uniform", "averaging": None, "df-merge-gp": None}
    assert "told.df-merge-agreement (by auto, from uniform points: it has no slopes to descend)" in told.stderr
    assert all(json.loads(told.stdout))


def test_patience_counts_after_the_startup_trials_whatever_they_are() -> None:
    noise = Noise(ObjectiveSettings(), Metrics({}), {})
    for startup in ("uniform", "descent", None):
        rule = Rule.of(SearchSettings.model_validate({"startup": startup, "patience": 3}), noise)
        assert rule is not None
        assert rule.startup == 10
