"""Parts of a model that no file has: refused by name where answers depend on them, for bases, experts and adapters."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BigBirdConfig,
    BigBirdForSequenceClassification,
    DistilBertForMaskedLM,
    MBartConfig,
    MBartForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)

from dfmerge_studies.checkpoints.digest import model_digest
from dfmerge_studies.checkpoints.load import ModelClass, load_model
from dfmerge_studies.checkpoints.reference import Checkpoint, resolve
from dfmerge_studies.checkpoints.resident import Resident, load_resident
from dfmerge_studies.errors import InputError
from tests.models import FAMILIES, VOCABULARY, randomise_, save_model_directory
from tests.project import Project

PROBE = torch.tensor([[2, 30, 31, 40, 3]])


def checkpoint(path: Path) -> Checkpoint:
    return resolve(str(path), root=Path("/"), where="spec.yaml: base")


def resident_of(model_class: ModelClass, base: Path, **experts: Path) -> Resident:
    return load_resident(
        checkpoint(base),
        {name: checkpoint(path) for name, path in experts.items()},
        {name: name for name in experts},
        model_class,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def drop(folder: Path, *names: str) -> None:
    """Take tensors out of a model's file."""
    tensors = load_file(folder / "model.safetensors")
    for name in names:
        del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def masked(project: Project, model_class: Any) -> None:
    """Put a masked language model in the place of the base: an encoder without a pooler or a head of a classifier."""
    config = AutoModelForSequenceClassification.from_pretrained(project.folder / "base").config
    torch.manual_seed(5)
    model_class(config).save_pretrained(project.folder / "base")


def classifier_adapter(project: Project, name: str, saved: list[str], *, labels: int) -> Any:
    """Put a LoRA classifier in the place of an expert; returns the live model as it was trained."""
    torch.manual_seed(len(name))
    model = AutoModelForSequenceClassification.from_pretrained(
        project.folder / "base", num_labels=labels, ignore_mismatched_sizes=True
    )
    target = {"bert": "query", "distilbert": "q_lin"}[project.family]
    config = peft.LoraConfig(r=2, target_modules=[target], task_type="SEQ_CLS", modules_to_save=saved)
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter_name, parameter in wrapped.named_parameters():
            if "lora_" in parameter_name or "modules_to_save" in parameter_name:
                parameter.normal_(std=0.3)
    shutil.rmtree(project.folder / name)
    wrapped.save_pretrained(project.folder / name)
    return wrapped.eval()


