"""Guards: tasks that no expert stands for, outside the objective, on which no trial may fall far below the base."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.distributions import FloatDistribution
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dfmerge_studies import StudySpec, optimize_merge
from dfmerge_studies.errors import InputError
from dfmerge_studies.report.notes import publish, trial_note
from dfmerge_studies.report.view import StudyView
from dfmerge_studies.study.comparison import check_split
from dfmerge_studies.study.fingerprint import stated_fingerprint
from dfmerge_studies.study.provenance import stored_metrics
from dfmerge_studies.study.session import stored_study
from dfmerge_studies.tasks.metrics import Metrics, guarded
from dfmerge_studies.trials.marks import DROPS, TASKS
from dfmerge_studies.trials.reading import results
from dfmerge_studies.trials.space import Space
from dfmerge_studies.trust_region import Goal, _next_point
from tests.models import CHOICES, TEXTS, make_model
from tests.processes import command
from tests.project import Project, copied, make_project, sharpened, start_ranks


def add_guards(project: Project, *, rows: int = 8, **fields: Any) -> Project:
    """A guard of general text and one of choices beside the project's two tasks; `fields` are of the first."""
    for split, shift in (("validation", 0), ("test", 3)):
        texts = [{"t": f"{TEXTS[(i + shift) % len(TEXTS)]}, {i}"} for i in range(rows)]
        safe = [{"t": f"{TEXTS[(i + shift) % len(TEXTS)]}?", "c": list(CHOICES[:3]), "l": i % 3} for i in range(rows)]
        for name, lines in (("plain", texts), ("safe", safe)):
            (project.folder / f"{name}.{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = {
        name: {"path": "json", "data_files": {split: f"{name}.{split}.jsonl" for split in ("validation", "test")}}
        for name in ("plain", "safe")
    }
    project.spec["tasks"] |= {
        "plain": {
            "type": "text",
            "dataset": data["plain"],
            "doc_to_target": "t",
            "guard": True,
            "max_drop": 30,
            **fields,
        },
        "safe": {
            "dataset": data["safe"],
            "doc_to_text": "t",
            "doc_to_choice": "c",
            "doc_to_target": "l",
            "guard": True,
        },
    }
    for name in ("plain", "safe"):
        project.spec["tasks"][name]["test_split"] = "test"
    project.spec["search"]["max_drop"] = 60
    project.write()
    return project


@pytest.fixture(scope="session")
def finished_guarded(tmp_path_factory) -> Project:
    """A finished study with two guards and a baseline."""
    folder = tmp_path_factory.mktemp("guarded") / "p"
    project = add_guards(make_project(folder, "llama", rows=12, samples=3, trials=5))
    project.spec["baselines"] = ["averaging"]
    project.write()
    project.cli("run", "spec.yaml")
    return project


@pytest.fixture
def project(finished_guarded, tmp_path) -> Project:
    return copied(finished_guarded, tmp_path / "p")


def trials_of(project: Project) -> Any:
    return results(stored_study(StudySpec.from_yaml(project.file)))


def test_a_guard_is_no_part_of_the_objective_and_bounds_every_trial_by_the_base(project):
    study = stored_study(StudySpec.from_yaml(project.file))
    base = study.user_attrs["dfmerge:scores:base:validation"]["scores"]
    experts = study.user_attrs["dfmerge:scores:experts:validation"]["scores"]
    assert set(experts) == {"red", "blue"}
    for trial in results(study):
        scores, drops = trial.user_attrs[TASKS], trial.user_attrs[DROPS]
        assert trial.values == [pytest.approx((scores["red"] + scores["blue"]) / 2)]
        assert drops["plain"] == pytest.approx(100 * (scores["plain"] - base["plain"]), abs=1e-3)
        assert drops["safe"] == pytest.approx(100 * (base["safe"] - scores["safe"]), abs=1e-3)
        assert drops["red"] == pytest.approx(100 * (experts["red"] - scores["red"]), abs=1e-3)
        allowed = {"red": 60, "blue": 60, "plain": 30, "safe": 60}
        expected = [drops[task] - allowed[task] for task in drops]
        assert [trial.constraints[name] for name in sorted(trial.constraints)] == pytest.approx(expected, abs=1e-3)


