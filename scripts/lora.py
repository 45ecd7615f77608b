"""A LoRA adapter (Hu et al., arXiv 2106.09685) to train instead of the whole model, through peft: for `finetune.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dfmerge_studies.checkpoints.adapters import TASK_TYPES
from dfmerge_studies.checkpoints.load import quiet_transformers
from dfmerge_studies.checkpoints.write import new_directory, write_texts
from dfmerge_studies.errors import InputError, first_line
from dfmerge_studies.objective.problem import Checkpoints
from dfmerge_studies.report.origins import adapter_base

ALL_LINEAR = "all-linear"  # peft's word for every linear layer but the output


@dataclass(frozen=True)
class LoRA:
    """What of a model is trained: W + (alpha / rank) B A for some of its matrices W.

    Attributes:
        rank: of B A.
        alpha: the scale's numerator; None for twice the rank.
        targets: names of the linear layers, or `all-linear` alone.
    """

    rank: int
    alpha: int | None = None
    targets: Sequence[str] = (ALL_LINEAR,)


def add_adapter(model: Any, lora: LoRA, found: Checkpoints) -> Any:
    """Freeze the model and put fresh factors beside its matrices, in place.

    Args:
        model: the base.
        lora: rank, scale and layers.
        found: where the base is, for the adapter's configuration.

    Returns:
        peft's model around it. Its new parameters are those of the model that require gradients.

    Raises:
        InputError: it answers with a head of its own, or has no such layers.
    """
    from peft import LoraConfig, get_peft_model

    if found.has_heads:
        raise InputError(
            "this script trains LoRA experts of models that answer with text, not of classifiers",
            where="--lora",
            hint="Leave --lora out, or train the adapter and its head with peft (modules_to_save)",
        )
    targets = ALL_LINEAR if list(lora.targets) == [ALL_LINEAR] else list(lora.targets)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha or 2 * lora.rank,
        target_modules=targets,
        task_type=TASK_TYPES[found.model_class],
        base_model_name_or_path=adapter_base(found.base),
    )
    try:
        with quiet_transformers():
            return get_peft_model(model, config)
    except ValueError as error:
        layers = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        hint = f"Linear layers: {', '.join(sorted(layers))}, or {ALL_LINEAR}"
        raise InputError(first_line(error), where="--lora-targets", hint=hint) from error


def write_adapter(adapter: Any, tokenizer: Any, out: Path, record: str, *, mark: str, force: bool) -> None:
    """Write an adapter directory, as the spec's `experts` name it.

    Args:
        adapter: what `add_adapter` returned.
        tokenizer: the base's.
        out: directory to make.
        record: the text of the mark.
        mark: name of the file that such a directory is known by.
        force: replace a directory that has it.

    Raises:
        InputError: the directory exists and may not be replaced.
        RunError: it cannot be written; nothing is left behind.
    """
    with new_directory(out, force=force, mark=mark) as folder:
        adapter.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_texts(folder, {mark: record})


def trainable(model: nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that training changes: all of them, or an adapter's.

    Args:
        model: with or without an adapter.
    """
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
