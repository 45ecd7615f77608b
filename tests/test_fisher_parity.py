"""The engine and the scores against numbers that the paper's own code computed on small trained models.

The reference models are not part of this project.  They are looked for in the folder that DFMERGE_PARITY_DIR names, or
in `shared/parity` beside the repository or above it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel

from dfmerge_studies.importance.task_fisher import task_fisher
from dfmerge_studies.tasks.choices import Answers
from dfmerge_studies.tasks.encoding import Encoded, Kind
from dfmerge_studies.tasks.evaluate import choice_losses, labels_of
from dfmerge_studies.tasks.metrics import METRICS

TASKS = ("trec", "subj", "cr")
FLOOR = 1e-12  # the reference adds it to every entry


def find_parity() -> Path | None:
    """The folder of reference numbers, if there is one."""
    if "DFMERGE_PARITY_DIR" in os.environ:
        return Path(os.environ["DFMERGE_PARITY_DIR"])
    root = Path(__file__).resolve().parents[1]
    for folder in (root, root.parent, root.parent.parent):
        if (folder / "shared" / "parity" / "reference" / "reference.json").is_file():
            return folder / "shared" / "parity"
    return None


PARITY = find_parity()
pytestmark = pytest.mark.skipif(PARITY is None, reason="no shared/parity folder; name one in DFMERGE_PARITY_DIR")


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    assert PARITY is not None
    content: dict[str, Any] = json.loads((PARITY / "reference" / "reference.json").read_text())
    return content


@pytest.fixture(scope="module")
def examples() -> dict[str, list[Encoded]]:
    """The validation rows, tokenised as the reference does: the tokenizer ends texts and choices with its own token."""
    assert PARITY is not None
    tokenizer = AutoTokenizer.from_pretrained(PARITY / "base")

    def read(task: str) -> list[Encoded]:
        rows = map(json.loads, (PARITY / f"{task}.validation.jsonl").read_text().splitlines())
        return [
            Encoded(
                i,
                tuple(tokenizer(row["input"], truncation=True, max_length=128)["input_ids"]),
                tuple(tuple(tokenizer(choice)["input_ids"]) for choice in row["choices"]),
                row["label"],
            )
            for i, row in enumerate(rows)
        ]

    return {task: read(task) for task in TASKS}


def load(name: str) -> PreTrainedModel:
    assert PARITY is not None
    model: PreTrainedModel = AutoModelForSeq2SeqLM.from_pretrained(PARITY / name)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("model", ["base", *TASKS])
def test_accuracies_are_those_of_the_reference_but_for_one_row(
    model: str, reference: dict[str, Any], examples: dict[str, list[Encoded]]
) -> None:
    loaded = load(model)
    expected = reference["base_accuracy"] if model == "base" else reference["expert_accuracy"][model]
    for task in TASKS:
        losses = choice_losses(loaded, Kind.TEXT_TO_TEXT, examples[task], pad_id=0)
        found = METRICS["accuracy"].score(Answers(losses, labels_of(examples[task])))
        assert abs(found - expected[task]) * len(examples[task]) < 1.5, task


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("point", [0, 1, 2])
def test_the_fisher_is_that_of_the_reference(
    point: int, task: str, reference: dict[str, Any], examples: dict[str, list[Encoded]]
) -> None:
    assert PARITY is not None
    scale = next(p for p in reference["points"] if p["tag"] == f"point{point}.dfmerge")["coefficients"][task]
    model, expert = load("base"), dict(load(task).named_parameters())
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(scale * (expert[name] - p))
    inputs = [examples[task][i] for i in reference["fisher_indices"][task]]
    found = task_fisher(model, Kind.TEXT_TO_TEXT, inputs, pad_id=0).values
    expected = load_file(PARITY / "reference" / f"point{point}.fisher.{task}.safetensors")
    assert found.keys() == expected.keys()
    squares = error = 0.0
    for name, value in expected.items():
        value = value.double()
        difference = found[name].double() + FLOOR - value
        error += float(difference.square().sum())
        squares += float(value.square().sum())
        assert difference.norm() < 1e-4 * value.norm(), name
    assert error < (1e-4) ** 2 * squares