def test_the_tables_have_a_column_for_a_guard_which_is_in_no_mean_and_in_which_nothing_is_best(project):
    result = project.json("run", "spec.yaml")
    assert result["guards"] == {"plain": 30, "safe": 60}
    rows = {row["name"]: row for row in result["rows"]}
    assert set(rows) == {"base, unmerged", "each task's own expert", "averaging", next(reversed(rows))}
    for split in ("validation", "test"):
        base = rows["base, unmerged"][split]
        for row in rows.values():
            aims = {task: score for task, score in row[split]["tasks"].items() if task in ("red", "blue")}
            assert row[split]["mean"] == pytest.approx(sum(aims.values()) / 2)
        for name in ("averaging", next(reversed(rows))):
            found = rows[name][split]["guards"]
            lost = rows[name][split]["tasks"]["plain"] - base["tasks"]["plain"]
            assert found["plain"]["drop"] == pytest.approx(100 * lost, abs=1e-3)
            assert found["plain"]["kept"] == (100 * lost <= 30)
            assert found["safe"]["allowed"] == 60
    shown = project.cli("run", "spec.yaml").stdout
    assert "plain (guard)" in shown
    assert "safe (guard)" in shown
    assert "guards allow" in shown
    bound = rows["base, unmerged"]["validation"]["tasks"]["plain"] + 0.3
    assert f"<= {bound:.3f}" in shown


def test_the_verdict_has_a_line_for_each_guard(project):
    summary = project.json("status", "spec.yaml")
    assert set(summary["verdict"]["guards"]) == {"plain", "safe"}
    lines = [note for note in summary["verdict"]["notes"] if note.startswith("the guard ")]
    assert len(lines) == 2
    assert "bits_per_byte" in lines[0]
    assert "the base's" in lines[0]
    best = summary["best"]
    assert best["feasible"] == all(
        best["drops"][task] <= allowed for task, allowed in {"red": 60, "blue": 60, "plain": 30, "safe": 60}.items()
    )
    shown = project.cli("status", "spec.yaml").stdout
    assert "drop vs base" in shown
    assert "drop vs expert" in shown
    assert project.json("list", "spec.yaml")[0]["guards"] == {"plain": 30, "safe": 60}


@pytest.mark.slow
def test_a_page_a_card_notes_and_a_comparison_know_the_guards(project):
    project.cli("report", "spec.yaml", "--out", "page")
    page = (project.folder / "page" / "index.html").read_text()
    assert "plain (guard)" in page
    assert "guard plain is" in page
    drawn = json.loads((project.folder / "page" / "figures" / "scores.json").read_text())
    assert drawn["guards"] == {"plain": 30, "safe": 60}
    exported = project.json("export", "spec.yaml", "--out", "merged")
    assert set(exported["guards"]) == {"plain", "safe"}
    card = (project.folder / "merged" / "README.md").read_text()
    assert "Guards are tasks that no expert stands for" in card
    assert "- plain on validation: " in card
    kept = json.loads((project.folder / "merged" / "dfmerge.json").read_text())
    assert kept["base_scores"]["validation"].keys() == {"red", "blue", "plain", "safe"}
    study = stored_study(StudySpec.from_yaml(project.file))
    assert publish(study)
    view = StudyView.of(study)
    note = trial_note(view, view.best, 1)
    assert "own expert, of guards the base" in note
    assert "Constraint " in note
    compared = project.json("compare", "spec.yaml", "--methods", "averaging,df-merge")
    rows = {row["method"]: row for row in compared["rows"]}
    assert rows["zero-shot"]["tasks"].keys() == {"red", "blue", "plain", "safe"}
    assert rows["fine-tuned"]["mean"] is not None  # of the tasks that have an expert
    assert rows["averaging"]["guards"].keys() == {"plain", "safe"}
    assert "plain" not in rows["averaging"]["ranks"]
    for form in ("csv", "latex"):
        assert "plain" in project.cli("compare", "spec.yaml", "--methods", "averaging,df-merge", f"--{form}").stdout


