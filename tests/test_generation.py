"""Texts that a model writes: against a loop that runs the whole model for every token, alone, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfmerge_studies.errors import InputError, RunError
from dfmerge_studies.importance.passes import Job
from dfmerge_studies.importance.rows import sum_by_rows
from dfmerge_studies.importance.task_fisher import sampling_draws, share_of_sum, task_fisher
from dfmerge_studies.methods import Estimator
from dfmerge_studies.tasks.encoding import Encoded, Kind
from dfmerge_studies.tasks.generation import Writer, write_texts, write_tokens
from tests.models import FAMILIES, make_examples, make_model
from tests.project import sharpened
from tests.test_fisher import assert_same

WRITERS = [name for name, family in FAMILIES.items() if family.kind is not Kind.CLASSIFICATION]


def logits_behind(model: nn.Module, kind: Kind, prompt: tuple[int, ...], tokens: list[int]) -> Tensor:
    """Scores (len(tokens) + 1, vocabulary) of the token behind the prompt and behind each of the tokens."""
    if kind is Kind.CAUSAL:
        return model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 :]
    decoder = torch.tensor([[model.config.decoder_start_token_id, *tokens]])
    return model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder).logits[0]


def slow_tokens(model: nn.Module, kind: Kind, example: Encoded, writer: Writer) -> tuple[int, ...]:
    """The definition: one token after the other, each the likeliest, until an end."""
    tokens: list[int] = []
    with torch.no_grad():
        while len(tokens) < writer.max_gen_toks:
            tokens.append(int(logits_behind(model, kind, example.input_ids, tokens)[-1].argmax()))
            text = writer.tokenizer.decode(tokens)
            if tokens[-1] == writer.tokenizer.eos_token_id or any(end in text for end in writer.until):
                break
    return tuple(tokens)


def ending(family: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model whose texts are of several tokens and lengths: it likes the end of sequence and dislikes padding."""
    model = sharpened(make_model(family, dtype))
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        if FAMILIES[family].kind is Kind.TEXT_TO_TEXT:
            head[0] *= 0.1
        head[FAMILIES[family].tokenizer().eos_token_id] *= 6
    return model


def writer_for(family: str, *until: str, tokens: int = 10) -> Writer:
    return Writer(FAMILIES[family].tokenizer(), tokens, until)


@pytest.mark.parametrize("family", WRITERS)
def test_a_batch_writes_what_a_loop_writes_for_each_input_alone(family: str) -> None:
    model, examples, kind = ending(family), make_examples(family), FAMILIES[family].kind
    writer = writer_for(family)
    expected = [slow_tokens(model, kind, example, writer) for example in examples]
    assert len({len(example.input_ids) for example in examples}) > 3  # so there is padding
    for budget in (1, 60, 10_000):
        assert (
            write_tokens(model, kind, examples, writer, pad_id=FAMILIES[family].pad_id, token_budget=budget) == expected
        )
    assert write_texts(model, kind, examples, writer, pad_id=FAMILIES[family].pad_id) == list(
        map(writer.text, expected)
    )


@pytest.mark.parametrize("family", ["t5-v1.1", "gpt2"])
def test_a_text_ends_before_the_first_of_its_ends_whatever_tokens_it_is_made_of(family: str) -> None:
    model, examples, kind = ending(family), make_examples(family), FAMILIES[family].kind
    plain = write_texts(model, kind, examples, writer_for(family), pad_id=0)
    ends = sorted({text[i : i + 3] for text in plain for i in (2, 5) if len(text) > i + 3})[:4]
    writer = writer_for(family, *ends)
    expected = [slow_tokens(model, kind, example, writer) for example in examples]
    assert write_tokens(model, kind, examples, writer, pad_id=0) == expected
    texts = write_texts(model, kind, examples, writer, pad_id=0)
    assert texts != plain
    for text, whole in zip(texts, plain, strict=True):
        assert whole.startswith(text)
        assert not any(end in text for end in ends)


def test_an_end_in_the_prompt_ends_nothing() -> None:
    model, (example, *_) = ending("gpt2"), make_examples("gpt2")
    prompt = FAMILIES["gpt2"].tokenizer().decode(example.input_ids)
    free = write_tokens(model, Kind.CAUSAL, [example], writer_for("gpt2"), pad_id=0)
    assert write_tokens(model, Kind.CAUSAL, [example], writer_for("gpt2", prompt[-2:]), pad_id=0) == free


def test_a_model_is_left_in_the_mode_it_was_in_and_tells_how_far_it_is() -> None:
    model, examples, done = ending("gpt2"), make_examples("gpt2"), []
    model.train()
    write_texts(model, Kind.CAUSAL, examples, writer_for("gpt2"), pad_id=0, token_budget=60, progress=done.append)
    assert model.training
    assert sum(done) == len(examples)
    assert len(done) > 1


def test_the_generation_settings_of_a_model_count_but_for_sampling_and_beams() -> None:
    model, examples = ending("gpt2"), make_examples("gpt2")
    greedy = write_tokens(model, Kind.CAUSAL, examples, writer_for("gpt2"), pad_id=0)
    model.generation_config.update(do_sample=True, temperature=5.0, num_beams=3, max_length=30)
    assert write_tokens(model, Kind.CAUSAL, examples, writer_for("gpt2"), pad_id=0) == greedy
    third = greedy[0][2]
    model.generation_config.update(eos_token_id=[0, third])
    assert (
        write_tokens(model, Kind.CAUSAL, examples, writer_for("gpt2"), pad_id=0)[0]
        == greedy[0][: greedy[0].index(third) + 1]
    )


