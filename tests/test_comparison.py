"""Comparisons: which studies they are made of, what they share, what they take over from earlier runs."""

from __future__ import annotations

import csv
import io
import json
import signal

import optuna
import pytest
from optuna.trial import TrialState

from dfmerge_studies import InputError, StudySpec, compare, load_problem
from dfmerge_studies.objective.derive import derive_problem
from dfmerge_studies.study.scores import multi_task_row, stored_scores
from dfmerge_studies.study.variants import Variant, study_spec, variants

optuna.logging.set_verbosity(optuna.logging.ERROR)
SHORT = {"trials": 3, "startup_trials": 2, "sampler": "gp"}


def test_a_problem_derived_for_another_seed_is_the_one_that_would_be_loaded(project):
    tasks = {name: {**task, "limit": 9} for name, task in project.spec["tasks"].items()}
    project.write(tasks=tasks, importance={"samples": 6, "indices": {"red": [1, 2, 3]}})
    spec = StudySpec.from_yaml(project.file)
    problem = load_problem(spec)
    problem.reference_scores["base", "validation"] = {"red": 0.5}
    problem.reference_scores["base", "test"] = {"red": 0.25}
    other = spec.derive(search={"seed": 1})
    derived, loaded = derive_problem(problem, other), load_problem(other)
    assert derived.fisher_indices() == loaded.fisher_indices() != problem.fisher_indices()
    assert derived.fisher_indices()["red"] == [1, 2, 3]
    assert derived.data_digests() == loaded.data_digests() != problem.data_digests()
    assert derived.data_digests("test") == problem.data_digests("test")
    assert derived.resident is problem.resident
    assert derived.reference_scores == {("base", "test"): {"red": 0.25}}  # of the rows that are still the same
    same_seed = derive_problem(problem, spec.derive(method="gta"))
    assert same_seed.reference_scores == problem.reference_scores
    stored = {"red": [5], "blue": [7, 8]}
    assert derive_problem(problem, other, indices=stored).fisher_indices() == stored


def test_a_problem_is_not_derived_for_other_models(project):
    spec = StudySpec.from_yaml(project.file)
    problem = load_problem(spec)
    for changes in ({"experts": {"red": "blue", "blue": "red"}}, {"dtype": "bfloat16"}, {"base": "red"}):
        with pytest.raises(InputError, match="those of another spec"):
            derive_problem(problem, spec.derive(**changes))


@pytest.mark.slow
def test_studies_that_run_has_made_are_taken_as_they_are(project):
    project.write(baselines=["averaging", "task-arithmetic"])
    printed = project.json("run", "spec.yaml")
    run = {row["name"].split()[0]: row["test"]["tasks"] for row in printed["rows"]}
    before = project.files()
    found = compare(StudySpec.from_yaml(project.file), ["df-merge", "averaging", "task-arithmetic"])
    assert {entry.variant: entry.study for entry in found.entries} == {
        "df-merge": "colours",
        "averaging": "colours.averaging",
        "task-arithmetic": "colours.task-arithmetic",
    }
    assert {entry.variant: entry.scores["test"] for entry in found.entries} == {
        name: run[name] for name in run if name in found.variants
    }
    assert found.references["zero-shot"][0]["test"] == run["base,"]
    assert found.references["fine-tuned"][0]["test"] == run["each"]
    assert project.files() == before


def trials_of(project) -> dict[str, list]:
    """Every completed trial of every study: coefficients, values, and when it ended."""
    url = f"sqlite:///{project.folder / 'colours.db'}"
    found = {}
    for name in optuna.get_all_study_names(url):
        trials = optuna.load_study(study_name=name, storage=url).get_trials(states=(TrialState.COMPLETE,))
        found[name] = [(t.user_attrs["coefficients"], t.values, t.datetime_complete) for t in trials]
    return found