@pytest.mark.slow
def test_a_guard_without_a_test_split_is_not_measured_there_and_keeps_no_other_task_from_it(project) -> None:
    del project.spec["tasks"]["plain"]["test_split"]
    project.write()
    found = project.json("run", "spec.yaml")
    for row in found["rows"]:
        if row["name"] != "each task's own expert":
            assert list(row["test"]["tasks"]) == ["red", "blue", "safe"]
    assert found["verdict"]["split"] == "test"
    assert set(found["verdict"]["guards"]) == {"plain", "safe"}
    plain, safe = (next(n for n in found["verdict"]["notes"] if f"guard {name}" in n) for name in ("plain", "safe"))
    assert "bits_per_byte on validation, " in plain
    assert "accuracy, " in safe
    table = project.cli("run", "spec.yaml").stdout.partition("colours: test ")[2].splitlines()
    base = next(line.split("unmerged")[1].split() for line in table if "base, unmerged" in line)
    assert base[2] == "-"  # of red, blue, plain, safe, mean
    scored = project.json("evaluate", "spec.yaml", "--model", "red", "--split", "test")
    assert list(scored["tasks"]) == ["red", "blue", "safe"]
    assert check_split(StudySpec.from_yaml(project.file), None) == ("validation", "test")


def test_merge_and_evaluate_say_whether_the_guards_are_kept(project):
    drops = {}
    for coefficient in (0.0, 1.0):
        out = f"at-{coefficient}"
        project.spec["tasks"]["plain"]["max_drop"] = 0.5
        project.write()
        arguments = ("merge", "spec.yaml", "--method", "gta", "--coefficients", str(coefficient), "--out", out)
        drops[coefficient] = project.json(*arguments)["guards"]
    assert drops[0.0]["plain"] == {"drop": 0.0, "allowed": 0.5, "kept": True}
    assert drops[1.0]["plain"]["kept"] == (drops[1.0]["plain"]["drop"] <= 0.5)
    evaluated = project.json("evaluate", "spec.yaml", "--model", "at-1.0")
    assert evaluated["guards"]["plain"]["drop"] == pytest.approx(drops[1.0]["plain"]["drop"], abs=0.01)
    assert evaluated["mean"] == pytest.approx(sum(evaluated["tasks"][t]["score"] for t in ("red", "blue")) / 2)
    told = project.cli("evaluate", "spec.yaml", "--model", "at-1.0", "--set", "tasks.plain.max_drop=0")
    assert "guard plain" in told.stdout + told.stderr
    assert "base, unmerged" in told.stdout


def test_the_winner_keeps_the_guards_where_a_trial_does(project):
    """The bound is set where some trials keep it and the best of the others does not."""
    trials = trials_of(project)
    lost = sorted(trial.user_attrs[DROPS]["plain"] for trial in trials)
    project.spec["name"] = "bound"
    project.spec["tasks"]["plain"]["max_drop"] = lost[1]
    project.write()
    result = project.json("run", "spec.yaml")
    feasible = [trial for trial in trials_of(project) if all(value <= 0 for value in trial.constraints.values())]
    assert feasible
    assert result["best"]["number"] in [trial.number for trial in feasible]
    assert result["best"]["feasible"]