COMMANDS = (
    ("run", "spec.yaml"),
    ("fisher", "spec.yaml", "--expert", "red", "--out", "f.safetensors"),
    ("merge", "spec.yaml", "--coefficients", "0.5", "--out", "m"),
    ("evaluate", "spec.yaml", "--model", "red"),
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_an_adapter_without_the_part_of_a_head_that_the_base_lacks_too_is_refused_by_name(
    project_of: Callable[[str], Project], command: tuple[str, ...]
) -> None:
    project = project_of("bert")
    masked(project, BertForMaskedLM)
    for name, labels in (("red", 3), ("blue", 2)):
        classifier_adapter(project, name, ["classifier"], labels=labels)
    done = project.cli(*command, check=2)
    assert "/red: tensor bert.pooler.dense.bias is not in the adapter, nor in the base" in done.stderr
    assert "modules_to_save" in done.stderr
    assert not (project.folder / "m").exists()


def test_an_adapter_that_brings_all_of_its_head_answers_as_the_live_one(project_of: Callable[[str], Project]) -> None:
    project = project_of("distilbert")
    masked(project, DistilBertForMaskedLM)
    live = classifier_adapter(project, "red", ["classifier"], labels=4)
    resident = resident_of(ModelClass.CLASSIFICATION, project.folder / "base", red=project.folder / "red")
    resident.load_scaled_(0, 1.0)
    resident.use_head_("red")
    with torch.no_grad():
        torch.testing.assert_close(resident.model(PROBE).logits, live(PROBE).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("saved", [["classifier"], ["classifier", "pooler"]])
def test_an_adapter_on_a_base_with_a_head_of_another_size_answers_as_the_live_one(
    project_of: Callable[[str], Project], saved: list[str]
) -> None:
    project = project_of("bert")
    save_model_directory(project.folder / "base", "bert", seed=4, num_labels=3)  # a base that knows three classes
    live = classifier_adapter(project, "red", saved, labels=2)
    resident = resident_of(ModelClass.CLASSIFICATION, project.folder / "base", red=project.folder / "red")
    resident.load_scaled_(0, 1.0)
    resident.use_head_("red")
    with torch.no_grad():
        torch.testing.assert_close(resident.model(PROBE).logits, live(PROBE).logits, rtol=1e-4, atol=1e-5)


def test_a_tensor_of_another_shape_than_its_configuration_says_is_refused_with_both(
    project_of: Callable[[str], Project],
) -> None:
    folder = project_of("bert").folder
    tensors = load_file(folder / "red" / "model.safetensors")
    name = "bert.encoder.layer.1.output.dense.bias"
    tensors[name] = tensors[name][:3].clone()
    save_file(tensors, folder / "red" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"layer\.1\.output\.dense\.bias has shape \(3,\), but \(16,\) follows from"):
        resident_of(ModelClass.CLASSIFICATION, folder / "base", red=folder / "red")


@pytest.mark.parametrize(
    "name",
    ["encoder.layer.1.attention.self.query.weight", "embeddings.LayerNorm.bias", "encoder.layer.0.output.dense.bias"],
)
def test_a_base_whose_encoder_lacks_a_tensor_is_refused_by_name_though_experts_have_it(
    project_of: Callable[[str], Project], name: str
) -> None:
    folder = project_of("bert").folder
    drop(folder / "base", name)
    with pytest.raises(InputError, match=rf"base: tensor bert\.{name} is not in the weights"):
        resident_of(ModelClass.CLASSIFICATION, folder / "base", red=folder / "red")


@pytest.mark.parametrize(
    "name", ["classifier.bias", "bert.pooler.dense.weight", "bert.encoder.layer.1.output.dense.bias"]
)
def test_an_expert_that_lacks_a_tensor_is_refused_by_name(project_of: Callable[[str], Project], name: str) -> None:
    folder = project_of("bert").folder
    drop(folder / "red", name)
    with pytest.raises(InputError, match=rf"red: tensor {name} is not in the weights"):
        resident_of(ModelClass.CLASSIFICATION, folder / "base", red=folder / "red")


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("t5", "decoder.block.0.layer.1.EncDecAttention.k.weight"),
        ("t5-v1.1", "encoder.block.1.layer.0.SelfAttention.q.weight"),
        ("gpt2", "transformer.h.1.mlp.c_fc.bias"),
        ("llama", "lm_head.weight"),
    ],
)
@pytest.mark.parametrize("who", ["base", "red"])
def test_a_language_model_that_lacks_a_tensor_is_refused_by_name(
    project_of: Callable[[str], Project], family: str, name: str, who: str
) -> None:
    folder = project_of(family).folder
    drop(folder / who, name)
    kind = {"text_to_text": ModelClass.SEQ2SEQ, "causal": ModelClass.CAUSAL}[FAMILIES[family].kind.name.lower()]
    with pytest.raises(InputError, match=rf"{who}: tensor {name} is not in the weights"):
        resident_of(kind, folder / "base", red=folder / "red")


def test_the_key_bias_of_an_attention_counts_though_a_softmax_cancels_it(project_of: Callable[[str], Project]) -> None:
    folder = project_of("bert").folder
    drop(folder / "red", "bert.encoder.layer.0.attention.self.key.bias")
    with pytest.raises(InputError, match=r"self\.key\.bias is not in the weights"):
        load_model(checkpoint(folder / "red"), ModelClass.CLASSIFICATION, dtype=torch.float32)