@pytest.mark.slow
def test_compare_prints_every_method_over_seeds_in_every_form(project):
    project.write(search=SHORT)
    asked = ("compare", "spec.yaml", "--methods", "averaging,gta,df-merge", "--seeds", "2")
    printed = project.json(*asked)
    assert printed["split"] == "test"
    rows = {row["method"]: row for row in printed["rows"]}
    assert list(rows) == ["zero-shot", "fine-tuned", "averaging", "gta", "df-merge"]
    assert all(row["seeds"] == 2 for row in rows.values())
    assert [study["study"] for study in rows["df-merge"]["studies"]] == ["colours", "colours.df-merge.seed1"]
    assert [study["study"] for study in rows["gta"]["studies"]] == ["colours.gta", "colours.gta.seed1"]
    for row in (rows["averaging"], rows["gta"], rows["df-merge"]):
        for task in ("red", "blue"):
            given = [study["tasks"][task] for study in row["studies"]]
            assert row["tasks"][task]["mean"] == pytest.approx(sum(given) / 2)
            assert row["tasks"][task]["std"] == pytest.approx(abs(given[0] - given[1]) / 2**0.5)
    assert rows["gta"]["trials"] == 3
    assert rows["averaging"]["trials"] == 1
    experts = {
        name: project.json("evaluate", "spec.yaml", "--model", name, "--split", "test") for name in ("red", "blue")
    }
    assert rows["fine-tuned"]["tasks"]["red"]["mean"] == experts["red"]["tasks"]["red"]["score"]
    assert rows["fine-tuned"]["tasks"]["blue"]["mean"] == experts["blue"]["tasks"]["blue"]["score"]
    before = project.files()
    lines = list(csv.DictReader(io.StringIO(project.cli(*asked, "--csv").stdout)))
    assert {line["method"]: float(line["mean"]) for line in lines if line["task"] == "mean"} == {
        name: row["mean"] for name, row in rows.items()
    }
    latex = project.cli(*asked, "--latex").stdout
    table = project.cli(*asked).stdout
    for name, row in rows.items():
        assert f"{100 * row['mean']:.1f}" in next(line for line in latex.splitlines() if line.startswith(name))
        assert f"{100 * row['mean']:.1f}" in next(line for line in table.splitlines() if line.split()[:1] == [name])
    assert project.files() == before  # nothing was run or scored again
    on_validation = project.json(*asked, "--split", "validation")
    assert on_validation["split"] == "validation"
    best = project.json("status", "spec.yaml")["best"]
    assert on_validation["rows"][-1]["studies"][0]["tasks"] == best["tasks"]


@pytest.fixture(scope="module")
def uncut(make_copy, tmp_path_factory):
    """What a comparison prints that is not cut."""
    whole = make_copy("t5", tmp_path_factory.mktemp("whole"))
    whole.write(search=SHORT)
    return whole.json("compare", "spec.yaml", "--methods", "df-merge,gta,averaging", "--seeds", "2")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "interrupt"])
def test_a_comparison_that_is_cut_goes_on_and_repeats_nothing(project, uncut, how):
    project.write(search=SHORT)
    asked = ["compare", "spec.yaml", "--methods", "df-merge,gta,averaging", "--seeds", "2", "--json"]
    process = project.start(*asked)
    assert any("colours.gta: 2/3" in line for line in process.stderr)
    process.send_signal({"kill": signal.SIGKILL, "interrupt": signal.SIGINT}[how])
    process.communicate(timeout=120)
    assert process.returncode == {"kill": -signal.SIGKILL, "interrupt": 130}[how]
    before = trials_of(project)
    assert len(before["colours"]) == 3
    assert "colours.averaging" not in before
    resumed = json.loads(project.cli(*asked).stdout)
    after = trials_of(project)
    assert all(after[name][: len(trials)] == trials for name, trials in before.items())
    assert {name: len(trials) for name, trials in after.items()} == {
        "colours": 3,
        "colours.gta": 3,
        "colours.averaging": 1,
        "colours.df-merge.seed1": 3,
        "colours.gta.seed1": 3,
        "colours.averaging.seed1": 1,
    }
    for ours, theirs in zip(resumed["rows"], uncut["rows"], strict=True):
        assert (ours["method"], ours["tasks"], ours["mean"]) == (theirs["method"], theirs["tasks"], theirs["mean"])
        assert ours["fishers"] == theirs["fishers"]


@pytest.mark.slow
def test_a_method_that_fails_is_shown_and_does_not_stop_the_others(project):
    # In 16 bits weights of a hundred thousand are infinite.
    project.write(search={"trials": 6, "startup_trials": 6, "bounds": [0, 1e6]}, dtype="float16")
    done = project.cli("compare", "spec.yaml", "--methods", "gta,averaging", "--json", check=1)
    rows = {row["method"]: row for row in json.loads(done.stdout)["rows"]}
    assert rows["gta"]["mean"] is None
    assert "3 trials in a row failed" in rows["gta"]["errors"][0]
    assert 0 <= rows["averaging"]["mean"] <= 1
    assert "colours.gta failed, going on" in done.stderr
    shown = project.cli("compare", "spec.yaml", "--methods", "gta,averaging", check=1)
    assert "failed" in next(line for line in shown.stdout.splitlines() if line.startswith(" gta"))


