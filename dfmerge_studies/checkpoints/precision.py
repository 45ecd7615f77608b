"""The precision that a model is written in: that of the base's files, or another; what it cannot hold is refused.

Types have the names that `--dtype`, specs and configurations give them: `bfloat16`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from dfmerge_studies.boundary import reading
from dfmerge_studies.checkpoints.files import weights_files
from dfmerge_studies.checkpoints.header import read_header
from dfmerge_studies.checkpoints.reference import Checkpoint
from dfmerge_studies.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


class Precision(StrEnum):
    """What `--dtype` can say."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"
    BASE = "base"


def written_dtype(precision: Precision, base: Checkpoint) -> str:
    """The type that weights are written in.

    Args:
        precision: as it was asked for.
        base: whose files decide where nothing else was asked for.

    Raises:
        InputError: the base's files cannot be read.
    """
    return stored_dtype(base) if precision is Precision.BASE else precision.value


def stored_dtype(checkpoint: Checkpoint) -> str:
    """The floating-point type that most numbers of a checkpoint's files have; float32 where none is one that we write.

    Args:
        checkpoint: a model or an adapter.

    Raises:
        InputError: a file is damaged, or holds more than weights.
    """
    import torch

    numbers: Counter[str | None] = Counter()
    for file in weights_files(checkpoint):
        with reading(str(file), "cannot be read", "Copy the file again"), file.open("rb") as stream:
            if file.suffix == ".safetensors":
                for entry in read_header(file, stream)[0].values():
                    numbers[_NAMES.get(entry.dtype)] += math.prod(entry.shape)
            else:
                for tensor in torch.load(stream, map_location="meta", weights_only=True).values():
                    numbers[_name(tensor.dtype)] += tensor.numel()
    written = set(_NAMES.values())
    return next((name for name, _ in numbers.most_common() if name is not None and name in written), "float32")


def rounded(tensors: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Tensors in another type; those of whole numbers stay as they are.

    Args:
        tensors: by name.
        dtype: a floating-point type.

    Raises:
        InputError: a finite number is infinite in that type; names the tensor.
    """
    return {name: _rounded(name, tensor, dtype) for name, tensor in tensors.items()}


def _rounded(name: str, tensor: Tensor, dtype: str) -> Tensor:
    import torch

    wanted: torch.dtype = getattr(torch, dtype)
    if not tensor.is_floating_point() or tensor.dtype == wanted:
        return tensor
    found = tensor.to(wanted)
    if not found.isfinite().all() and tensor.isfinite().all():
        raise InputError(
            f"{name} holds {tensor.abs().max():g}, and the largest number of {dtype} is {torch.finfo(wanted).max:g}",
            where="--dtype",
            hint="Use bfloat16, which has the range of float32, or float32",
        )
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def in_precision(model: PreTrainedModel, dtype: str) -> Iterator[None]:
    """A model whose parameters are of another type for as long as the context lasts, and then what they were.

    Parameters that transformers itself always keeps in float32 beside 16-bit ones stay so (`wo` of T5 in float16).

    Args:
        model: in memory.
        dtype: of its parameters.

    Raises:
        InputError: a number is infinite in that type; names the parameter.
    """
    import torch

    plan: Mapping[str, torch.dtype] = getattr(model, "_get_dtype_plan", lambda dtype: {})(getattr(torch, dtype))
    named: dict[str, Any] = dict(model.named_parameters())
    originals = {name: parameter.data for name, parameter in named.items()}
    before = model.config.dtype
    try:
        for name, parameter in named.items():
            parts = set(name.split("."))
            kept = next((_name(own) for key, own in plan.items() if key in parts), dtype)
            parameter.data = _rounded(name, parameter.data, kept)
        yield
    finally:
        for name, parameter in named.items():
            parameter.data = originals[name]
        model.config.dtype = before
