"""Metrics against slow definitions, and what a spec with another metric than accuracy runs, shows and refuses."""

from __future__ import annotations

import csv
import io
import json
import math
from itertools import product

import pytest
from huggingface_hub import ModelCard
from optuna_dashboard import get_note

from dfmerge_studies import StudySpec, open_study
from dfmerge_studies.errors import InputError
from dfmerge_studies.report.figures import figures
from dfmerge_studies.report.figures.base import Drawing
from dfmerge_studies.report.notes import publish
from dfmerge_studies.report.view import StudyView
from dfmerge_studies.spec import ObjectiveSettings
from dfmerge_studies.study.fingerprint import stated_fingerprint
from dfmerge_studies.study.probes import reselect, row_scores
from dfmerge_studies.study.session import stored_study
from dfmerge_studies.study.value import objective_values
from dfmerge_studies.tasks.choices import Answers
from dfmerge_studies.tasks.metrics import METRICS, Metric, Metrics, task_metrics
from tests.project import Project

WANTED = [0, 1, 2, 1, 0, 2, 2, 1, 0, 0]
TAKEN = [0, 2, 2, 1, 1, 2, 0, 1, 0, 2]


def answers(wanted: list[int], taken: list[int], classes: int = 4, positive: int | None = None) -> Answers:
    """Losses that are lowest at what is taken."""
    return Answers([[float(c != each) for c in range(classes)] for each in taken], wanted, positive)


def counts(of: int, wanted: list[int], taken: list[int]) -> tuple[int, int, int]:
    """True positives, false positives, false negatives of a class."""
    pairs = list(zip(wanted, taken, strict=True))
    return pairs.count((of, of)), sum(t == of != w for w, t in pairs), sum(w == of != t for w, t in pairs)


def f1(of: int, wanted: list[int], taken: list[int]) -> float:
    right, wrong, missed = counts(of, wanted, taken)
    return 2 * right / (2 * right + wrong + missed) if right else 0.0


def slow_mcc(wanted: list[int], taken: list[int]) -> float:
    """Gorodkin's statistic: the correlation of the two sides' class indicators, summed over classes."""
    rows = range(len(wanted))

    def covariance(one: list[int], other: list[int]) -> float:
        together = sum(one[i] == other[i] for i in rows)
        return together * len(rows) - sum(one[i] == other[j] for i, j in product(rows, rows))

    return covariance(wanted, taken) / math.sqrt(covariance(wanted, wanted) * covariance(taken, taken))


def test_metrics_are_what_their_definitions_say():
    given = answers(WANTED, TAKEN, positive=2)
    recalls = [counts(c, WANTED, TAKEN)[0] / WANTED.count(c) for c in range(3)]
    expected = {
        "accuracy": sum(w == t for w, t in zip(WANTED, TAKEN, strict=True)) / 10,
        "balanced_accuracy": sum(recalls) / 3,
        "f1": f1(2, WANTED, TAKEN),
        "macro_f1": sum(f1(c, WANTED, TAKEN) for c in range(3)) / 3,
        "mcc": slow_mcc(WANTED, TAKEN),
        "log_likelihood": sum(
            math.log((1.0 if w == t else math.exp(-1)) / (1 + 3 * math.exp(-1)))
            for w, t in zip(WANTED, TAKEN, strict=True)
        )
        / 10,
    }
    assert set(expected) == set(task_metrics("classification"))  # those of choices alone: tests/test_acc_norm.py
    assert {name: METRICS[name].score(given) for name in expected} == pytest.approx(expected)


def test_log_likelihood_takes_inputs_with_different_numbers_of_choices_and_any_losses():
    given = Answers([[2000.0, 2001.0], [0.5, 0.5, 0.5]], [1, 0])
    expected = (math.log(math.exp(-1) / (1 + math.exp(-1))) + math.log(1 / 3)) / 2
    assert METRICS["log_likelihood"].score(given) == pytest.approx(expected)
    assert METRICS["accuracy"].score(given) == 0.5