def test_a_study_is_joined_under_the_same_guards_only(project):
    project.spec["tasks"]["plain"]["max_drop"] = 5
    project.write()
    told = project.cli("run", "spec.yaml", check=2).stderr
    assert "guards: the study has" in told
    del project.spec["tasks"]["plain"], project.spec["tasks"]["safe"]
    project.write()
    assert "tasks: the study has" in project.cli("run", "spec.yaml", check=2).stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks.red.guard": True}, ("tasks.red.guard", "the expert red stands for this task")),
        ({"search.max_drop": None}, ("tasks.safe.max_drop", "a guard needs a bound")),
        ({"tasks.safe.guard": False, "tasks.safe.max_drop": 3}, ("tasks.safe.max_drop", "guard: true")),
        ({"objective": {"kind": "weighted", "weights": {"red": 1, "plain": 1}}}, ("objective.weights", "'plain' is a")),
        ({"importance.indices": {"plain": [0]}}, ("importance.indices", "'plain' is a guard")),
        ({"tasks.plain.max_drop": -1}, ("tasks.plain.max_drop",)),
        ({"tasks.red.guard": True, "tasks.blue.guard": True}, ("all tasks are guards",)),
    ],
)
def test_guards_that_cannot_be_are_refused_by_field(project, changes, words):
    overrides = [part for field, value in changes.items() for part in ("--set", f"{field}={json.dumps(value)}")]
    told = project.cli("validate", "spec.yaml", "--set", "name=other", *overrides, check=2).stderr
    assert all(word in told for word in words), told


def test_validate_says_what_a_guard_may_lose(project):
    told = project.cli("validate", "spec.yaml").stdout
    assert "plain: 8 validation inputs, a guard, which may lose 30 points against the base" in told
    assert "red: 12 validation inputs, 3 for Fisher" in told


def test_a_bound_of_a_task_s_own_goes_before_that_of_the_search(project):
    spec = StudySpec.from_yaml(project.file, ["tasks.red.max_drop=2"])
    assert spec.allowed == {"red": 2, "blue": 60, "plain": 30, "safe": 60}
    alone = StudySpec.from_yaml(project.file, ["search.max_drop=null", "tasks.red.max_drop=2", "tasks.safe.max_drop=1"])
    assert alone.allowed == {"red": 2, "plain": 30, "safe": 1}
    assert stated_fingerprint(alone)["max_drop"] == {"red": 2}


def test_agreement_with_experts_leaves_guards_their_own_metric(project):
    project.cli("run", "spec.yaml", "--set", "name=agreeing", "--set", "objective=agreement", "--trials", "2")
    study = stored_study(StudySpec.from_yaml(project.file, ["name=agreeing", "objective=agreement"]))
    assert stored_metrics(study, "validation").names == {
        "red": "agreement", "blue": "agreement", "plain": "bits_per_byte", "safe": "accuracy",
    }  # fmt: skip
    trial = results(study)[0]
    assert trial.values == [pytest.approx((trial.user_attrs[TASKS]["red"] + trial.user_attrs[TASKS]["blue"]) / 2)]


@pytest.mark.slow
def test_a_pareto_study_has_no_objective_for_a_guard_and_bounds_it(project):
    changes = ["name=front", "objective=pareto", "search.sampler=auto", "search.trials=4"]
    flags = [part for change in changes for part in ("--set", change)]
    project.cli("run", "spec.yaml", *flags)
    study = stored_study(StudySpec.from_yaml(project.file, changes))
    assert study.metric_names == ["red", "blue"]
    assert all(len(trial.values) == 2 and len(trial.constraints) == 4 for trial in results(study))


