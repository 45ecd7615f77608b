"""Small real model directories of every supported family, for tests.

Each is a real transformers model with a real tokenizer, saved by `save_pretrained`; only the weights are random, drawn
so that every parameter, norms and biases too, has a gradient that is not trivially zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from dfmerge_studies.tasks.encoding import Encoded, Kind

TEXTS = (
    "the river was quiet and the boats lay still in the evening light",
    "a train left the station at noon with nobody on board",
    "we walked home along the old wall",
    "bread, salt and a little water: that is all you need!",
    "she asked where the library was, and nobody could tell",
    "is the answer yes or no? yes, it is; no, it is not",
    "good, bad, terrible, wonderful, number, place, person, description",
    "rain",
)
CHOICES = ("yes", "a terrible place", "no", "nobody is on board", "wonderful")
LABELS = 3
VOCABULARY = 200


def _t5_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = _trained(["<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )


def _causal_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = _trained(["<|endoftext|>", "<unk>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<unk>",
        model_max_length=64,
    )


def _bert_tokenizer() -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {piece: i for i, piece in enumerate([*special, *_word_pieces(VOCABULARY - len(special))])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=40,
    )


def _word_pieces(size: int) -> list[str]:
    """Signs, words, and the two pieces of longer words of `TEXTS`, the same in every process, as trained ones are not.

    The library's trainer of word pieces goes through words in an order that differs from run to run.
    """
    splitter = pre_tokenizers.BertPreTokenizer()
    words = {word for text in TEXTS for word, _ in splitter.pre_tokenize_str(text.lower())}
    signs = {sign for word in words for sign in word}
    inner = {f"##{sign}" for sign in signs} | {f"##{word[6:]}" for word in words if len(word) > 6}
    pieces = sorted(signs | inner | {word[:6] for word in words})
    return [*pieces, *(f"[unused{i}]" for i in range(size - len(pieces)))]


def _roberta_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = _trained(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        cls_token="<s>",
        sep_token="</s>",
        mask_token="<mask>",
        model_max_length=40,
    )


def _trained(special: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer trained on `TEXTS`; the special tokens get the first ids, in order."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


_T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
_BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
}


def _t5(_: int, layers: int) -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(**_T5, num_layers=layers, feed_forward_proj="relu", tie_word_embeddings=True)
    )


def _gated(layers: int) -> dict[str, Any]:
    return {"num_layers": layers, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


def _t5_v11(_: int, layers: int) -> PreTrainedModel:
    return T5ForConditionalGeneration(T5Config(**_T5, **_gated(layers)))


def _mt5(_: int, layers: int) -> PreTrainedModel:
    return MT5ForConditionalGeneration(MT5Config(**_T5, **_gated(layers)))


def _gpt2(_: int, layers: int) -> PreTrainedModel:
    sizes = {"n_embd": 16, "n_layer": layers, "n_head": 2, "n_positions": 64, "n_inner": 24}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **sizes))


def _llama(tied: bool) -> Callable[[int, int], PreTrainedModel]:
    def build(_: int, layers: int) -> PreTrainedModel:
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                bos_token_id=0,
                eos_token_id=0,
                tie_word_embeddings=tied,
            )
        )

    return build


def _bert(labels: int, layers: int) -> PreTrainedModel:
    sizes = {"num_hidden_layers": layers, "max_position_embeddings": 40, "num_labels": labels}
    return BertForSequenceClassification(BertConfig(**_BERT, **sizes))


def _distilbert(labels: int, layers: int) -> PreTrainedModel:
    return DistilBertForSequenceClassification(
        DistilBertConfig(
            vocab_size=VOCABULARY,
            dim=16,
            hidden_dim=24,
            n_layers=layers,
            n_heads=2,
            max_position_embeddings=40,
            num_labels=labels,
        )
    )


def _roberta(labels: int, layers: int) -> PreTrainedModel:
    special = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "type_vocab_size": 1}
    sizes = {"num_hidden_layers": layers, "max_position_embeddings": 44, "num_labels": labels}
    return RobertaForSequenceClassification(RobertaConfig(**_BERT, **special, **sizes))


@dataclass(frozen=True)
class Family:
    """One supported architecture: how it answers, how to build it from numbers of labels and layers, how it reads."""

    kind: Kind
    build: Callable[[int, int], PreTrainedModel]
    tokenizer: Callable[[], PreTrainedTokenizerFast]
    pad_id: int


FAMILIES: dict[str, Family] = {
    "t5": Family(Kind.TEXT_TO_TEXT, _t5, _t5_tokenizer, 0),
    "t5-v1.1": Family(Kind.TEXT_TO_TEXT, _t5_v11, _t5_tokenizer, 0),
    "mt5": Family(Kind.TEXT_TO_TEXT, _mt5, _t5_tokenizer, 0),
    "gpt2": Family(Kind.CAUSAL, _gpt2, _causal_tokenizer, 0),
    "llama-tied": Family(Kind.CAUSAL, _llama(True), _causal_tokenizer, 0),
    "llama": Family(Kind.CAUSAL, _llama(False), _causal_tokenizer, 0),
    "bert": Family(Kind.CLASSIFICATION, _bert, _bert_tokenizer, 0),
    "distilbert": Family(Kind.CLASSIFICATION, _distilbert, _bert_tokenizer, 0),
    "roberta": Family(Kind.CLASSIFICATION, _roberta, _roberta_tokenizer, 1),
}


def randomise_(model: nn.Module, generator: torch.Generator) -> None:
    """Redraw every parameter: matrices with a spread that keeps activations near 1, scales near 1, biases near 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() >= 2:
                wide = "embed" in name or "shared" in name or "wte" in name or "bias" in name
                value = 0.7 * noise if wide else noise / parameter.shape[-1] ** 0.5
            elif name.endswith("bias"):
                value = 0.3 * noise
            else:
                value = 1 + 0.3 * noise
            parameter.copy_(value)


