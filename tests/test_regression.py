"""Tasks of type regression: a number per input, through the whole program."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from huggingface_hub import ModelCard
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from dfmerge_studies.errors import InputError
from dfmerge_studies.importance.task_fisher import sampling_draws, task_fisher
from dfmerge_studies.tasks.encoding import Encoded, Kind
from dfmerge_studies.tasks.metrics import METRICS, task_metrics
from dfmerge_studies.tasks.numbers import Numbers, read_numbers
from tests.models import FAMILIES, TEXTS, make_examples, make_model
from tests.project import Project, perturbed
from tests.test_fisher import assert_same

ESTIMATORS = ("exact", "sampled", "empirical")


# Importance


def numbered(family: str) -> list[Encoded]:
    """Inputs with numbers for labels."""
    found = make_examples(family)
    return [Encoded(e.index, e.input_ids, (), 0.7 * i - 1.5) for i, e in enumerate(found)]


def loop(model: nn.Module, examples: list[Encoded], estimator: str, draws: Tensor) -> dict[str, Tensor]:
    """The definition: the squared gradient of (f - y)^2 / 2, each y by itself.

    The mean over y ~ N(f, 1) is a sum over the nodes of a Gauss-Hermite rule, which is exact for squares.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(4)
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for example, draw in zip(examples, draws, strict=True):
        f = model(input_ids=torch.tensor([example.input_ids])).logits[0, 0]
        mean = float(f.detach())
        if estimator == "exact":
            answers = [(mean + node, weight) for node, weight in zip(nodes, weights / weights.sum(), strict=True)]
        elif estimator == "sampled":
            answers = [(mean + float(torch.distributions.Normal(0, 1).icdf(draw)), 1.0)]
        else:
            answers = [(example.label, 1.0)]
        for y, weight in answers:
            gradients = torch.autograd.grad((f - y) ** 2 / 2, list(model.parameters()), retain_graph=True)
            for name, gradient in zip(total, gradients, strict=True):
                total[name] += weight / len(examples) * gradient**2
    return total


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta"])
def test_the_importance_of_every_parameter_is_that_of_a_loop_over_numbers_in_float64(family: str, estimator: str):
    model, examples = make_model(family, torch.float64, num_labels=1), numbered(family)
    draws = sampling_draws(len(examples), torch.Generator().manual_seed(3))
    found = task_fisher(
        model,
        Kind.REGRESSION,
        examples,
        pad_id=FAMILIES[family].pad_id,
        estimator=estimator,
        generator=torch.Generator().manual_seed(3),
    ).values
    assert_same(found, loop(model, examples, estimator, draws))


def test_the_mean_of_sampled_importances_is_the_exact_one():
    model, example = make_model("bert", torch.float64, num_labels=1), numbered("bert")[7]
    names = ["classifier.weight"]
    exact = task_fisher(model, Kind.REGRESSION, [example], pad_id=0, names=names).values["classifier.weight"]
    sampled = task_fisher(
        model,
        Kind.REGRESSION,
        [example] * 500,
        pad_id=0,
        names=names,
        estimator="sampled",
        generator=torch.Generator().manual_seed(0),
    ).values["classifier.weight"]
    assert torch.allclose(sampled, exact, rtol=0.25)  # the mean of 500 squares of a normal number: sqrt(2 / 500) = 6 %


# Metrics


def test_metrics_of_numbers_are_what_their_definitions_say():
    given, wanted = [0.5, 2.0, 2.0, -1.0, 4.0], [1.0, 3.0, 2.0, 0.0, 3.5]
    answers = Numbers(given, wanted)
    a, b = np.array(given), np.array(wanted)

    def correlation(a: Any, b: Any) -> float:
        return float(((a - a.mean()) * (b - b.mean())).sum() / (a.std() * b.std() * len(a)))

    def ranks(values: list[float]) -> Any:
        return np.array([np.mean([1 + i for i, v in enumerate(sorted(values)) if v == value]) for value in values])

    expected = {
        "pearson": correlation(a, b),
        "spearman": correlation(ranks(given), ranks(wanted)),
        "mse": float(((a - b) ** 2).mean()),
    }
    assert set(expected) == set(task_metrics("regression"))
    assert {name: METRICS[name].score(answers) for name in expected} == pytest.approx(expected)
    assert METRICS["mse"].result(answers).rows == pytest.approx(((a - b) ** 2).tolist())


