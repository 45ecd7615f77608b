"""Forward and backward passes over a chunk of inputs, per kind of model, that leave squared gradients in a capture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dfmerge_studies.errors import RunError
from dfmerge_studies.importance.capture import Capture
from dfmerge_studies.importance.directions import directions, drawn_choices, labels_of_all
from dfmerge_studies.importance.fisher import add_rows_
from dfmerge_studies.methods import Blocks, Estimator
from dfmerge_studies.tasks.batches import Rows, device_of, make_rows
from dfmerge_studies.tasks.encoding import HEADED, Encoded, Kind
from dfmerge_studies.tasks.generation import Writer
from dfmerge_studies.tasks.scoring import Relabel, continuation_losses, decode, encode, head_outputs, probabilities
from dfmerge_studies.tasks.tags import IGNORED


@dataclass(frozen=True, slots=True)
class Job:
    """What all chunks share.

    Attributes:
        model: the model.
        kind: how it answers.
        examples: the N inputs.
        pad_id: token id to pad with.
        estimator: which choices or tokens count.
        draws: (N,) a number in [0, 1) for every input, by position, for choices that are drawn; (N, T) for tokens.
        writer: where texts end that the model writes; None where it picks a choice.
        blocks: what linear layers have instead of a diagonal.
    """

    model: nn.Module
    kind: Kind
    examples: Sequence[Encoded]
    pad_id: int
    estimator: Estimator
    draws: Tensor
    writer: Writer | None = None
    blocks: Blocks | None = None

    @property
    def along(self) -> bool:
        """Whether labels are drawn token by token along a text, which is then each input's only choice."""
        return self.writer is not None and self.estimator.draws


def _head(job: Job, capture: Capture, chunk: Sequence[int]) -> None:
    """One forward pass, and a backward pass per direction in the space of what the head gives."""
    batch = [job.examples[i] for i in chunk]

    def found(z: Tensor) -> Iterator[Tensor]:
        check_finite(z, batch)
        return directions(job.kind, job.estimator, z, batch, job.draws[list(chunk)])

    add_rows_(capture, len(batch), lambda: head_outputs(job.model, job.kind, batch, job.pad_id), found)


def _causal(job: Job, capture: Capture, chunk: Sequence[int]) -> None:
    """All rows in one forward and one backward pass."""
    batch = [job.examples[i] for i in chunk]
    rows = make_rows(batch, device_of(job.model))
    if job.estimator is not Estimator.EXACT and not job.along:
        losses = None
        if job.estimator.draws:
            losses = rows.grid(continuation_losses(job.model, batch, rows, job.pad_id), len(batch))
        batch, rows = only_chosen(job, chunk, batch, losses)
    add_rows_(
        capture,
        len(rows.owner),
        lambda: continuation_losses(job.model, batch, rows, job.pad_id, drawn_tokens(job, chunk)),
        lambda losses: [_weights(job, losses, rows, batch)],
    )


def _text_to_text(job: Job, capture: Capture, chunk: Sequence[int]) -> None:
    """The encoder once per input, the decoder once per row, back through the encoder once per choice index."""
    model = job.model
    batch = [job.examples[i] for i in chunk]
    if job.estimator is Estimator.EXACT and job.blocks is None and device_of(model).type != "cpu":
        _text_to_text_rows(job, capture, batch)
        return
    with capture.stage(len(batch)) as encoder:
        hidden, mask = encode(model, batch, job.pad_id)
    rows = make_rows(batch, device_of(model))
    if job.estimator is not Estimator.EXACT and not job.along:
        losses = None
        if job.estimator.draws:
            plain = hidden.detach()
            losses = rows.grid(decode(model, plain[rows.owner], mask[rows.owner], rows.targets), len(batch))
        batch, rows = only_chosen(job, chunk, batch, losses)
    states = hidden.detach()[rows.owner].requires_grad_(hidden.requires_grad)
    with capture.stage(len(rows.owner)) as decoder:
        flat = decode(model, states, mask[rows.owner], rows.targets, drawn_tokens(job, chunk))
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


def _text_to_text_rows(job: Job, capture: Capture, batch: Sequence[Encoded]) -> None:
    """The same with the encoder once per row: an accelerator computes more than it needs to in less than it waits.

    Not for blocks, in which an encoder's inputs count once per choice and not by its probability.
    """
    rows = make_rows(batch, device_of(job.model))
    texts = [batch[i] for i, example in enumerate(batch) for _ in example.choices]

    def losses() -> Tensor:
        hidden, mask = encode(job.model, texts, job.pad_id)
        return decode(job.model, hidden, mask, rows.targets)

    add_rows_(capture, len(texts), losses, lambda found: [_weights(job, found, rows, batch)])


PASSES = {Kind.TEXT_TO_TEXT: _text_to_text, Kind.CAUSAL: _causal, **dict.fromkeys(HEADED, _head)}


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
        return torch.tensor(labels_of_all([job.examples[i] for i in chunk]), device=p.device)
    return drawn_choices(p, job.draws[list(chunk)])


def drawn_tokens(job: Job, chunk: Sequence[int]) -> Relabel | None:
    """Labels z[t] ~ p(.|x, y[<t]) at every token of the texts y of a chunk; None where labels are not drawn so.

    Args:
        job: the numbers that decide the draws.
        chunk: positions of the B inputs, each with one text.
    """
    if not job.along:
        return None

    def relabel(logits: Tensor, tokens: Tensor) -> Tensor:
        labels = tokens.clone()
        for row, i in enumerate(chunk):  # one by one: in float64, a row is T times the vocabulary
            length = int((tokens[row] != IGNORED).sum())
            p = torch.softmax(logits[row, :length].double(), dim=-1)
            labels[row, :length] = drawn_choices(p, job.draws[i, :length])
        return labels

    return relabel


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
