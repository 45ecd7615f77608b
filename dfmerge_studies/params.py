"""Named parameters of a model, their alignment across checkpoints, and task vectors.

Symbols, used as they stand in the formulas of this package:

    theta_pre   parameters of the base         {name: tensor}
    theta[i]    parameters of expert i         {name: tensor}, shapes of theta_pre
    tau[i]      theta[i] - theta_pre           {name: tensor}, only the names where it is not zero throughout
    M           number of experts

A parameter that is tied to another appears once, under the name that `torch.nn.Module.named_parameters` gives it.
Buffers and integer tensors are no parameters here: they stay the base's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from dfmerge_studies.errors import InputError

Weights = Mapping[str, Tensor]
Source = TypeVar("Source")
_MEND_NAMES = "Base and experts must be one architecture; name the base that this expert was fine-tuned from"


class OnDemand(Mapping[str, Tensor], Generic[Source]):
    """Tensors that are made whenever they are asked for, so that they are not all in memory.

    Args:
        source: what each is made of, by their names, in their order.
    """

    def __init__(self, source: Mapping[str, Source]) -> None:
        self._source = source

    def __contains__(self, name: object) -> bool:
        return name in self._source  # without making it

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)


@dataclass(frozen=True)
class TaskVector:
    """What fine-tuning changed: tau = theta_expert - theta_pre.

    Attributes:
        expert: name of the expert.
        deltas: difference per parameter name, shape of the parameter; a name that is absent did not change at all.
    """

    expert: str
    deltas: Mapping[str, Tensor]


def float_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The floating-point parameters of a model by name, tied ones once, in the model's own order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.is_floating_point()}


def changed_names(task_vectors: Iterable[TaskVector], order: Iterable[str]) -> list[str]:
    """Names on which at least one expert differs from the base, in the given order.

    Args:
        task_vectors: one per expert.
        order: parameter names, in the order wanted; others are left out.
    """
    changed = {name for vector in task_vectors for name in vector.deltas}
    return [name for name in order if name in changed]


def align(base: Weights, expert: Weights, *, base_file: str, expert_file: str) -> None:
    """Check that two sets of parameters have the same names and shapes.

    Args:
        base: parameters of the base.
        expert: parameters of one expert, under the same naming.
        base_file: where the base was read from, for the message.
        expert_file: where the expert was read from, for the message.

    Raises:
        InputError: naming the first tensor that differs, both shapes and both files.
    """
    for name in base:
        if name not in expert:
            raise InputError(
                f"tensor {name} {tuple(base[name].shape)} of the base {base_file} is missing here",
                where=expert_file,
                hint=_MEND_NAMES,
            )
    for name in expert:
        if name not in base:
            raise InputError(
                f"tensor {name} {tuple(expert[name].shape)} does not exist in the base {base_file}",
                where=expert_file,
                hint=_MEND_NAMES,
            )
    for name, tensor in base.items():
        ours, theirs = tuple(expert[name].shape), tuple(tensor.shape)
        if ours != theirs:
            raise InputError(
                f"tensor {name} has shape {ours} but {theirs} in the base {base_file}",
                where=expert_file,
                hint=_mend_shapes(ours, theirs),
            )


def _mend_shapes(ours: tuple[int, ...], theirs: tuple[int, ...]) -> str:
    if len(ours) == len(theirs) == 2 and ours[1] == theirs[1] and min(ours[0], theirs[0]) > 100:
        return (
            "Only the number of rows differs, which is what a vocabulary that was padded or extended looks like: "
            "resize both with model.resize_token_embeddings to one size, with the same tokenizer, and save them again"
        )
    return "Use the base that this expert was fine-tuned from"


def task_vector(expert_name: str, base: Weights, expert: Weights) -> TaskVector:
    """Tau = theta_expert - theta_pre, without the parameters that are equal bit for bit.

    Args:
        expert_name: name that the vector carries.
        base: theta_pre.
        expert: theta of the expert; names and shapes as in `base` (see `align`).

    Raises:
        InputError: a weight of the expert is not finite.
    """
    deltas: dict[str, Tensor] = {}
    for name, theta in expert.items():
        start = base[name]
        theta = theta.detach().to(device=start.device)
        check_finite(theta, name, where=expert_name)
        if not torch.equal(theta, start):
            deltas[name] = theta.to(start.dtype) - start
    return TaskVector(expert_name, deltas)


def check_finite(tensor: Tensor, name: str, *, where: str) -> None:
    """Raise `InputError` if a weight is NaN or infinite.

    Raises:
        InputError: with the number of such values.
    """
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise InputError(
            f"tensor {name} holds {bad} values that are NaN or infinite",
            where=where,
            hint="The checkpoint is damaged or its training diverged; use another one",
        )


def stacked(numbers: Sequence[Tensor]) -> Tensor:
    """Single numbers as one tensor, on the device of the first: one copy from each other device, and no wait.

    Args:
        numbers: of one type, without dimensions, on any devices.
    """
    places: dict[torch.device, list[int]] = {}
    for position, number in enumerate(numbers):
        places.setdefault(number.device, []).append(position)
    if len(places) < 2:
        return torch.stack(list(numbers))
    parts = [torch.stack([numbers[i] for i in positions]).to(numbers[0].device) for positions in places.values()]
    order = [i for positions in places.values() for i in positions]
    back = torch.tensor(sorted(range(len(order)), key=order.__getitem__), device=numbers[0].device)
    return torch.cat(parts).index_select(0, back)


def at_least_float32(tensor: Tensor) -> torch.dtype:
    """The type that sums over a tensor are kept in: its own, or float32 where that is narrower."""
    return torch.promote_types(tensor.dtype, torch.float32)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; afterwards every module has its own again, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def tracking(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Let gradients reach some parameters and no others for a while; afterwards all as before, also after an error.

    Args:
        model: whose parameters.
        names: of those that gradients reach.
    """
    asked, flags = set(names), [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    wanted = {id(parameter) for name, parameter in model.named_parameters() if name in asked}
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
