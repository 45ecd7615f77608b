"""Diagonal Fisher information of a task at a model's present weights.

    x        one of the N inputs;  c  one of its choices, or a class
    l(x, c)  loss of the choice, p(c|x) its probability (see `tasks.scoring`); p is a constant for the gradients
    F        {parameter: shape of the parameter}, >= 0

    exact       F = 1/N  sum over x and c of p(c|x) (grad l(x, c))^2
    sampled     F = 1/N  sum over x of (grad l(x, c))^2,  c drawn from p(.|x)
    empirical   F = 1/N  sum over x of (grad l(x, c))^2,  c the label
    mask-nodes  as sampled, but of masks on heads and neurons, spread over the parameters (see `nodes`)

Squares are taken per input and choice, never of a batch's sum.  Weights go into the direction of the backward pass,
sqrt(p) l, so that nothing is weighted afterwards.

For classes, l(x, c) = -log p(c|x), and sum over c of p_c (grad l_c)^2 is a quadratic form in the gradients of the
scores with the matrix diag(p) - p p^T.  Its rank is one less than the number of classes, so one backward pass per class
but one is enough, each along a column of a square root of that matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from dfmerge_studies.errors import InputError, RunError
from dfmerge_studies.importance.capture import Capture
from dfmerge_studies.importance.nodes import NodeCapture, spread
from dfmerge_studies.params import float_parameters
from dfmerge_studies.ranks import SOLO, Ranks
from dfmerge_studies.tasks.encoding import Encoded, Kind
from dfmerge_studies.tasks.evaluate import length_batches
from dfmerge_studies.tasks.scoring import (
    Rows,
    autocasting,
    class_logits,
    continuation_losses,
    decode,
    device_of,
    encode,
    make_rows,
    probabilities,
)

ROW_BUDGET = 8192


class Estimator(StrEnum):
    """Which choices of an input count, and how much."""

    EXACT = "exact"
    SAMPLED = "sampled"
    EMPIRICAL = "empirical"
    MASK_NODES = "mask-nodes"

    @property
    def draws(self) -> bool:
        """Whether the one choice of an input that counts is drawn, so that a generator is needed."""
        return self in (Estimator.SAMPLED, Estimator.MASK_NODES)


@dataclass(frozen=True, slots=True)
class FisherResult:
    """A diagonal Fisher, without a floor.

    Attributes:
        values: {parameter name: tensor of its shape, >= 0}: means over the inputs, or sums where so documented; or
            {mask: (units,)} where so documented.
        samples: inputs used.
    """

    values: dict[str, Tensor]
    samples: int


@dataclass(frozen=True, slots=True)
class _Job:
    """What all chunks share.  `draws`: a number in [0, 1) for every input, by position, for choices that are drawn."""

    model: nn.Module
    kind: Kind
    examples: Sequence[Encoded]
    pad_id: int
    estimator: Estimator
    draws: Tensor
    autocast: torch.dtype | None


def diagonal_fisher(
    model: nn.Module,
    kind: Kind,
    examples: Sequence[Encoded],
    *,
    pad_id: int,
    names: Collection[str] | None = None,
    estimator: str = Estimator.EXACT,
    generator: torch.Generator | None = None,
    row_budget: int = ROW_BUDGET,
    accumulate_dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    compact: bool = False,
    progress: Callable[[int], None] | None = None,
    ranks: Ranks = SOLO,
) -> FisherResult:
    """Diagonal Fisher information, the mean over the inputs.

    Args:
        model: the model; left as it is found.
        kind: how the model answers.
        examples: the N inputs; labels are used by `empirical` only.
        pad_id: token id to pad inputs with.
        names: parameters wanted, as `named_parameters()` gives them (tied ones once); all of floating point for `None`.
        estimator: `exact`, `sampled`, `empirical` or `mask-nodes`.
        generator: on the CPU, source of the choices that are drawn, one number per input in order.
        row_budget: rows times tokens whose activations are alive at once, the bound on memory.
        accumulate_dtype: precision of products and sums.
        autocast: run the model in mixed precision of this dtype.
        compact: for `mask-nodes`, values by mask, which `whole` turns into those of parameters.
        progress: called with the number of inputs done since the last call.
        ranks: processes that share the inputs; the values are right on the leader, and of no use on the others.

    Raises:
        InputError: no inputs, a missing label, an unknown estimator or name, or a module that cannot be handled.
        RunError: a loss is not finite.
    """
    if not examples:
        raise InputError("there are no inputs to compute the Fisher information from", mend="Check samples and limit")
    draws = sampling_draws(len(examples), generator) if _draws(estimator) else None
    share = ranks.shares([_rows_times_tokens(example, kind) for example in examples])[ranks.rank]
    result = FisherResult({}, 0)

    def compute() -> int:
        nonlocal result
        result = fisher_sum(
            model,
            kind,
            [examples[i] for i in share],
            pad_id=pad_id,
            names=names,
            estimator=estimator,
            draws=draws[share] if draws is not None else None,
            row_budget=row_budget,
            accumulate_dtype=accumulate_dtype,
            autocast=autocast,
            progress=progress,
            ranks=ranks,
        )
        return result.samples

    samples = sum(ranks.agreed(compute))
    values = result.values
    ranks.sum_on_leader_(values[name] for name in sorted(values))
    for total in values.values():
        total.div_(samples)
    return FisherResult(values if compact else whole(model, values, estimator=estimator, names=names), samples)


def whole(
    model: nn.Module, values: dict[str, Tensor], *, estimator: str, names: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Values by parameter, from those that `fisher_sum` and `diagonal_fisher(compact=True)` give.

    Args:
        model: the model that they are of.
        values: by mask for `mask-nodes`; the other estimators' are whole already and come back as they are.
        estimator: theirs.
        names: parameters wanted; all of floating point for `None`.

    Returns:
        {parameter: tensor of its shape}; for `mask-nodes` views that repeat their values and must not be written in.
    """
    if estimator != Estimator.MASK_NODES:
        return values
    return spread(model, values, float_parameters(model) if names is None else names)