def test_a_tensor_counts_however_little_it_changes(tmp_path: Path) -> None:
    """An attention of small weights, whose queries hardly matter to the logits."""
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = MBartConfig(vocab_size=120, d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, **sizes)
    torch.manual_seed(1)
    MBartForConditionalGeneration(config).save_pretrained(tmp_path / "red")
    drop(tmp_path / "red", "model.encoder.layers.0.self_attn.q_proj.weight")
    with pytest.raises(InputError, match=r"encoder\.layers\.0\.self_attn\.q_proj\.weight is not in the weights"):
        load_model(checkpoint(tmp_path / "red"), ModelClass.SEQ2SEQ, dtype=torch.float32)


# What nothing depends on.


def saved(model: Any, path: Path, family: str) -> Path:
    model.save_pretrained(path)
    tokenizer = path.parent / "tokenizer"  # one for all: training it again would draw another
    if not tokenizer.exists():
        FAMILIES[family].tokenizer().save_pretrained(tokenizer)
    return shutil.copytree(tokenizer, path, dirs_exist_ok=True)


def big_bird(path: Path, *, seed: int) -> Path:
    """A classifier with a pooler that its head does not use."""
    config = BigBirdConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=40,
        attention_type="original_full",
    )
    model = BigBirdForSequenceClassification(config)
    randomise_(model, torch.Generator().manual_seed(seed))
    return saved(model, path, "bert")


def xlnet(path: Path, *, seed: int) -> Path:
    """A language model with a mask embedding that scoring does not use."""
    config = XLNetConfig(vocab_size=VOCABULARY, d_model=16, n_layer=1, n_head=2, d_inner=24)
    model = XLNetLMHeadModel(config)
    randomise_(model, torch.Generator().manual_seed(seed))
    return saved(model, path, "gpt2")


POOLER = ("bert.pooler.weight", "bert.pooler.bias")


@pytest.mark.parametrize("who", [("base",), ("red",), ("base", "red")], ids="+".join)
@pytest.mark.parametrize(
    ("make", "model_class", "unused"),
    [(big_bird, ModelClass.CLASSIFICATION, POOLER), (xlnet, ModelClass.CAUSAL, ("transformer.mask_emb",))],
    ids=["a pooler", "a mask"],
)
def test_a_part_that_no_answer_depends_on_may_be_missing_and_changes_nothing(
    tmp_path: Path, who: tuple[str, ...], make: Any, model_class: ModelClass, unused: tuple[str, ...]
) -> None:
    folders = {name: make(tmp_path / name, seed=seed) for seed, name in enumerate(("base", "red"))}
    whole = resident_of(model_class, folders["base"], red=folders["red"])
    for name in who:
        drop(folders[name], *unused)
    residents = [resident_of(model_class, folders["base"], red=folders["red"]) for _ in range(2)]
    answers = []
    for resident in (whole, *residents):
        resident.load_scaled_(0, 0.7)
        resident.use_head_("red")
        with torch.no_grad():
            answers.append(resident.model(input_ids=PROBE).logits)
    torch.testing.assert_close(answers[1], answers[0], rtol=0, atol=0)
    torch.testing.assert_close(answers[2], answers[0], rtol=0, atol=0)
    states = [{**dict(r.model.state_dict()), **r.heads.get("red", {})} for r in residents]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    for resident in residents:
        assert not set(unused) & set(resident.names)


# The heads of an exported model.


def test_a_head_without_a_tensor_is_refused_by_name_and_does_not_borrow_it_from_another_task(
    project_of: Callable[[str], Project],
) -> None:
    project = project_of("bert")
    project.cli("merge", project.file, "--coefficients", "0.5", "--method", "task-arithmetic", "--out", "m")
    assert project.json("evaluate", project.file, "--model", "m")["tasks"].keys() == {"red", "blue"}
    assert model_digest(checkpoint(project.folder / "m"))
    head = project.folder / "m" / "heads" / "blue.safetensors"
    tensors = load_file(head)
    del tensors["classifier.bias"]
    save_file(tensors, head)
    done = project.cli("evaluate", project.file, "--model", "m", check=2)
    assert "tensor classifier.bias is not in the weights, nor in the head of the task blue" in done.stderr
