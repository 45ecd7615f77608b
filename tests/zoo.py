"""Tiny models of many more architectures than `models.FAMILIES`, and what becomes of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from tests.models import FAMILIES, VOCABULARY, Family

_SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "d_ff"), 24),
    **dict.fromkeys(("hidden_dim", "d_inner", "ffn_hidden_size"), 24),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_kv_heads", "num_decoder_layers"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "d_head"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 64),
    **dict.fromkeys(("max_encoder_position_embeddings", "max_decoder_position_embeddings", "sliding_window"), 64),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "rotary_dim", "state_size"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 12),
    "num_experts_per_tok": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
}


@dataclass(frozen=True)
class Animal:
    """One architecture.

    Attributes:
        like: the family whose kind and tokenizer it has.
        settings: of its configuration, besides small sizes.
        slow: its importance is computed row by row.
        refused: what the refusal says; None for an architecture that works.
        model_type: of transformers, where it is not the name in the table.
    """

    like: str
    settings: dict[str, Any] = field(default_factory=dict)
    slow: bool = False
    refused: str | None = None
    model_type: str | None = None


_DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
_BATCH = "answers row .* otherwise in a batch than alone"

ZOO: dict[str, Animal] = {
    # causal
    "opt": Animal("gpt2", slow=True),
    "mistral": Animal("gpt2"),
    "mixtral": Animal("gpt2", slow=True),
    "qwen2": Animal("gpt2"),
    "qwen3": Animal("gpt2"),
    "qwen2_moe": Animal("gpt2", {"decoder_sparse_step": 1}, slow=True),
    "qwen3_moe": Animal("gpt2", {"decoder_sparse_step": 1}, slow=True),
    "olmoe": Animal("gpt2", slow=True),
    "phi": Animal("gpt2"),
    "phi3": Animal("gpt2", {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}),
    "gemma": Animal("gpt2"),
    "gemma2": Animal("gpt2"),
    "gemma3_text": Animal("gpt2"),
    "falcon": Animal("gpt2", {"new_decoder_architecture": False}, slow=True),
    "falcon with alibi": Animal("gpt2", {"alibi": True}, slow=True, model_type="falcon"),
    "gpt_neox": Animal("gpt2"),
    "gptj": Animal("gpt2"),
    "gpt_neo": Animal("gpt2", {"attention_types": [[["global", "local"], 1]], "window_size": 4}),
    "bloom": Animal("gpt2"),
    "mpt": Animal("gpt2"),
    "granite": Animal("gpt2"),
    "olmo2": Animal("gpt2"),
    "stablelm": Animal("gpt2"),
    "starcoder2": Animal("gpt2"),
    "cohere": Animal("gpt2"),
    "mamba": Animal("gpt2", slow=True),
    # text to text
    "umt5": Animal("t5", slow=True),
    "longt5": Animal("t5", {"decoder_start_token_id": 0, "local_radius": 4}, slow=True),
    "bart": Animal("t5", slow=True),
    "mbart": Animal("t5", slow=True),
    "pegasus": Animal("t5"),
    "marian": Animal("t5"),
    "blenderbot": Animal("t5", slow=True),
    "m2m_100": Animal("t5"),
    "led": Animal("t5", {"attention_window": 4}, slow=True),
    "switch_transformers": Animal(
        "t5", {"decoder_start_token_id": 0}, refused="SwitchTransformersForConditionalGeneration cannot be scored"
    ),
    # encoders with a classification head
    "electra": Animal("bert"),
    "albert": Animal("bert"),
    "xlm-roberta": Animal("roberta", {"max_position_embeddings": 44}),
    "camembert": Animal("roberta", {"max_position_embeddings": 44}),
    "mpnet": Animal("roberta", {"max_position_embeddings": 44, "relative_attention_num_buckets": 32}, slow=True),
    "deberta": Animal("bert", _DEBERTA, slow=True),
    "deberta-v2": Animal("bert", _DEBERTA, slow=True),
    "modernbert": Animal("bert", {"global_attn_every_n_layers": 2, "local_attention": 8}),
    "longformer": Animal("roberta", {"attention_window": 4, "max_position_embeddings": 44}, slow=True),
    "roformer": Animal("bert"),
    "funnel": Animal("bert", {"block_sizes": [1, 1], "d_head": 8}, slow=True),
    "xlnet": Animal("bert", refused=_BATCH),
    "fnet": Animal("bert", refused=_BATCH),
    "nystromformer": Animal("bert", refused=_BATCH),
    "convbert": Animal("bert", {"head_ratio": 1}, refused=_BATCH),
}
SUPPORTED = [name for name, animal in ZOO.items() if animal.refused is None]
REFUSED = [name for name, animal in ZOO.items() if animal.refused is not None]
# Parameters of these models that no text reaches: sinusoidal positions that are never trained, attention to tokens
# that a task names.
UNUSED = {
    "pegasus": ("embed_positions",),
    "marian": ("embed_positions",),
    "roformer": ("embed_positions",),
    "led": ("_global.",),
}
_AUTO: dict[str, Any] = {
    "gpt2": AutoModelForCausalLM,
    "t5": AutoModelForSeq2SeqLM,
    "bert": AutoModelForSequenceClassification,
    "roberta": AutoModelForSequenceClassification,
}
_SPECIAL = {
    "gpt2": {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0},
    "t5": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 0},
    "bert": {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3},
    "roberta": {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2},
}


def family_of(name: str) -> Family:
    """The architecture as a family of `models`."""
    animal = ZOO[name]
    like = FAMILIES[animal.like]
    return Family(like.kind, _build(name), like.tokenizer, like.pad_id)


def _build(name: str) -> Callable[[int, int], PreTrainedModel]:
    animal = ZOO[name]

    def build(labels: int, _: int) -> PreTrainedModel:
        model_type = animal.model_type or name
        default = AutoConfig.for_model(model_type)
        renamed = getattr(default, "attribute_map", {})
        fixed = {key for key in _SIZES if isinstance(getattr(type(default), key, None), property)} | {*renamed}
        sizes = {key: size for key, size in _SIZES.items() if key not in fixed and hasattr(default, key)}
        more = {"num_labels": labels} if animal.like in ("bert", "roberta") else {}
        settings = {"vocab_size": VOCABULARY, **sizes, **_SPECIAL[animal.like], **more, **animal.settings}
        config = AutoConfig.for_model(model_type, **settings)
        model: PreTrainedModel = _AUTO[animal.like].from_config(config)
        return model

    return build
