"""A merge of LoRA experts as a LoRA adapter on their base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dfmerge_studies.checkpoints.adapters import TASK_TYPES
from dfmerge_studies.checkpoints.low_rank import LowRank, energy, low_rank, save_adapter
from dfmerge_studies.errors import RunError
from dfmerge_studies.objective.problem import Problem
from dfmerge_studies.report.origins import adapter_base


@dataclass(frozen=True)
class AdapterExport:
    """What an adapter keeps of a merge.

    Attributes:
        rank: of its matrices; of smaller ones, their own.
        energy: share of the sum of squares of all changes that is kept.
        matrices: how many there are.
        worst: the layer that keeps least.
        worst_energy: what it keeps.
    """

    rank: int
    energy: float
    matrices: int
    worst: str
    worst_energy: float

    def line(self) -> str:
        """The same in one line."""
        return (
            f"An adapter of rank {self.rank} on {self.matrices} matrices keeps {100 * self.energy:.2f}% of the energy "
            f"of the merge's change; least is {100 * self.worst_energy:.2f}%, of {self.worst}"
        )

    def described(self) -> dict[str, Any]:
        """The same for JSON."""
        worst = {"layer": self.worst, "energy": self.worst_energy}
        return {"rank": self.rank, "energy": self.energy, "matrices": self.matrices, "worst": worst}


def write_adapters(problem: Problem, folder: Path, rank: int, dtype: str) -> AdapterExport:
    """Write the merge in the resident model as an adapter; of classifiers one per task, with the task's head.

    Args:
        problem: models in memory, the merge in the resident one.
        folder: that exists.
        rank: at most.
        dtype: of the stored tensors.

    Raises:
        InputError: the merge changes what no adapter can.
        RunError: it changes nothing.
    """
    resident = problem.resident
    parts = low_rank(resident.model, resident.base, resident.names, rank)
    if not parts:
        raise RunError("the merge is the base: there is nothing for an adapter to change", where="--as-adapter")
    for task, head in (resident.heads or {"": {}}).items():
        place = folder / task
        place.mkdir(exist_ok=True)
        save_adapter(
            place,
            parts,
            base=_base_name(problem),
            task_type=TASK_TYPES[problem.checkpoints.model_class],
            dtype=dtype,
            head=head,
            head_modules=_modules(head, resident.model.base_model_prefix),
        )
        resident.tokenizer.save_pretrained(place)
    return _kept(parts)


def _kept(parts: Mapping[str, LowRank]) -> AdapterExport:
    worst = min(parts, key=lambda name: parts[name].energy)
    rank = max(part.rank for part in parts.values())
    return AdapterExport(rank, energy(parts), len(parts), worst, parts[worst].energy)


def _base_name(problem: Problem) -> str:
    """How the adapter names its base: as the Hub, or else as the experts do where that is a folder here too."""
    base = problem.checkpoints.base
    ours = adapter_base(base)
    named = {expert.adapter_base for expert in problem.checkpoints.experts.values()}
    name = named.pop() if len(named) == 1 else ""
    there = (
        ours == str(base.path) and Path(name).is_absolute() and Path(name).is_dir() and Path(name).samefile(base.path)
    )
    return name if there else ours


def _modules(head: Mapping[str, Tensor], prefix: str) -> list[str]:
    """The modules that a head's parameters are of, the outermost that hold nothing else."""
    found = []
    for name in head:
        parts = name.split(".")
        found.append(".".join(parts[:2]) if parts[0] == prefix else parts[0])
    return list(dict.fromkeys(found))