def _draws(estimator: str) -> bool:
    return estimator in set(Estimator) and Estimator(estimator).draws


def sampling_draws(inputs: int, generator: torch.Generator | None) -> Tensor:
    """(inputs,) uniform numbers, one per input in order, so that batching and sharing out do not change the choices.

    Args:
        inputs: how many inputs there are.
        generator: on the CPU; advanced by `inputs` draws.

    Raises:
        InputError: there is no generator.
    """
    if generator is None:
        raise InputError("this estimator draws choices and needs a random generator", mend="Pass one, seeded")
    return torch.rand(inputs, generator=generator, dtype=torch.float64)


def fisher_sum(
    model: nn.Module,
    kind: Kind,
    examples: Sequence[Encoded],
    *,
    pad_id: int,
    names: Collection[str] | None = None,
    estimator: str = Estimator.EXACT,
    draws: Tensor | None = None,
    row_budget: int = ROW_BUDGET,
    accumulate_dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    progress: Callable[[int], None] | None = None,
    ranks: Ranks = SOLO,
) -> FisherResult:
    """Sums instead of means, for inputs that are shared out: add `values` and `samples` of the shares, then divide.

    For `mask-nodes` the values are those of masks, by mask; `whole` gives those of parameters.

    Args:
        model: the model; left as it is found.
        kind: how the model answers.
        examples: the N inputs of this share; with none, the sums are zero.
        pad_id: token id to pad inputs with.
        names: parameters wanted; all of floating point for `None`.
        estimator: `exact`, `sampled`, `empirical` or `mask-nodes`.
        draws: (N,) of `sampling_draws`, the numbers of these inputs; needed where choices are drawn, else unused.
        row_budget: rows times tokens whose activations are alive at once.
        accumulate_dtype: precision of products and sums.
        autocast: run the model in mixed precision of this dtype.
        progress: called with the number of inputs done since the last call.
        ranks: whose held signals are looked at between chunks; nothing is added up over them here.

    Raises:
        InputError: a missing label, an unknown estimator or name, draws that do not match the inputs, or a module that
            cannot be handled.
        RunError: a loss is not finite.
    """
    if estimator not in set(Estimator):
        raise InputError(f"unknown estimator {estimator!r}", mend=f"Use one of {', '.join(Estimator)}")
    if _draws(estimator) and (draws is None or len(draws) != len(examples)):
        raise InputError(f"the estimator {estimator} needs one draw per input", mend="Use sampling_draws")
    if names is None:
        names = float_parameters(model)
    job = _Job(
        model,
        kind,
        examples,
        pad_id,
        Estimator(estimator),
        torch.zeros(len(examples)) if draws is None else draws,
        autocast,
    )
    kept = NodeCapture if estimator == Estimator.MASK_NODES else Capture
    capture = kept(model, names, accumulate_dtype)
    if not capture.sums or not examples:
        return FisherResult(capture.sums, len(examples))
    chunk_of = {Kind.TEXT_TO_TEXT: _text_to_text, Kind.CAUSAL: _causal, Kind.CLASSIFICATION: _classification}[kind]
    with capture.attached(), torch.no_grad():
        for chunk in length_batches(examples, kind, row_budget, _rows_times_tokens):
            ranks.check()
            with autocasting(model, autocast):
                chunk_of(job, capture, chunk)
                capture.end_chunk()
            if progress is not None:
                progress(len(chunk))
        return FisherResult(capture.finish(), len(examples))