@pytest.mark.parametrize("kind", ["mean", "min", "weighted", "pareto"])
def test_the_sampler_auto_proposes_where_it_expects_the_guard_to_be_kept(kind):
    """On a line where the objective rises to the right and the guard falls beyond the middle."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    goal = Goal(
        kind,
        {"a": 1.0} if kind == "weighted" else None,
        {"a": 0.01, "b": 0.01, "g": -0.01},
        {"g": 20.0},
        frozenset("g"),
    )
    tasks = ["a", "b", "g"]
    space = Space(("x",), 0.0, 1.0)

    def proposed(allowed: float | None) -> float:
        study = optuna.create_study(directions=["maximize"] * (2 if kind == "pareto" else 1))
        for place, x in enumerate((0.0, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9)):
            scores = {"a": x, "b": x, "g": 1.0 + max(0.0, x - 0.5)}  # of g, lower is better
            drop = 100 * (scores["g"] - 1.0)
            trial = optuna.trial.create_trial(
                params={"x": x},
                distributions={"x": FloatDistribution(0, 1)},
                values=[x, x] if kind == "pareto" else [x],
                user_attrs={TASKS: scores, DROPS: {"g": drop}, "place": place},
            )
            study.add_trial(trial)
            if allowed is not None:
                stored = study.trials[-1]
                assert stored.number == place
        trials = [
            trial if allowed is None else _constrained(trial, trial.user_attrs[DROPS]["g"] - allowed)
            for trial in study.trials
        ]
        wanted = replace(goal, allowed={} if allowed is None else {"g": allowed})
        point, expected = _next_point(trials, [], space, wanted, startup=3, seed=1)
        assert set(expected["tasks"]) == set(tasks)
        return point["x"]

    assert proposed(20.0) < 0.78
    if kind != "pareto":
        assert proposed(None) > 0.8


def _constrained(trial: optuna.trial.FrozenTrial, value: float) -> optuna.trial.FrozenTrial:
    trial.set_constraint("000", value)
    return trial


def test_a_search_in_python_has_guards_too():
    base, a, b = (torch.nn.Linear(2, 1, bias=False) for _ in range(3))
    for model, weights in ((base, [0.0, 0.0]), (a, [1.0, 0.0]), (b, [0.0, 1.0])):
        model.weight.data.copy_(torch.tensor([weights]))

    def score(model: torch.nn.Linear) -> dict[str, float]:
        x, y = model.weight[0].tolist()
        return {"a": x, "b": y, "general": 1.0 - 0.5 * (x + y)}  # what the merge gains, general knowledge loses

    free = optimize_merge(base, {"a": a, "b": b}, score, trials=12, seed=1, guards={"general": 100})
    held = optimize_merge(base, {"a": a, "b": b}, score, trials=12, seed=1, guards={"general": 50})
    assert free.value > 0.8
    assert free.study.metric_names == ["mean score"]
    assert 1.0 - held.scores["general"] <= 0.5 + 1e-9
    assert held.value == pytest.approx(0.5, abs=0.1)
    for guards, words in (({"other": 5}, "no task 'other'"), ({"a": 5}, "stands for"), ({"general": -1}, "no number")):
        with pytest.raises(InputError, match=words):
            optimize_merge(base, {"a": a, "b": b}, score, trials=2, guards=guards)


def test_the_mean_of_metrics_and_its_words_are_without_guards():
    metrics = Metrics.named({"a": "accuracy", "b": "accuracy", "wiki": "bits_per_byte"}, {"wiki": 5.0})
    assert metrics.mean.name == "accuracy"
    assert metrics.mean_of({"a": 0.5, "b": 0.7, "wiki": 9.0}) == pytest.approx(0.6)
    assert metrics.short == "accuracy"
    assert metrics.heading == "accuracy of a and b in percent, bits_per_byte of wiki"
    assert metrics.bounds({"a": 0.1, "wiki": 1.0}) == {"wiki": pytest.approx(1.05)}
    assert list(metrics.aims) == ["a", "b"]
    assert metrics.value_text([0.5]) == "50.0"
    assert list(metrics.only(["wiki"]).aims) == ["wiki"]
    kept = guarded({"wiki": 1.05}, {"wiki": 1.0}, metrics)["wiki"]
    assert kept.kept
    assert not guarded({"wiki": 1.051}, {"wiki": 1.0}, metrics)["wiki"].kept


def classifiers(folder: Path, *, head: bool) -> Project:
    """Two classifiers, a base with or without a head of its own, and a guard of the base's task."""
    project = make_project(folder, "bert", rows=10, samples=3, trials=2)
    if head:
        sharpened(make_model("bert", num_labels=4)).save_pretrained(project.folder / "base")
    lines = [json.dumps({"input": f"{TEXTS[i % len(TEXTS)]} {i}", "label": i % 4}) for i in range(10)]
    (project.folder / "own.jsonl").write_text("\n".join(lines))
    dataset = {"path": "json", "data_files": {"validation": "own.jsonl"}}
    fields = {"type": "classification", "dataset": dataset, "doc_to_text": "input", "doc_to_target": "label"}
    project.spec["tasks"]["own"] = {**fields, "guard": True, "max_drop": 20, "max_length": 32}
    project.write()
    return project


