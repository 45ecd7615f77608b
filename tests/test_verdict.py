"""The verdict: what a study has come to, from its storage alone, first wherever a study is shown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from dfmerge_studies.report.verdict import Verdict, verdict_of
from dfmerge_studies.report.view import StudyView
from dfmerge_studies.study.provenance import FINGERPRINT, SPEC
from dfmerge_studies.study.rows import rows_attribute
from tests.project import Project, copied

Rows = Mapping[str, Sequence[float]]
ALL, NONE = [1.0] * 40, [0.0] * 40


def right(count: int, of: int = 40, start: int = 0) -> list[float]:
    """So many rows right, from one on."""
    return [float((row - start) % of < count) for row in range(of)]


def kept(rows: Rows, *, keep_rows: bool = True) -> dict[str, Any]:
    scores = {task: float(np.mean(row)) for task, row in rows.items()}
    more = {"n": {task: len(row) for task, row in rows.items()}, **rows_attribute(rows)} if keep_rows else {}
    return {"data": {}, "scores": scores, **more}


class Storage:
    """Studies as `run` leaves them, with made-up scores of rows."""

    def __init__(self, folder: Path, objective: str = "mean", metric: str = "accuracy") -> None:
        self.url = f"sqlite:///{folder}/s.db"
        self.objective, self.metric = objective, metric

    def study(
        self,
        trials: Sequence[Rows],
        name: str = "s",
        *,
        method: str = "df-merge",
        at: Mapping[str, float] | None = None,
        keep_rows: bool = True,
        **references: Rows,
    ) -> optuna.Study:
        """A study of these trials; references are `base`, `experts`, or `test_experts` and `test` of the winner."""
        study = optuna.create_study(storage=self.url, study_name=name, direction="maximize")
        tasks = list(trials[0])
        fingerprint = {
            "method": method, "experts": [[task, task] for task in tasks], "tasks": tasks,
            "metrics": dict.fromkeys(tasks, self.metric), "objective": {"kind": self.objective},
            "search.bounds": [0.0, 1.0], "search.seed": 0,
        }  # fmt: skip
        study.set_user_attr(FINGERPRINT, fingerprint)
        study.set_user_attr(SPEC, {"base": "base", "tasks": {task: {} for task in tasks}})
        for number, rows in enumerate(trials):
            scores = {task: float(np.mean(row)) for task, row in rows.items()}
            value = min(scores.values()) if self.objective == "min" else float(np.mean(list(scores.values())))
            attributes = {
                "tasks": scores, "coefficients": dict(at or dict.fromkeys(tasks, 0.5)), "place": number,
                "drops": {}, "seconds": {}, "fishers": {}, **(rows_attribute(rows) if keep_rows else {}),
            }  # fmt: skip
            study.add_trial(optuna.trial.create_trial(value=value, user_attrs=attributes))
        best = int(np.argmax([trial.value for trial in study.trials]))
        for row, rows in references.items():
            split = "test" if row.startswith("test") else "validation"
            which = {"test": f"trial {best}"}.get(row, row.removeprefix("test_"))
            study.set_user_attr(f"dfmerge:scores:{which}:{split}", kept(rows, keep_rows=keep_rows))
        return study

    def verdict(self) -> Verdict:
        found = verdict_of(StudyView.of(optuna.load_study(study_name="s", storage=self.url)))
        assert found is not None
        return found


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path)


def test_it_says_what_the_merge_keeps_and_what_loses_most(storage: Storage):
    storage.study([{"a": right(30), "b": right(20)}], experts={"a": right(36), "b": right(24)})
    found = storage.verdict()
    assert found.kept == pytest.approx(50 / 60)
    assert found.largest_drop == ("a", pytest.approx(15.0))
    assert found.text.startswith("keeps 83% of the experts' mean (62.5 of 75.0 on validation, which chose it); ")
    assert "a loses most, 15.0 points" in found.text
    assert "no other method to compare it with" in found.text


def test_a_merge_that_is_no_better_than_averaging_is_said_to_be_so(storage: Storage):
    """65.8 beside 65.0 on 40 rows: noise."""
    storage.study([{"a": right(27, start=3)}], experts={"a": ALL})
    storage.study([{"a": right(26)}], "s.averaging", method="averaging")
    found = storage.verdict()
    assert "no better than averaging (+2.5 points, standard error " in found.text
    (against,) = found.against
    assert (against.better, against.clear, against.paired) == (False, False, True)
    assert against.difference == pytest.approx(1 / 40)


def test_all_that_it_is_no_better_than_are_named_and_the_best_of_them_goes_first(storage: Storage):
    storage.study([{"a": right(27, start=3)}], experts={"a": ALL})
    storage.study([{"a": right(27)}], "s.averaging", method="averaging")
    storage.study([{"a": right(28)}], "s.gta", method="gta")
    storage.study([{"a": right(5)}], "s.fisher", method="fisher")
    found = storage.verdict()
    assert "no better than gta and averaging (" in found.text
    assert "against gta)" in found.text
    assert [each.method for each in found.against] == ["gta", "averaging", "fisher"]


def test_the_same_difference_is_one_where_the_rows_agree(storage: Storage):
    """Right wherever averaging is, and on five rows of 40 more."""
    storage.study([{"a": right(31)}], experts={"a": ALL})
    storage.study([{"a": right(26)}], "s.averaging", method="averaging")
    assert "better than averaging, the best of the others (+12.5 points, standard error 5.3)" in storage.verdict().text


def test_without_rows_it_goes_by_the_errors_of_both_scores(storage: Storage):
    storage.study([{"a": right(31)}], experts={"a": ALL})
    storage.study([{"a": right(26)}], "s.averaging", method="averaging", keep_rows=False)
    (against,) = storage.verdict().against
    assert not against.paired
    assert against.standard_error is None  # of a study that does not even say how many rows there were
    assert "of a standard error that is not known" in storage.verdict().text


def test_test_scores_are_compared_where_all_have_them_since_no_trial_was_chosen_by_them(storage: Storage):
    """Better on the rows that chose it, worse on others."""
    storage.study([{"a": right(34)}], experts={"a": ALL}, test_experts={"a": ALL}, test={"a": right(22)})
    storage.study([{"a": right(26)}], "s.averaging", method="averaging", test={"a": right(24)})
    found = storage.verdict()
    assert found.split == "test"
    assert "no better than averaging (-5.0 points" in found.text
    assert "of 100.0 on test)" in found.text


def test_the_worst_task_counts_where_it_is_the_objective(tmp_path: Path):
    storage = Storage(tmp_path, "min")
    storage.study([{"a": right(38), "b": right(20)}], experts={"a": ALL, "b": ALL})
    storage.study([{"a": right(19), "b": right(40)}], "s.averaging", method="averaging")
    (against,) = storage.verdict().against
    assert against.difference == pytest.approx(1 / 40)


def test_scores_without_a_lowest_value_have_no_share(tmp_path: Path):
    storage = Storage(tmp_path, metric="log_likelihood")
    storage.study([{"a": [-1.0, -2.0, -3.0]}], experts={"a": [-1.0, -1.0, -2.0]})
    found = storage.verdict()
    assert found.kept is None
    assert found.text.startswith("a mean of -2.000 where the experts have -1.333, on validation")


def test_an_expert_that_is_worse_than_the_base_on_its_own_task_is_named(storage: Storage):
    reference = {"experts": {"a": right(15), "b": right(30)}, "base": {"a": right(25), "b": right(10)}}
    storage.study([{"a": right(20), "b": right(20)}], **reference)
    (note,) = [note for note in storage.verdict().notes if "worse than the base" in note]
    assert note == "the expert a is worse than the base on its own task a: 37.5 against 62.5"


def test_rows_that_are_too_few_to_tell_the_best_trials_apart_are_said(storage: Storage):
    few = [{"a": right(20, start=3 * number), "b": right(1900 - 100 * number, 2000)} for number in range(4)]
    storage.study(few)
    notes = [note for note in storage.verdict().notes if "apart" in note]
    assert len(notes) == 1
    assert notes[0].startswith("the 40 rows of a do not tell the best 4 trials apart: the standard error")


def test_a_winner_at_the_edge_of_the_bounds_is_said(storage: Storage):
    storage.study([{"a": right(20), "b": right(20)}], at={"a": 1.0, "b": 0.4})
    notes = [note for note in storage.verdict().notes if "edge" in note]
    assert notes == ["at the edge of search.bounds, 1: the coefficient of a; wider bounds may hold a better merge"]


def test_a_winner_inside_the_bounds_is_not_talked_of(storage: Storage):
    storage.study([{"a": right(20)}], at={"a": 0.97})
    assert not [note for note in storage.verdict().notes if "edge" in note]


@pytest.fixture(scope="module")
def whole_original(make_copy, tmp_path_factory) -> Project:
    project = make_copy("bert", tmp_path_factory.mktemp("verdict"))
    project.write(baselines=["averaging"], search={"trials": 3, "startup_trials": 2, "sampler": "gp"})
    project.cli("run", "spec.yaml")
    return project


@pytest.fixture
def whole(whole_original: Project, tmp_path: Path) -> Project:
    return copied(whole_original, tmp_path / "whole")


@pytest.mark.slow
def test_it_comes_first_in_run_status_page_card_and_json(whole: Project):
    found = whole.json("status", "spec.yaml")["verdict"]
    assert found["split"] == "test"
    assert [each["method"] for each in found["against"]] == ["averaging"]
    again = whole.cli("run", "spec.yaml").stdout.splitlines()
    assert again[0] == f"verdict: {found['text']}"
    assert [line.removeprefix("verdict: ") for line in again[1 : 1 + len(found["notes"])]] == found["notes"]
    assert whole.json("run", "spec.yaml")["verdict"] == found
    first = whole.cli("status", "spec.yaml").stdout.split("study")[0]
    assert found["text"][:60] in " ".join(first.split())
    whole.cli("report", "spec.yaml", "--out", "site")
    page = (whole.folder / "site/index.html").read_text()
    text = found["text"].replace("'", "&#39;")
    assert page.index(text[1:60]) < page.index("experts merged into one model")
    whole.cli("export", "spec.yaml", "--out", "merged")
    card = (whole.folder / "merged/README.md").read_text()
    assert card.index(found["text"][1:]) < card.index("## Coefficients")
    numbers = set(range(3)) - {whole.json("status", "spec.yaml")["best"]["number"]}
    whole.cli("export", "spec.yaml", "--trial", str(min(numbers)), "--out", "other")
    assert found["text"][1:] not in (whole.folder / "other/README.md").read_text()


@pytest.mark.slow
def test_scores_of_base_experts_and_trials_keep_their_rows(whole: Project):
    rows = whole.json("run", "spec.yaml")["rows"]
    for split in ("validation", "test"):
        assert all(row[split]["n"] == {"red": 24, "blue": 24} for row in rows)
        for row in rows:
            for task, error in row[split]["standard_errors"].items():
                score = row[split]["tasks"][task]
                assert error == pytest.approx((score * (1 - score) / 23) ** 0.5)
    shown = whole.cli("run", "spec.yaml").stdout
    assert " rows " in shown
    assert "± standard error" in shown


@pytest.mark.slow
def test_the_difference_to_averaging_is_that_of_the_rows_of_the_exported_models(whole: Project):
    """Against the answers of both merges, each written out and run by transformers alone."""
    from transformers import pipeline

    whole.cli("export", "spec.yaml", "--out", "ours", "--split-heads")
    at = "red=0.5,blue=0.5"
    flags = ("--method", "averaging", "--set", "baselines=[]", "--coefficients", at, "--out", "mean", "--split-heads")
    whole.cli("merge", "spec.yaml", *flags)
    rows: dict[str, dict[str, np.ndarray]] = {"ours": {}, "mean": {}}
    for name, by_task in rows.items():
        for task in ("red", "blue"):
            classify = pipeline("text-classification", str(whole.folder / name / task))
            data = [json.loads(line) for line in (whole.folder / f"{task}.test.jsonl").read_text().splitlines()]
            answers = [classify(each["input"])[0]["label"] == f"LABEL_{each['label']}" for each in data]
            by_task[task] = np.array(answers, dtype=float)
    differences = [rows["ours"][task] - rows["mean"][task] for task in ("red", "blue")]
    (against,) = whole.json("status", "spec.yaml")["verdict"]["against"]
    assert against["paired"]
    assert against["difference"] == pytest.approx(np.mean([each.mean() for each in differences]))
    errors = [each.std(ddof=1) / len(each) ** 0.5 for each in differences]
    assert against["standard_error"] == pytest.approx(np.hypot(*errors) / 2)


def test_the_verdict_needs_no_models_at_hand(whole: Project):
    expected = whole.json("status", "spec.yaml")["verdict"]
    for name in ("base", "red", "blue"):
        (whole.folder / name).rename(whole.folder / f"gone-{name}")
    assert whole.json("status", "spec.yaml")["verdict"] == expected
