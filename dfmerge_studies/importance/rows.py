"""Sum of squared per-row gradients by plain autograd, one row at a time: slow, and right for any model.

A row is an (input, choice) pair, or a direction of what a head gives for an input, as in `directions`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from dfmerge_studies.errors import InputError, first_line, out_of_memory
from dfmerge_studies.importance.capture import check_names, refuse_unused
from dfmerge_studies.importance.directions import directions
from dfmerge_studies.importance.passes import Job, check_finite, drawn_tokens, only_chosen
from dfmerge_studies.methods import Estimator
from dfmerge_studies.params import at_least_float32, evaluating, tracking
from dfmerge_studies.tasks.batches import device_of, make_rows
from dfmerge_studies.tasks.encoding import HEADED, Encoded, Kind
from dfmerge_studies.tasks.scoring import Relabel, continuation_losses, decode, encode, head_outputs, probabilities


def sum_by_rows(
    job: Job, names: Collection[str], *, done: Callable[[int], None] = lambda inputs: None
) -> dict[str, Tensor]:
    """Sum of squared per-row gradients of a model's parameters.

    Args:
        job: model, inputs, estimator.
        names: names of the wanted parameters, as `named_parameters()` gives them.
        done: called with the number of inputs done since the last call.

    Returns:
        {parameter: tensor of its shape}, in its precision, or float32 where that is narrower.

    Raises:
        InputError: a name that the model does not have, or a parameter that it does not use.
        RunError: a loss is not finite.
    """
    model = job.model
    check_names(model, names)
    asked = set(names)
    wanted = {name: p for name, p in model.named_parameters() if name in asked}
    sums = {name: torch.zeros_like(p, dtype=at_least_float32(p), requires_grad=False) for name, p in wanted.items()}
    used: set[str] = set()
    with tracking(model, names), evaluating(model):
        for i in range(len(job.examples)):
            for output, direction in _rows(job, i):
                for name, gradient in zip(wanted, _gradients(model, output, direction, wanted), strict=True):
                    if gradient is not None:
                        used.add(name)
                        gradient = gradient.to(sums[name].dtype)
                        sums[name].addcmul_(gradient, gradient)
            done(1)
    refuse_unused(set(sums) - used)
    return sums


def _gradients(
    model: nn.Module, output: Tensor, direction: Tensor, wanted: Mapping[str, Tensor]
) -> Sequence[Tensor | None]:
    if not output.requires_grad:
        return [None] * len(wanted)
    several = output.dim() > 0  # of a head, which has a pass per direction
    try:
        return torch.autograd.grad(output, [*wanted.values()], direction, retain_graph=several, allow_unused=True)
    except RuntimeError as error:
        if out_of_memory(error) is not None:
            raise
        raise InputError(
            f"{type(model).__name__} cannot be differentiated: {first_line(error)}",
            hint="Use a method without importance, such as gta, or another model",
        ) from error


def _rows(job: Job, i: int) -> Iterator[tuple[Tensor, Tensor]]:
    """What each row of the i-th input is the gradient of, and in which direction."""
    example = job.examples[i]
    if job.kind in HEADED:
        with torch.enable_grad():
            z = head_outputs(job.model, job.kind, [example], job.pad_id)
        check_finite(z.detach(), [example])
        for direction in directions(job.kind, job.estimator, z.detach(), [example], job.draws[[i]]):
            yield z, direction
        return
    if job.along:
        with torch.enable_grad():
            loss = _loss(job, example, drawn_tokens(job, [i]))
        check_finite(loss.detach()[None], [example])
        yield loss, torch.ones_like(loss)
        return
    weights = [1.0] * len(example.choices)
    if job.estimator is Estimator.EXACT or job.estimator.draws:
        with torch.no_grad():
            losses = torch.stack([_loss(job, single) for single in _singles(example)])
        check_finite(losses, [example] * len(losses))
        weights = probabilities(losses).tolist()
        if job.estimator is not Estimator.EXACT:
            example = only_chosen(job, [i], [example], losses[None])[0][0]
            weights = [1.0]
    else:
        example = only_chosen(job, [i], [example], None)[0][0]
    for single, weight in zip(_singles(example), weights, strict=False):
        with torch.enable_grad():
            loss = _loss(job, single)
        check_finite(loss.detach()[None], [example])
        yield loss, loss.new_tensor(weight).sqrt()


def _singles(example: Encoded) -> list[Encoded]:
    """The input with each of its choices alone."""
    return [
        Encoded(example.index, example.input_ids, (choice,), 0, example.token_type_ids, example.truncated)
        for choice in example.choices
    ]


def _loss(job: Job, single: Encoded, relabel: Relabel | None = None) -> Tensor:
    model: nn.Module = job.model
    rows = make_rows([single], device_of(model))
    if job.kind is Kind.CAUSAL:
        return continuation_losses(model, [single], rows, job.pad_id, relabel)[0]
    hidden, mask = encode(model, [single], job.pad_id)
    return decode(model, hidden, mask, rows.targets, relabel)[0]