def test_classes_that_are_missing_count_as_scikit_learn_has_it():
    all_zero, wanted = [0] * 6, [0, 0, 0, 0, 1, 1]
    assert METRICS["f1"].score(answers(wanted, all_zero, positive=1)) == 0.0
    assert METRICS["mcc"].score(answers(wanted, all_zero)) == 0.0
    assert METRICS["macro_f1"].score(answers(wanted, all_zero)) == pytest.approx((0.8 + 0) / 2)
    assert METRICS["balanced_accuracy"].score(answers(wanted, all_zero)) == 0.5
    beside = [0, 0, 0, 3, 1, 1]  # class 3 is no label: the answer is wrong, and a class of its own for macro F1
    assert METRICS["balanced_accuracy"].score(answers(wanted, beside)) == pytest.approx((3 / 4 + 1) / 2)
    assert METRICS["macro_f1"].score(answers(wanted, beside)) == pytest.approx((6 / 7 + 1 + 0) / 3)


def test_nothing_to_score_is_refused():
    with pytest.raises(InputError, match="no examples"):
        METRICS["accuracy"].score(Answers([], []))
    with pytest.raises(ValueError, match="2 answers to 1"):
        METRICS["accuracy"].score(Answers([[0.0], [0.0]], [0]))


def test_a_point_of_a_drop_is_a_hundredth_of_the_range_and_of_the_unit_where_there_is_no_range():
    assert METRICS["accuracy"].drop(0.7, 0.8) == pytest.approx(10)
    assert METRICS["mcc"].drop(0.3, 0.5) == pytest.approx(10)
    assert METRICS["log_likelihood"].drop(-0.6, -0.5) == pytest.approx(10)
    assert METRICS["log_likelihood"].drop(-0.4, -0.5) == pytest.approx(-10)


def test_a_metric_whose_lower_scores_are_better_is_turned_round_wherever_scores_are_compared():
    error = Metric("error", high=math.inf, higher_is_better=False, percent=False)
    metrics = Metrics({"a": error, "b": error})
    scores = {"a": 2.0, "b": 3.0}
    assert objective_values(ObjectiveSettings(), scores, metrics) == (-2.5,)
    assert objective_values(ObjectiveSettings(kind="min"), scores, metrics) == (-3.0,)
    assert metrics.mean_of(scores) == 2.5
    assert metrics.value_text([-2.5]) == "2.500"
    assert metrics.drops(scores, {"a": 1.5}) == {"a": pytest.approx(50)}
    mixed = Metrics({"a": METRICS["accuracy"], "b": error})
    assert mixed.mean_of({"a": 0.5, "b": 3.0}) == pytest.approx(-1.25)
    assert (mixed.mean.higher_is_better, mixed.mean.percent) == (True, False)


def test_headings_say_which_metric_each_task_has_and_what_is_in_percent():
    one = Metrics.named({"a": "f1", "b": "f1"})
    assert (one.text, one.short, one.heading) == ("f1", "f1", "f1 in percent")
    two = Metrics.named({"a": "accuracy", "b": "mcc", "c": "accuracy"})
    assert two.heading == "accuracy of a and c, mcc of b in percent"
    other = Metrics.named({"a": "accuracy", "b": "log_likelihood"})
    assert other.heading == "accuracy of a in percent, log_likelihood of b"
    assert (other.text, other.short) == ("accuracy of a, log_likelihood of b", "accuracy or log_likelihood")
    assert (other["a"].shown(0.8214), other["b"].shown(-0.8214), other.mean.shown(0.1)) == ("82.1", "-0.821", "0.100")


def test_a_metric_of_another_version_is_shown_as_a_plain_number():
    assert Metrics.named({"a": "perplexity_of_tomorrow"}).value_text([3.25]) == "3.250"


# Specs


def with_metrics(project: Project, **metrics: dict[str, object]) -> dict[str, object]:
    """The project's tasks with other fields."""
    return {name: {**task, **metrics.get(name, {})} for name, task in project.spec["tasks"].items()}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"metric": "macro_f"}, ["tasks.red", "'macro_f'", "did you mean 'macro_f1'?"]),
        ({"metric": "bleu"}, ["tasks.red", "the metrics of type: choice are accuracy, acc, "]),
        ({"metric": "agreement"}, ["tasks.red.metric", "the metrics of type: choice are accuracy"]),
        ({"metric": "f1"}, ["tasks.red", "needs 'positive'"]),
        ({"metric": "mcc", "positive": 1}, ["tasks.red", "mcc has no use for 'positive'"]),
        ({"metric": "f1", "positive": True}, ["tasks.red.positive", "found true", "a text in quotes"]),
        ({"metric": "f1", "positive": -1}, ["tasks.red", "no choice of index -1"]),
        ({"metric": "f1", "positive": "yes"}, ["tasks.red", "'doc_to_choice' to be a list"]),
        ({"metric": "f1", "positive": "yes", "doc_to_choice": ["no", "maybe"]}, ["tasks.red", "'yes' is not among"]),
        ({"metric": "f1", "positive": 2, "doc_to_choice": ["no", "maybe"]}, ["tasks.red", "no choice of index 2"]),
    ],
)
def test_a_metric_that_cannot_be_is_refused_by_field(project, fields, words):
    project.write(tasks=with_metrics(project, red=fields))
    with pytest.raises(InputError) as caught:
        StudySpec.from_yaml(project.file)
    for word in words:
        assert word in str(caught.value)


