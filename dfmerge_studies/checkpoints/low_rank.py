"""The difference between a merge and its base as a LoRA adapter.

D       theta* - theta_pre of one matrix, as its layer multiplies with it     (out, in)
U S V'  singular value decomposition of D
A, B    lora_A = sqrt(S_r) V_r' (r, in), lora_B = U_r sqrt(S_r) (out, r): B A is the matrix of rank r that is nearest
        to D (Eckart and Young 1936)
energy  sum of the r largest S^2 over the sum of all
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dfmerge_studies.checkpoints.precision import rounded
from dfmerge_studies.checkpoints.reference import ADAPTER_PREFIX, Checkpoint
from dfmerge_studies.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WHERE, _WHOLE = "--as-adapter", "Leave it out: the whole model holds everything"


@dataclass(frozen=True)
class LowRank:
    """The difference of one matrix, cut to a rank.

    Attributes:
        a: `lora_A`, (r, in).
        b: `lora_B`, (out, r).
        kept: sum of squares of the difference that is kept.
        whole: of the whole difference.
        turned: whether the layer keeps its matrix as (in, out).
    """

    a: Tensor
    b: Tensor
    kept: float
    whole: float
    turned: bool = False

    @property
    def rank(self) -> int:
        """Number of singular values that are kept."""
        return len(self.a)

    @property
    def energy(self) -> float:
        """Share of the sum of squares that is kept."""
        return self.kept / self.whole


def lora_rank(experts: Mapping[str, Checkpoint]) -> int:
    """Sum of the ranks of LoRA experts: a sum of scaled experts is no larger.

    Args:
        experts: by name.

    Raises:
        InputError: one of them is no LoRA adapter.
    """
    total = 0
    for name, expert in experts.items():
        settings = expert.read_adapter_config() if expert.is_adapter else {}
        if settings.get("peft_type") != "LORA":
            kind = f"an adapter of the type {settings.get('peft_type')}" if expert.is_adapter else "a whole model"
            raise InputError(
                f"the expert {name} is {kind}, and only LoRA experts come out as one", where=_WHERE, hint=_WHOLE
            )
        ranks = [settings.get("r", 8), *dict(settings.get("rank_pattern") or {}).values()]
        total += max(int(rank) for rank in ranks)
    return total


def low_rank(model: PreTrainedModel, base: Mapping[str, Tensor], names: Sequence[str], rank: int) -> dict[str, LowRank]:
    """The changed matrices of a merge, each cut to a rank.

    Args:
        model: holds the merge.
        base: theta_pre, for the names.
        names: parameters that some expert changes.
        rank: at most so many singular values of each.

    Returns:
        By the name of the layer; matrices that the merge leaves as they are, are left out.

    Raises:
        InputError: a changed parameter is no matrix that an adapter changes; names it.
    """
    uses: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        uses.setdefault(id(parameter), []).append(name)
    found: dict[str, LowRank] = {}
    for name in names:
        parameter = model.get_parameter(name)
        difference = parameter.detach().float() - base[name].float()
        if not difference.any():
            continue
        owner, _, leaf = name.rpartition(".")
        layer = model.get_submodule(owner)
        if leaf != "weight" or not isinstance(layer, (nn.Linear, Conv1D)):
            raise InputError(
                f"{name} is changed by the merge, and an adapter changes the matrices of linear layers only",
                where=_WHERE,
                hint=_WHOLE,
            )
        if len(uses[id(parameter)]) > 1:
            raise InputError(
                f"{name} is changed by the merge and is one matrix with {uses[id(parameter)][1]}, of which an adapter "
                "changes one use",
                where=_WHERE,
                hint=_WHOLE,
            )
        turned = isinstance(layer, Conv1D)
        found[owner] = _cut(difference.T if turned else difference, rank, turned)
    return found


def _cut(difference: Tensor, rank: int, turned: bool) -> LowRank:
    u, s, v = torch.linalg.svd(difference, full_matrices=False)
    root = s[:rank].sqrt()
    squares = s.double().square()
    return LowRank(
        (root[:, None] * v[:rank]).cpu().contiguous(),
        (u[:, :rank] * root).cpu().contiguous(),
        float(squares[:rank].sum()),
        float(squares.sum()),
        turned,
    )


def energy(parts: Mapping[str, LowRank]) -> float:
    """Share of the sum of squares of all differences that is kept.

    Args:
        parts: by layer.
    """
    whole = sum(part.whole for part in parts.values())
    return sum(part.kept for part in parts.values()) / whole if whole else 1.0


def save_adapter(
    folder: Path,
    parts: Mapping[str, LowRank],
    *,
    base: str,
    task_type: str,
    dtype: str,
    head: Mapping[str, Tensor] | None = None,
    head_modules: Sequence[str] = (),
) -> None:
    """Write a PEFT adapter.

    Args:
        folder: that exists.
        parts: by layer; at least one.
        base: name or path of the model that it sits on.
        task_type: of PEFT.
        dtype: of the stored tensors.
        head: parameters of a classifier's head, which the adapter brings whole.
        head_modules: the modules that they are of.

    Raises:
        InputError: a number is infinite in that type.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    rank = max(part.rank for part in parts.values())
    smaller = {name: part.rank for name, part in parts.items() if part.rank < rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,  # which PEFT divides by the rank
        rank_pattern=smaller,
        alpha_pattern=dict(smaller),
        target_modules=sorted(parts),
        fan_in_fan_out=all(part.turned for part in parts.values()),
        modules_to_save=list(head_modules) or None,
        task_type=task_type,
        base_model_name_or_path=base,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    tensors = {
        f"{ADAPTER_PREFIX}{name}.lora_{which}.weight": t
        for name, p in parts.items()
        for which, t in (("A", p.a), ("B", p.b))
    }
    tensors |= {f"{ADAPTER_PREFIX}{name}": tensor.detach().cpu().contiguous() for name, tensor in (head or {}).items()}
    save_file(rounded(tensors, dtype), folder / "adapter_model.safetensors", metadata={"format": "pt"})
