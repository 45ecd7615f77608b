"""Accuracy by the sum of a choice's log-likelihoods, and by that sum over its length, against lm-evaluation-harness."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dfmerge_studies.objective.loading import load_problem
from dfmerge_studies.spec import StudySpec
from dfmerge_studies.tasks.answers import given_answers, judged, wanted_answers
from dfmerge_studies.tasks.choices import predict
from dfmerge_studies.tasks.data import load_rows
from dfmerge_studies.tasks.evaluate import choice_losses
from dfmerge_studies.tasks.metrics import METRICS
from tests.project import make_project


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_choices_are_taken_by_sums_over_their_tokens_and_over_signs_or_bytes(family: str, tmp_path: Path) -> None:
    project = make_project(tmp_path / "p", family, rows=24)
    choices = "{{ ['yes', input[:9] ~ 'é', 'éé' ~ input[3:7], 'the rain and ' ~ input[2:12]] }}"
    project.spec["tasks"]["red"] |= {"doc_to_choice": choices, "doc_to_target": "{{ label % 4 }}"}
    spec = StudySpec.from_yaml(project.write())
    problem = load_problem(spec)
    examples = problem.examples("red", "validation")
    model, kind = problem.resident.model, problem.kinds["red"]
    rows = load_rows("red", spec.tasks["red"], "validation", root=spec.root, spec_file="s")
    losses = choice_losses(model, kind, examples, pad_id=0)
    expected: dict[str, list[float]] = {"acc": [], "acc_norm": [], "acc_bytes": []}
    for row, example, means in zip(rows, examples, losses, strict=True):
        lls = np.array([-mean * len(ids) for mean, ids in zip(means, example.choices, strict=True)])
        lengths = {
            "acc": np.ones(4),
            "acc_norm": np.array([float(len(text)) for text in row.choices]),
            "acc_bytes": np.array([float(len(text.encode("utf-8"))) for text in row.choices]),
        }
        for name, length in lengths.items():  # as lm_eval.api.task computes them
            expected[name].append(float(np.argmax(lls / length) == row.label))
    taken = {"accuracy": predict(losses)}
    for name, right in expected.items():
        task = spec.tasks["red"].model_copy(update={"metric": name})
        given = given_answers(model, task, kind, examples, tokenizer=problem.resident.tokenizer, pad_id=0)
        result = METRICS[name].result(judged(task, given, wanted_answers(task, examples)))
        assert result.rows == right
        taken[name] = predict(given)
    assert len({tuple(each) for each in taken.values()}) == (4 if family == "gpt2" else 3)  # one is not another


def test_metrics_of_sums_are_of_choices(tmp_path: Path) -> None:
    project = make_project(tmp_path / "p", "bert", rows=6)
    project.spec["tasks"]["red"]["metric"] = "acc_norm"
    done = project.cli("validate", project.write(), check=2)
    assert "found 'acc_norm'; the metrics of type: classification are accuracy, balanced_accuracy" in done.stderr


@pytest.mark.slow
def test_a_study_searches_and_shows_acc_norm(tmp_path: Path) -> None:
    project = make_project(tmp_path / "p", "gpt2", rows=12)
    for task in project.spec["tasks"].values():
        task["metric"] = "acc_norm"
    summary = project.json("run", project.write(method="gta"), "--trials", "2")
    assert summary["metric"] == "acc_norm"
