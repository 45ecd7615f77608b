"""Fold a live adapter into dense weights, and refuse it where that would make another model of it.

Two things are compared, since either alone would miss something: the uses of a tied matrix with each other, whatever
their precision, and the outputs on a few tokens before and after.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dfmerge_studies.checkpoints.probe import probe_inputs, probe_logits, relative_error
from dfmerge_studies.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Relative, in L2 over all outputs: rounding of the weights, carried through all layers.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
TOLERANCE_16_BIT = 1e-1


@dataclass(frozen=True)
class Plain:
    """What is looked at again once an adapter has been folded in, from the base before the adapter was put on it.

    Attributes:
        tied: of each tensor that goes by several names, these names and a copy of it.
        probes: inputs of a few tokens, spread over the vocabulary.
        tied_by_config: the configuration's `tie_word_embeddings`.
    """

    tied: Sequence[tuple[list[str], Tensor]]
    probes: Sequence[dict[str, Tensor]]
    tied_by_config: bool | None


def plain(model: Any, *, tokens: Iterable[int] = (), generator: bool) -> Plain:
    """Look at a base before an adapter is put on it.

    Args:
        model: the base.
        tokens: token ids that the adapter names itself, to be among those that are tried.
        generator: whether an encoder-decoder has to be given a decoder's tokens.
    """
    probes = probe_inputs(model, tokens=list(tokens), generator=generator)
    tied = [(names, model.get_parameter(names[0]).detach().clone()) for names in tied_names(model)]
    return Plain(tied, probes, getattr(model.config, "tie_word_embeddings", None))


def tied_names(model: nn.Module) -> list[list[str]]:
    """The names of each tensor that goes by several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def fold(wrapped: Any, before: Plain, *, where: str) -> PreTrainedModel:
    """Fold an adapter into the weights that it sits on.

    Args:
        wrapped: PEFT's model around the base, with the adapter loaded and active; it is used up.
        before: of `plain`, for this base.
        where: the adapter, for messages.

    Returns:
        The folded model, in evaluation mode, with its matrices tied as they were.

    Raises:
        InputError: the folded model is not the live one: uses of a tied matrix differ, or outputs do.
    """
    wrapped.eval()
    _untie_(wrapped)
    live = [probe_logits(wrapped, probe) for probe in before.probes]
    folded = wrapped.merge_and_unload()
    folded.eval()
    for names, original in before.tied:
        _tie_again_(folded, names, original, where)
    if before.tied_by_config is not None:  # peft saw that the copies are apart, and wrote it into the configuration
        folded.config.tie_word_embeddings = before.tied_by_config
    for logits, probe in zip(live, before.probes, strict=True):
        check_same_answers(logits, probe_logits(folded, probe), next(folded.parameters()).dtype, where)
    return folded  # type: ignore[no-any-return]  # peft types its return as Module


def _untie_(wrapped: nn.Module) -> None:
    """Give every use of a tied matrix a copy of its own, so that folding into one use does not change the others."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in wrapped.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, leaf))
    for uses in owners.values():
        for module, leaf in uses[1:]:
            parameter = module._parameters[leaf]
            assert parameter is not None
            module._parameters[leaf] = nn.Parameter(parameter.detach().clone(), requires_grad=False)


def _tie_again_(model: nn.Module, names: list[str], original: Tensor, where: str) -> None:
    """Tie parameters that were one tensor, if they still are equal."""
    first = model.get_parameter(names[0])
    for name in names[1:]:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        other = module.get_parameter(leaf)
        if not _equal_but_for_rounding(first.detach(), other.detach(), original):
            raise InputError(
                f"{names[0]} and {name} are one tied matrix in the base, and the adapter changes only one of the two, "
                "or both differently; folded into one matrix, it would be another model",
                where=where,
                hint="Train the adapter without this matrix, or on a base whose embeddings are saved untied, "
                "and name that base",
            )
        module._parameters[leaf] = first


def _equal_but_for_rounding(a: Tensor, b: Tensor, original: Tensor) -> bool:
    """Whether two sums of `original` and a change are the same, of which peft may compute the change in two orders."""
    if a.shape != b.shape:
        return False
    size = a.abs().maximum(b.abs()).maximum((a - original).abs())
    return bool(((a - b).abs() <= 2 * torch.finfo(a.dtype).eps * size).all())


def check_same_answers(live: Tensor, folded: Tensor, dtype: torch.dtype, where: str) -> None:
    """Refuse an adapter whose outputs differ from those of the weights that it was made of.

    Args:
        live: logits under the adapter.
        folded: logits of the weights.
        dtype: of the weights.
        where: the adapter, for messages.

    Raises:
        InputError: they differ by more than rounding.
    """
    error = relative_error(folded, live)
    if not error <= TOLERANCE.get(dtype, TOLERANCE_16_BIT):
        raise InputError(
            "folded into the weights, the adapter answers otherwise than live: "
            f"the outputs on a few tokens differ by {error:.1%} of their size",
            where=where,
            hint="An adapter of this kind cannot be merged; train one that only adds to weights, such as LoRA",
        )
