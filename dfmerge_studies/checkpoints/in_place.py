"""A model that every scaled expert and every merge is written into, in place.

theta_pre   base parameters, for the names on which an expert differs    {name: tensor}
tau[i]      task vectors, each entry where its parameter is              {name: tensor}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dfmerge_studies.checkpoints.spread import place_of
from dfmerge_studies.checkpoints.streamed import on_device, streamed
from dfmerge_studies.params import TaskVector
from dfmerge_studies.points import Coefficient, coefficient_at


@dataclass
class InPlace:
    """A base and its experts' task vectors around one model.

    Attributes:
        model: the model whose parameters are overwritten, in evaluation mode.
        base: theta_pre for `names`.
        task_vectors: one per expert, in their order.
        names: parameters on which at least one expert differs from the base, in the model's order.
    """

    model: nn.Module
    base: Mapping[str, Tensor]
    task_vectors: Sequence[TaskVector]
    names: Sequence[str]

    @property
    def device(self) -> torch.device:
        """Where the first parameter is, and batches are put; all others too, unless the model is spread."""
        return next(self.model.parameters()).device

    def place_of(self, name: str) -> torch.device:
        """Where a parameter is, and what belongs to it.

        Args:
            name: as for `spread.place_of`.
        """
        return place_of(self.model, name)

    def keep_on_(self, *, host: bool) -> None:
        """Bring theta_pre and the task vectors from the host to the parameters, or keep them and copy what is used.

        Args:
            host: whether they stay in the host's memory.
        """
        place = streamed if host else on_device
        self.base = place(self.base, self.place_of)
        self.task_vectors = [TaskVector(v.expert, place(v.deltas, self.place_of)) for v in self.task_vectors]

    @torch.no_grad()
    def load_scaled_(self, expert: int, coefficient: Coefficient) -> None:
        """Write theta_pre + lambda * tau[expert] into the model, lambda being one number or one per parameter."""
        parameters = dict(self.model.named_parameters())
        deltas = self.task_vectors[expert].deltas
        for name in self.names:
            parameter = parameters[name]
            parameter.copy_(self.base[name])
            if name in deltas:
                parameter.add_(deltas[name], alpha=coefficient_at(coefficient, name))

    @torch.no_grad()
    def load_base_(self) -> None:
        """Write theta_pre into the model."""
        parameters = dict(self.model.named_parameters())
        for name in self.names:
            parameters[name].copy_(self.base[name])


def put_head_on_(model: nn.Module, head: Mapping[str, Tensor]) -> None:
    """Replace the parameters of a model's head, which may change its number of classes.

    Args:
        model: a classifier.
        head: parameters by name; with none, nothing happens.
    """
    for name, tensor in head.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
        if isinstance(module, nn.Linear) and leaf == "weight":
            module.out_features, module.in_features = tensor.shape