def test_correlations_with_a_constant_are_zero_and_such_labels_are_refused():
    for name in ("pearson", "spearman"):
        assert METRICS[name].score(Numbers([2.0, 2.0, 2.0], [1.0, 2.0, 3.0])) == 0.0
        assert METRICS[name].pointless(Numbers([], [1.0, 1.0])) == "all rows have the same number"
        assert METRICS[name].pointless(Numbers([], [1.0, 2.0])) is None


# Data


def test_numbers_are_read_from_numbers_and_from_texts():
    assert read_numbers([1, 2.5, "3.75", "-1e-2"], where="w", split="s") == [1.0, 2.5, 3.75, -0.01]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "there is no label"),
        (float("nan"), "there is no label"),
        ("very much", "label 'very much' is not a finite number"),
        (True, "label True is not a finite number"),
        (float("inf"), "label inf is not a finite number"),
        ([1.0], r"label \[1.0\] is not a finite number"),
    ],
)
def test_labels_that_are_no_numbers_are_refused_by_row(value: object, says: str):
    with pytest.raises(InputError, match=f"row 1 of the split 'validation': {says}"):
        read_numbers([1.0, value], where="spec.yaml: tasks.red.doc_to_target", split="validation")


# Through the command line


@pytest.fixture
def mixed(project_of) -> Project:
    """A classifier's task, blue, beside one of pairs of texts, red, whose labels are what its expert gives."""
    project: Project = project_of("bert")
    project.spec = copy.deepcopy(project.spec)
    expert = perturbed("bert", seed=1, labels=1)
    expert.config.problem_type = "regression"
    expert.save_pretrained(project.folder / "red")
    tokenizer = AutoTokenizer.from_pretrained(project.folder / "red")
    for split, shift in (("validation", 0), ("test", 3)):
        lines = []
        for i in range(24):
            a, b = f"{TEXTS[(i + shift) % len(TEXTS)]} {i}", TEXTS[(3 * i + 1) % len(TEXTS)]
            number = own_number(expert, tokenizer, a, b)
            lines.append(json.dumps({"a": a, "b": b, "score": round(number, 6)}))
        (project.folder / f"red.{split}.jsonl").write_text("\n".join(lines))
    red = {**project.spec["tasks"]["red"], "type": "regression"}
    red |= {"doc_to_text": "a", "doc_to_text_pair": "b", "doc_to_target": "score", "max_length": 40}
    project.spec["tasks"]["red"] = red
    project.write()
    return project


def own_number(model: Any, tokenizer: Any, a: str, b: str) -> float:
    """What a model gives for a pair, by transformers alone."""
    with torch.no_grad():
        return float(model(**tokenizer(a, b, return_tensors="pt")).logits)


def with_red(project: Project, **fields: Any) -> None:
    project.write(tasks={**project.spec["tasks"], "red": {**project.spec["tasks"]["red"], **fields}})


@pytest.mark.parametrize("metric", ["pearson", "spearman", "mse"])
def test_an_expert_of_pairs_scores_best_on_the_numbers_that_it_gives(mixed: Project, metric: str):
    with_red(mixed, metric=metric)
    scored = mixed.json("evaluate", "spec.yaml", "--model", "red", "--split", "test")["tasks"]["red"]
    assert (scored["metric"], scored["n"]) == (metric, 24)
    # In a batch, numbers are rounded otherwise, which may change places of two that are nearly equal.
    assert scored["score"] == pytest.approx(0.0 if metric == "mse" else 1.0, abs=5e-3)


