"""A study from spec to export through the real command line: cut anywhere, resumed, extended, joined."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from dfmerge_studies.spec import StudySpec
from dfmerge_studies.storage import create_study, open_storage
from dfmerge_studies.study import provenance
from dfmerge_studies.study.session import open_study
from dfmerge_studies.trials.reading import results
from tests.processes import Forked, command
from tests.project import Project, cli_environment

EXPERTS = ("red", "blue")
optuna.logging.set_verbosity(optuna.logging.ERROR)


def completed(project: Project, name: str = "colours") -> list[tuple[dict[str, float], float, dict[str, float]]]:
    """Coefficients, value and task scores of every completed trial, in order, exactly."""
    study = optuna.load_study(study_name=name, storage=f"sqlite:///{project.folder / 'colours.db'}")
    trials = study.get_trials(states=(TrialState.COMPLETE,))
    return [
        (t.user_attrs["coefficients"], t.value, t.user_attrs["tasks"])
        for t in sorted(trials, key=lambda t: t.user_attrs["place"])
    ]


def start(project: Project, *arguments: str) -> Forked:
    return project.start("run", "spec.yaml", *arguments)


def wait_for_trials(project: Project, process: Forked, count: int) -> None:
    """Read progress lines until `count` trials are complete."""
    assert process.stderr is not None
    for line in process.stderr:
        if f": {count}/" in line:
            return
    raise AssertionError(f"the run ended with {process.wait()} before {count} trials")


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_after_a_run_the_one_file_of_the_study_has_all_of_it(project: Project, tmp_path: Path, workers: str) -> None:
    words = ["run", "spec.yaml", "--no-test", "--workers", workers]
    environment = {**os.environ, **cli_environment()}
    # A process of its own, which ends as a user's does: those of other tests leave without cleaning up.
    done = subprocess.run([sys.executable, "-m", "dfmerge_studies", *words], cwd=project.folder, env=environment)
    assert done.returncode == 0
    assert [file.name for file in project.folder.glob("colours.db*")] == ["colours.db"]
    copy = shutil.copy(project.folder / "colours.db", tmp_path / "copy.db")
    trials = optuna.load_study(study_name="colours", storage=f"sqlite:///{copy}").trials
    assert sum(trial.state == TrialState.COMPLETE for trial in trials) == len(completed(project))


@pytest.mark.slow
def test_a_run_reaches_its_total_and_says_what_it_did(project):
    printed = project.json("run", "spec.yaml")
    assert printed["trials"] == {"target": 4, "complete": 4, "running": 0, "waiting": 0, "failed": 0, "pruned": 0}
    assert printed["study"] == "colours"
    assert printed["method"] == "df-merge"
    best = printed["best"]
    assert best["value"] == pytest.approx(sum(best["tasks"].values()) / 2)
    assert best["value"] == max(value for _, value, _ in completed(project))
    assert printed["storage"] == f"sqlite:///{project.folder / 'colours.db'}"
    assert [row["name"] for row in printed["rows"]][:2] == ["base, unmerged", "each task's own expert"]
    assert set(printed["rows"][-1]) >= {"validation", "test", "coefficients"}
    assert project.json("status", "spec.yaml")["best"] == best
    listed = project.json("list", "spec.yaml")
    whose = {"metric": "accuracy", "task_metrics": {"red": "accuracy", "blue": "accuracy"}, "guards": {}}
    assert listed == [
        {
            "study": "colours",
            "method": "df-merge",
            "trials": printed["trials"],
            "best_value": best["value"],
            "stopped": None,
            **whose,
        }
    ]


@pytest.mark.slow
def test_the_first_trial_is_one_over_m_and_asked_for_points_follow(project):
    project.write(search={"trials": 3, "startup_trials": 3, "enqueue": [0.25, {"red": 1.0, "blue": 0.0}]})
    project.json("run", "spec.yaml")
    points = [point for point, _, _ in completed(project)]
    assert points == [{"red": 0.5, "blue": 0.5}, {"red": 0.25, "blue": 0.25}, {"red": 1.0, "blue": 0.0}]


def test_every_trial_carries_scores_timings_and_cache_hits(finished):
    study = optuna.load_study(study_name="colours", storage=f"sqlite:///{finished.folder / 'colours.db'}")
    for trial in study.get_trials():
        attributes = trial.user_attrs
        assert set(attributes["tasks"]) == set(attributes["drops"]) == set(EXPERTS)
        assert set(attributes["seconds"]) == {"fisher", "merge", "evaluate"}
        assert sum(attributes["fishers"].values()) == len(EXPERTS)
    assert study.user_attrs["dfmerge:fisher_indices"].keys() == set(EXPERTS)
    assert "torch" in study.user_attrs["dfmerge:versions"]


LONGER = {"trials": 6, "startup_trials": 3}


@pytest.fixture(scope="module")
def whole(make_copy: Callable[..., Project], tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose study of six trials ran without a cut."""
    project = make_copy("t5", tmp_path_factory.mktemp("whole"))
    project.write(search=LONGER)
    project.json("run", "spec.yaml", "--no-test")
    return project