@pytest.mark.slow
def test_a_multi_task_model_is_a_row_that_is_scored_once_for_its_content(project):
    asked = ("compare", "spec.yaml", "--methods", "averaging", "--multi-task", "red")
    row = project.json(*asked)["rows"][2]
    evaluated = project.json("evaluate", "spec.yaml", "--model", "red", "--split", "test")
    assert row["method"] == "multi-task"
    assert row["merged"] is False
    assert {task: cell["mean"] for task, cell in row["tasks"].items()} == {
        task: entry["score"] for task, entry in evaluated["tasks"].items()
    }
    told: list[str] = []
    spec = StudySpec.from_yaml(project.file, ["multi_task=red"])
    again = compare(spec, ["averaging"], progress=lambda what, done, total: told.append(what))
    assert {task: cell["mean"] for task, cell in row["tasks"].items()} == again.references["multi-task"][0]["test"]
    assert not [what for what in told if ": test" in what]
    other = StudySpec.from_yaml(project.file, ["multi_task=blue"])
    latest = compare(other, ["averaging"], progress=lambda what, done, total: told.append(what))
    assert {what for what in told if ": test" in what} == {"red: test", "blue: test"}
    study = optuna.load_study(study_name="colours.averaging", storage=f"sqlite:///{project.folder / 'colours.db'}")
    row = multi_task_row(study)
    assert row is not None
    assert stored_scores(study, row, "test") == latest.references["multi-task"][0]["test"]


@pytest.mark.slow
def test_the_ablation_takes_its_rows_from_the_same_studies(project):
    project.write(search=SHORT)
    printed = project.json("compare", "spec.yaml", "--ablation", "--split", "validation")
    rows = {row["method"]: row for row in printed["rows"]}
    assert set(rows) >= {"df-merge", "df-merge-static", "gta", "df-merge-no-search", "fisher"}
    first = rows["df-merge-no-search"]["studies"][0]
    assert (first["study"], first["coefficients"]) == ("colours", {"red": 0.5, "blue": 0.5})
    stored = optuna.load_study(study_name="colours", storage=f"sqlite:///{project.folder / 'colours.db'}")
    assert first["tasks"] == stored.trials[0].user_attrs["tasks"]
    assert rows["df-merge-no-search"]["trials"] == 1
    assert rows["df-merge"]["trials"] == 3
    assert "no Fisher (gta)" in project.cli("compare", "spec.yaml", "--ablation", "--split", "validation").stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "df-merge,gat"], "Did you mean 'gta'?"),
        (["--methods", "gta,gta"], "named twice"),
        (["--methods", "nonsense"], "The methods are averaging"),
        (["--methods", ","], "no method is named"),
        (["--methods", "df-merge-agreement", "--split", "validation"], "agreement and not accuracy"),
        (["--split", "training"], "Use validation or test"),
        (["--csv", "--json"], "cannot be used together"),
        (["--ablation", "--methods", "gta"], "--ablation"),
        (["--multi-task", "nowhere"], "--multi-task"),
    ],
)
def test_what_compare_cannot_do_is_said_before_anything_is_made(project, arguments, said):
    assert said in project.cli("compare", "spec.yaml", *arguments, check=2).stderr
    assert not (project.folder / "colours.db").exists()


def test_a_study_about_something_else_is_refused_before_any_method_runs(project):
    taken = ("--set", "name=colours.gta", "--storage", "sqlite:///colours.db")
    project.json("run", "spec.yaml", "--method", "averaging", *taken)
    done = project.cli("compare", "spec.yaml", "--methods", "averaging,gta", check=2)
    assert "'colours.gta' is about something else" in done.stderr
    assert set(trials_of(project)) == {"colours.gta"}


def test_a_variant_that_is_what_the_spec_says_is_the_spec_s_own_study(project):
    spec = StudySpec.from_yaml(project.file)
    same = Variant("df-merge-random", "df-merge", {"search": {"sampler": "random"}})
    assert study_spec(spec, same, 0).name == "colours.df-merge-random"
    assert study_spec(spec, same, 3).name == "colours.df-merge-random.seed3"
    random = spec.derive(search={"sampler": "random"})
    assert study_spec(random, same, 0).name == "colours"
    assert study_spec(random, same, 3).name == study_spec(random, variants()["df-merge"], 3).name
    assert study_spec(random.derive(method="gta"), variants()["df-merge"], 0).search.sampler == "random"
    with pytest.raises(InputError, match="a name is 1 to 100"):
        study_spec(spec.derive(name="x" * 95), variants()["averaging"], 0)