def test_weights_that_overflow_are_refused_with_the_row() -> None:
    model, examples = make_model("gpt2"), make_examples("gpt2")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.fill_(1e30)
    with pytest.raises(RunError, match="not a number") as caught:
        write_texts(model, Kind.CAUSAL, examples, writer_for("gpt2"), pad_id=0)
    assert "row " in str(caught.value.where)


def test_a_model_that_cannot_generate_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="BertForSequenceClassification cannot generate"):
        write_texts(make_model("bert"), Kind.CAUSAL, make_examples("bert"), writer_for("bert"), pad_id=0)


# --- importance ------------------------------------------------------------------------------------------------------


def loop_fisher(
    model: nn.Module, kind: Kind, examples: list[Encoded], writer: Writer, draws: Tensor | None
) -> dict[str, Tensor]:
    """The definition of `sampled` (with draws) and `empirical` (without), one input and one token at a time."""
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for i, example in enumerate(examples):
        read = slow_tokens(model, kind, example, writer) if draws is not None else example.choices[0]
        logits = logits_behind(model, kind, example.input_ids, list(read[:-1]))
        losses = []
        for t, scores in enumerate(logits):
            label = read[t]
            if draws is not None:
                label = int((scores.detach().softmax(0).cumsum(0) <= draws[i, t]).sum())
            losses.append(F.cross_entropy(scores[None], torch.tensor([label])))
        gradients = torch.autograd.grad(torch.stack(losses).mean(), list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient**2 / len(examples)
    return total


def with_targets(family: str) -> list[Encoded]:
    """Inputs with one target each, as tasks of texts have them."""
    return [replace(example, choices=example.choices[:1], label=0) for example in make_examples(family)]


def importance(
    family: str, model: nn.Module, examples: list[Encoded], estimator: str, **options: Any
) -> dict[str, Tensor]:
    return task_fisher(
        model,
        FAMILIES[family].kind,
        examples,
        pad_id=FAMILIES[family].pad_id,
        writer=writer_for(family),
        estimator=estimator,
        generator=torch.Generator().manual_seed(3),
        **options,
    ).values


@pytest.mark.parametrize("estimator", ["sampled", "empirical"])
@pytest.mark.parametrize("family", WRITERS)
def test_the_importance_of_texts_is_that_of_a_loop_over_single_rows(family: str, estimator: str) -> None:
    model, examples = ending(family), with_targets(family)
    writer = writer_for(family)
    draws = sampling_draws(len(examples), torch.Generator().manual_seed(3), writer.max_gen_toks)
    expected = loop_fisher(model, FAMILIES[family].kind, examples, writer, draws if estimator == "sampled" else None)
    for budget in (60, 100_000):
        found = importance(family, model, examples, estimator, row_budget=budget)
        assert_same(found, expected)
    assert all(bool((value > 0).any()) for value in found.values())


def test_drawn_labels_are_not_the_tokens_that_the_model_reads() -> None:
    model, examples = ending("gpt2"), with_targets("gpt2")
    expected = loop_fisher(model, Kind.CAUSAL, examples, writer_for("gpt2"), None)
    found = importance("gpt2", model, examples, "sampled")
    assert (found["lm_head.weight"] if "lm_head.weight" in found else found["transformer.wte.weight"]).norm() > 0
    assert any((found[name] - value).norm() > 0.1 * value.norm() for name, value in expected.items())


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_row_by_row_and_in_shares_the_importance_of_texts_is_the_same(family: str) -> None:
    model, examples, kind = ending(family), with_targets(family), FAMILIES[family].kind
    whole = importance(family, model, examples, "sampled")
    writer = writer_for(family)
    draws = sampling_draws(len(examples), torch.Generator().manual_seed(3), writer.max_gen_toks)
    job = Job(model, kind, examples, 0, Estimator.SAMPLED, draws, writer)
    shares = [share_of_sum(job, range(k, len(examples), 2), list(whole)) for k in (0, 1)]
    assert_same({name: (shares[0][name] + shares[1][name]) / len(examples) for name in whole}, whole)
    texts = write_tokens(model, kind, examples, writer, pad_id=0)
    written = [replace(each, choices=(text,), label=0) for each, text in zip(examples, texts, strict=True)]
    by_rows = sum_by_rows(replace(job, examples=written), list(whole))
    assert_same({name: value / len(examples) for name, value in by_rows.items()}, whole)


def test_inputs_without_targets_have_an_importance_by_what_the_model_writes() -> None:
    model, examples = ending("t5"), with_targets("t5")
    without = [replace(example, choices=(), label=None) for example in examples]
    assert_same(importance("t5", model, without, "sampled"), importance("t5", model, examples, "sampled"))


def test_mask_nodes_draw_along_the_text_too() -> None:
    model, examples = ending("gpt2"), with_targets("gpt2")
    nodes, tokens = importance("gpt2", model, examples, "mask-nodes"), importance("gpt2", model, examples, "sampled")
    assert nodes.keys() == tokens.keys()
    assert all(bool((value > 0).all()) for value in nodes.values())


def test_an_expectation_over_all_texts_is_refused() -> None:
    with pytest.raises(InputError, match="no finite set"):
        importance("t5", ending("t5"), with_targets("t5"), "exact")
