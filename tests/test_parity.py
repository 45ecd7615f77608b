"""The whole product against the numbers that the paper's own code gave on small real models.

The numbers lie outside the repository: in the folder that DFMERGE_PARITY_DIR names, or in `shared/parity` beside or
above the checkout.  Tolerances are those of their own README: the reference is off by that much against float64.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

from dfmerge_studies.methods import METHODS
from dfmerge_studies.objective.loading import load_problem
from dfmerge_studies.objective.merger import Merger
from dfmerge_studies.spec import StudySpec
from tests.project import Project
from tests.test_fisher_parity import find_parity

TASKS = ("trec", "subj", "cr")
MERGED_TOLERANCE = {"dfmerge": 1e-5, "gta": 1e-6}  # relative L2
POINTS = [f"point{number}.{method}" for number in range(3) for method in ("dfmerge", "gta")]


FOLDER = find_parity()
pytestmark = pytest.mark.skipif(FOLDER is None, reason="the parity numbers are not here; set DFMERGE_PARITY_DIR")


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return json.loads((FOLDER / "reference/reference.json").read_text())


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> StudySpec:
    folder = tmp_path_factory.mktemp("parity")
    for name in ("base", *TASKS, *(f"{t}.{s}.jsonl" for t in TASKS for s in ("validation", "test"))):
        (folder / name).symlink_to(FOLDER / name)
    (folder / "spec.yaml").write_text(yaml.safe_dump(_spec(), sort_keys=False))
    return StudySpec.from_yaml(folder / "spec.yaml")


@pytest.fixture(scope="module")
def problem(spec):
    return load_problem(spec)


def _spec() -> dict[str, Any]:
    def task(name: str) -> dict[str, Any]:
        files = {"validation": f"{name}.validation.jsonl", "test": f"{name}.test.jsonl"}
        return {
            "type": "choice",
            "dataset": {"path": "json", "data_files": files},
            "doc_to_text": "input",
            "doc_to_choice": "choices",
            "doc_to_target": "label",
            "test_split": "test",
            "max_length": 128,
        }

    return {
        "name": "parity",
        "base": "base",
        "experts": {name: name for name in TASKS},
        "tasks": {name: task(name) for name in TASKS},
        "importance": {"indices": str(FOLDER / "reference/reference.json"), "dtype": "float32"},
        "device": "cpu",
    }


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Relative L2 over all parameters together."""
    assert ours.keys() == theirs.keys()
    difference = sum((ours[n].double() - theirs[n].double()).pow(2).sum() for n in theirs)
    return float((difference / sum(theirs[n].double().pow(2).sum() for n in theirs)).sqrt())


def assert_at_most_one_row(ours: dict[str, float], theirs: dict[str, float], problem, split: str) -> None:
    for task in TASKS:
        rows = len(problem.examples(task, split))
        assert abs(ours[task] - theirs[task]) * rows < 1.5, (task, split, ours[task], theirs[task])


@pytest.mark.slow
@pytest.mark.parametrize("tag", POINTS)
def test_merged_weights_and_accuracies_are_the_reference_s(problem, reference, tag):
    point = next(p for p in reference["points"] if p["tag"] == tag)
    kind = tag.split(".")[1]
    merger = Merger(problem, METHODS["df-merge" if kind == "dfmerge" else "gta"], None)
    outcome = merger.run(point["coefficients"])
    merged = {name: p.detach() for name, p in problem.resident.model.named_parameters()}
    expected = load_file(FOLDER / f"reference/{tag}.merged.safetensors")
    assert distance(merged, expected) < MERGED_TOLERANCE[kind]
    assert_at_most_one_row(outcome.tasks, point["validation"], problem, "validation")
    assert_at_most_one_row(merger.scores("test"), point["test"], problem, "test")


@pytest.mark.slow
def test_base_and_expert_accuracies_are_the_reference_s(problem, reference):
    merger = Merger(problem, METHODS["df-merge"], None)
    base = {task: result.score for task, result in merger.base_results("validation").items()}
    assert_at_most_one_row(base, reference["base_accuracy"], problem, "validation")
    for index, expert in enumerate(TASKS):
        problem.resident.load_scaled_(index, 1.0)
        theirs = reference["expert_accuracy"][expert]
        assert_at_most_one_row(merger.scores("validation"), theirs, problem, "validation")


@pytest.mark.slow
def test_the_command_line_merges_to_the_reference_s_weights_and_scores(spec, reference, tmp_path):
    point = next(p for p in reference["points"] if p["tag"] == "point1.dfmerge")
    project = Project(spec.root, "t5")
    coefficients = ",".join(f"{name}={value!r}" for name, value in point["coefficients"].items())
    out = tmp_path / "merged"
    printed = project.json("merge", "spec.yaml", "--coefficients", coefficients, "--out", out)
    assert printed["coefficients"] == point["coefficients"]
    model = AutoModelForSeq2SeqLM.from_pretrained(out)
    merged = {name: p.detach() for name, p in model.named_parameters()}
    assert distance(merged, load_file(FOLDER / "reference/point1.dfmerge.merged.safetensors")) < 1e-5
    scores = project.json("evaluate", "spec.yaml", "--model", out, "--split", "test")
    for task in TASKS:
        assert abs(scores["tasks"][task]["score"] - point["test"][task]) * scores["tasks"][task]["n"] < 1.5