@pytest.mark.slow
def test_ctrl_c_at_the_last_trial_ends_the_run_before_its_baselines(project: Project) -> None:
    project.write(baselines=["task-arithmetic"])
    process = start(project)
    wait_for_trials(project, process, project.spec["search"]["trials"])
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, (output, errors)
    assert "interrupted" in output + errors
    printed = project.json("run", "spec.yaml")
    assert [row["name"] for row in printed["rows"]][2] == "task-arithmetic"


@pytest.mark.slow
@pytest.mark.parametrize(("how", "stops"), [("kill", (2, 4)), ("terminate", (4,)), ("interrupt", (2,))])
def test_a_run_that_was_cut_and_resumed_gives_the_very_same_trials(whole, project, how, stops):
    cut = project
    cut.write(search=LONGER)
    chance = random.Random(how)
    for stop in stops:
        process = start(cut)
        wait_for_trials(cut, process, stop)
        time.sleep(chance.uniform(0.0, 0.15))
        process.send_signal({"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "interrupt": signal.SIGINT}[how])
        process.communicate(timeout=60)
        assert process.returncode == (-signal.SIGKILL if how == "kill" else 130)
        before = completed(cut)
        assert len(before) >= stop
    resumed = cut.json("run", "spec.yaml", "--no-test")
    assert resumed["trials"]["complete"] == 6
    assert completed(cut)[: len(before)] == before
    assert completed(cut) == completed(whole)


@pytest.mark.slow
def test_a_finished_study_runs_nothing_more_and_add_extends_it(project):
    project.json("run", "spec.yaml", "--trials", "3")
    first = completed(project)
    assert project.json("run", "spec.yaml", "--trials", "3")["trials"]["complete"] == 3
    extended = project.json("run", "spec.yaml", "--trials", "3", "--set", "search.trials=3")
    assert extended["trials"]["target"] == 3
    grown = project.json("run", "spec.yaml", "--add", "2")
    assert grown["trials"] == {**grown["trials"], "target": 6, "complete": 6}
    assert completed(project)[:3] == first
    assert project.json("status", "spec.yaml")["trials"]["target"] == 6


@pytest.mark.slow
def test_the_same_files_under_another_path_are_the_same_study(project, tmp_path):
    project.json("run", "spec.yaml", "--trials", "2")
    moved = tmp_path / "moved"
    project.folder.rename(moved)
    again = Project(moved, project.family, project.spec)
    again.write(base=str(moved / "base"))
    assert again.json("run", "spec.yaml", "--trials", "3")["trials"]["complete"] == 3


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"search": {"trials": 4, "startup_trials": 2, "seed": 7}}, "search.seed"),
        ({"method": "gta"}, "method"),
        ({"importance": {"samples": 5}}, "importance.samples"),
        ({"importance": {"samples": 4, "estimator": "empirical"}}, "importance.estimator"),
        ({"objective": "min"}, "objective"),
        ({"experts": {"red": "blue", "blue": "red"}}, "expert"),
        ({"experts": {"blue": "blue", "red": "red"}}, "experts"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_joining_with_other_science_is_refused_with_the_differences(studied, change, named):
    before = studied.files()
    studied.write(**change)
    failed = studied.cli("run", "spec.yaml", check=2)
    assert "is about something else" in failed.stderr
    assert named in failed.stderr
    studied.write()
    assert studied.files() == before


def test_changing_only_budget_and_batches_is_fine(studied):
    studied.write(token_budget=64, importance={"samples": 4, "row_budget": 64})
    studied.json("run", "spec.yaml", "--trials", "2", "--set", "cache=null")
    studied.write()


@pytest.fixture(scope="module")
def studied(tmp_path_factory, make_copy) -> Project:
    """A project with a study of two trials, shared by tests that leave it as it is."""
    project = make_copy("t5", tmp_path_factory.mktemp("studied"))
    project.json("run", "spec.yaml", "--trials", "2")
    return project


@pytest.mark.slow
def test_a_step_puts_every_coefficient_on_the_grid_and_fishers_recur(project):
    project.write(search={"trials": 6, "startup_trials": 4, "step": 0.5, "sampler": "gp"})
    printed = project.json("run", "spec.yaml")
    for point, _, _ in completed(project):
        assert all(value in (0.0, 0.5, 1.0) for value in point.values())
    assert printed["fishers"]["computed"] <= 6  # two experts at three values
    assert printed["fishers"]["computed"] + printed["fishers"]["cached"] == 12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "trials"), [("averaging", 1), ("fisher", 1), ("task-arithmetic", 11), ("gta", 4), ("ties", 11)]
)
def test_every_method_is_a_study(project, method, trials):
    printed = project.json("run", "spec.yaml", "--method", method)
    assert printed["method"] == method
    assert printed["trials"]["complete"] == printed["trials"]["target"] == trials
    points = [point for point, _, _ in completed(project)]
    if trials == 1:
        assert points == [{"red": 0.5, "blue": 0.5}]
    if method == "task-arithmetic":
        assert sorted(point["red"] for point in points) == [i / 10 for i in range(11)]
        assert all(point["red"] == point["blue"] for point in points)
    assert project.json("run", "spec.yaml", "--method", method)["trials"]["complete"] == trials
    if method != "fisher":
        assert printed["fishers"] == {"computed": 0, "cached": 0}


