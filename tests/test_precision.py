"""The type that merges are written in: the base's by default, another one on demand, scored as it is stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from dfmerge_studies.checkpoints.precision import stored_dtype
from dfmerge_studies.checkpoints.reference import Checkpoint
from dfmerge_studies.report.checked import Checked
from dfmerge_studies.tasks.metrics import Metrics, TaskScore
from tests.project import Project

AT = "red=0.3,blue=0.8"
MERGE = ("merge", "spec.yaml", "--coefficients", AT)
NewProject = Callable[..., Project]


def in_16_bits(project: Project, auto: type = AutoModelForCausalLM) -> None:
    """Store the project's base as bfloat16."""
    base = project.folder / "base"
    auto.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)


def types(folder: Path) -> set[torch.dtype]:
    return {tensor.dtype for file in folder.rglob("*.safetensors") for tensor in load_file(file).values()}


def test_a_merge_is_stored_as_the_base_is_and_takes_no_more_room(project_of: NewProject):
    project = project_of("llama")
    in_16_bits(project)
    done = project.json(*MERGE, "--out", "merged")
    out = project.folder / "merged"
    assert done["dtype"] == "bfloat16"
    assert types(out) == {torch.bfloat16}
    sizes = [(project.folder / name / "model.safetensors").stat().st_size for name in ("base", "merged")]
    assert abs(sizes[0] - sizes[1]) < 200
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


@pytest.mark.slow
def test_what_was_written_in_another_type_is_scored_as_it_is_stored(project_of: NewProject):
    project = project_of("llama")
    done = project.json(*MERGE, "--out", "merged", "--dtype", "bfloat16")
    checked = done["checked"]
    before = project.json(*MERGE, "--out", "exact", "--dtype", "float32")
    assert before["checked"] is None
    for name, key, dtype in (("merged", "score", "bfloat16"), ("exact", "merged", "float32")):
        scores = project.json("evaluate", "spec.yaml", "--model", name, "--set", f"dtype={dtype}")["tasks"]
        assert {task: entry[key] for task, entry in checked["tasks"].items()} == {
            task: entry["score"] for task, entry in scores.items()
        }
    written = load_file(project.folder / "merged/model.safetensors")
    for name, tensor in load_file(project.folder / "exact/model.safetensors").items():
        assert torch.equal(written[name], tensor.to(torch.bfloat16))
    provenance = json.loads((project.folder / "merged/dfmerge.json").read_text())
    assert (provenance["dtype"], provenance["checked"]) == ("bfloat16", checked)
    card = ModelCard.load(project.folder / "merged/README.md")
    shown = {result.task_name: result.metric_value for result in card.data.eval_results}
    assert shown == {task: round(entry["score"], 4) for task, entry in checked["tasks"].items()}
    assert "stored as bfloat16" in card.text


def test_an_exported_trial_says_its_scores_before_and_after(finished: Project):
    done = finished.cli("export", "spec.yaml", "--out", "merged", "--dtype", "bfloat16")
    assert "as bfloat16 (and before): red " in done.stdout
    assert types(finished.folder / "merged") == {torch.bfloat16}
    AutoModelForSeq2SeqLM.from_pretrained(finished.folder / "merged")


def test_a_number_that_float16_cannot_hold_is_refused_by_name_and_nothing_is_left(project_of: NewProject):
    project = project_of("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    for folder in ("base", "red", "blue"):
        file = project.folder / folder / "model.safetensors"
        tensors = load_file(file)
        tensors[name][0, 0] = 1e5
        save_file(tensors, file, metadata={"format": "pt"})
    failed = project.cli(*MERGE, "--out", "merged", "--dtype", "float16", check=2)
    assert name in failed.stderr
    assert "65504" in failed.stderr
    assert "bfloat16" in failed.stderr
    assert not [each for each in project.folder.iterdir() if "merged" in each.name]
    project.cli(*MERGE, "--out", "merged", "--dtype", "bfloat16")


def test_heads_are_stored_in_the_same_type(project_of: NewProject):
    project = project_of("bert")
    project.cli(*MERGE, "--out", "merged", "--dtype", "float16")
    assert types(project.folder / "merged") == {torch.float16}


def test_what_transformers_keeps_in_float32_beside_float16_stays_so(project: Project):
    project.cli(*MERGE, "--out", "merged", "--dtype", "float16")
    stored = load_file(project.folder / "merged/model.safetensors")
    assert {name for name, tensor in stored.items() if tensor.dtype == torch.float32} == {
        name for name in stored if ".wo." in name
    }
    loaded = AutoModelForSeq2SeqLM.from_pretrained(project.folder / "merged")
    assert all(torch.equal(loaded.get_parameter(name), tensor) for name, tensor in stored.items())


def scored(rows: list[float]) -> dict[str, TaskScore]:
    return {"a": TaskScore(sum(rows) / len(rows), "accuracy", len(rows), rows)}


def test_a_score_that_rounding_does_not_explain_is_said():
    """Rounding turns answers in both directions alike; damage turns them in one."""
    metrics, before = Metrics.named({"a": "accuracy"}), [1.0] * 50 + [0.0] * 50
    both_ways = [0.0] * 4 + [1.0] * 46 + [1.0] * 3 + [0.0] * 47
    one_way = [0.0] * 10 + [1.0] * 40 + [0.0] * 50
    assert Checked("bfloat16", metrics, scored(both_ways), scored(before)).warnings() == []
    (said,) = Checked("float16", metrics, scored(one_way), scored(before)).warnings()
    assert said == "as float16, a scores 40.0 instead of 50.0, which is more than noise on 100 rows"
    lone = Metrics.named({"a": "log_likelihood"})
    shifted = {"a": TaskScore(-1.001, "log_likelihood", 3, [-1.001, -1.001, -1.001])}
    exact = {"a": TaskScore(-1.0, "log_likelihood", 3, [-1.0, -1.0, -1.0])}
    assert Checked("bfloat16", lone, shifted, exact).warnings() == []  # certain, and of no account


@pytest.mark.parametrize("name", ["bf16", "float8"])
def test_another_word_than_a_type_is_refused(project: Project, name: str):
    failed = project.cli(*MERGE, "--out", "merged", "--dtype", name, check=2)
    assert "--dtype" in failed.stderr
    assert "bfloat16" in failed.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_type_of_files_is_what_most_of_their_numbers_have_whatever_the_configuration_says(tmp_path, dtype):
    tensors = {"a": torch.ones(10, 10, dtype=dtype), "b": torch.ones(3, dtype=torch.float64), "ids": torch.arange(500)}
    (tmp_path / "config.json").write_text('{"dtype": "float64"}')
    save_file(tensors, tmp_path / "model.safetensors")
    assert stored_dtype(Checkpoint("base", tmp_path)) == str(dtype).removeprefix("torch.")
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert stored_dtype(Checkpoint("base", tmp_path)) == str(dtype).removeprefix("torch.")


def test_the_shared_encoder_of_a_classifier_loads_in_its_type(project_of: NewProject):
    project = project_of("bert")
    project.cli(*MERGE, "--out", "merged", "--dtype", "bfloat16")
    model = AutoModelForSequenceClassification.from_pretrained(project.folder / "merged", num_labels=3)
    assert model.bert.embeddings.word_embeddings.weight.dtype == torch.bfloat16
