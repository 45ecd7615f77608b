"""Spreading a model over the CUDA devices of this process, so that a trial has room beside the weights on each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from dfmerge_studies.checkpoints.spread import layer_map, spread_
from dfmerge_studies.errors import InputError
from dfmerge_studies.objective.cards import idle_bytes, weight_budgets
from dfmerge_studies.objective.importances import check_importance
from dfmerge_studies.objective.in_parts import needing_all
from dfmerge_studies.objective.memory import Activations, Needs, memory_of
from dfmerge_studies.objective.problem import Problem
from dfmerge_studies.spec import StudySpec

# Activations as a multiple of the weights, before they can be measured; of 1B to 13B the table of docs/memory.md has
# 0.6 to 2.1.  `memory.place_` measures them on the devices, and merges in parts where this was too little.
_ACTIVATIONS = 1.0


def spread_problem_(problem: Problem) -> None:
    """Spread a problem's model where its spec asks for that; heads go where the model has its own.

    The devices are given so many weights that all of a trial fits beside them; where they do not hold it, so many that
    base values and task vectors may stay on the host; at last, that importances are computed one parameter at a time.

    Args:
        problem: all of it on the host.

    Raises:
        InputError: the model says nothing of its modules, or the devices do not hold it.
    """
    if problem.spec.device_map is None:
        return
    resident = problem.resident
    whole, row = memory_of(problem, Activations()).device, problem.spec.row
    trials = [_on_devices(whole), _on_devices(whole) - whole.base - whole.vectors]
    if needing_all(problem, row, check_importance(problem, row)) is None:
        problem.part_entries = max(problem.sizes.values(), default=1)
        part = memory_of(problem, Activations()).device
        problem.part_entries = None
        others = torch.cuda.device_count() - 1  # the sums of one parameter are on its device alone
        trials.append(_on_devices(part) - part.base - part.vectors + others * (part.sums + part.importance))
    weights, spare = whole.model, int(_ACTIVATIONS * whole.model)
    resident.spread_(_fitting(resident.model, problem.spec, weights, [trial + spare for trial in trials]))


def place_model_(model: nn.Module, spec: StudySpec, device: torch.device) -> None:
    """Put a model that is only scored on its device, or spread it where the spec asks for that.

    Args:
        model: on the host.
        spec: may have a `device_map`.
        device: for one without.

    Raises:
        InputError: the model says nothing of its modules, or the devices do not hold it.
    """
    if spec.device_map is None:
        model.to(device)
        return
    tensors = [*model.parameters(), *model.buffers()]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    spread_(model, _fitting(model, spec, weights, [weights + int(_ACTIVATIONS * weights), weights]))


def _on_devices(needs: Needs) -> int:
    """What of the needs of a trial that a CPU would compute is of the devices, where devices do."""
    return needs.total - needs.merged - needs.waiting


def _fitting(model: nn.Module, spec: StudySpec, weights: int, trials: Sequence[int]) -> dict[str, int]:
    """Where each module goes, for the first of some trials that fits.

    Args:
        model: on the host.
        spec: with a `device_map`.
        weights: its bytes.
        trials: bytes at the peak, the most first.
    """
    assert spec.device_map is not None
    where, free = spec.where("device_map"), [idle_bytes(number) for number in range(torch.cuda.device_count())]
    for trial in trials:
        budgets = weight_budgets(free, weights, trial, spec.memory)
        places = layer_map(model, spec.device_map, budgets, where=where)
        if places is not None:
            return places
    raise InputError(
        f"{type(model).__name__} does not fit on the {len(free)} CUDA devices: its weights take {weights / 1e9:.2f} "
        f"GB, with what has to be beside them about {trials[-1] / 1e9:.2f} GB, and {sum(free) / 1e9:.2f} GB are free",
        where=where,
        hint="Free memory on them, use more devices, or use dtype: bfloat16",
    )