def _rows_times_tokens(example: Encoded, kind: Kind) -> int:
    if kind is Kind.CLASSIFICATION:
        return len(example.input_ids)
    return len(example.choices) * (len(example.input_ids) + max(map(len, example.choices), default=0))


# --- chunks ----------------------------------------------------------------------------------------------------------


def _classification(job: _Job, capture: Capture, chunk: Sequence[int]) -> None:
    """One forward pass, and a backward pass per direction in the space of class scores."""
    batch = [job.examples[i] for i in chunk]
    with capture.stage(len(batch)) as stage:
        logits = class_logits(job.model, batch, job.pad_id)
    _check_finite(logits.detach(), batch)
    p = torch.softmax(logits.detach(), dim=-1)
    if job.estimator is Estimator.EXACT:
        directions = class_directions(p)
    else:
        chosen = _chosen(job, chunk, p)
        directions = (p - nn.functional.one_hot(chosen, p.shape[1]))[:, None]
    for k in range(directions.shape[1]):
        rows = [k * len(batch) + i for i in range(len(batch))]
        capture.backward(stage, logits, directions[:, k], rows, keep=k + 1 < directions.shape[1])


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


def _causal(job: _Job, capture: Capture, chunk: Sequence[int]) -> None:
    """All rows in one forward and one backward pass."""
    batch = [job.examples[i] for i in chunk]
    rows = make_rows(batch, device_of(job.model))
    if job.estimator is not Estimator.EXACT:
        losses = None
        if job.estimator.draws:
            losses = rows.grid(continuation_losses(job.model, batch, rows, job.pad_id), len(batch))
        batch, rows = _only_chosen(job, chunk, batch, losses)
    with capture.stage(len(rows.owner)) as stage:
        flat = continuation_losses(job.model, batch, rows, job.pad_id)
    capture.backward(stage, flat, _weights(job, flat, rows, batch), range(len(flat)))


def _text_to_text(job: _Job, capture: Capture, chunk: Sequence[int]) -> None:
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
        batch, rows = _only_chosen(job, chunk, batch, losses)
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


# --- which rows, and how much they count -----------------------------------------------------------------------------


def _weights(job: _Job, losses: Tensor, rows: Rows, batch: Sequence[Encoded]) -> Tensor:
    """(R,) square roots of the rows' weights: of p(c|x) for `exact`, 1 for the estimators that take one row each."""
    table = rows.grid(losses.detach(), len(batch))
    _check_finite(losses.detach(), [batch[i] for i in rows.owner.tolist()])
    if job.estimator is not Estimator.EXACT:
        return torch.ones_like(losses)
    weights: Tensor = probabilities(table)[rows.owner, rows.choice].sqrt()
    return weights


def _chosen(job: _Job, chunk: Sequence[int], p: Tensor) -> Tensor:
    """(B,) the one choice of each input that counts: its label, or one drawn from p (B, C)."""
    if job.estimator is Estimator.EMPIRICAL:
        labels = []
        for i in chunk:
            label = job.examples[i].label
            if label is None:
                where = f"row {job.examples[i].index}"
                raise InputError("the empirical estimator needs labels", where=where, mend="Give doc_to_target")
            labels.append(label)
        return torch.tensor(labels, device=p.device)
    edges = p.double().cumsum(1)
    draws = job.draws[list(chunk)].to(p.device)[:, None] * edges[:, -1:]
    last = (p > 0).long().cumsum(1).argmax(1)
    return torch.minimum((edges <= draws).sum(1), last)


def _only_chosen(
    job: _Job, chunk: Sequence[int], batch: Sequence[Encoded], losses: Tensor | None
) -> tuple[list[Encoded], Rows]:
    """The batch with only the chosen choice of every input, and its rows."""
    p = torch.empty(len(batch), 1, device=device_of(job.model)) if losses is None else probabilities(losses)
    chosen = _chosen(job, chunk, p).tolist()
    kept = [
        Encoded(example.index, example.input_ids, (example.choices[c],), 0, example.token_type_ids, example.truncated)
        for example, c in zip(batch, chosen, strict=True)
    ]
    return kept, make_rows(kept, device_of(job.model))


def _check_finite(values: Tensor, examples: Sequence[Encoded]) -> None:
    finite = values.isfinite().flatten(1).all(1) if values.dim() > 1 else values.isfinite()
    if not bool(finite.all()):
        example = examples[int((~finite).long().argmax())]
        raise RunError(
            "the model's loss is not finite",
            where=f"row {example.index}",
            mend="The weights, or the precision they are run in, overflow; try float32, or smaller coefficients",
        )
