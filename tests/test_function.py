"""An expert must compute the base's function: configurations are compared field by field, buffers too, and answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from dfmerge_studies.checkpoints.load import ModelClass
from dfmerge_studies.checkpoints.reference import Checkpoint, resolve
from dfmerge_studies.checkpoints.resident import Resident, load_resident
from dfmerge_studies.errors import InputError
from tests.models import FAMILIES, VOCABULARY, make_model, randomise_
from tests.project import Project

KINDS = {"TEXT_TO_TEXT": ModelClass.SEQ2SEQ, "CAUSAL": ModelClass.CAUSAL, "CLASSIFICATION": ModelClass.CLASSIFICATION}
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
MORE: dict[str, Callable[[], PreTrainedModel]] = {
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=8)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=4)),
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCABULARY,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_position_embeddings=64,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
            decoder_start_token_id=1,
            forced_eos_token_id=None,
        )
    ),
}


def kind_of(family: str) -> ModelClass:
    if family in FAMILIES:
        return KINDS[FAMILIES[family].kind.name]
    return ModelClass.SEQ2SEQ if family == "bart" else ModelClass.CAUSAL


@pytest.fixture
def pair(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """A function that writes a base and an expert of a family with one tokenizer; the expert has other weights."""

    def write(family: str) -> tuple[Path, Path]:
        tokenizers = {"bart": "t5"}
        tokenizer = (FAMILIES.get(family) or FAMILIES[tokenizers.get(family, "gpt2")]).tokenizer()
        for seed, name in enumerate(("base", "red")):
            if family in FAMILIES:
                model = make_model(family, seed=seed)
            else:
                model = MORE[family]()
                randomise_(model, torch.Generator().manual_seed(seed))
            model.save_pretrained(tmp_path / name)
            tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / "base", tmp_path / "red"

    return write


def checkpoint(path: Path) -> Checkpoint:
    return resolve(str(path), root=Path("/"), where="spec.yaml: base")


def resident_of(family: str, base: Path, **experts: Path) -> Resident:
    return load_resident(
        checkpoint(base),
        {name: checkpoint(path) for name, path in experts.items()},
        {name: name for name in experts},
        kind_of(family),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def configure(folder: Path, *drop: str, **fields: Any) -> None:
    """Change fields of a config.json; double underscores descend."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for name, value in fields.items():
        *parents, leaf = name.split("__")
        target = config
        for parent in parents:
            target = target[parent]
        target[leaf] = value
    for name in drop:
        config.pop(name, None)
    file.write_text(json.dumps(config))


