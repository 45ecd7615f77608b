"""scripts/finetune.py on tiny real models: it learns, what it writes is an expert, and processes share the work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

from dfmerge_studies import StudySpec
from scripts import finetune
from scripts.lora import LoRA, add_adapter
from tests.models import TEXTS
from tests.project import Project, load_parameters, make_project, start_ranks
from tests.test_generate_tasks import generating

ROOT = Path(__file__).resolve().parents[1]
SLOW = pytest.mark.slow
WORDS = ("river", "train", "wall")


def trainable(folder: Path, family: str) -> Project:
    """A project whose tasks can be learnt, as a trainer has it: the first word decides, and one expert is missing."""
    project = make_project(folder, family)
    for name, task in project.spec["tasks"].items():
        labels = 3 if name == "red" else 2  # as the project's experts have
        choices = ["yes", "no", "rain"][:labels]
        lines = [{"input": f"{WORDS[i % labels]} {i}", "choices": choices, "label": i % labels} for i in range(48)]
        (folder / f"{name}.train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for split in ("validation", "test"):
            (folder / f"{name}.{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:24]))
        task["training_split"] = "train"
        task["dataset"]["data_files"]["train"] = f"{name}.train.jsonl"
    project.spec["experts"] = {"red": "new-red", "blue": "blue"}
    project.write()
    return project


def train(project: Project, *arguments: str, out: str = "new-red") -> dict[str, Any]:
    """Train in this process; what training.json says."""
    common = ("--out", str(project.folder / out), "--batch-size", "12", "--lr", "0.01", "--evaluate-every", "10")
    finetune.main([str(project.file), *common, *arguments])
    return json.loads((project.folder / out / "training.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", pytest.param("gpt2", marks=SLOW), pytest.param("bert", marks=SLOW)])
def test_an_expert_learns_its_task_and_takes_part_in_a_study(tmp_path: Path, family: str) -> None:
    project = trainable(tmp_path, family)
    record = train(project, "--task", "red", "--steps", "150")
    losses = [entry["validation"] for entry in record["history"]]
    assert record["validation_loss"] == min(losses) < 0.7 * losses[0] or losses[0] < 0.2
    assert record["best_step"] == 10 * (losses.index(min(losses)) + 1)
    scores = project.json("evaluate", project.file, "--model", "new-red", "--split", "validation")["tasks"]
    assert scores["red"]["score"] == record["history"][losses.index(min(losses))]["accuracy"]["red"] > 0.6
    rows = project.json("run", project.file, "--trials", "2")["rows"]
    assert rows[-1]["validation"]["tasks"]["red"] >= 0


@pytest.mark.slow
def test_an_expert_that_is_trained_on_targets_writes_them(tmp_path: Path) -> None:
    project = generating(tmp_path, "llama", {"generation_kwargs": {"max_gen_toks": 12}})
    answers = ["yes", "a terrible place", "no", "good, bad"]
    lines = [{"input": text, "answers": [answer, "-"]} for text, answer in zip(TEXTS, answers, strict=False)]
    (tmp_path / "red.validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    project.spec["tasks"]["red"]["training_split"] = "validation"
    project.write()
    record = train(project, "--task", "red", "--steps", "60")
    assert record["history"][-1]["accuracy"] == {}  # nothing is written for an evaluation: its loss says enough
    scores = project.json("evaluate", project.file, "--model", "new-red", "--split", "validation")["tasks"]
    assert scores["red"]["score"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_lora_expert_learns_its_task_and_what_is_written_is_the_adapter_alone(tmp_path: Path, family: str) -> None:
    project = trainable(tmp_path, family)
    targets = {"llama": ("q_proj", "up_proj"), "t5": ("q", "wi")}[family]
    record = train(project, "--task", "red", "--steps", "40", "--lora", "4", "--lora-targets", *targets)
    assert record["lora"] == {"rank": 4, "alpha": None, "targets": list(targets)}
    assert record["validation_loss"] < 0.9 * record["history"][0]["validation"]
    folder = tmp_path / "new-red"
    assert not list(folder.glob("model*.safetensors"))
    names = load_file(folder / "adapter_model.safetensors")
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in names} == set(targets)
    assert {max(min(t.shape) for t in names.values())} == {4}
    best = record["history"][[e["validation"] for e in record["history"]].index(record["validation_loss"])]
    scores = project.json("evaluate", project.file, "--model", "new-red", "--split", "validation")["tasks"]
    assert scores["red"]["score"] == best["accuracy"]["red"]


def test_training_an_adapter_leaves_the_base_as_it_is(tmp_path: Path) -> None:
    project = trainable(tmp_path, "llama")
    found = finetune.find_checkpoints(StudySpec.from_yaml(project.file).derive(experts={}))
    trainee = finetune.load_trainee(found, ["red"], {})
    before = {name: p.clone() for name, p in trainee.model.named_parameters()}
    adapter = add_adapter(trainee.model, LoRA(2, alpha=6), found)
    assert {name.rpartition(".lora_")[0] != "" for name, p in trainee.named_parameters() if p.requires_grad} == {True}
    base = {n.replace(".base_layer", ""): p for n, p in trainee.model.named_parameters() if ".lora_" not in n}
    assert base.keys() == before.keys()
    assert all(torch.equal(base[name], before[name]) for name in before)
    config = adapter.peft_config["default"]
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (2, 6, str(tmp_path / "base"))
    linear = {name for name, module in trainee.model.named_modules() if name.endswith(".base_layer")}
    assert {name.split(".")[-2] for name in linear} == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", "distilbert"])
def test_a_multi_task_model_is_scored_on_every_task(tmp_path: Path, family: str) -> None:
    project = trainable(tmp_path, family)
    project.spec["experts"] = {"red": "red", "blue": "blue"}
    project.write()
    record = train(project, "--multi-task", "--steps", "150", out="both")
    told = record["history"][record["best_step"] // 10 - 1]["accuracy"]
    scores = project.json("evaluate", project.file, "--model", "both", "--split", "validation")["tasks"]
    assert {task: entry["score"] for task, entry in scores.items()} == told
    assert min(told.values()) > 0.6
    heads = sorted(file.stem for file in (tmp_path / "both" / "heads").glob("*.safetensors"))
    assert heads == ([] if family == "t5" else ["blue", "red"])
    if heads:
        red, blue = (load_file(tmp_path / "both" / "heads" / f"{name}.safetensors") for name in ("red", "blue"))
        assert any(not torch.equal(red[name], blue[name]) for name in red)


def test_training_stops_when_the_validation_loss_no_longer_falls(tmp_path: Path) -> None:
    project = trainable(tmp_path, "bert")
    record = train(project, "--task", "red", "--steps", "400", "--lr", "1e-12", "--patience", "2", "--seed", "3")
    steps = [entry["step"] for entry in record["history"]]
    assert steps[-1] < 400
    assert sum(step > record["best_step"] for step in steps) == 2


def test_the_seed_decides_the_result_and_a_small_micro_batch_does_not_change_it(tmp_path: Path) -> None:
    project = trainable(tmp_path, "t5")
    without_dropout(project)
    for out, more in (("a", ()), ("b", ()), ("c", ("--micro-batch", "5")), ("d", ("--seed", "1"))):
        train(project, "--task", "red", "--steps", "4", *more, out=out)
    a, b, c, d = (load_parameters(tmp_path / name, AutoModelForSeq2SeqLM) for name in "abcd")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert max(float((a[name] - c[name]).abs().max()) for name in a) < 1e-3  # Adam divides by small gradients
    assert any(not torch.allclose(a[name], d[name], atol=1e-3) for name in a)


def without_dropout(project: Project) -> None:
    """Take the only randomness that differs between processes out of the base."""
    file = project.folder / "base" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "dropout_rate": 0.0}))


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--sharpness-aware", "fsam", "--mask-every", "2", "--mask-rows", "7")])
def test_two_processes_train_what_one_trains(tmp_path: Path, more: tuple[str, ...]) -> None:
    project = trainable(tmp_path, "t5")
    without_dropout(project)
    options = ["--task", "red", *more, "--steps", "4", "--batch-size", "12", "--lr", "0.01", "--evaluate-every", "2"]
    alone = train(project, "--task", "red", "--steps", "4", *more)
    # What `accelerate launch` does on several GPUs; on CPUs it starts one process only.
    words = [str(project.file), "--out", str(tmp_path / "two"), *options]
    ranks = start_ranks(finetune.main, words, folder=tmp_path)
    for rank in ranks:
        output, errors = rank.communicate(timeout=500)
        assert rank.returncode == 0, output[-500:] + errors[-2000:]
    record = json.loads((tmp_path / "two" / "training.json").read_text())
    assert record["processes"] == 2
    assert record["validation_loss"] == pytest.approx(alone["validation_loss"], rel=1e-3)
    one, two = (load_parameters(tmp_path / name, AutoModelForSeq2SeqLM) for name in ("new-red", "two"))
    apart = torch.cat([(one[name] - two[name]).abs().flatten() for name in one])
    # Adam divides by small gradients, and masks have an edge, so that a rounding can be a whole step of 0.01 for a few;
    # another step moves four fifths of the weights by more than 1e-3.
    assert apart.mean() < 3e-4
    assert (apart > 1e-3).float().mean() < 0.02


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--task", "rad"), "Did you mean 'red'?"),
        (("--task", "red", "--set", "tasks.red.training_split=null"), "no training_split"),
        (("--task", "red", "--set", "tasks.red.training_split=night"), "no split 'night'"),
        (
            ("--task", "red", "--set", "tasks.red.type=regression", "--set", "tasks.red.metric=mse"),
            "trains no heads for tasks of type regression",
        ),
        (("--task", "red", "--lora", "4"), "trains LoRA experts of models that answer with text"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], part: str
) -> None:
    project = trainable(tmp_path, "bert")
    with pytest.raises(SystemExit) as stop:
        train(project, *arguments)
    assert stop.value.code == 2
    assert part in capsys.readouterr().err
    assert not (tmp_path / "new-red").exists()


def test_layers_that_an_adapter_cannot_find_are_told_with_those_that_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = trainable(tmp_path, "llama")
    with pytest.raises(SystemExit) as stop:
        train(project, "--task", "red", "--lora", "4", "--lora-targets", "q", "v")
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "--lora-targets" in said
    assert "down_proj, gate_proj, k_proj" in said
    assert not (tmp_path / "new-red").exists()