@pytest.mark.slow
def test_a_study_of_a_regression_beside_a_classification_finds_a_merge_and_exports_it(mixed: Project):
    printed = mixed.json("run", "spec.yaml", "--set", "method=df-merge")
    assert printed["task_metrics"] == {"red": "pearson", "blue": "accuracy"}
    rows = {row["name"]: row["validation"] for row in printed["rows"]}
    assert rows["each task's own expert"]["tasks"]["red"] == pytest.approx(1.0)
    assert rows["base, unmerged"]["tasks"]["red"] < 1.0
    assert "pearson" in mixed.cli("status", "spec.yaml").stdout

    mixed.cli("export", "spec.yaml", "--out", "merged", "--split-heads")
    again = mixed.json("evaluate", "spec.yaml", "--model", "merged")["tasks"]
    best = printed["best"]["tasks"]
    assert {task: entry["score"] for task, entry in again.items()} == pytest.approx(best, abs=1e-5)

    folder = mixed.folder / "merged/red"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert (model.config.problem_type, model.config.num_labels) == ("regression", 1)
    pairs = [json.loads(line) for line in (mixed.folder / "red.validation.jsonl").read_text().splitlines()]
    pipe = pipeline("text-classification", str(folder))
    given = [pipe({"text": pair["a"], "text_pair": pair["b"]})["score"] for pair in pairs]
    found = METRICS["pearson"].score(Numbers(given, [pair["score"] for pair in pairs]))
    assert found == pytest.approx(best["red"], abs=1e-4)
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "text-classification"
    names: dict[str, object] = {}
    exec(card.text.split("```python")[1].split("```")[0].replace("DIR", str(folder)), names)


def test_where_less_is_better_the_search_and_the_verdict_know_it(mixed: Project):
    with_red(mixed, metric="mse")
    alone = ("--set", "method=gta", "--set", "objective={kind: weighted, weights: {red: 1, blue: 0}}")
    mixed.cli("run", "spec.yaml", *alone, "--trials", "5", "--no-test")
    study = optuna.load_study(study_name="colours", storage=f"sqlite:///{mixed.folder}/colours.db")
    scores = [trial.user_attrs["tasks"]["red"] for trial in study.trials]
    status = mixed.json("status", "spec.yaml", *alone)
    assert status["best"]["tasks"]["red"] == min(scores) < max(scores)
    assert status["best"]["value"] == pytest.approx(-min(scores))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"metric": "accuracy"}, "the metrics of type: regression are pearson, spearman, mse"),
        ({"doc_to_choice": ["a", "b"]}, "tasks.red.doc_to_choice: unknown key"),
        ({"type": "classification", "metric": "accuracy"}, "a regression head (problem_type 'regression')"),
        ({"doc_to_target": "a"}, "is not a finite number"),
        ({"doc_to_target": 3}, "pearson on validation would be the same for every model"),
        ({"positive": 1}, "has no use for 'positive'"),
    ],
)
def test_what_does_not_fit_a_regression_is_refused(mixed: Project, fields: dict[str, Any], says: str):
    with_red(mixed, **fields)
    assert says in mixed.cli("validate", "spec.yaml", check=2).stderr


def test_a_head_of_several_outputs_gives_no_number(mixed: Project, tmp_path: Path):
    perturbed("bert", seed=1, labels=3).save_pretrained(mixed.folder / "red")
    said = mixed.cli("validate", "spec.yaml", check=2).stderr
    assert "a head of 3 outputs; tasks of type regression have a head that gives one number" in said


def test_numbers_have_nothing_to_agree_on(mixed: Project):
    said = mixed.cli("run", "spec.yaml", "--set", "objective=agreement", check=2).stderr
    assert "tasks.red.type: objective: agreement compares answers" in said
    assert "a task of type regression has none" in said


def test_heads_and_choices_are_not_mixed(mixed: Project):
    red = {**mixed.spec["tasks"]["red"], "type": "choice", "doc_to_choice": ["a", "b"]}
    mixed.write(tasks={**mixed.spec["tasks"], "red": {k: v for k, v in red.items() if k != "doc_to_text_pair"}})
    said = mixed.cli("validate", "spec.yaml", check=2).stderr
    assert "tasks of type choice and classification cannot be mixed: one model answers them all" in said


def test_init_writes_such_a_task_from_the_head_of_the_expert(mixed: Project):
    files = ["--data", "red.validation.jsonl", "--data", "blue.validation.jsonl"]
    mixed.cli("init", "base", "red", "blue", *files, "--out", "made.yaml")
    text = (mixed.folder / "made.yaml").read_text()
    assert "    type: regression\n" in text
    assert "    doc_to_target: score  # the right number\n" in text
    assert "    type: classification\n" in text
    assert mixed.json("validate", "made.yaml")["ok"]
