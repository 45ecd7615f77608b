"""Shapes of real models, random models of these shapes, and random inputs for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from dfmerge_studies.tasks.encoding import HEADED, Encoded, Kind
from scripts.counting import Widths


@dataclass(frozen=True)
class Size:
    """Shape of a model.

    Attributes:
        kind: how it answers.
        layers: of an encoder-decoder, in either half.
        heads: of attention.
        width: of the residual stream.
        inner: of the feed-forward layers.
        vocabulary: tokens.
        key_heads: of keys and values, where there are fewer.
    """

    kind: Kind
    layers: int
    heads: int
    width: int
    inner: int
    vocabulary: int
    key_heads: int | None = None

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.width // self.heads

    def build(self) -> nn.Module:
        """A random model of this shape."""
        if self.kind is Kind.TEXT_TO_TEXT:
            return T5ForConditionalGeneration(
                T5Config(
                    vocab_size=self.vocabulary,
                    d_model=self.width,
                    d_kv=self.head,
                    d_ff=self.inner,
                    num_layers=self.layers,
                    num_heads=self.heads,
                    decoder_start_token_id=0,
                    pad_token_id=0,
                )
            )
        shape = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
        }
        if self.kind is Kind.CAUSAL:
            return LlamaForCausalLM(
                LlamaConfig(**shape, num_key_value_heads=self.key_heads, tie_word_embeddings=True, pad_token_id=0)
            )
        return BertForSequenceClassification(BertConfig(**shape, num_labels=4, pad_token_id=0))

    def narrow(self) -> tuple[Size, Widths]:
        """The same depth with small widths that no other number has, and what they stand for."""
        head = 10 if self.kind is Kind.CAUSAL else 11  # rotary positions take pairs
        small = Size(self.kind, self.layers, self.heads, head * self.heads, 16 * head - 3, 6011, self.key_heads)
        real = {small.head: self.head, small.width: self.width, small.inner: self.inner, 6011: self.vocabulary}
        if self.key_heads is not None:
            real[head * self.key_heads] = self.head * self.key_heads
        return small, Widths(real)


SIZES = {
    "tiny": Size(Kind.TEXT_TO_TEXT, 2, 2, 32, 64, 1000),
    "mini": Size(Kind.TEXT_TO_TEXT, 3, 8, 256, 1024, 8000),  # 8M
    "small": Size(Kind.TEXT_TO_TEXT, 6, 8, 512, 2048, 32128),  # 60M
    "base": Size(Kind.TEXT_TO_TEXT, 12, 12, 768, 3072, 32128),  # 220M
    "large": Size(Kind.TEXT_TO_TEXT, 24, 16, 1024, 4096, 32128),  # 740M
    "minilm": Size(Kind.CLASSIFICATION, 6, 12, 384, 1536, 30522),  # 22M
    "bert-base": Size(Kind.CLASSIFICATION, 12, 12, 768, 3072, 30522),  # 110M
    "causal-135m": Size(Kind.CAUSAL, 30, 9, 576, 1536, 49152, key_heads=3),
}


def examples(
    kind: Kind, inputs: int, tokens: int, choices: int, *, vocabulary: int = 7000, seed: int = 0
) -> list[Encoded]:
    """Random inputs of half to one and a half times `tokens` tokens, choices of 2 to 4 tokens."""
    draw = torch.Generator().manual_seed(seed)

    def text(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, min(vocabulary, 7000), (length,), generator=draw).tolist())

    made = []
    for i in range(inputs):
        length = tokens // 2 + int(torch.randint(0, tokens + 1, (), generator=draw))
        options = tuple(text(2 + c % 3) for c in range(choices)) if kind not in HEADED else ()
        made.append(Encoded(i, text(length), options, int(torch.randint(0, choices, (), generator=draw))))
    return made
