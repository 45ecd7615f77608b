"""Inputs of a split are put on the device once, and what is kept changes nothing."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from dfmerge_studies.importance.task_fisher import task_fisher
from dfmerge_studies.tasks import placing
from dfmerge_studies.tasks.evaluate import choice_losses
from tests.models import FAMILIES, make_examples, make_model

KINDS = ["t5", "bert", "llama"]


def kept_of(model: torch.nn.Module) -> dict:
    return placing._kept.get(model, {})


@pytest.mark.parametrize("family", KINDS)
def test_a_second_scoring_makes_no_tensors_of_its_inputs_and_gives_the_same(family: str) -> None:
    model, examples, kind = make_model(family), make_examples(family), FAMILIES[family].kind
    first = choice_losses(model, kind, examples, pad_id=0)
    kept = dict(kept_of(model))
    assert kept
    assert choice_losses(model, kind, examples, pad_id=0) == first
    assert kept_of(model).keys() == kept.keys()
    assert all(kept_of(model)[key][1] is made for key, (_, made) in kept.items())


@pytest.mark.parametrize("family", KINDS)
def test_gradients_pass_what_was_made_while_scoring(family: str) -> None:
    examples, kind = make_examples(family), FAMILIES[family].kind
    plain = task_fisher(make_model(family).eval(), kind, examples, pad_id=0).values
    model = make_model(family).eval()
    choice_losses(model, kind, examples, pad_id=0)
    torch.testing.assert_close(task_fisher(model, kind, examples, pad_id=0).values, plain)


def test_other_inputs_and_another_padding_are_other_tensors() -> None:
    model, examples = make_model("bert"), make_examples("bert")
    one = placing.once(lambda model, batch, pad_id: (pad_id, *(e.index for e in batch)))
    assert one(model, examples[:2], 0) == (0, examples[0].index, examples[1].index)
    assert one(model, examples[1::-1], 0) == (0, examples[1].index, examples[0].index)
    assert one(model, examples[:2], 7) == (7, examples[0].index, examples[1].index)


def test_only_the_batches_used_last_are_kept_and_none_outlives_its_model(monkeypatch) -> None:
    monkeypatch.setattr(placing, "KEPT", 2)
    model, examples = make_model("bert"), make_examples("bert")
    made = placing.once(lambda model, batch, pad_id: torch.zeros(1))
    tensors = [made(model, [example], 0) for example in examples[:3]]
    assert [made for _, made in kept_of(model).values()] == tensors[1:]
    last = weakref.ref(tensors[-1])
    del model, tensors
    gc.collect()
    assert last() is None
