"""Importance of heads that answer with several things at once, against a loop over all their answers in float64."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForTokenClassification

from dfmerge_studies.errors import InputError
from dfmerge_studies.importance.task_fisher import sampling_draws, task_fisher
from dfmerge_studies.tasks.encoding import Encoded, Kind
from dfmerge_studies.tasks.tags import IGNORED
from tests.models import FAMILIES, make_examples, make_model, randomise_
from tests.test_fisher import assert_same

LABELS = 3


def squares(model: nn.Module, loss: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g**2 for g, p in zip(found, model.parameters(), strict=True)]


def add_(total: dict[str, Tensor], found: list[Tensor], weight: float) -> None:
    for name, square in zip(total, found, strict=True):
        total[name] += weight * square


def zeros(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p) for name, p in model.named_parameters()}


def logits_of(model: nn.Module, example: Encoded) -> Tensor:
    logits: Tensor = model(input_ids=torch.tensor([example.input_ids])).logits[0]
    return logits


# Sets of labels


def with_sets(family: str) -> list[Encoded]:
    sets = list(product((0, 1), repeat=LABELS))
    return [Encoded(e.index, e.input_ids, (), sets[(3 * i + 1) % 8]) for i, e in enumerate(make_examples(family))]


def loop_sets(model: nn.Module, examples: list[Encoded], *, empirical: bool) -> dict[str, Tensor]:
    """The definition: minus the log-probability of each of the 2^K sets, by its probability."""
    total = zeros(model)
    for example in examples:
        z = logits_of(model, example)
        for bits in product((0, 1), repeat=LABELS):
            loss = nn.functional.binary_cross_entropy_with_logits(z, torch.tensor(bits).to(z), reduction="sum")
            weight = float(bits == example.label) if empirical else math.exp(-float(loss.detach()))
            if weight:
                add_(total, squares(model, loss), weight / len(examples))
    return total


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_multi_label_head_has_the_importance_of_a_loop_over_all_sets(family: str, estimator: str) -> None:
    model, examples = make_model(family, torch.float64, num_labels=LABELS), with_sets(family)
    found = task_fisher(model, Kind.MULTI_LABEL, examples, pad_id=FAMILIES[family].pad_id, estimator=estimator).values
    assert_same(found, loop_sets(model, examples, empirical=estimator == "empirical"))


# Tags of words


def token_model(tags: int = LABELS) -> BertForTokenClassification:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=200, max_position_embeddings=40, num_labels=tags, **sizes)
    model = BertForTokenClassification(config)
    randomise_(model, torch.Generator().manual_seed(0))
    model.to(torch.float64)
    return model.eval()


def with_tags() -> list[Encoded]:
    """Inputs of up to five words, of one or more tokens each; one word has no tag."""
    examples = []
    for i, e in enumerate(make_examples("bert")[::-1]):
        places = tuple(range(1, len(e.input_ids) - 1, 1 + i % 2))[:5]
        tags = tuple((i + w) % LABELS for w in range(len(places)))
        if i == 2:
            tags = (tags[0], IGNORED, *tags[2:])
        examples.append(Encoded(e.index, e.input_ids, (), tags, words=places))
    assert len({len(example.words) for example in examples}) > 1
    return examples


def loop_tags(model: nn.Module, examples: list[Encoded], *, empirical: bool) -> dict[str, Tensor]:
    """The definition: minus the log-probability of each sequence of tags, by its probability."""
    total = zeros(model)
    for example in examples:
        losses = -torch.log_softmax(logits_of(model, example)[list(example.words)], dim=-1)
        if empirical:
            assert isinstance(example.label, tuple)
            loss = torch.stack([losses[w, tag] for w, tag in enumerate(example.label) if tag != IGNORED]).sum()
            add_(total, squares(model, loss), 1 / len(examples))
            continue
        for tags in product(range(LABELS), repeat=len(example.words)):
            loss = losses[range(len(tags)), tags].sum()
            add_(total, squares(model, loss), math.exp(-float(loss.detach())) / len(examples))
    return total


def test_a_token_head_has_the_importance_of_a_loop_over_all_sequences_of_tags() -> None:
    model, examples = token_model(), [e for e in with_tags() if len(e.words) <= 3] or with_tags()[:1]
    examples += [Encoded(e.index, e.input_ids, (), e.label[:3], words=e.words[:3]) for e in with_tags()[2:4]]  # type: ignore[index]
    found = task_fisher(model, Kind.TOKENS, examples, pad_id=0).values
    assert_same(found, loop_tags(model, examples, empirical=False))


def test_a_token_head_s_empirical_importance_is_that_of_the_tags_that_there_are() -> None:
    model, examples = token_model(), with_tags()
    found = task_fisher(model, Kind.TOKENS, examples, pad_id=0, estimator="empirical").values
    assert_same(found, loop_tags(model, examples, empirical=True))


# What both have in common


def cases() -> list[tuple[Kind, nn.Module, list[Encoded]]]:
    return [
        (Kind.MULTI_LABEL, make_model("bert", torch.float64, num_labels=LABELS), with_sets("bert")),
        (Kind.TOKENS, token_model(), with_tags()),
    ]


@pytest.mark.parametrize("case", [0, 1], ids=["sets", "tags"])
def test_what_is_drawn_depends_on_the_input_alone_and_has_the_exact_importance_in_the_mean(case: int) -> None:
    kind, model, examples = cases()[case]
    draws = torch.Generator().manual_seed(5)
    whole = task_fisher(model, kind, examples, pad_id=0, estimator="sampled", generator=draws, row_budget=100_000)
    draws = torch.Generator().manual_seed(5)
    single = task_fisher(model, kind, examples, pad_id=0, estimator="sampled", generator=draws, row_budget=1)
    assert_same(whole.values, single.values)

    example, names = examples[3], ["classifier.bias"]
    exact = task_fisher(model, kind, [example], pad_id=0, names=names).values["classifier.bias"]
    draws = torch.Generator().manual_seed(0)
    many = task_fisher(model, kind, [example] * 1000, pad_id=0, names=names, estimator="sampled", generator=draws)
    assert torch.allclose(many.values["classifier.bias"], exact, rtol=0.25)  # of the mean of 1000: some 5 %


@pytest.mark.parametrize("case", [0, 1], ids=["sets", "tags"])
def test_chunks_do_not_change_the_exact_importance_and_labels_are_only_needed_where_they_are_used(case: int) -> None:
    kind, model, examples = cases()[case]
    bare = [Encoded(e.index, e.input_ids, words=e.words) for e in examples]
    a = task_fisher(model, kind, bare, pad_id=0, row_budget=1).values
    b = task_fisher(model, kind, bare, pad_id=0, row_budget=100_000).values
    assert_same(a, b)
    with pytest.raises(InputError, match="needs labels"):
        task_fisher(model, kind, bare, pad_id=0, estimator="empirical")
    assert len(sampling_draws(len(bare), torch.Generator().manual_seed(0))) == len(bare)