def make_model(
    family: str, dtype: torch.dtype = torch.float32, *, seed: int = 0, num_labels: int = LABELS, layers: int = 2
) -> PreTrainedModel:
    """A small model of the family, in evaluation mode; the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = FAMILIES[family].build(num_labels, layers)
    randomise_(model, torch.Generator().manual_seed(seed))
    model.to(dtype)
    model.eval()
    return model


def save_model_directory(
    path: Path, family: str, *, seed: int = 0, num_labels: int = LABELS, dtype: torch.dtype = torch.float32
) -> Path:
    """Write a model and its tokenizer where `from_pretrained` finds them; returns the path."""
    make_model(family, dtype, seed=seed, num_labels=num_labels).save_pretrained(path)
    FAMILIES[family].tokenizer().save_pretrained(path)
    return path


def make_examples(family: str, *, num_labels: int = LABELS, inputs: int = len(TEXTS)) -> list[Encoded]:
    """Tokenised inputs of different lengths, with choices of different lengths and numbers where the kind has choices.

    One input has choices of a single token; one is truncated.
    """
    kind, tokenizer = FAMILIES[family].kind, FAMILIES[family].tokenizer()
    examples = []
    for i, text in enumerate(TEXTS[:inputs]):
        ids = tuple(tokenizer(text)["input_ids"])
        truncated = i == 1
        if truncated:
            ids = (*ids[:6], ids[-1])
        if kind is Kind.CLASSIFICATION:
            examples.append(Encoded(i, ids, (), i % num_labels, None, truncated))
            continue
        few = CHOICES[: 2 + i % 4]
        choices = tuple(tuple(tokenizer((" " if kind is Kind.CAUSAL else "") + choice)["input_ids"]) for choice in few)
        if i == 2:
            choices = tuple(choice[:1] for choice in choices[2:4]) or ((5,), (6,))
        examples.append(Encoded(i, ids, choices, i % len(choices), None, truncated))
    return examples
