"""Forward and backward passes over a chunk of inputs, per kind of model, that leave squared gradients in a capture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dfmerge_studies.errors import InputError, RunError
from dfmerge_studies.importance.capture import Capture
from dfmerge_studies.importance.fisher import add_rows_
from dfmerge_studies.methods import Estimator
from dfmerge_studies.tasks.encoding import Encoded, Kind
from dfmerge_studies.tasks.scoring import (
    Rows,
    class_logits,
    continuation_losses,
    decode,
    device_of,
    encode,
    make_rows,
    probabilities,
)


@dataclass(frozen=True, slots=True)
class Job:
    """What all chunks share.  `draws`: a number in [0, 1) for every input, by position, for choices that are drawn."""

    model: nn.Module
    kind: Kind
    examples: Sequence[Encoded]
    pad_id: int
    estimator: Estimator
    draws: Tensor


def _classification(job: Job, capture: Capture, chunk: Sequence[int]) -> None:
    """One forward pass, and a backward pass per direction in the space of class scores."""
    batch = [job.examples[i] for i in chunk]

    def directions(logits: Tensor) -> Sequence[Tensor]:
        check_finite(logits, batch)
        return class_rows(job, chunk, logits).unbind(1)

    add_rows_(capture, len(batch), lambda: class_logits(job.model, batch, job.pad_id), directions)


def class_rows(job: Job, chunk: Sequence[int], logits: Tensor) -> Tensor:
    """Directions in the space of class scores whose squared gradients are added up.

    Args:
        job: the estimator, and the draws or labels that it needs.
        chunk: positions of the B inputs.
        logits: (B, K) their class scores.

    Returns:
        (B, rows, K)
    """
    p = torch.softmax(logits, dim=-1)
    if job.estimator is Estimator.EXACT:
        return class_directions(p)
    chosen = _chosen(job, chunk, p)
    return (p - nn.functional.one_hot(chosen, p.shape[1]))[:, None]


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
    directions: Tensor = reflection[:, 1:] * s[:, None, :]
    return directions.to(p.dtype)


def _causal(job: Job, capture: Capture, chunk: Sequence[int]) -> None:
    """All rows in one forward and one backward pass."""
    batch = [job.examples[i] for i in chunk]
    rows = make_rows(batch, device_of(job.model))
    if job.estimator is not Estimator.EXACT:
        losses = None
        if job.estimator.draws:
            losses = rows.grid(continuation_losses(job.model, batch, rows, job.pad_id), len(batch))
        batch, rows = only_chosen(job, chunk, batch, losses)
    add_rows_(
        capture,
        len(rows.owner),
        lambda: continuation_losses(job.model, batch, rows, job.pad_id),
        lambda losses: [_weights(job, losses, rows, batch)],
    )


def _text_to_text(job: Job, capture: Capture, chunk: Sequence[int]) -> None:
    """The encoder once per input, the decoder once per row, back through the encoder once per choice index."""
    model = job.model
    batch = [job.examples[i] for i in chunk]
    with capture.stage(len(batch)) as encoder:
        hidden, mask = encode(model, batch, job.pad_id)
    rows = make_rows(batch, device_of(model))
    if job.estimator is not Estimator.EXACT:
        losses = None
        if job.estimator.draws:
            plain = hidden.detach()
            losses = rows.grid(decode(model, plain[rows.owner], mask[rows.owner], rows.targets), len(batch))
        batch, rows = only_chosen(job, chunk, batch, losses)
    states = hidden.detach()[rows.owner].requires_grad_(hidden.requires_grad)
    with capture.stage(len(rows.owner)) as decoder:
        flat = decode(model, states, mask[rows.owner], rows.targets)
    inputs = [states] if hidden.requires_grad else []
    found = capture.backward(decoder, flat, _weights(job, flat, rows, batch), range(len(flat)), inputs)
    if not found:
        return
    owner, choice = rows.owner.tolist(), rows.choice.tolist()
    last = max(choice)
    for c in range(last + 1):
        numbers = [-1] * len(batch)
        for row, (i, k) in enumerate(zip(owner, choice, strict=True)):
            if k == c:
                numbers[i] = row
        picked = torch.tensor([max(row, 0) for row in numbers], device=hidden.device)
        present = torch.tensor([row >= 0 for row in numbers], device=hidden.device)
        direction = found[0].index_select(0, picked) * present[:, None, None]
        capture.backward(encoder, hidden, direction.to(hidden.dtype), numbers, keep=c < last)


PASSES = {Kind.TEXT_TO_TEXT: _text_to_text, Kind.CAUSAL: _causal, Kind.CLASSIFICATION: _classification}


# --- which rows, and how much they count -----------------------------------------------------------------------------


def _weights(job: Job, losses: Tensor, rows: Rows, batch: Sequence[Encoded]) -> Tensor:
    """(R,) square roots of the rows' weights: of p(c|x) for `exact`, 1 for the estimators that take one row each."""
    table = rows.grid(losses.detach(), len(batch))
    check_finite(losses.detach(), [batch[i] for i in rows.owner.tolist()])
    if job.estimator is not Estimator.EXACT:
        return torch.ones_like(losses)
    weights: Tensor = probabilities(table)[rows.owner, rows.choice].sqrt()
    return weights


def _chosen(job: Job, chunk: Sequence[int], p: Tensor) -> Tensor:
    """(B,) the one choice of each input that counts: its label, or one drawn from p (B, C)."""
    if job.estimator is Estimator.EMPIRICAL:
        labels = []
        for i in chunk:
            label = job.examples[i].label
            if label is None:
                where = f"row {job.examples[i].index}"
                raise InputError("the empirical estimator needs labels", where=where, hint="Give doc_to_target")
            labels.append(label)
        return torch.tensor(labels, device=p.device)
    edges = p.double().cumsum(1)
    draws = job.draws[list(chunk)].to(p.device)[:, None] * edges[:, -1:]
    last = (p > 0).long().cumsum(1).argmax(1)
    return torch.minimum((edges <= draws).sum(1), last)


def only_chosen(
    job: Job, chunk: Sequence[int], batch: Sequence[Encoded], losses: Tensor | None
) -> tuple[list[Encoded], Rows]:
    """The batch with only the chosen choice of every input, and its rows.

    Args:
        job: the estimator, and the draws or labels that it needs.
        chunk: positions of the B inputs.
        batch: these inputs.
        losses: (B, C), where the choice is drawn.
    """
    p = torch.empty(len(batch), 1, device=device_of(job.model)) if losses is None else probabilities(losses)
    chosen = _chosen(job, chunk, p).tolist()
    kept = [
        Encoded(example.index, example.input_ids, (example.choices[c],), 0, example.token_type_ids, example.truncated)
        for example, c in zip(batch, chosen, strict=True)
    ]
    return kept, make_rows(kept, device_of(job.model))


def check_finite(values: Tensor, examples: Sequence[Encoded]) -> None:
    """Refuse losses or scores that are not finite.

    Args:
        values: (n, ...) one row each.
        examples: their n inputs, for the message.

    Raises:
        RunError: naming the row.
    """
    finite = values.isfinite().flatten(1).all(1) if values.dim() > 1 else values.isfinite()
    if not bool(finite.all()):
        example = examples[int((~finite).long().argmax())]
        raise RunError(
            "the model's loss is not finite",
            where=f"row {example.index}",
            hint="The weights, or the precision they are run in, overflow; try float32, or smaller coefficients",
        )