TENTHS = [i / 10 for i in range(19)]
GRIDS = {
    "ties": {(shared, None) for shared in TENTHS[8:]},
    "dare": {(shared, rate) for shared in TENTHS[:11] for rate in TENTHS[1:10:2]},
}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "family"), [("ties", "bert"), ("dare", "bert")])
def test_a_grid_that_was_killed_and_resumed_gives_the_same_trials_and_models(project_of, tmp_path, method, family):
    whole = project_of(family)
    shutil.copytree(whole.folder, tmp_path / "cut")
    cut = Project(tmp_path / "cut", family, dict(whole.spec))
    for each in (whole, cut):
        each.write(method=method)
    best = whole.json("run", "spec.yaml", "--no-test")["best"]
    process = start(cut)
    wait_for_trials(cut, process, 4)
    process.kill()
    process.communicate(timeout=60)
    resumed = cut.json("run", "spec.yaml", "--no-test")["best"]
    assert {**resumed, "number": 0} == {**best, "number": 0}
    assert completed(cut) == completed(whole)
    study = optuna.load_study(study_name="colours", storage=f"sqlite:///{cut.folder / 'colours.db'}")
    trials = study.get_trials(states=(TrialState.COMPLETE,))
    points = [(t.user_attrs["coefficients"]["red"], t.user_attrs.get("drop_rate")) for t in trials]
    assert set(points) == GRIDS[method]
    assert len(points) == len(GRIDS[method])

    exported, same = (each.json("export", "spec.yaml", "--out", "merged") for each in (cut, whole))
    assert exported["digest"] == same["digest"]
    assert exported.get("drop_rate") == best.get("drop_rate")
    scores = cut.json("evaluate", "spec.yaml", "--model", "merged")
    assert {task: entry["score"] for task, entry in scores["tasks"].items()} == best["tasks"]
    assert ("drop rate" in cut.cli("status", "spec.yaml").stdout) == (method == "dare")
    card = (cut.folder / "merged/README.md").read_text()
    command = next(line for line in card.splitlines() if line.startswith("dfmerge merge ")).split()[1:]
    assert cut.json(*_filled(command, "again"))["digest"] == exported["digest"]
    if method == "dare":
        rate = command.index("--drop-rate") + 1
        command[rate] = "0.25"
        assert cut.json(*_filled(command, "other"))["digest"] != exported["digest"]