def test_the_positive_class_may_be_named_by_its_text(project):
    fields = {"metric": "f1", "positive": "bad", "doc_to_choice": ["good", "bad"]}
    project.write(tasks=with_metrics(project, red=fields))
    assert StudySpec.from_yaml(project.file).tasks["red"].positive_class() == 1


def test_the_science_of_studies_of_accuracy_is_that_of_earlier_versions(project):
    fingerprint = stated_fingerprint(StudySpec.from_yaml(project.file))
    assert fingerprint["metrics"] == {"red": "accuracy", "blue": "accuracy"}
    assert "positive" not in fingerprint
    project.write(tasks=with_metrics(project, red={"metric": "f1", "positive": 1}))
    fingerprint = stated_fingerprint(StudySpec.from_yaml(project.file))
    assert (fingerprint["metrics"]["red"], fingerprint["positive"]) == ("f1", {"red": 1})


def test_a_metric_of_classes_is_refused_where_choices_differ_from_row_to_row(project):
    project.write(tasks=with_metrics(project, red={"metric": "macro_f1"}))
    found = json.loads(project.cli("validate", "spec.yaml", "--json", check=2).stdout)
    assert "row 1 of validation has other choices than row 0" in found["problems"][0]["what"]
    assert found["problems"][0]["where"].endswith("tasks.red.metric")


def test_labels_on_which_all_models_score_alike_are_refused_before_anything_is_stored(project_of):
    project = project_of("bert")
    file = project.folder / "blue.test.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**row, "label": 0}) + "\n" for row in rows))
    for fields in ({"metric": "mcc"}, {"metric": "f1", "positive": 1}):
        project.write(tasks=with_metrics(project, blue=fields))
        done = project.cli("run", "spec.yaml", check=2)
        assert f"tasks.blue.metric: {fields['metric']} on test would be the same for every model" in done.stderr
    assert not (project.folder / "colours.db").exists()


# Studies


@pytest.mark.slow
def test_a_study_of_other_metrics_runs_is_resumed_and_names_them_wherever_it_shows_them(project_of):
    project = project_of("bert")
    metrics = {"red": {"metric": "macro_f1"}, "blue": {"metric": "log_likelihood"}}
    search = {"trials": 3, "startup_trials": 2, "max_drop": 60}
    project.write(tasks=with_metrics(project, **metrics), search=search, objective="min")
    project.cli("run", "spec.yaml", "--trials", "1")
    printed = project.json("run", "spec.yaml")
    text = "macro_f1 of red, log_likelihood of blue"
    words = "log_likelihood of blue, macro_f1 of red"
    assert printed["metric"] in (text, words)
    assert printed["task_metrics"] == {"red": "macro_f1", "blue": "log_likelihood"}
    best, rows = printed["best"], {row["name"].split()[0]: row for row in printed["rows"]}
    assert best["value"] == min(best["tasks"].values()) < 0
    experts = rows["each"]["validation"]["tasks"]
    assert best["drops"] == pytest.approx({t: 100 * (experts[t] - best["tasks"][t]) for t in experts}, abs=1e-3)
    assert best["feasible"] == all(drop <= 60 for drop in best["drops"].values())

    shown = project.cli("run", "spec.yaml").stdout
    assert "validation log_likelihood of blue, macro_f1 of red in percent" in shown
    assert f"{best['tasks']['blue']:.3f}" in shown
    assert f"{100 * best['tasks']['red']:.1f}" in shown
    status = project.cli("status", "spec.yaml").stdout
    assert f"{best['value']:.3f}" in status
    assert words in status
    assert words in project.cli("list", "spec.yaml").stdout
    exported = project.json("export", "spec.yaml", "--out", "merged")
    assert exported["metric"] == words
    card = ModelCard.load(project.folder / "merged/README.md")
    kinds = {(r.task_name, r.metric_type) for r in card.data.eval_results}
    assert kinds == {("red", "macro_f1"), ("blue", "log_likelihood")}
    assert "Validation: log_likelihood of blue, macro_f1 of red in percent" in card.text
    scored = project.json("evaluate", "spec.yaml", "--model", "merged")
    assert {task: entry["score"] for task, entry in scored["tasks"].items()} == pytest.approx(best["tasks"])
    assert {task: entry["metric"] for task, entry in scored["tasks"].items()} == printed["task_metrics"]

    study = stored_study(StudySpec.from_yaml(project.file))
    publish(study)
    assert "log\\_likelihood or macro\\_f1 on the worst task" in get_note(study)
    view = StudyView.of(study)
    drawn = {figure.name: figure for figure in figures(view) if isinstance(figure, Drawing)}
    for figure in drawn.values():
        figure.plotly()
        figure.static()
    axes = drawn["scores"].plotly().layout
    titles = [axes[name].title.text for name in axes if name.startswith("yaxis")]
    assert sorted(titles) == ["log_likelihood"] * 2 + ["macro_f1, %"] * 2
    assert "log_likelihood or macro_f1" in drawn["trajectory"].plotly().layout.yaxis.title.text
    assert drawn["trajectory"].data()["unit"] == ""


