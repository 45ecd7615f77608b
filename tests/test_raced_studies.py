"""Studies whose trials are raced: what a stopped trial leaves, and that nothing takes its estimate for a score."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import FrozenTrial, TrialState, create_trial
from optuna_dashboard import get_note

from dfmerge_studies import InputError, optimize_merge
from dfmerge_studies.objective.merger import Merger
from dfmerge_studies.racing import Rival
from dfmerge_studies.report.notes import publish, study_note
from dfmerge_studies.report.view import StudyView
from dfmerge_studies.search import make_sampler
from dfmerge_studies.spec import ObjectiveSettings, SearchSettings, StudySpec
from dfmerge_studies.storage import id_of, join_study, load_study, open_storage
from dfmerge_studies.study.races import Races
from dfmerge_studies.study.rows import trial_rows
from dfmerge_studies.study.session import Session, open_study
from dfmerge_studies.study.stopping import Noise, Rule
from dfmerge_studies.study.variants import study_spec, variants
from dfmerge_studies.study.warm_start import best_points
from dfmerge_studies.tasks.metrics import Metrics
from dfmerge_studies.trials.loop import work
from dfmerge_studies.trials.marks import GRADIENT, PROPOSAL, RACED, ROWS, TASKS, place_of
from dfmerge_studies.trials.outbox import Outbox
from dfmerge_studies.trials.owner import working
from dfmerge_studies.trials.reading import counts, ended, pruned_of, results, settled
from dfmerge_studies.trials.results import Event, TrialResult
from dfmerge_studies.trials.space import Space
from dfmerge_studies.trust_region import Goal
from tests.project import Project, make_project
from tests.servers import STORAGES
from tests.test_in_memory import target_score, toys

optuna.logging.set_verbosity(optuna.logging.ERROR)
SPACE = Space(("a", "b"))
LOOSE = {"error": 0.3}  # so that many of a small project's trials are stopped
TRIALS = 8


def search(**changes: Any) -> dict[str, Any]:
    return {"trials": TRIALS, "startup_trials": 3, "sampler": "random", "racing": LOOSE, **changes}


def study_at(project: Project) -> optuna.Study:
    return load_study(open_storage(f"sqlite:///{project.folder}/colours.db", create=False), "colours")


def history(study: optuna.Study) -> list[tuple[Any, ...]]:
    """What a run without interruption and one that was cut must have in common."""
    done = sorted((t for t in study.trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)), key=place_of)
    raced = [{**t.user_attrs[RACED], "against": None} for t in done]  # a number, which a retry changes
    return [(t.params, t.state, t.values, t.intermediate_values, r) for t, r in zip(done, raced, strict=True)]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_project(tmp_path_factory.mktemp("raced") / "project", "bert", rows=60, samples=2)


@pytest.fixture(scope="module")
def raced(bert: Project) -> Project:
    """A study of uniform trials that were raced; nobody may change it."""
    bert.write(search=search())
    bert.cli("run", "spec.yaml", "--no-test")
    return bert


@pytest.fixture
def fresh(bert: Project, tmp_path: Path) -> Project:
    """The same models and data without a study."""
    project = Project(bert.folder, bert.family, {**bert.spec, "storage": f"sqlite:///{tmp_path}/colours.db"})
    project.spec["base"] = str(bert.folder / "base")
    project.spec["experts"] = {name: str(bert.folder / name) for name in ("red", "blue")}
    project.spec["cache"] = "none"
    tasks = json.loads(json.dumps(bert.spec["tasks"]))
    for task in tasks.values():
        files = task["dataset"]["data_files"]
        task["dataset"]["data_files"] = {split: str(bert.folder / file) for split, file in files.items()}
    project.spec["tasks"] = tasks
    return Project(tmp_path, bert.family, project.spec)


def opened(project: Project, **changes: Any) -> Session:
    return open_study(StudySpec.from_yaml(project.write(search=search(**changes))))


# What a trial leaves


def test_some_trials_are_pruned_and_all_count_towards_the_total(raced: Project) -> None:
    study = study_at(raced)
    counted = counts(study)
    assert counted["pruned"] >= 2
    assert counted["complete"] >= 2
    assert ended(counted) == TRIALS == len(study.trials)


def test_a_pruned_trial_has_estimates_and_their_errors_and_nothing_that_looks_like_a_score(raced: Project) -> None:
    study = study_at(raced)
    numbers = {trial.number for trial in results(study)}
    for trial in pruned_of(study.trials):
        kept = trial.user_attrs[RACED]
        assert not {TASKS, ROWS, "drops"} & set(trial.user_attrs)
        assert trial.constraints == {}
        assert kept["against"] in numbers
        assert sum(kept["rows"].values()) == kept["scored"] < kept["of"] == 120
        value, error = kept["value"]
        assert error > 0
        assert trial.value == value == trial.intermediate_values[kept["scored"]]  # as Optuna has it
        assert {len(each) for each in kept["tasks"].values()} == {2}
        assert list(trial.user_attrs["coefficients"]) == ["red", "blue"]


def test_a_trial_that_was_not_pruned_scores_on_all_rows_what_it_scores_without_races(fresh: Project) -> None:
    session = opened(fresh)
    session.run()
    whole = [trial for trial in results(session.study) if trial.user_attrs[RACED]["against"] is not None]
    assert whole
    for trial in whole:
        session.merge_(trial)
        again = session.merger.results("validation")
        assert trial.user_attrs[TASKS] == {task: found.score for task, found in again.items()}
        assert trial_rows(trial) == {task: list(found.rows or ()) for task, found in again.items()}
        assert trial.user_attrs[RACED]["scored"] == trial.user_attrs[RACED]["of"] == 120


def test_estimates_are_those_of_the_first_rows_of_the_order_against_the_incumbent(raced: Project) -> None:
    session = open_study(StudySpec.from_yaml(raced.file))
    races = Races(session)
    for trial in pruned_of(session.study.trials):
        incumbent = races.incumbent(place_of(trial))
        assert incumbent is not None
        assert incumbent.number == trial.user_attrs[RACED]["against"]
        rival = races.rival(incumbent)
        assert rival is not None
        session.merger.merge_(session.point(trial))
        rows = {task: list(found.rows or ()) for task, found in session.merger.results("validation").items()}
        first = rival.order()[: trial.user_attrs[RACED]["scored"]]
        estimate = rival.estimate([((task, row), rows[task][row]) for task, row in first])
        assert trial.value == pytest.approx(estimate.value)
        assert trial.user_attrs[RACED]["tasks"] == {t: pytest.approx(list(e)) for t, e in estimate.tasks.items()}


def test_the_incumbent_is_the_best_whole_trial_before_a_place(raced: Project) -> None:
    session = open_study(StudySpec.from_yaml(raced.file))
    races = Races(session)
    assert races.incumbent(0) is None
    for place in range(1, TRIALS):
        before = [trial for trial in results(session.study) if place_of(trial) < place]
        found = races.incumbent(place)
        assert found is not None
        assert found.value == max(trial.value for trial in before if trial.value is not None)


def test_no_trial_is_raced_against_one_that_breaks_a_constraint(fresh: Project) -> None:
    session = opened(fresh, max_drop=0.0, trials=4, enqueue=[0.0])
    session.run()
    races = Races(session)
    for place in range(1, 5):
        before = [trial for trial in results(session.study) if place_of(trial) < place]
        kept = [trial for trial in before if all(each <= 0 for each in trial.constraints.values())]
        assert (races.incumbent(place) is None) == (not kept)


def test_trials_that_keep_no_rows_race_nothing_and_it_is_said_once(
    fresh: Project, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("dfmerge_studies.study.rows.LONGEST", 10)
    session = opened(fresh, trials=3)
    session.run()
    assert counts(session.study)["complete"] == 3
    assert [record.message for record in caplog.records if "nothing is raced" in record.message] == [
        "colours: nothing is raced, since trial 0 does not keep its score on each row of red, blue"
    ]


@pytest.mark.parametrize("objective", ["min", {"kind": "weighted", "weights": {"red": 3, "blue": 0}}, "agreement"])
def test_other_objectives_are_raced_by_their_own_value(fresh: Project, objective: Any) -> None:
    fresh.spec["objective"] = objective
    session = opened(fresh, trials=2 * TRIALS)
    session.run()
    assert ended(counts(session.study)) == 2 * TRIALS
    pruned = pruned_of(session.study.trials)
    assert pruned
    weighted = {"red"} if isinstance(objective, dict) else {"red", "blue"}
    for trial in pruned:
        tasks = {task: score for task, (score, _) in trial.user_attrs[RACED]["tasks"].items()}
        assert set(tasks) == weighted
        worth = min(tasks.values()) if objective == "min" else sum(tasks.values()) / len(tasks)
        assert trial.value == pytest.approx(worth)


def test_the_steps_of_a_startup_that_descends_are_scored_on_all_rows_and_what_follows_is_raced(fresh: Project) -> None:
    session = opened(fresh, sampler="auto", startup_trials=4, trials=9)
    assert session.plan.startup == "descent"
    session.run()
    trials = sorted(session.study.trials, key=place_of)
    sloped = [place_of(trial) for trial in trials if GRADIENT in trial.user_attrs]
    assert sloped == [0, 1, 2]  # the fourth is the last step: nothing follows from its slope
    assert all(trial.state == TrialState.COMPLETE for trial in trials[:3])
    raced = [place_of(trial) for trial in trials if trial.user_attrs[RACED]["against"] is not None]
    assert raced == [3, 4, 5, 6, 7, 8]


# Cut and resumed


@pytest.mark.slow
@pytest.mark.parametrize("startup", ["uniform", "descent"])
def test_a_raced_search_that_was_cut_in_the_middle_of_a_race_equals_an_uncut_one(
    fresh: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, startup: str
) -> None:
    settings = {"sampler": "auto", "startup": startup, "startup_trials": 3, "trials": 7}
    session = opened(fresh, **settings)
    session.run()
    uncut = history(session.study)
    assert any(state == TrialState.PRUNED for _, state, *_ in uncut)
    fresh.spec["storage"] = f"sqlite:///{tmp_path}/cut.db"
    answered, given = [0], Merger.given

    def interrupted(self: Merger, task: str, split: Any, rows: Any = None) -> Any:
        answered[0] += rows is not None
        if answered[0] in (5, 30):
            answered[0] += 1
            raise KeyboardInterrupt
        return given(self, task, split, rows)

    monkeypatch.setattr(Merger, "given", interrupted)
    for _ in range(9):
        try:
            session = opened(fresh, **settings)
            session.run()
        except KeyboardInterrupt:
            continue
        break
    assert history(session.study) == uncut
    assert len(session.study.trials) == 7 + 2


# The loop and the storages


def evaluate(point: dict[str, float], place: int) -> TrialResult:
    if place % 2:
        return TrialResult((0.25,), {RACED: {"scored": 8}}, pruned=True, intermediate={4: 0.5, 8: 0.25})
    return TrialResult((point["a"],), {TASKS: {"t": point["a"]}}, constraints=(-1.0,), intermediate={4: 0.75})


@pytest.mark.parametrize("kind", STORAGES[:-1])  # behind a proxy it is a database again
def test_every_storage_takes_pruned_trials_with_their_way(
    kind: str, new_storage: Callable[[str], str], tmp_path: Path
) -> None:
    sampler = make_sampler("random", seed=0, study_name="s", space=SPACE)
    url = new_storage(kind)
    study = join_study(open_storage(url), "s", directions=["maximize"], sampler=sampler)
    events = list[Event]()
    summary = work(study, SPACE, evaluate, target=4, outbox=tmp_path / "out", on_event=events.append)
    assert (summary.completed, summary.counts["complete"], summary.counts["pruned"]) == (4, 2, 2)
    assert [event.kind for event in events if event.kind != "started"] == ["completed", "pruned"] * 2
    stored = sorted(load_study(open_storage(url), "s").trials, key=place_of)
    assert [trial.state for trial in stored] == [TrialState.COMPLETE, TrialState.PRUNED] * 2
    assert stored[1].values == [0.25]
    assert stored[1].intermediate_values == {4: 0.5, 8: 0.25}
    assert stored[0].intermediate_values == {4: 0.75}
    assert [len(trial.constraints) for trial in stored] == [1, 0, 1, 0]
    assert list((tmp_path / "out").iterdir()) == []
    assert [place_of(trial) for trial in settled(stored)] == [0, 1, 2, 3]


def test_a_pruned_result_that_was_not_told_is_applied_as_one(tmp_path: Path) -> None:
    sampler = make_sampler("random", seed=0, study_name="s", space=SPACE)
    study = join_study(open_storage(f"sqlite:///{tmp_path}/s.db"), "s", directions=["maximize"], sampler=sampler)
    with working() as owner:
        trial = study.ask(dict(SPACE.distributions()))
        for name, value in {"owner": {**owner, "pid": 2**22 + 1}, "place": 0, "drawn": True}.items():
            trial.set_user_attr(name, value)
        outbox = Outbox(tmp_path / "out", study)
        outbox.write(0, {**owner, "pid": 2**22 + 1}, evaluate({}, 1))
        assert outbox.apply() == 1
    (told,) = study.trials
    assert (told.state, told.values, told.intermediate_values) == (TrialState.PRUNED, [0.25], {4: 0.5, 8: 0.25})
    assert told.user_attrs[RACED] == {"scored": 8}


# What learns from them


def trial_at(place: int, point: dict[str, float], **more: Any) -> FrozenTrial:
    ranges = SPACE.distributions()
    attributes = {"place": place, **more.pop("attributes")}
    return create_trial(params=point, distributions={**ranges}, user_attrs=attributes, **more)


def whole_at(place: int, a: float, b: float, value: float) -> FrozenTrial:
    return trial_at(place, {"a": a, "b": b}, values=[value], attributes={TASKS: {"t": value, "guard": 0.5}})


def pruned_at(place: int, a: float, b: float, value: float, error: float) -> FrozenTrial:
    raced = {"value": [value, error], TASKS: {"t": [value, error]}}
    return trial_at(place, {"a": a, "b": b}, values=[value], state=TrialState.PRUNED, attributes={RACED: raced})


def proposal_after(*trials: FrozenTrial) -> tuple[dict[str, float], dict[str, Any]]:
    goal = Goal(guards=frozenset({"guard"}))
    sampler = make_sampler("auto", seed=0, study_name="s", space=SPACE, startup_trials=4, goal=goal)
    study = optuna.create_study(direction="maximize", sampler=sampler, study_name="s")
    study.add_trials(trials)
    study.ask({**SPACE.distributions()})
    last = study.trials[-1]
    return last.params, last.user_attrs[PROPOSAL]


def surface(a: float, b: float) -> float:
    return 0.8 - (a - 0.6) ** 2 - (b - 0.4) ** 2


POINTS = [(0.1, 0.1), (0.9, 0.2), (0.5, 0.5), (0.2, 0.8), (0.7, 0.7), (0.4, 0.3)]


def test_an_estimate_weighs_in_the_model_by_its_error() -> None:
    known = [whole_at(i, a, b, surface(a, b)) for i, (a, b) in enumerate(POINTS)]
    there = (0.6, 0.4)  # the best point, whose estimate is far too low
    without, _ = proposal_after(*known)
    vague, _ = proposal_after(*known, pruned_at(6, *there, 0.2, 5.0))
    exact, _ = proposal_after(*known, pruned_at(6, *there, 0.2, 1e-3))
    off = {name: abs(vague[name] - without[name]) for name in vague}
    assert max(off.values()) < 0.05
    assert max(abs(exact[name] - without[name]) for name in exact) > 0.1


def test_stopped_trials_count_as_startup_and_never_are_the_centre_of_a_region() -> None:
    known = [whole_at(0, 0.2, 0.2, 0.5), *(pruned_at(i, a, b, 0.9, 0.1) for i, (a, b) in enumerate(POINTS[:3], 1))]
    _, expected = proposal_after(*known)
    assert expected["region"]["centre"] == pytest.approx({"a": 0.2, "b": 0.2})


def test_without_stopped_trials_proposals_are_what_they_were() -> None:
    from dfmerge_studies.surrogate import WHOLE, History, proposal, utility

    x = torch.tensor(POINTS, dtype=torch.float64)
    s = torch.tensor([[surface(*p)] for p in POINTS], dtype=torch.float64)
    plain = proposal(History(x, s), utility("mean", None), region=WHOLE, seed=0)
    assert History(x, s).errors is None
    assert plain.point.tolist() == proposal(History(x, s), utility("mean", None), region=WHOLE, seed=0).point.tolist()


def test_patience_counts_stopped_trials_as_trials_without_gain() -> None:
    noise = Noise(ObjectiveSettings(), Metrics.named({"t": "accuracy"}), {"t": 100})
    rule = Rule.of(SearchSettings.model_validate({"startup_trials": 1, "patience": 3}), noise)
    assert rule is not None
    whole = [create_trial(values=[0.5], user_attrs={"place": 0, TASKS: {"t": 0.5}})]
    promising = [
        create_trial(state=TrialState.PRUNED, values=[0.9], user_attrs={"place": place, RACED: {}})
        for place in (1, 2, 3)
    ]
    assert rule.stop([*whole, *promising[:2]], 1) is None
    stop = rule.stop([*whole, *promising], 1)
    assert stop is not None
    assert stop.after == 4


def test_another_study_starts_from_whole_trials_alone(raced: Project) -> None:
    study = study_at(raced)
    settings = SearchSettings.model_validate({"warm_start": {"study": "colours", "points": 50}}).warm_start
    assert settings is not None
    points = best_points(study, Space(("red", "blue")), ["red", "blue"], settings)
    assert {each["trial"] for each in points} <= {trial.number for trial in results(study)}


# What is shown


def test_status_says_how_many_were_stopped_and_how_many_rows_that_saved(raced: Project) -> None:
    study = study_at(raced)
    pruned, whole = pruned_of(study.trials), results(study)
    scored = sum(trial.user_attrs[RACED]["scored"] for trial in [*pruned, *whole])
    found = raced.json("status", "spec.yaml")
    assert found["racing"] == {"stopped": len(pruned), "rows_scored": scored, "rows": 120 * TRIALS}
    assert found["trials"]["complete"] + found["trials"]["pruned"] == found["trials"]["target"] == TRIALS
    assert found["seconds_left"] == 0.0
    assert found["best"]["number"] in {trial.number for trial in whole}
    shown = raced.cli("status", "spec.yaml").stdout
    assert f"{len(whole)} of {TRIALS} complete, {len(pruned)} pruned" in shown
    assert f"stopped early; {scored} of {120 * TRIALS} rows scored" in shown


def test_the_dashboard_s_notes_tell_estimates_from_scores(raced: Project, tmp_path: Path) -> None:
    view = StudyView.of(study_at(raced))
    assert len(view.trials) + len(view.pruned) == TRIALS
    assert "stopped early" in study_note(view)
    optuna.copy_study(
        from_study_name="colours",
        from_storage=f"sqlite:///{raced.folder}/colours.db",
        to_storage=f"sqlite:///{tmp_path}/copy.db",
    )
    study = load_study(open_storage(f"sqlite:///{tmp_path}/copy.db"), "colours")
    assert publish(study)
    for trial in pruned_of(study.trials):
        text = get_note(optuna.Trial(study, id_of(trial)))
        assert "since it could not win against trial" in text
        assert "Number" not in text


def test_a_stopped_trial_cannot_be_exported_and_the_message_says_why(raced: Project, tmp_path: Path) -> None:
    number = pruned_of(study_at(raced).trials)[0].number
    done = raced.cli("export", "spec.yaml", "--trial", str(number), "--out", tmp_path / "out", check=2)
    assert f"trial {number} was stopped on a part of its rows" in done.stderr


# What is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"search": search(sampler="gp")}, "racing needs sampler: auto or random"),
        ({"search": search(sampler=None, acquisition="ucb")}, "racing needs sampler: auto or random"),
        ({"search": search(racing={"error": 0.9})}, "search.racing"),
        ({"search": search(racing=0.1)}, "search.racing"),
        ({"search": search(), "objective": "pareto"}, "racing has one objective"),
    ],
)
def test_what_cannot_be_raced_is_refused_by_name(fresh: Project, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        StudySpec.from_yaml(fresh.write(**changes))


def test_a_metric_of_all_rows_together_is_refused_for_tasks_of_the_objective_alone(fresh: Project) -> None:
    fresh.spec["tasks"]["red"]["metric"] = "mcc"
    with pytest.raises(InputError, match=r"tasks\.red\.metric: search\.racing needs metrics that are means over rows"):
        StudySpec.from_yaml(fresh.write(search=search()))
    fresh.spec["experts"] = {"blue": fresh.spec["experts"]["blue"]}
    fresh.spec["tasks"]["red"] |= {"guard": True, "max_drop": 5}
    assert StudySpec.from_yaml(fresh.write(search=search())).search.race is not None


def test_false_and_true_are_short_forms() -> None:
    assert SearchSettings.model_validate({"racing": False}).race is None
    race = SearchSettings.model_validate({"racing": True}).race
    assert race is not None
    assert race.error == 0.1


def test_a_study_is_raced_or_not_from_its_beginning_to_its_end(raced: Project) -> None:
    done = raced.cli("run", "spec.yaml", "--set", "search.racing=false", "--no-test", check=2)
    assert "search.racing: the study has {'error': 0.3}, this run has None" in done.stderr


def test_models_in_memory_are_not_raced() -> None:
    base, experts = toys()
    with pytest.raises(InputError, match="rows that a trial could be stopped on are not known"):
        optimize_merge(base, experts, target_score, trials=2, racing=True)


def test_the_rows_of_a_comparison_whose_sampler_cannot_learn_from_stopped_trials_are_not_raced(fresh: Project) -> None:
    spec = StudySpec.from_yaml(fresh.write(search=search(sampler=None)))
    assert study_spec(spec, variants()["df-merge-gp"], 0).search.race is None
    assert study_spec(spec, variants()["task-arithmetic"], 0).search.race is not None


def test_a_rival_is_plain_data_that_other_ranks_can_be_sent() -> None:
    import pickle

    rival = Rival({"a": [1.0, 0.0]}, {"a": 1.0}, {"a": 1.0}, 0.1, 0)
    assert pickle.loads(pickle.dumps(rival)) == rival
