"""The model that scripts/finetune.py trains: the base with a head per task, whose forward pass is the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dfmerge_studies.checkpoints.load import load_model, load_tokenizer
from dfmerge_studies.checkpoints.resident import head_names
from dfmerge_studies.objective.inputs import padding_id
from dfmerge_studies.objective.problem import Checkpoints
from dfmerge_studies.params import float_parameters
from dfmerge_studies.tasks.encoding import Encoded, Kind
from dfmerge_studies.tasks.scoring import forward_losses

Head = dict[str, nn.Parameter]


class Trainee(nn.Module):
    """The model in training with one head per task; its forward pass is the loss, so that Accelerate can wrap it.

    Args:
        model: the base.
        kind: how it answers.
        pad_id: token id that batches are padded with.
        heads: by task, the parameters of its head; empty for models without heads.
    """

    def __init__(self, model: Any, kind: Kind, pad_id: int, heads: Mapping[str, Head]) -> None:
        super().__init__()
        self.model, self.kind, self.pad_id, self.heads = model, kind, pad_id, heads
        self._kept = nn.ParameterList([p for head in heads.values() for p in head.values()])  # known to the optimizer

    def take_head_(self, task: str) -> None:
        """Put a task's head on the model: the parameters themselves, so that they are trained.

        Args:
            task: whose head.
        """
        for name, parameter in self.heads.get(task, {}).items():
            owner, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(owner)
            module.register_parameter(leaf, parameter)
            if isinstance(module, nn.Linear) and leaf == "weight":
                module.out_features, module.in_features = parameter.shape

    def forward(self, batches: Mapping[str, Sequence[Encoded]]) -> Tensor:
        """Mean loss of the rows of all tasks.

        Args:
            batches: rows by task.
        """
        return self.losses(batches).mean()

    def losses(self, batches: Mapping[str, Sequence[Encoded]]) -> Tensor:
        """Loss of every row, (rows,), task by task.

        Args:
            batches: rows by task.
        """
        losses = []
        for task, batch in batches.items():
            self.take_head_(task)
            if self.kind is Kind.CLASSIFICATION:
                table = forward_losses(self.model, self.kind, batch, pad_id=self.pad_id)
                labels = torch.tensor([row.label for row in batch], device=table.device)
                losses.append(table.gather(1, labels[:, None]).flatten())
            else:  # the wrong choices cost memory and teach nothing
                right = [replace(row, choices=(row.choices[row.label or 0],), label=0) for row in batch]
                losses.append(forward_losses(self.model, self.kind, right, pad_id=self.pad_id).flatten())
        return torch.cat(losses)


def load_trainee(found: Checkpoints, tasks: Sequence[str], classes: Mapping[str, list[str]]) -> Trainee:
    """The base, with a fresh head per task where the tasks are classifications.

    Args:
        found: the base and how it answers.
        tasks: names of the tasks.
        classes: per classification task, the names of its classes.
    """
    heads: dict[str, Head] = {}
    model: Any = None
    for task in tasks if found.has_heads else tasks[:1]:
        loaded = load_model(
            found.base, found.model_class, dtype=torch.float32, classes=classes.get(task, ()), headless=True
        )
        if found.has_heads:
            own = head_names(loaded.model, loaded.missing)
            heads[task] = {n: nn.Parameter(p.detach()) for n, p in float_parameters(loaded.model).items() if n in own}
        model = model or loaded.model
    trainee = Trainee(model, found.kinds[tasks[0]], padding_id(load_tokenizer(found.base)), heads)
    trainee.take_head_(tasks[0])
    return trainee