@pytest.mark.slow
def test_a_comparison_says_its_metric_in_every_form(project_of):
    project = project_of("bert")
    metrics = {key: {"metric": "balanced_accuracy"} for key in ("red", "blue")}
    project.write(tasks=with_metrics(project, **metrics), search={"trials": 2})
    methods = ("compare", "spec.yaml", "--methods", "gta,averaging")
    printed = project.json(*methods)
    assert (printed["metric"], printed["task_metrics"]["red"]) == ("balanced_accuracy", "balanced_accuracy")
    assert "test balanced_accuracy in percent" in project.cli(*methods).stdout
    lines = list(csv.DictReader(io.StringIO(project.cli(*methods, "--csv").stdout)))
    assert {line["metric"] for line in lines} == {"balanced_accuracy"}
    assert "test balanced_accuracy in percent" in project.cli(*methods, "--latex").stdout
    same = ("--set", "name=colours.gta", "--storage", "sqlite:///colours.db")
    page = project.json("report", "spec.yaml", "--set", "method=gta", *same)["page"]
    assert "Validation balanced_accuracy in percent" in (project.folder / page).read_text()


@pytest.mark.slow
def test_the_choice_on_a_share_of_the_rows_is_made_again_for_means_over_rows_only(project_of):
    project = project_of("bert")
    both = {key: {"metric": "log_likelihood"} for key in ("red", "blue")}
    project.write(tasks=with_metrics(project, **both), search={"trials": 3, "startup_trials": 2, "sampler": "gp"})
    project.cli("run", "spec.yaml")
    session = open_study(StudySpec.from_yaml(project.file))
    for trial in session.study.trials:
        rows = row_scores(session, trial)
        assert {task: sum(row) / len(row) for task, row in rows.items()} == pytest.approx(trial.user_attrs["tasks"])
    found = reselect(session, [0.5, 1.0], draws=3)
    best = session.best()
    assert [choices[-1] for choices in found.chosen] == [best.number] * 3
    drawn = {figure.name: figure for figure in figures(StudyView.of(session.study))}["ratio"]
    assert drawn.plotly().layout.yaxis.title.text == "mean log_likelihood on test"
    project.write(tasks=with_metrics(project, red={"metric": "mcc"}), name="other", search={"trials": 2})
    project.cli("run", "spec.yaml")
    refused = project.cli("report", "spec.yaml", "--figures", "ratio", check=2).stderr
    assert "mcc is no mean over rows" in refused


def test_a_pareto_study_of_two_metrics_has_a_value_of_each_kind(project_of):
    project = project_of("bert")
    fields = {"red": {"metric": "mcc"}, "blue": {"metric": "f1", "positive": 1}}
    project.write(tasks=with_metrics(project, **fields), search={"trials": 2}, objective="pareto")
    printed = project.json("run", "spec.yaml", "--no-test")["best"]
    assert printed["values"] == list(printed["tasks"].values())
    assert printed["value"] == pytest.approx(sum(printed["values"]) / 2)
