"""Ask a model about a few tokens: what two models, or two states of one, answer tells whether they are one function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# What models raise for inputs or numbers that they do not take.
PROBE_FAILURES = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, NotImplementedError)
_TOKENS = 12
_NAMED = 32  # tokens that the caller names, at most


def probe_inputs(model: Any, *, tokens: Sequence[int] = (), generator: bool) -> list[dict[str, Tensor]]:
    """Inputs of a few tokens, spread over the vocabulary.

    Args:
        model: a model of any of the three kinds.
        tokens: token ids that are to be among them.
        generator: whether an encoder-decoder has to be given a decoder's tokens.
    """
    size = len(model.get_input_embeddings().weight)
    config = model.config
    pad_id, eos_id, start_id = (getattr(config, f"{name}_token_id", None) for name in ("pad", "eos", "decoder_start"))
    spread = [i for i in range(1, size, max(1, size // _TOKENS)) if i not in (pad_id, eos_id)][:_TOKENS]
    named = [i for i in tokens if 0 <= i < size][:_NAMED]
    end = [eos_id] if type(eos_id) is int and 0 <= eos_id < size else []  # the heads of some classifiers sit on it
    device = next(model.parameters()).device
    probes = []
    for ids in (named + spread, spread[::-2]):
        inputs = {"input_ids": torch.tensor([ids + end], device=device)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if generator and getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = torch.tensor([[start_id or 0, *ids]], device=device)
        probes.append(inputs)
    return probes


@torch.no_grad()
def probe_logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The model's logits."""
    logits: Tensor = model(**inputs).logits
    return logits


def relative_error(a: Tensor, b: Tensor) -> float:
    """Distance of two outputs, relative to the size of the second, in L2; infinite where shapes differ."""
    if a.shape != b.shape:
        return float("inf")
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-300))