ANOTHER_FUNCTION = [
    ("llama", "rope_parameters__rope_theta", 500000.0),
    ("llama", "rms_norm_eps", 1e-2),
    ("llama", "hidden_act", "gelu"),
    ("llama", "rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}),
    ("gpt2", "n_head", 4),
    ("gpt2", "activation_function", "relu"),
    ("gpt2", "layer_norm_epsilon", 1e-1),
    ("gpt2", "scale_attn_weights", False),
    ("gpt2", "scale_attn_by_inverse_layer_idx", True),
    ("t5", "dense_act_fn", "gelu"),
    ("t5", "relative_attention_max_distance", 8),
    ("t5", "layer_norm_epsilon", 1e-1),
    ("t5", "scale_decoder_outputs", False),
    ("t5", "decoder_start_token_id", 1),
    ("bert", "num_attention_heads", 4),
    ("bert", "hidden_act", "relu"),
    ("bert", "layer_norm_eps", 1e-1),
    ("bert", "is_decoder", True),
    ("roberta", "pad_token_id", 0),
    ("distilbert", "n_heads", 4),
    ("mistral", "sliding_window", 4),
    ("mistral", "sliding_window", None),
    ("gemma2", "final_logit_softcapping", 5.0),
    ("gemma2", "attn_logit_softcapping", 5.0),
    ("gemma2", "query_pre_attn_scalar", 16),
    ("gemma2", "layer_types", ["full_attention", "full_attention"]),
    ("bart", "scale_embedding", True),
    ("bart", "activation_function", "relu"),
]


def field_of(name: str) -> str:
    return {"n_head": "n_head", "n_heads": "n_heads"}.get(name, name).replace("__", ".")


@pytest.mark.parametrize(("family", "name", "value"), ANOTHER_FUNCTION)
def test_an_expert_with_another_function_is_refused_by_field_with_both_values_and_files(
    pair: Callable[..., tuple[Path, Path]], family: str, name: str, value: Any
) -> None:
    base, red = pair(family)
    assert resident_of(family, base, red=red).names
    configure(red, **{name: value})
    with pytest.raises(InputError) as refused:
        resident_of(family, base, red=red)
    message = str(refused.value)
    assert message.startswith(f"{red}/config.json: {field_of(name)}")
    assert f"{base}/config.json" in message
    if not isinstance(value, dict):
        assert f" is {value!r}" in message


def test_the_fault_that_is_refused_is_real(pair: Callable[..., tuple[Path, Path]]) -> None:
    """The same weights under another rope_theta answer otherwise, by transformers alone."""
    _, red = pair("llama")
    ids = torch.tensor([list(range(2, 20))])
    with torch.no_grad():
        before = AutoModelForCausalLM.from_pretrained(red)(ids).logits
        configure(red, rope_parameters__rope_theta=500000.0)
        after = AutoModelForCausalLM.from_pretrained(red)(ids).logits
    assert float((after - before).norm() / before.norm()) > 0.01


CANNOT_MATTER = [
    ("gpt2", {"resid_pdrop": 0.5, "attn_pdrop": 0.0, "summary_first_dropout": 0.3}),
    ("gpt2", {"use_cache": False, "torch_dtype": "bfloat16", "initializer_range": 0.5, "architectures": ["Other"]}),
    ("gpt2", {"pad_token_id": 0, "bos_token_id": 5, "eos_token_id": 7}),
    ("gpt2", {"task_specific_params": {"text-generation": {"do_sample": True}}, "unsloth_version": "2025.1"}),
    ("gpt2", {"max_length": 12, "do_sample": True, "temperature": 0.3}),
    ("llama", {"pad_token_id": 0, "_name_or_path": "elsewhere", "transformers_version": "4.30.0"}),
    ("llama", {"max_position_embeddings": 128}),
    ("llama", {"pretraining_tp": 2, "attention_dropout": 0.4}),
    ("t5", {"dropout_rate": 0.4, "task_specific_params": {"summarization": {"prefix": "x"}}, "output_past": True}),
    ("bert", {"hidden_dropout_prob": 0.5, "classifier_dropout": 0.3, "finetuning_task": "sst2"}),
    ("bert", {"gradient_checkpointing": True, "position_embedding_type": "absolute", "pad_token_id": 0}),
    ("bert", {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}),
    ("qwen2", {"max_position_embeddings": 32, "pad_token_id": 3}),
]


@pytest.mark.parametrize(("family", "fields"), CANNOT_MATTER)
def test_what_cannot_matter_is_no_reason_to_refuse_an_expert(
    pair: Callable[..., tuple[Path, Path]], family: str, fields: dict[str, Any]
) -> None:
    base, red = pair(family)
    configure(red, **fields)
    assert resident_of(family, base, red=red).names


def test_old_and_new_ways_to_write_rotary_positions_are_equal(pair: Callable[..., tuple[Path, Path]]) -> None:
    base, red = pair("llama")
    configure(base, "rope_parameters", rope_theta=10000.0, rope_scaling={"type": "linear", "factor": 2.0})
    new = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    configure(red, "rope_theta", "rope_scaling", rope_parameters=new)
    assert resident_of("llama", base, red=red).names
    configure(base, "rope_scaling")
    configure(red, "rope_parameters")
    assert resident_of("llama", base, red=red).names


def test_longer_positions_count_where_rotary_scaling_depends_on_them(pair: Callable[..., tuple[Path, Path]]) -> None:
    base, red = pair("llama")
    for folder in (base, red):
        configure(folder, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    configure(red, max_position_embeddings=128)
    with pytest.raises(InputError, match="max_position_embeddings is 128, but 64"):
        resident_of("llama", base, red=red)


def test_a_field_that_an_old_configuration_leaves_to_its_default_is_equal_to_it(
    pair: Callable[..., tuple[Path, Path]],
) -> None:
    base, red = pair("llama")
    configure(base, "attention_bias", "mlp_bias", "head_dim", "rms_norm_eps", "pretraining_tp")
    assert resident_of("llama", base, red=red).names


def test_a_buffer_that_differs_is_refused_by_name(pair: Callable[..., tuple[Path, Path]]) -> None:
    base, red = pair("bart")
    tensors = load_file(red / "model.safetensors")
    save_file({**tensors, "final_logits_bias": torch.zeros(1, VOCABULARY)}, red / "model.safetensors", {"format": "pt"})
    assert resident_of("bart", base, red=red).names
    biases = torch.zeros(1, VOCABULARY)
    biases[0, 7] = 0.5
    save_file({**tensors, "final_logits_bias": biases}, red / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=rf"{red}: buffer final_logits_bias differs .*{base}.* by up to 0\.5"):
        resident_of("bart", base, red=red)


def test_the_configuration_beside_an_adapter_is_compared_too(pair: Callable[..., tuple[Path, Path]]) -> None:
    base, red = pair("llama")
    model = AutoModelForCausalLM.from_pretrained(base)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    shutil.rmtree(red)
    wrapped.save_pretrained(red)
    shutil.copy(base / "config.json", red)
    resident_of("llama", base, red=red)
    configure(red, rope_parameters__rope_theta=500000.0)
    with pytest.raises(InputError, match=r"red/config\.json: rope_parameters\.rope_theta is 500000\.0, but 10000\.0"):
        resident_of("llama", base, red=red)


def test_every_command_refuses_another_function(project_of: Callable[[str], Project]) -> None:
    project = project_of("llama")
    configure(project.folder / "blue", rms_norm_eps=1e-2)
    for command in (
        ("run", project.file),
        ("merge", project.file, "--coefficients", "0.5", "--out", "m"),
        ("fisher", project.file, "--expert", "red", "--out", "f"),
    ):
        done = project.cli(*command, check=2)
        assert "blue/config.json: rms_norm_eps is 0.01, but 1e-06 in" in done.stderr
