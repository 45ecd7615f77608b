"""PEFT adapters: folded at 1 they are the live adapter, or they are refused by name."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from dfmerge_studies.checkpoints.adapters import load_adapter, other_base
from dfmerge_studies.checkpoints.load import ModelClass
from dfmerge_studies.checkpoints.reference import Checkpoint, resolve
from dfmerge_studies.checkpoints.resident import load_resident
from dfmerge_studies.errors import InputError
from dfmerge_studies.tasks.encoding import Kind
from tests.models import FAMILIES, randomise_, save_model_directory
from tests.project import make_project

AUTO = {
    Kind.TEXT_TO_TEXT: (AutoModelForSeq2SeqLM, ModelClass.SEQ2SEQ, "SEQ_2_SEQ_LM"),
    Kind.CAUSAL: (AutoModelForCausalLM, ModelClass.CAUSAL, "CAUSAL_LM"),
    Kind.CLASSIFICATION: (AutoModelForSequenceClassification, ModelClass.CLASSIFICATION, "SEQ_CLS"),
}


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def base(family: str) -> Path:
        if family not in made:
            made[family] = save_model_directory(tmp_path_factory.mktemp(family) / "base", family)
        return made[family]

    return base


def lora(**settings: Any) -> peft.PeftConfig:
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 7} | settings)


def save_adapter(
    base: Path, kind: Kind, config: peft.PeftConfig, path: Path, *, seed: int = 0, **loading: Any
) -> peft.PeftModel:
    """Save an adapter with random weights; returns the live one."""
    auto, _, task_type = AUTO[kind]
    config.task_type = config.task_type or task_type
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        live = peft.get_peft_model(auto.from_pretrained(base, **loading), config)
        with torch.no_grad():
            for parameter in live.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    live.save_pretrained(path)
    return live.eval()


def at(path: Path) -> Checkpoint:
    return resolve(str(path), root=Path("/"), where="spec.yaml: base")


def folded(base: Path, kind: Kind, path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return load_adapter(at(path), at(base), AUTO[kind][1], dtype=dtype)


def outputs(model: Any, kind: Kind) -> Tensor:
    """Logits on tokens that nothing else has been tried on, row by row since some heads know no padding."""
    ids = torch.randint(3, 150, (4, 9), generator=torch.Generator().manual_seed(11))
    ids[0, :4] = torch.tensor([5, 6, 100, 101])
    more = {"decoder_input_ids": ids[:1, :4]} if kind is Kind.TEXT_TO_TEXT else {}
    with torch.no_grad():
        return torch.cat([model(input_ids=row[None], **more).logits for row in ids])


def rewritten(path: Path, **fields: Any) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


Q = {"target_modules": ["q_proj", "v_proj"]}
EMBED = ["embed_tokens"]
EXACT: dict[str, tuple[str, Callable[[], peft.PeftConfig]]] = {
    "plain": ("llama", lambda: lora(**Q)),
    "every dense layer": ("llama", lambda: lora(target_modules="all-linear")),
    "ranks and scales by pattern": (
        "llama",
        lambda: lora(**Q, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 9}, use_rslora=True),
    ),
    "one layer": ("llama", lambda: lora(**Q, layers_to_transform=[1])),
    "DoRA": ("llama", lambda: lora(**Q, use_dora=True)),
    "transposed dense layers": ("gpt2", lambda: lora(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
    "DoRA on transposed dense layers": (
        "gpt2",
        lambda: lora(target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True),
    ),
    "positions": ("gpt2", lambda: lora(target_modules=["wpe"])),
    "relative positions": ("t5", lambda: lora(target_modules=["relative_attention_bias", "q"])),
    "untied embeddings": ("llama", lambda: lora(target_modules=["embed_tokens", "lm_head"])),
    "saved embeddings, untied": ("llama", lambda: lora(**Q, modules_to_save=["embed_tokens", "lm_head", "norm"])),
    "some tokens, untied": ("llama", lambda: lora(**Q, trainable_token_indices=[5, 100])),
    "both uses of a tied matrix": (
        "llama-tied",
        lambda: lora(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True),
    ),
    "saved embeddings, kept tied": (
        "llama-tied",
        lambda: lora(**Q, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ),
    "some tokens, tied": ("llama-tied", lambda: lora(**Q, trainable_token_indices=[5, 100])),
    "trainable tokens alone": (
        "gpt2",
        lambda: peft.TrainableTokensConfig(target_modules=["wte"], token_indices=[5, 100]),
    ),
    "a head and all biases": ("bert", lambda: lora(target_modules=["query", "word_embeddings"], bias="all")),
    "a bias of its own": ("bert", lambda: lora(target_modules=["query", "value"], lora_bias=True)),
    "a head of two layers": ("roberta", lambda: lora(target_modules=["query", "value"], bias="lora_only")),
    "AdaLoRA": (
        "llama",
        lambda: peft.AdaLoraConfig(target_r=2, init_r=4, total_step=10, tinit=1, tfinal=1, **Q),
    ),
    "IA3": ("t5", lambda: peft.IA3Config(target_modules=["k", "v", "wo"], feedforward_modules=["wo"])),
    "IA3 on transposed dense layers": (
        "gpt2",
        lambda: peft.IA3Config(target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True),
    ),
    "LoHa": ("llama", lambda: peft.LoHaConfig(r=3, **Q)),
    "LoKr": ("llama", lambda: peft.LoKrConfig(r=3, decompose_both=True, **Q)),
    "VeRA": ("llama", lambda: peft.VeraConfig(r=4, save_projection=False, **Q)),
    "VB-LoRA": ("llama", lambda: peft.VBLoRAConfig(num_vectors=6, vector_length=4, topk=2, **Q)),
    "OFT": ("llama", lambda: peft.OFTConfig(r=0, oft_block_size=4, **Q)),
    "BOFT": ("llama", lambda: peft.BOFTConfig(boft_block_size=4, **Q)),
    "FourierFT": ("llama", lambda: peft.FourierFTConfig(n_frequency=10, **Q)),
    "norms": ("llama", lambda: peft.LNTuningConfig(target_modules=["norm"])),
    "OLoRA": ("llama", lambda: lora(**Q, init_lora_weights="olora")),
    "PiSSA": ("llama", lambda: lora(**Q, init_lora_weights="pissa")),
}


@pytest.mark.parametrize("name", EXACT)
def test_a_folded_adapter_answers_as_the_live_one_and_is_the_same_model_each_time(
    bases: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    family, config = EXACT[name]
    kind, base = FAMILIES[family].kind, bases(family)
    live = save_adapter(base, kind, config(), tmp_path / "red")
    torch.manual_seed(1)
    model = folded(base, kind, tmp_path / "red")
    drawn = torch.rand(1)
    expected = outputs(live, kind)
    with live.disable_adapter():
        without = outputs(live, kind)
    assert (expected - without).norm() > 1e-3 * expected.norm()
    torch.testing.assert_close(outputs(model, kind), expected, rtol=1e-4, atol=1e-4)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn), "loading uses up random numbers of its caller"
    torch.manual_seed(2)
    again = dict(folded(base, kind, tmp_path / "red").named_parameters())
    assert all(torch.equal(parameter, again[n]) for n, parameter in model.named_parameters())


@pytest.mark.parametrize("name", ["plain", "DoRA", "both uses of a tied matrix", "a head of two layers", "IA3"])
def test_in_sixteen_bits_a_folded_adapter_differs_by_rounding(
    bases: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    family, config = EXACT[name]
    kind, base = FAMILIES[family].kind, bases(family)
    live = save_adapter(base, kind, config(), tmp_path / "red")
    model = folded(base, kind, tmp_path / "red", torch.bfloat16)
    expected = outputs(live, kind)
    assert (outputs(model, kind).float() - expected).norm() < 0.05 * expected.norm()


# What one use of a tied matrix gets, the other must not.


TIED: dict[str, tuple[str, Callable[[], peft.PeftConfig], str]] = {
    "embed_tokens": ("llama-tied", lambda: lora(target_modules=EMBED), "lm_head.weight"),
    "lm_head": ("llama-tied", lambda: lora(target_modules=["lm_head"]), "embed_tokens.weight"),
    "both, each its own": ("llama-tied", lambda: lora(target_modules=["embed_tokens", "lm_head"]), "lm_head.weight"),
    "wte": ("gpt2", lambda: lora(target_modules=["wte"]), "lm_head.weight"),
    "shared": ("t5", lambda: lora(target_modules=["shared"]), "embed_tokens.weight"),
    "encoder alone": ("t5", lambda: lora(target_modules=["encoder.embed_tokens"]), "shared.weight"),
    "lm_head of T5": ("t5", lambda: lora(target_modules=["lm_head"]), "shared.weight"),
    "saved embed_tokens": ("llama-tied", lambda: lora(**Q, modules_to_save=EMBED), "lm_head.weight"),
    "saved lm_head": ("llama-tied", lambda: lora(**Q, modules_to_save=["lm_head"]), "embed_tokens.weight"),
    "both saved": ("llama-tied", lambda: lora(**Q, modules_to_save=["lm_head", *EMBED]), "embed_tokens.weight"),
    "tokens of lm_head": (
        "llama-tied",
        lambda: lora(**Q, trainable_token_indices={"lm_head": [5, 100]}),
        "embed_tokens.weight",
    ),
    "other tokens": (
        "llama-tied",
        lambda: lora(**Q, trainable_token_indices={"lm_head": [5, 100], "embed_tokens": [5, 101]}),
        "embed_tokens.weight",
    ),
    "VeRA": ("llama-tied", lambda: peft.VeraConfig(r=4, target_modules=["lm_head"]), "embed_tokens.weight"),
    "LoHa": ("llama-tied", lambda: peft.LoHaConfig(r=4, target_modules=["lm_head"]), "embed_tokens.weight"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", TIED)
def test_an_adapter_of_one_use_of_a_tied_matrix_is_refused_by_name(
    bases: Callable[[str], Path], tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    family, config, other = TIED[name]
    kind, base = FAMILIES[family].kind, bases(family)
    save_adapter(base, kind, config(), tmp_path / "red")
    with pytest.raises(InputError, match=r"red: .* and .* are one tied matrix in the base") as refusal:
        folded(base, kind, tmp_path / "red", dtype)
    assert other in refusal.value.what


def test_a_tied_model_stays_tied_through_folding(bases: Callable[[str], Path], tmp_path: Path) -> None:
    save_adapter(bases("llama-tied"), Kind.CAUSAL, lora(**Q, trainable_token_indices=[5]), tmp_path / "red")
    model = folded(bases("llama-tied"), Kind.CAUSAL, tmp_path / "red")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.config.tie_word_embeddings is True


# What is no change of weights.


REFUSED: dict[str, tuple[str, Callable[[], peft.PeftConfig], str]] = {
    "prompt tuning": ("llama", lambda: peft.PromptTuningConfig(num_virtual_tokens=3), "PROMPT_TUNING.*beside"),
    "prefix tuning": ("llama", lambda: peft.PrefixTuningConfig(num_virtual_tokens=3), "PREFIX_TUNING.*beside"),
    "p-tuning": ("llama", lambda: peft.PromptEncoderConfig(num_virtual_tokens=3), "P_TUNING.*beside"),
    "multitask prompts": (
        "t5",
        lambda: peft.MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=2),
        "MULTITASK_PROMPT_TUNING.*beside",
    ),
    "prompts in attention": (
        "llama",
        lambda: peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1),
        "ADAPTION_PROMPT.*beside",
    ),
    "mixtures of adapters": ("llama", lambda: peft.PolyConfig(r=2, **Q), "POLY.*beside"),
    "more layers": ("llama", lambda: lora(**Q, layer_replication=[(0, 1), (0, 2)]), "layer_replication is set"),
    "tokens that call it": ("llama", lambda: lora(**Q, alora_invocation_tokens=[5]), "alora_invocation_tokens is set"),
    "a bias that the base lacks": ("llama", lambda: lora(**Q, lora_bias=True), "LORA cannot be folded.*no bias"),
    "drawn starts": (
        "llama",
        lambda: lora(**Q, init_lora_weights="pissa_niter_4"),
        "draws random numbers.*pissa_niter",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_change_of_the_bases_weights_is_refused_by_name(
    bases: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    family, config, message = REFUSED[name]
    kind, base = FAMILIES[family].kind, bases(family)
    save_adapter(base, kind, config(), tmp_path / "red")
    with pytest.raises(InputError, match=message) as refusal:
        folded(base, kind, tmp_path / "red")
    assert refusal.value.where is not None
    assert "red" in refusal.value.where


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda'"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "init_lora_weights is 'loftq'"),
        ({"peft_type": "NEWLORA"}, "peft_type 'NEWLORA'"),
        ({"peft_type": None}, "peft_type None"),
        ({"task_type": "SEQ_CLS"}, "task_type is SEQ_CLS, but .* CAUSAL_LM"),
        ({"task_type": "TOKEN_CLS"}, "task_type is TOKEN_CLS, but .* CAUSAL_LM"),
        ({"lora_alpha": "7"}, "does not fit the base"),
        ({"target_modules": 3}, "does not fit the base"),
    ],
)
def test_a_configuration_that_means_something_else_is_refused(
    bases: Callable[[str], Path], tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    save_adapter(bases("llama"), Kind.CAUSAL, lora(**Q), tmp_path / "red")
    rewritten(tmp_path / "red", **fields)
    with pytest.raises(InputError, match=message):
        folded(bases("llama"), Kind.CAUSAL, tmp_path / "red")


def test_what_the_base_uses_outside_the_module_is_found_out_by_its_outputs(tmp_path: Path) -> None:
    # DeBERTa reads the matrix of its relative positions itself, past the adapter: live, this adapter does nothing.
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    positions = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_position_embeddings": 40}
    config = DebertaV2Config(vocab_size=200, num_labels=3, **sizes, **positions)
    model = DebertaV2ForSequenceClassification(config)
    randomise_(model, torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "base", Kind.CLASSIFICATION, lora(target_modules=["rel_embeddings"]), tmp_path / "red")
    with pytest.raises(InputError, match=r"answers otherwise than live: .* differ by \d+\.\d%"):
        folded(tmp_path / "base", Kind.CLASSIFICATION, tmp_path / "red")
    save_adapter(tmp_path / "base", Kind.CLASSIFICATION, lora(target_modules=["query_proj"]), tmp_path / "blue")
    folded(tmp_path / "base", Kind.CLASSIFICATION, tmp_path / "blue")


def test_an_adapter_of_stacked_experts_is_folded(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=200, **sizes, **experts))
    randomise_(model, torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "base")
    config = lora(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    live = save_adapter(tmp_path / "base", Kind.CAUSAL, config, tmp_path / "red")
    model = folded(tmp_path / "base", Kind.CAUSAL, tmp_path / "red")
    torch.testing.assert_close(outputs(model, Kind.CAUSAL), outputs(live, Kind.CAUSAL), rtol=1e-4, atol=1e-4)


# Which base, which folder.


@pytest.mark.parametrize(
    ("named", "noted"),
    [
        ("google/flan-t5-base", True),
        ("/somewhere/else/base", False),
        ("C:\\models\\Base\\", False),
        ("org/base", False),
        ("", False),
        (None, False),
    ],
)
def test_an_adapter_that_names_another_base_gets_a_note(
    bases: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, named: str | None, noted: bool
) -> None:
    save_adapter(bases("llama"), Kind.CAUSAL, lora(**Q), tmp_path / "red")
    rewritten(tmp_path / "red", base_model_name_or_path=named)
    with caplog.at_level(logging.WARNING):
        load_resident(
            at(bases("llama")),
            {"red": at(tmp_path / "red")},
            {"red": "red"},
            ModelClass.CAUSAL,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
    notes = [record.getMessage() for record in caplog.records if "names the base" in record.getMessage()]
    assert len(notes) == int(noted)
    assert all("flan-t5-base" in note and "red" in note for note in notes)


@pytest.mark.parametrize("reference", ["google/flan-t5-base@main", "package:google_flan_t5_base/model"])
def test_a_base_by_its_own_name_gets_no_note(bases: Callable[[str], Path], tmp_path: Path, reference: str) -> None:
    save_adapter(bases("llama"), Kind.CAUSAL, lora(**Q), tmp_path / "red")
    rewritten(tmp_path / "red", base_model_name_or_path="google/flan-t5-base")
    assert other_base(at(tmp_path / "red"), Checkpoint(reference, bases("llama"))) is None


def test_validate_refuses_an_adapter_of_one_use_and_notes_another_base(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project", "gpt2", rows=6, samples=2, trials=1)
    for target in ("c_attn", "wte"):
        shutil.rmtree(project.folder / "red")
        save_adapter(project.folder / "base", Kind.CAUSAL, lora(target_modules=[target]), project.folder / "red")
        rewritten(project.folder / "red", base_model_name_or_path="org/other")
        if target == "c_attn":
            (note,) = project.json("validate", "spec.yaml")["notes"]
            assert note["where"].endswith("spec.yaml: experts.red")
            assert "the adapter names the base org/other" in note["what"]
    refused = project.cli("run", "spec.yaml", check=2).stderr
    assert "transformer.wte.weight and lm_head.weight are one tied matrix" in refused
    assert not list(project.folder.rglob("*.db"))


def test_a_setting_that_peft_does_not_know_gets_a_note(
    bases: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_adapter(bases("llama"), Kind.CAUSAL, lora(**Q), tmp_path / "red")
    rewritten(tmp_path / "red", use_newer_idea=True, use_no_idea=False)
    with caplog.at_level(logging.WARNING):
        folded(bases("llama"), Kind.CAUSAL, tmp_path / "red")
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [
        "the installed peft does not know the field use_newer_idea and ignores it"
    ]


def test_a_folder_of_several_adapters_is_refused_with_their_names(bases: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("first", "second"):
        save_adapter(bases("llama"), Kind.CAUSAL, lora(**Q), tmp_path / "all" / name)
    with pytest.raises(InputError, match=r"holds 2 adapters in folders of their own: first, second\. Name one"):
        at(tmp_path / "all")
