"""Exported models: what is in the directory, that it loads, that nothing half-written is left."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from dfmerge_studies.checkpoints.write import write_model
from dfmerge_studies.errors import InputError, RunError
from tests.project import load_parameters

AT = "red=0.3,blue=0.8"


@pytest.mark.slow
def test_an_exported_trial_loads_and_gives_the_trial_s_scores_again(finished):
    project = finished
    best = project.json("status", "spec.yaml")["best"]
    exported = project.json("export", "spec.yaml", "--out", "merged")
    assert exported["study"] == "colours"
    assert (exported["trial"], exported["value"]) == (best["number"], best["value"])
    out = project.folder / "merged"
    model = AutoModelForSeq2SeqLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("the river was quiet", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=2).shape[0] == 1
    assert (out / "generation_config.json").is_file()
    scores = project.json("evaluate", "spec.yaml", "--model", "merged")
    assert {task: entry["score"] for task, entry in scores["tasks"].items()} == best["tasks"]
    assert scores["mean"] == pytest.approx(best["value"])


def test_a_given_trial_is_exported_and_the_cache_saves_its_fishers(finished):
    exported = finished.json("export", "spec.yaml", "--trial", "0", "--out", "first")
    assert exported["trial"] == 0
    assert exported["fishers"] == {"computed": 0, "cached": 2}
    assert finished.json("export", "spec.yaml", "--trial", "1", "--out", "second")["trial"] == 1


def test_merging_again_at_known_coefficients_computes_no_fisher_and_gives_the_same_weights(project):
    first = project.json("merge", "spec.yaml", "--coefficients", AT, "--out", "one")
    again = project.json("merge", "spec.yaml", "--coefficients", AT, "--out", "two")
    assert first["fishers"] == {"computed": 2, "cached": 0}
    assert again["fishers"] == {"computed": 0, "cached": 2}
    assert first["digest"] == again["digest"]
    without = project.json("merge", "spec.yaml", "--coefficients", AT, "--out", "three", "--set", "cache=null")
    assert without["fishers"]["computed"] == 2
    assert without["digest"] == first["digest"]


def test_a_damaged_cache_entry_is_computed_again_and_the_merge_is_the_same(project):
    first = project.json("merge", "spec.yaml", "--coefficients", AT, "--out", "one")
    entry = next((project.folder / ".dfmerge/fishers").glob("*.safetensors"))
    entry.write_bytes(entry.read_bytes()[:-8])
    again = project.json("merge", "spec.yaml", "--coefficients", AT, "--out", "two")
    assert again["fishers"] == {"computed": 1, "cached": 1}
    assert again["digest"] == first["digest"]


@pytest.mark.slow
def test_the_card_and_the_provenance_tell_how_to_make_the_model_again(finished):
    project = finished
    exported = project.json("export", "spec.yaml", "--out", "merged")
    card = ModelCard.load(project.folder / "merged/README.md")
    assert card.data.base_model is None  # folders of this machine
    assert {"merge", "df-merge"} <= set(card.data.tags)
    assert card.data.metrics == ["accuracy"]
    results = {(r.task_name, r.dataset_split): r.metric_value for r in card.data.eval_results}
    best = project.json("status", "spec.yaml")["best"]
    assert results["red", "validation"] == pytest.approx(best["tasks"]["red"], abs=1e-4)
    assert ("blue", "test") in results
    assert "| red | `red` | red |" in card.text
    provenance = json.loads((project.folder / "merged/dfmerge.json").read_text())
    assert provenance["trial"] == exported["trial"]
    coefficients = ",".join(f"{name}={value!r}" for name, value in provenance["coefficients"].items())
    assert coefficients in card.text
    again = project.json("merge", "spec.yaml", "--coefficients", coefficients, "--out", "again")
    assert again["digest"] == exported["digest"]
    # The file is an indices file, too: another study can use the very same inputs.
    project.write(name="another", importance={"samples": 1, "indices": "merged/dfmerge.json"})
    assert project.json("merge", "spec.yaml", "--coefficients", AT, "--out", "x")["fishers"]["computed"] == 2
    validated = project.json("validate", "spec.yaml")
    assert validated["estimate"]["fisher_inputs"] == {"red": 4, "blue": 4}  # as many as the first study had


def test_heads_are_kept_per_task_beside_the_shared_encoder(project_of):
    project = project_of("bert")
    project.json("merge", "spec.yaml", "--coefficients", AT, "--out", "merged")
    out = project.folder / "merged"
    AutoModel.from_pretrained(out)
    for task, classes in (("red", 3), ("blue", 2)):
        head = load_file(out / f"heads/{task}.safetensors")
        assert head["classifier.weight"].shape[0] == classes
        expert = load_file(project.folder / task / "model.safetensors")
        assert torch.equal(head["classifier.weight"], expert["classifier.weight"])
    assert "classifier.weight" not in load_file(out / "model.safetensors")


@pytest.mark.parametrize("family", ["t5", "gpt2", "bert"])
def test_the_code_on_the_card_runs_and_loads_the_model(project_of, family):
    project = project_of(family)
    project.json("merge", "spec.yaml", "--coefficients", AT, "--out", "merged")
    card = (project.folder / "merged/README.md").read_text()
    code = card.split("```python")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace("DIR", str(project.folder / "merged")).replace("TASK", "blue"), names)
    output = names["model"](**names["tokenizer"]("the river was quiet", return_tensors="pt"), **_decoder(family))
    assert output.logits.isfinite().all()
    if family == "bert":
        head = load_file(project.folder / "merged/heads/blue.safetensors")
        assert torch.equal(names["model"].classifier.weight, head["classifier.weight"])


def _decoder(family: str) -> dict[str, torch.Tensor]:
    return {"decoder_input_ids": torch.tensor([[0]])} if family == "t5" else {}


def test_every_file_may_be_read_by_whom_any_new_file_may_be(project_of):
    project = project_of("bert")  # with heads
    project.cli("merge", "spec.yaml", "--coefficients", "red=0.5,blue=0.5", "--out", "merged")
    files = [file for file in (project.folder / "merged").rglob("*") if file.is_file()]
    assert sum(file.suffix == ".safetensors" for file in files) == 3
    assert len({file.stat().st_mode for file in files}) == 1


def test_large_weights_are_sharded(finished):
    project = finished
    project.json("export", "spec.yaml", "--out", "merged", "--shard-size", "10KB")
    out = project.folder / "merged"
    assert (out / "model.safetensors.index.json").is_file()
    assert len(list(out.glob("model-*.safetensors"))) > 1
    AutoModelForSeq2SeqLM.from_pretrained(out)


def test_a_chat_template_comes_along(project_of):
    project = project_of("llama")
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer = AutoTokenizer.from_pretrained(project.folder / "base")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(project.folder / "base")
    project.json("merge", "spec.yaml", "--coefficients", AT, "--out", "merged")
    assert AutoTokenizer.from_pretrained(project.folder / "merged").chat_template == template
    AutoModelForCausalLM.from_pretrained(project.folder / "merged")


def test_tied_weights_stay_tied_and_buffers_stay_the_base_s(project):
    project.json("merge", "spec.yaml", "--coefficients", AT, "--method", "gta", "--out", "merged")
    model = AutoModelForSeq2SeqLM.from_pretrained(project.folder / "merged")
    assert model.lm_head.weight is model.shared.weight
    base = load_parameters(project.folder / "base", AutoModelForSeq2SeqLM)
    red = load_parameters(project.folder / "red", AutoModelForSeq2SeqLM)
    blue = load_parameters(project.folder / "blue", AutoModelForSeq2SeqLM)
    merged = load_parameters(project.folder / "merged", AutoModelForSeq2SeqLM)
    for name, start in base.items():
        expected = start + 0.3 * (red[name] - start) + 0.8 * (blue[name] - start)
        torch.testing.assert_close(merged[name], expected, rtol=1e-5, atol=1e-6)


def test_an_export_is_left_alone_without_force_and_replaced_whole_with_it(project):
    out = project.folder / "merged"
    arguments = ("merge", "spec.yaml", "--coefficients", AT, "--out", "merged")
    project.cli(*arguments)
    inode = out.stat().st_ino
    assert "--force" in project.cli(*arguments, check=2).stderr
    assert out.stat().st_ino == inode
    project.cli(*arguments, "--force")
    assert out.stat().st_ino != inode
    assert (out / "config.json").is_file()
    assert [f.name for f in project.folder.iterdir() if f.name.startswith(".merged")] == []


def test_a_write_that_fails_leaves_nothing_behind(project, tmp_path):
    model = AutoModelForSeq2SeqLM.from_pretrained(project.folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(project.folder / "base")
    # A text whose name is a folder that does not exist: the last step of the write fails.
    with pytest.raises(RunError, match="cannot be written"):
        write_model(
            model, tokenizer, tmp_path / "out", source=project.folder / "base", heads={}, texts={"no/such/folder": ""}
        )
    assert [f.name for f in tmp_path.iterdir() if "out" in f.name] == []


def test_a_target_below_a_file_is_refused(project):
    (project.folder / "file").write_text("")
    failed = project.cli("merge", "spec.yaml", "--coefficients", AT, "--out", "file/merged", check=2)
    assert "is a file" in failed.stderr


@pytest.mark.slow
def test_an_export_that_is_killed_leaves_no_model_directory_or_a_whole_one(finished):
    """Kill exports at different moments: the directory appears only when it is complete."""
    project = finished
    export = ("export", "spec.yaml", "--out", "merged", "--force")
    project.process("status", "spec.yaml")  # the first process also waits for what the others are forked from
    begun = time.monotonic()
    project.process(*export)
    life = time.monotonic() - begun  # of an export, on this machine as busy as it is
    shutil.rmtree(project.folder / "merged")
    for fraction in (0.5, 0.7, 0.8, 0.9, 1.0):
        process = project.start(*export)
        time.sleep(fraction * life)
        process.kill()
        process.communicate()
        if (project.folder / "merged").exists():
            AutoModelForSeq2SeqLM.from_pretrained(project.folder / "merged")
            assert (project.folder / "merged/dfmerge.json").is_file()
    project.json(*export)


def test_absolute_paths_of_this_machine_stay_out_of_the_card(project):
    project.write(base=str(project.folder / "base"))
    project.json("merge", "spec.yaml", "--coefficients", AT, "--out", "merged")
    assert str(project.folder) not in (project.folder / "merged/README.md").read_text()


def test_a_fisher_file_has_one_tensor_per_base_parameter_and_says_what_it_is(project):
    printed = project.json("fisher", "spec.yaml", "--expert", "red", "--coefficient", "0.3", "--out", "red.safetensors")
    assert printed == {
        "out": "red.safetensors",
        "expert": "red",
        "coefficient": 0.3,
        "estimator": "exact",
        "samples": 4,
        "cached": False,
        "key": printed["key"],
    }
    values = load_file(project.folder / "red.safetensors")
    base = load_parameters(project.folder / "base", AutoModelForSeq2SeqLM)
    assert {name: tuple(value.shape) for name, value in values.items()} == {n: tuple(p.shape) for n, p in base.items()}
    assert all((value >= 0).all() and value.sum() > 0 for value in values.values())
    again = project.json("fisher", "spec.yaml", "--expert", "red", "--coefficient", "0.3", "--out", "2.safetensors")
    assert again["cached"]
    stored = load_file(project.folder / "2.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in values.items())


def test_writing_over_a_directory_by_accident_is_refused_by_the_function_itself(project, tmp_path):
    model = AutoModelForSeq2SeqLM.from_pretrained(project.folder / "base")
    with pytest.raises(InputError, match="exists already"):
        write_model(model, None, tmp_path, source=Path(os.devnull).parent, heads={}, texts={})
