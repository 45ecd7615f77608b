"""Losses of the right answers, as functions that gradients can be taken of.

y          the right answer of an input: its label, or the text that it should give
l(x, y)    -log p(y|x), up to a constant and a factor per kind of task

kind                          l(x, y)
choices                       -log of the softmax over the choices of minus their losses
a text to be written          mean negative log-likelihood of its tokens
classification                -log softmax(z)[y]
regression                    half the square of z - y
several labels                mean over labels of the binary cross-entropy
tags of words                 mean over words of -log softmax(z_w)[y_w]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfmerge_studies.errors import InputError
from dfmerge_studies.tasks.batches import pad
from dfmerge_studies.tasks.encoding import HEADED, Encoded, Kind
from dfmerge_studies.tasks.evaluate import labels_of
from dfmerge_studies.tasks.scoring import forward_losses, head_outputs, mean_token_loss
from dfmerge_studies.tasks.tags import IGNORED


def answer_losses(model: nn.Module, kind: Kind, batch: Sequence[Encoded], *, pad_id: int) -> Tensor:
    """The loss of the right answer of every input, with its graph.

    Args:
        model: the model, in evaluation mode.
        kind: how it answers.
        batch: B inputs with labels.
        pad_id: token id to pad inputs with.

    Returns:
        (B,), in float32 at least.

    Raises:
        InputError: an input has no label, or no text that could be its answer.
    """
    if kind in HEADED:
        return _HEADS[kind](head_outputs(model, kind, batch, pad_id), labels_of(batch))
    for example in batch:
        check_answer(kind, example)
    table = forward_losses(model, kind, batch, pad_id=pad_id)
    right = torch.tensor([example.label or 0 for example in batch], device=table.device)[:, None]
    alone = torch.tensor([len(example.choices) == 1 for example in batch], device=table.device)
    among = -torch.log_softmax(-table, dim=-1).gather(1, right)
    return torch.where(alone, table[:, 0], among[:, 0])


def check_answer(kind: Kind, example: Encoded) -> None:
    """Refuse an input whose right answer has no loss.

    Args:
        kind: how the model answers.
        example: the input.

    Raises:
        InputError: it has no label, or no text that could be its answer.
    """
    if kind in HEADED or len(example.choices) > 1:
        labels_of([example])
    elif not example.choices:
        raise InputError(
            "the row has no target text that a loss could be taken of",
            where=f"row {example.index}",
            hint="Use another sampler: gradient needs a loss of every row",
        )


def _numbers(z: Tensor, labels: Sequence[Any]) -> Tensor:
    return 0.5 * (z[:, 0] - torch.tensor(labels, device=z.device, dtype=z.dtype)).square()


def _label_sets(z: Tensor, labels: Sequence[Any]) -> Tensor:
    wanted = torch.tensor(labels, device=z.device, dtype=z.dtype)
    return F.binary_cross_entropy_with_logits(z, wanted, reduction="none").mean(1)


def _tags(z: Tensor, labels: Sequence[Any]) -> Tensor:
    return mean_token_loss(z, pad(cast("Any", labels), IGNORED, z.device))


_HEADS: Mapping[Kind, Callable[[Tensor, Sequence[Any]], Tensor]] = {
    Kind.CLASSIFICATION: lambda z, labels: F.cross_entropy(z, torch.tensor(labels, device=z.device), reduction="none"),
    Kind.REGRESSION: _numbers,
    Kind.MULTI_LABEL: _label_sets,
    Kind.TOKENS: _tags,
}
