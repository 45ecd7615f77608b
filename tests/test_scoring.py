"""Scoring in batches against one forward pass per choice, and the order, bounds and errors of evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from dfmerge_studies.errors import InputError, RunError
from dfmerge_studies.tasks.choices import predict
from dfmerge_studies.tasks.encoding import Encoded, Kind
from dfmerge_studies.tasks.evaluate import choice_losses, labels_of, length_batches, pass_in_tokens, token_cost
from dfmerge_studies.tasks.folding import folding_is_right, settle_folding
from dfmerge_studies.tasks.scoring import forward_losses, probabilities
from tests.models import FAMILIES, make_examples, make_model, randomise_
from tests.test_fisher import loop_losses


def plain(model: nn.Module, kind: Kind, examples: list[Encoded]) -> list[list[float]]:
    with torch.no_grad():
        return [loop_losses(model, kind, example).tolist() for example in examples]


def assert_close(found: list[list[float]], expected: list[list[float]], tolerance: float = 1e-6) -> None:
    assert [len(row) for row in found] == [len(row) for row in expected]
    for left, right in zip(found, expected, strict=True):
        assert left == pytest.approx(right, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [1, 100, 100_000])
def test_losses_of_batches_are_those_of_single_choices_in_the_original_order(family: str, budget: int) -> None:
    spec, model, examples = FAMILIES[family], make_model(family, torch.float64), make_examples(family)
    found = choice_losses(model, spec.kind, examples, pad_id=spec.pad_id, token_budget=budget)
    assert_close(found, plain(model, spec.kind, examples))


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_attention_kernels_give_the_same_losses_folded_or_not(family: str, kernel: str) -> None:
    spec, model, examples = FAMILIES[family], make_model(family), make_examples(family)
    model.set_attn_implementation(kernel)
    expected = plain(make_model(family, torch.float64), spec.kind, examples)
    for folded in (False, True):
        with torch.no_grad():
            table = forward_losses(model, spec.kind, examples, pad_id=spec.pad_id, folded=folded)
        found = [[loss for loss in row if loss != math.inf] for row in table.tolist()]
        assert_close(found, expected, 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_precision_is_close_and_losses_are_single_precision(family: str) -> None:
    spec, model, examples = FAMILIES[family], make_model(family), make_examples(family)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as Accelerate does around finetune.py's passes
        with torch.no_grad():
            losses = forward_losses(model, spec.kind, examples, pad_id=spec.pad_id)
        found = choice_losses(model, spec.kind, examples, pad_id=spec.pad_id)
    assert losses.dtype == torch.float32
    assert_close(found, plain(model, spec.kind, examples), 0.15)


def _bart() -> PreTrainedModel:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1}
    return BartForConditionalGeneration(
        BartConfig(vocab_size=200, forced_eos_token_id=None, **sizes, **heads, **special)
    )


def _mistral() -> PreTrainedModel:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return MistralForCausalLM(MistralConfig(vocab_size=200, num_key_value_heads=2, sliding_window=4, **sizes))


@pytest.mark.parametrize(("build", "family"), [(_bart, "t5"), (_mistral, "gpt2")], ids=["bart", "mistral"])
def test_where_folding_would_be_wrong_it_is_found_out(build: Callable[[], PreTrainedModel], family: str) -> None:
    model = build().double().eval()
    randomise_(model, torch.Generator().manual_seed(0))
    spec, examples = FAMILIES[family], make_examples(family)
    expected = plain(model, spec.kind, examples)
    assert_close(choice_losses(model, spec.kind, examples, pad_id=0), expected)
    with torch.no_grad():
        folded = forward_losses(model, spec.kind, examples, pad_id=0, folded=True)
    assert any(abs(folded[i, c] - expected[i][c]) > 1e-3 for i in range(len(examples)) for c in range(len(expected[i])))


@pytest.mark.parametrize(("build", "family"), [(_bart, "t5"), (_mistral, "gpt2")], ids=["bart", "mistral"])
def test_it_is_found_out_too_where_products_have_16_bits(build: Callable[[], PreTrainedModel], family: str) -> None:
    model, spec, examples = build().eval(), FAMILIES[family], make_examples(family)
    randomise_(model, torch.Generator().manual_seed(0))
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert not folding_is_right(model, spec.kind, examples, 0)


def counted_passes(model: nn.Module) -> list[int]:
    done: list[int] = []
    model.decoder.register_forward_hook(lambda *_: done.append(1))
    return done


@pytest.mark.parametrize(("compute", "asked"), [(torch.float32, 2), (torch.bfloat16, 3)])
def test_a_model_is_asked_once_whether_folding_is_right_whatever_it_computes_in(
    compute: torch.dtype, asked: int
) -> None:
    model, examples = make_model("t5"), make_examples("t5")[:1]
    done = counted_passes(model)
    with torch.autocast("cpu", dtype=compute, enabled=compute is torch.bfloat16):
        first = choice_losses(model, Kind.TEXT_TO_TEXT, examples, pad_id=0)
        assert len(done) == asked + 1  # apart and folded, as it is computed if that is another precision; the batch
        assert choice_losses(model, Kind.TEXT_TO_TEXT, examples, pad_id=0) == first
    assert len(done) == asked + 2


def test_in_weights_of_16_bits_it_is_asked_each_time_unless_it_was_settled_before() -> None:
    model, examples = make_model("t5", torch.bfloat16).eval(), make_examples("t5")
    done = counted_passes(model)
    for _ in range(2):
        choice_losses(model, Kind.TEXT_TO_TEXT, examples[:1], pad_id=0)
    assert len(done) == 6
    settle_folding(model, Kind.TEXT_TO_TEXT, examples, pad_id=0)
    done.clear()
    for some in (examples, examples[:1], examples):
        choice_losses(model, Kind.TEXT_TO_TEXT, some, pad_id=0)
    assert len(done) == 3


def test_what_was_settled_does_not_change_with_the_weights() -> None:
    model, examples = make_model("t5", torch.bfloat16).eval(), make_examples("t5")
    settle_folding(model, Kind.TEXT_TO_TEXT, examples, pad_id=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # rounding grows with them: asked now, it might answer otherwise
    done = counted_passes(model)
    choice_losses(model, Kind.TEXT_TO_TEXT, examples, pad_id=0)
    assert len(done) == 1


def test_an_answer_holds_for_shorter_inputs_and_longer_ones_are_asked_about() -> None:
    model, examples = make_model("t5"), make_examples("t5")
    short, long = examples[0], replace(examples[0], input_ids=examples[0].input_ids * 3)
    done = counted_passes(model)
    passes = []
    for some in ([short], [long], [long, short], [short]):
        done.clear()
        choice_losses(model, Kind.TEXT_TO_TEXT, some, pad_id=0)
        passes.append(len(done))
    assert passes == [3, 3, 1, 1]


def test_a_model_whose_losses_are_not_finite_is_asked_again_whether_folding_is_right() -> None:
    model, examples = make_model("t5"), make_examples("t5")
    scale = model.get_parameter("decoder.final_layer_norm.weight")
    kept = scale.detach().clone()
    with torch.no_grad():
        scale.fill_(float("nan"))
        with pytest.raises(RunError):
            choice_losses(model, Kind.TEXT_TO_TEXT, examples, pad_id=0)
        scale.copy_(kept)
    expected = choice_losses(make_model("t5"), Kind.TEXT_TO_TEXT, examples, pad_id=0)
    assert choice_losses(model, Kind.TEXT_TO_TEXT, examples, pad_id=0) == expected


def test_probabilities_are_zero_for_absent_choices_and_sum_to_one() -> None:
    p = probabilities(torch.tensor([[1.0, 2.0, math.inf], [3.0, 3.0, 3.0]]))
    assert p.sum(1).tolist() == pytest.approx([1, 1])
    assert p[0, 2] == 0
    assert p[0, 0] / p[0, 1] == pytest.approx(math.e)


def test_batches_hold_every_input_once_the_longest_first_within_the_budget() -> None:
    examples = make_examples("t5") * 3
    batches = length_batches(examples, Kind.TEXT_TO_TEXT, 120)
    assert sorted(i for batch in batches for i in batch) == list(range(len(examples)))
    lengths = [len(examples[i].input_ids) for batch in batches for i in batch]
    assert lengths == sorted(lengths, reverse=True)
    for batch in batches:
        cost = len(batch) * max(token_cost(examples[i], Kind.TEXT_TO_TEXT) for i in batch)
        assert len(batch) == 1 or cost <= 120


def test_a_batch_ends_before_its_padding_costs_more_than_another_one() -> None:
    examples = [Encoded(i, (7,) * tokens, ((5,), (6,)), 0) for i, tokens in enumerate((40, 10, 38, 37, 12, 36))]
    assert length_batches(examples, Kind.TEXT_TO_TEXT, 10_000) == [[0, 2, 3, 5, 4, 1]]
    assert length_batches(examples, Kind.TEXT_TO_TEXT, 10_000, padding=9) == [[0, 2, 3, 5], [4, 1]]
    assert length_batches(examples, Kind.TEXT_TO_TEXT, 10_000, padding=8) == [[0, 2, 3], [5], [4, 1]]
    assert length_batches(examples, Kind.TEXT_TO_TEXT, 10_000, padding=0) == [[0], [2], [3], [5], [4], [1]]


def test_padding_is_cut_off_the_sooner_the_larger_the_model_is() -> None:
    small, large = (torch.nn.Linear(1000, width, bias=False) for width in (10, 100_000))
    assert pass_in_tokens(small) > 1000
    assert 16 < pass_in_tokens(large) < 16 + 8 * torch.get_num_threads() + 1


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_training_flag_and_reports_progress(training: bool) -> None:
    model, examples, done = make_model("bert"), make_examples("bert"), []
    model.train(training)
    choice_losses(model, Kind.CLASSIFICATION, examples, pad_id=0, token_budget=40, progress=done.append)
    assert model.training is training
    assert sum(done) == len(examples)
    assert len(done) > 1


def test_a_loss_that_is_not_finite_names_its_row() -> None:
    model, examples = make_model("t5"), make_examples("t5")
    with torch.no_grad():
        model.get_parameter("decoder.final_layer_norm.weight").fill_(float("nan"))
    with pytest.raises(RunError, match=r"row \d+: the model's loss is not finite"):
        choice_losses(model, Kind.TEXT_TO_TEXT, examples, pad_id=0)


@pytest.mark.parametrize("choices", [(), ((5,), ())])
def test_inputs_without_choices_or_tokens_are_refused(choices: tuple[tuple[int, ...], ...]) -> None:
    example = replace(make_examples("t5")[0], choices=choices)
    with pytest.raises(InputError, match="row 0"):
        choice_losses(make_model("t5"), Kind.TEXT_TO_TEXT, [example], pad_id=0)
    empty = replace(make_examples("gpt2")[0], input_ids=())
    with pytest.raises(InputError, match="prompt has no tokens"):
        choice_losses(make_model("gpt2"), Kind.CAUSAL, [empty], pad_id=0)


def test_predictions_are_the_lowest_loss_and_the_first_of_equals() -> None:
    assert predict([[2.0, 1.0, 3.0], [1.0, 1.0]]) == [1, 0]


def test_a_row_without_a_label_is_named() -> None:
    examples = [Encoded(0, (1,), ((2,), (3,)), 1), Encoded(1, (1,), ((2,), (3,)), 0)]
    assert labels_of(examples) == [1, 0]
    with pytest.raises(InputError, match="row 1: the row has no label"):
        labels_of([examples[0], replace(examples[1], label=None)])


def test_segment_ids_reach_the_model_and_texts_without_them_get_zeros() -> None:
    model = make_model("bert", torch.float64)
    pair = Encoded(0, (2, 10, 3, 11, 12, 3), (), 0, (0, 0, 0, 1, 1, 1))
    alone = Encoded(1, (2, 10, 3), (), 0)
    found = choice_losses(model, Kind.CLASSIFICATION, [pair, alone], pad_id=0)
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor([pair.input_ids]), token_type_ids=torch.tensor([pair.token_type_ids])
        ).logits[0]
    expected = [(-torch.log_softmax(logits, 0)).tolist(), *plain(model, Kind.CLASSIFICATION, [alone])]
    assert_close(found, expected)


@pytest.mark.parametrize("family", ["t5", "llama", "bert"])
def test_the_padding_token_may_be_any_token(family: str) -> None:
    spec, model, examples = FAMILIES[family], make_model(family, torch.float64), make_examples(family)
    losses = [choice_losses(model, spec.kind, examples, pad_id=pad_id) for pad_id in (spec.pad_id, 7)]
    assert_close(losses[0], losses[1])