def _filled(command: list[str], out: str) -> list[str]:
    return [{"SPEC.yaml": "spec.yaml", "DIR": out}.get(word, word) for word in command]


@pytest.mark.slow
def test_ucb_searches_with_step_and_constraint_and_its_kappa_is_part_of_the_study(project):
    project.write(search={"trials": 6, "startup_trials": 3, "step": 0.25, "max_drop": 30})
    printed = project.json("run", "spec.yaml", "--acquisition", "ucb", "--no-test")
    assert printed["trials"]["complete"] == 6
    points = [tuple(point.values()) for point, _, _ in completed(project)]
    assert all(value % 0.25 == 0 for point in points for value in point)
    assert not set(points[3:]) & set(points[:3])
    refused = project.cli("run", "spec.yaml", "--acquisition", "ucb", "--set", "search.kappa=1", check=2)
    assert "search.kappa: the study has 2.576, this run has 1.0" in refused.stderr
    assert "search.acquisition" in project.cli("run", "spec.yaml", check=2).stderr


@pytest.mark.slow
def test_max_drop_is_an_optuna_constraint_and_shown_in_status(project):
    project.write(search={"trials": 5, "startup_trials": 2, "max_drop": 10, "sampler": "gp"})
    project.json("run", "spec.yaml")
    status = project.json("status", "spec.yaml")
    assert set(status["best"]["drops"]) == set(EXPERTS)
    assert status["best"]["feasible"] == all(drop <= 10 for drop in status["best"]["drops"].values())
    study = optuna.load_study(study_name="colours", storage=f"sqlite:///{project.folder / 'colours.db'}")
    for trial in study.get_trials():
        drops = trial.user_attrs["drops"]
        expected = sorted(drop - 10 for drop in drops.values())
        assert sorted(trial.constraints.values()) == pytest.approx(expected, abs=1e-3)
    assert "max_drop" in project.cli("status", "spec.yaml").stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["min", "pareto", {"kind": "weighted", "weights": {"red": 3, "blue": 1}}])
def test_every_objective_runs_past_its_startup_trials_and_ends_in_one_best(project, kind):
    project.write(objective=kind, search={"trials": 5, "startup_trials": 2})
    best = project.json("run", "spec.yaml")["best"]
    scores = best["tasks"]
    if kind == "min":
        assert best["value"] == min(scores.values())
    elif kind == "pareto":
        assert best["values"] == list(scores.values())
        assert best["value"] == pytest.approx(sum(scores.values()) / 2)
        study = optuna.load_study(study_name="colours", storage=f"sqlite:///{project.folder / 'colours.db'}")
        assert best["number"] in [trial.number for trial in study.best_trials]
        assert study.metric_names == list(EXPERTS)
    else:
        assert best["value"] == pytest.approx((3 * scores["red"] + scores["blue"]) / 4)
    project.json("export", "spec.yaml", "--out", "best")


@pytest.mark.slow
def test_baselines_are_studies_of_their_own_beside_the_method(project):
    project.write(baselines=["averaging", "task-arithmetic"])
    printed = project.json("run", "spec.yaml")
    assert [row["name"].split()[0] for row in printed["rows"]] == [
        "base,",
        "each",
        "averaging",
        "task-arithmetic",
        "df-merge",
    ]
    names = [entry["study"] for entry in project.json("list", "spec.yaml")]
    assert names == ["colours", "colours.averaging", "colours.task-arithmetic"]
    assert project.json("run", "spec.yaml")["rows"] == printed["rows"]