def test_a_guard_of_classifiers_is_answered_by_the_head_that_the_base_brings(tmp_path):
    project = classifiers(tmp_path / "p", head=True)
    result = project.json("run", "spec.yaml")
    base = next(row for row in result["rows"] if row["name"] == "base, unmerged")["validation"]["tasks"]
    model = AutoModelForSequenceClassification.from_pretrained(project.folder / "base").eval()
    tokenizer = AutoTokenizer.from_pretrained(project.folder / "base")
    rows = [json.loads(line) for line in (project.folder / "own.jsonl").read_text().splitlines()]
    with torch.no_grad():
        taken = [int(model(**tokenizer(row["input"], return_tensors="pt")).logits.argmax()) for row in rows]
    assert base["own"] == sum(one == row["label"] for one, row in zip(taken, rows, strict=True)) / len(rows)
    merged = result["best"]["tasks"]
    project.cli("export", "spec.yaml", "--out", "merged", "--split-heads")
    assert project.json("evaluate", "spec.yaml", "--model", "merged")["tasks"]["own"]["score"] == merged["own"]
    whole = AutoModelForSequenceClassification.from_pretrained(project.folder / "merged" / "own")
    assert whole.config.num_labels == 4


def test_a_guard_of_classifiers_whose_base_has_no_head_is_refused(tmp_path):
    told = classifiers(tmp_path / "p", head=False).cli("run", "spec.yaml", check=2).stderr
    assert "tasks.own" in told
    assert "the base's own head, and the base has none" in told


@pytest.mark.slow
def test_two_ranks_keep_the_guards_and_their_numbers_as_one_process_does(project):
    alone = trials_of(project)
    project.spec |= {"name": "ranks", "baselines": []}
    project.write()
    ranks = start_ranks(command, ["run", "spec.yaml", "--no-test"], folder=project.folder)
    for rank in ranks:
        output, errors = rank.communicate(timeout=500)
        assert rank.wait() == 0, (output, errors)
    together = trials_of(project)
    for one, two in zip(alone[:2], together[:2], strict=True):  # startup points are those of the seed and the name
        assert one.user_attrs[TASKS].keys() == two.user_attrs[TASKS].keys()
    first, other = alone[0], together[0]  # 1/M
    assert other.user_attrs[TASKS] == pytest.approx(first.user_attrs[TASKS], rel=1e-4)
    assert other.user_attrs[DROPS] == pytest.approx(first.user_attrs[DROPS], abs=0.05)


@pytest.mark.slow
def test_a_search_by_groups_that_starts_from_a_guarded_study_is_guarded(project):
    source = trials_of(project)
    project.spec |= {"name": "fine", "baselines": [], "storage": "sqlite:///colours.db"}
    project.spec["search"] |= {"granularity": {"blocks": 2}, "warm_start": "colours", "trials": 4}
    project.write()
    result = project.json("run", "spec.yaml")
    assert result["warm_start"]["points"][0]["trial"] in [trial.number for trial in source]
    assert set(result["best"]["drops"]) == {"red", "blue", "plain", "safe"}
    assert all(len(trial.constraints) == 4 for trial in trials_of(project))
