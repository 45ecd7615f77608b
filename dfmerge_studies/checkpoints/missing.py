"""Parts of a model that its files do not hold, which transformers draws at random: do its answers depend on them?

A part matters if a NaN in it reaches or changes the output.  That finds every dependence that a probe exercises, also
one that cancels out or is rounded away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dfmerge_studies.checkpoints.probe import PROBE_FAILURES, probe_inputs, probe_logits
from dfmerge_studies.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_answers(model: PreTrainedModel, names: Iterable[str], *, where: str, owner: str, hint: str) -> None:
    """Refuse missing parts that the model's answers depend on; those that nothing depends on become zero.

    Args:
        model: the model, in evaluation mode.
        names: parameters or buffers that no file held.
        where: the checkpoint, for messages.
        owner: what has no such part, for messages.
        hint: what the reader can do about it.

    Raises:
        InputError: naming one of them.
    """
    names = frozenset(names)
    if (name := _first_needed(model, names, body=False)) is not None:
        raise InputError(_what(names, name, owner), where=where, hint=hint)
    _zero_(model, names)


def check_body(model: PreTrainedModel, names: Iterable[str], *, where: str, owner: str, hint: str) -> None:
    """Refuse missing parts of a classifier's encoder; a head, or a pooler in front of it, may be missing.

    Args:
        model: a classifier, in evaluation mode.
        names: parameters or buffers that no file held.
        where: the checkpoint, for messages.
        owner: what has no such part, for messages.
        hint: what the reader can do about it.

    Raises:
        InputError: naming one on which the encoder's hidden states depend.
    """
    names = frozenset(name for name in names if name.startswith(f"{model.base_model_prefix}."))
    if (name := _first_needed(model, names, body=True)) is not None:
        raise InputError(_what(names, name, owner), where=where, hint=hint)


def _what(names: frozenset[str], name: str, owner: str) -> str:
    more = f" ({len(names)} tensors are missing)" if len(names) > 1 else ""
    return f"tensor {name} is not in {owner}{more}; it would be drawn at random, and answers depend on it"


def _first_needed(model: Any, names: frozenset[str], *, body: bool) -> str | None:
    """The first of the parts that the logits, or the encoder's hidden states, depend on."""
    if not names:
        return None
    tensors = _tensors(model, names)
    forward = _hidden if body else probe_logits
    probes = probe_inputs(model, generator=body or model.can_generate())

    def reached(chosen: Iterable[str]) -> bool:
        return any(_reached([tensors[name] for name in chosen], partial(forward, model, probe)) for probe in probes)

    if not reached(tensors):
        return None
    return next((name for name in tensors if reached([name])), next(iter(tensors)))


@torch.no_grad()
def _reached(tensors: list[Tensor], forward: Callable[[], Tensor]) -> bool:
    """Whether NaN in some tensors reaches or changes the output; they are as before afterwards."""
    kept = [tensor.clone() for tensor in tensors]
    try:
        before = forward()
        for tensor in tensors:
            tensor.fill_(torch.nan)
        # Bit for bit: some kernels take a row of NaN for one that is masked and give zeros, which may change little.
        return not torch.equal(forward(), before)
    except PROBE_FAILURES:  # some models look at their numbers
        return True
    finally:
        for tensor, original in zip(tensors, kept, strict=True):
            tensor.copy_(original)


def _hidden(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    hidden: Tensor = model.base_model(**inputs)[0]
    return hidden


def _tensors(model: Any, names: frozenset[str]) -> dict[str, Tensor]:
    """The floating-point ones among them, in the order of their names; others are counts and positions, never drawn."""
    everything = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {name: everything[name].data for name in sorted(names) if everything[name].is_floating_point()}


def _zero_(model: Any, names: frozenset[str]) -> None:
    """So that a model is the same each time it is loaded and written."""
    for tensor in _tensors(model, names).values():
        tensor.zero_()