@pytest.mark.slow
def test_an_expert_without_a_task_is_weighed_by_all_tasks(project):
    project.write(experts={"red": "red", "blue": "blue", "third": {"model": "blue", "task": None}})
    project.json("run", "spec.yaml", "--trials", "2")
    printed = project.json("fisher", "spec.yaml", "--expert", "third", "--out", "third.safetensors")
    assert printed["samples"] == 8


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5-v1.1", "mt5", "gpt2", "llama-tied", "llama", "bert", "distilbert", "roberta"])
def test_every_family_runs_exports_and_gives_the_trial_s_scores_again(project_of, family):
    project = project_of(family)
    best = project.json("run", "spec.yaml", "--trials", "2")["best"]
    exported = project.json("export", "spec.yaml", "--out", "merged")
    assert (exported["trial"], exported["value"]) == (best["number"], best["value"])
    scores = project.json("evaluate", "spec.yaml", "--model", "merged")
    assert {task: entry["score"] for task, entry in scores["tasks"].items()} == best["tasks"]


@pytest.mark.slow
def test_with_fewer_inputs_than_samples_all_are_used_and_the_count_is_what_was_used(project):
    project.write(importance={"samples": 1000})
    printed = project.json("fisher", "spec.yaml", "--expert", "red", "--out", "red.safetensors")
    assert printed["samples"] == 24
    assert project.json("validate", "spec.yaml")["estimate"]["fisher_inputs"] == {"red": 24, "blue": 24}


@pytest.mark.slow
def test_status_counts_the_workers_that_are_at_work(project):
    project.write(search={"trials": 30, "startup_trials": 30})
    process = start(project)
    wait_for_trials(project, process, 1)
    assert project.json("status", "spec.yaml")["workers"] <= 1
    assert project.json("status", "spec.yaml")["trials"]["failed"] == 0  # looking takes no trial from a live worker
    process.kill()
    process.communicate()
    assert project.json("status", "spec.yaml")["workers"] == 0


@pytest.mark.slow
def test_two_runs_of_one_spec_at_once_share_the_study_and_its_total(project):
    project.write(search={"trials": 8, "startup_trials": 3, "sampler": "gp"})
    both = [start(project), start(project)]
    for process in both:
        process.communicate(timeout=240)
    assert [process.returncode for process in both] == [0, 0]
    status = project.json("status", "spec.yaml")
    assert status["trials"]["complete"] == 8
    assert status["trials"]["running"] == status["trials"]["waiting"] == 0


def _run_that_waits_briefly(words: list[str]) -> None:
    """A run that gives up after a moment to wait for the marks of one that has created the study and not founded it."""
    vars(provenance)["_FOUNDING_SECONDS"] = 0.2
    command(words)


@pytest.mark.slow
@pytest.mark.parametrize("looks", [1, 2])
def test_a_study_that_another_run_founds_while_this_one_looks_at_it_is_joined(project, monkeypatch, looks):
    """Its marks and its first trial appear between two looks of this run: no marks, and then a trial."""
    get_trials, looked = optuna.Study.get_trials, 0

    def founded_meanwhile(study, **options):
        nonlocal looked
        looked += 1
        if looked == looks:
            words = ["run", "spec.yaml", "--trials", "1", "--no-test"]
            other = Forked(_run_that_waits_briefly, words, folder=project.folder, environment=cli_environment())
            _, errors = other.communicate(timeout=300)
            assert other.returncode == 0, errors
        return get_trials(study, **options)

    storage = open_storage(f"sqlite:///{project.folder}/colours.db")
    assert create_study(storage, "colours", directions=["maximize"])
    monkeypatch.setattr(optuna.Study, "get_trials", founded_meanwhile)
    session = open_study(StudySpec.from_yaml(project.file))
    assert looked >= looks
    assert [trial.user_attrs["place"] for trial in results(session.study)] == [0]


def test_a_deleted_row_of_data_makes_another_study(studied):
    file = studied.folder / "red.validation.jsonl"
    content = file.read_text()
    file.write_text("".join(line + "\n" for line in content.splitlines()[:-1]))
    try:
        assert "data digest of red" in studied.cli("run", "spec.yaml", check=2).stderr
    finally:
        file.write_text(content)


@pytest.mark.slow
def test_the_storage_can_come_from_the_environment(project, tmp_path):
    url = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    project.cli("run", "spec.yaml", "--trials", "1", "--json", DFMERGE_STORAGE=url)
    assert (tmp_path / "elsewhere.db").exists()
    assert not (project.folder / "colours.db").exists()
