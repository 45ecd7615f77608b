"""Directions in the space of what a head gives, along which squared gradients add up to an importance.

    z      what the head gives for an input, B inputs in a batch (see `tasks.scoring`)
    y      an answer, p(y|x) its probability under the model, l(x, y) = -log p(y|x) up to a constant
    g(y)   dl/dz; its mean under p(y|x) is 0
    J      Jacobian of z in the parameters

    exact      E_y (J^T g(y))^2  =  diag(J^T C J)  =  sum over k of (J^T d_k)^2,  C = cov g(y) = sum over k of d_k d_k^T
    sampled    (J^T g(y))^2,  y drawn from p(y|x)
    empirical  (J^T g(y))^2,  y the label

Each kind of head has its answers:

    kind            y                           p(y|x)                               g(y)       C
    classification  one of K classes            softmax(z)[y]                        p - e_y    diag(p) - p p^T
    regression      a number                    normal: mean z, variance 1           z - y      1
    multi-label     0 or 1 for each label k     product over k; p_k = sigmoid(z_k)   p - y      diag(p (1 - p))
    tokens          one of K tags for a word    product over words of softmax(z_w)   as of classes, word by word
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torch.nn.utils.rnn import pad_sequence

from dfmerge_studies.errors import InputError
from dfmerge_studies.methods import Estimator
from dfmerge_studies.tasks.batches import pad, pad_mask
from dfmerge_studies.tasks.encoding import Encoded, Kind
from dfmerge_studies.tasks.tags import IGNORED

Batch = Sequence[Encoded]


def directions(kind: Kind, estimator: Estimator, z: Tensor, batch: Batch, draws: Tensor) -> Iterator[Tensor]:
    """Directions of the backward passes from a head's outputs, one after the other.

    Args:
        kind: of the head.
        estimator: which answers count.
        z: (B, ...) what it gives.
        batch: the B inputs; their labels are used by `empirical` only.
        draws: (B,) a number in [0, 1) per input, from which what is drawn follows.

    Yields:
        Tensors of the shape of z.

    Raises:
        InputError: `empirical` lacks a label.
    """
    answers = _ANSWERS[kind]
    if estimator is Estimator.EXACT:
        yield from answers.roots(z, batch)
    elif estimator is Estimator.EMPIRICAL:
        yield answers.gradient(z, answers.labels(labels_of_all(batch), z))
    else:
        yield answers.gradient(z, answers.drawn(z, batch, draws.to(z.device)))


def drawn_choices(p: Tensor, draws: Tensor) -> Tensor:
    """One choice per row, by inverting the cumulated probabilities.

    Args:
        p: (n, C) probabilities.
        draws: (n,) uniform numbers in [0, 1).

    Returns:
        (n,) indices, none of probability 0.
    """
    edges = p.double().cumsum(1)
    last = (p > 0).long().cumsum(1).argmax(1)
    return torch.minimum((edges <= draws.to(p.device)[:, None] * edges[:, -1:]).sum(1), last)


def labels_of_all(batch: Batch) -> list[object]:
    """The label of every input.

    Raises:
        InputError: one has none.
    """
    for example in batch:
        if example.label is None:
            raise InputError(
                "the empirical estimator needs labels", where=f"row {example.index}", hint="Give doc_to_target"
            )
    return [example.label for example in batch]


def class_directions(p: Tensor) -> Tensor:
    """Columns of a square root of diag(p) - p p^T.

    With s = sqrt(p), a unit vector, the matrix is diag(s) (I - s s^T) diag(s).  The Householder reflection
    H = I - v v^T / (1 + s_0), v = s + e_0, sends s to -e_0, so the other columns of H span what is orthogonal to s.

    Args:
        p: (B, K) probabilities.

    Returns:
        (B, K - 1, K): with D[j] these rows, sum over j of D[j]^T D[j] = diag(p) - p p^T.
    """
    s = p.double().sqrt()
    s = s / s.norm(dim=1, keepdim=True)
    v = s.clone()
    v[:, 0] += 1
    reflection = torch.eye(p.shape[1], dtype=s.dtype, device=s.device) - (
        v[:, :, None] * v[:, None, :] / (1 + s[:, :1, None])
    )
    found: Tensor = reflection[:, 1:] * s[:, None, :]
    return found.to(p.dtype)


# --- per kind --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Answers:
    """How a kind of head answers.

    Attributes:
        roots: from z, columns of a root of the covariance of g(y), one after the other.
        gradient: from z and answers, g(y).
        drawn: from z, the inputs and a uniform number for each of them, answers drawn from p(y|x).
        labels: the labels of the inputs as a tensor that `gradient` takes.
    """

    roots: Callable[[Tensor, Batch], Iterator[Tensor]]
    gradient: Callable[[Tensor, Tensor], Tensor]
    drawn: Callable[[Tensor, Batch, Tensor], Tensor]
    labels: Callable[[Sequence[object], Tensor], Tensor]


def _class_roots(z: Tensor, batch: Batch) -> Iterator[Tensor]:
    yield from class_directions(torch.softmax(z, dim=-1)).unbind(1)


def _class_gradient(z: Tensor, y: Tensor) -> Tensor:
    found: Tensor = torch.softmax(z, dim=-1) - one_hot(y, z.shape[-1])
    return found


def _drawn_classes(z: Tensor, batch: Batch, draws: Tensor) -> Tensor:
    return drawn_choices(torch.softmax(z, dim=-1), draws)


def _number_roots(z: Tensor, batch: Batch) -> Iterator[Tensor]:
    yield torch.ones_like(z)


def _drawn_numbers(z: Tensor, batch: Batch, draws: Tensor) -> Tensor:
    smallest = torch.finfo(torch.float64).eps  # the quantile of 0 is infinite
    found: Tensor = z + torch.special.ndtri(draws.double().clamp_min(smallest))[:, None].to(z.dtype)
    return found


def _label_roots(z: Tensor, batch: Batch) -> Iterator[Tensor]:
    p = torch.sigmoid(z)
    deviation = (p * (1 - p)).sqrt()
    for column in torch.eye(z.shape[1], dtype=z.dtype, device=z.device):
        yield deviation * column


def _drawn_labels(z: Tensor, batch: Batch, draws: Tensor) -> Tensor:
    numbers = _uniform(draws, [z.shape[1]] * len(z), z.device)
    return (numbers < torch.sigmoid(z)).to(z.dtype)


def _tag_roots(z: Tensor, batch: Batch) -> Iterator[Tensor]:
    """One word after the other: the squares of different words must not be added before they are squared."""
    p, present = torch.softmax(z, dim=-1), _words(batch, z.device)
    for w in range(z.shape[1]):
        for column in class_directions(p[:, w]).unbind(1):
            found = torch.zeros_like(z)
            found[:, w] = column * present[:, w, None]
            yield found


def _tag_gradient(z: Tensor, y: Tensor) -> Tensor:
    found: Tensor = torch.softmax(z, dim=-1) - one_hot(y.clamp_min(0), z.shape[-1])
    return found * (y != IGNORED)[..., None]


def _drawn_tags(z: Tensor, batch: Batch, draws: Tensor) -> Tensor:
    numbers = _uniform(draws, [len(example.words) for example in batch], z.device)
    chosen = drawn_choices(torch.softmax(z, dim=-1).flatten(0, 1), numbers.flatten()).view(z.shape[:2])
    return chosen.masked_fill(~_words(batch, z.device), IGNORED)


def _words(batch: Batch, device: torch.device) -> Tensor:
    """(B, W) whether an input has so many words."""
    return pad_mask([example.words for example in batch], device).bool()


def _uniform(draws: Tensor, counts: Sequence[int], device: torch.device) -> Tensor:
    """(B, most) several uniform numbers per input, made of its one, so that no other input changes them; else 0."""
    rows = []
    for draw, count in zip(draws.tolist(), counts, strict=True):
        generator = torch.Generator().manual_seed(int(draw * 2**53))
        rows.append(torch.rand(count, generator=generator, dtype=torch.float64))
    return pad_sequence(rows, batch_first=True).to(device)


_ANSWERS: Mapping[Kind, _Answers] = {
    Kind.CLASSIFICATION: _Answers(
        _class_roots, _class_gradient, _drawn_classes, lambda labels, z: torch.tensor(labels, device=z.device)
    ),
    Kind.REGRESSION: _Answers(
        _number_roots,
        lambda z, y: z - y,
        _drawn_numbers,
        lambda labels, z: torch.tensor(labels, device=z.device, dtype=z.dtype)[:, None],
    ),
    Kind.MULTI_LABEL: _Answers(
        _label_roots,
        lambda z, y: torch.sigmoid(z) - y,
        _drawn_labels,
        lambda labels, z: torch.tensor(labels, device=z.device, dtype=z.dtype),
    ),
    Kind.TOKENS: _Answers(
        _tag_roots, _tag_gradient, _drawn_tags, lambda labels, z: pad(cast("Any", labels), IGNORED, z.device)
    ),
}
