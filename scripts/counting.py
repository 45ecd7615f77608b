"""Tensors that say they are elsewhere and hold CPU values: what an accelerator would do, run and counted on a CPU.

    launches   operators that run a kernel; views and allocations run none
    waits      reads of a value by the host, and copies from or to it: the host stands still until the device is done
    bytes      read and written by kernels
    flops      of matrix products and of attention, two per multiplication and addition

A CPU build of torch knows no device but "cpu" and "meta", so the tensors say "meta"; the package asks only whether a
device is the CPU.  Numbers are real, so checks and branches that depend on values go where they go elsewhere.
Attention is counted as one fused kernel forward and two backward, as on CUDA.

There may be several such places, "meta:0" and "meta:1", as there are several cards.  An operator over tensors of two is
refused, as CUDA refuses it.

A narrow model stands for a wide one: `Widths` maps each of its widths to the real one when bytes and products are
counted.  Launches and waits do not depend on widths.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

ELSEWHERE = torch.device("meta")
_VIEWS = """
alias as_strided detach diagonal expand lift_fresh permute select slice split split_with_sizes squeeze t transpose
unbind unfold unsqueeze view _unsafe_view _reshape_alias
"""
_ALLOCATIONS = "empty empty_like empty_strided new_empty new_empty_strided set_"
_NO_KERNEL = frozenset((_VIEWS + _ALLOCATIONS).split())
_READS = frozenset(
    ["_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "_unique2"]
)  # by the host
_PRODUCTS = frozenset(["mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_"])


@dataclass(frozen=True)
class Widths:
    """Widths of a narrow model and those of the real one that they stand for; choose numbers that nothing else has."""

    real: Mapping[int, int] = field(default_factory=dict)

    def shape(self, shape: Sequence[int]) -> list[int]:
        """A shape as the real model has it."""
        return [self.real.get(size, size) for size in shape]

    def bytes(self, tensor: Tensor) -> int:
        """What a tensor takes in the real model; of an expanded one, what is stored."""
        stored = [1 if stride == 0 else size for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        return math.prod(self.shape(stored)) * tensor.element_size()


@dataclass
class Counts:
    """What ran elsewhere; `where` says which operators made the host wait."""

    launches: int = 0
    waits: int = 0
    bytes: int = 0
    flops: int = 0
    where: Counter[str] = field(default_factory=Counter)


class _Elsewhere(Tensor):
    """A tensor around one of the CPU, at a place."""

    plain: Tensor

    @staticmethod
    def __new__(cls, plain: Tensor, place: torch.device = ELSEWHERE) -> _Elsewhere:
        made: _Elsewhere = Tensor._make_wrapper_subclass(
            cls,
            plain.shape,
            strides=plain.stride(),
            storage_offset=plain.storage_offset(),
            dtype=plain.dtype,
            device=place,
        )
        made.plain = plain
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _Counting(Counts(), Widths()).__torch_dispatch__(operator, types, args, kwargs)  # outside of counting()

    def __repr__(self) -> str:
        return f"elsewhere({self.plain!r})"


def _plain(value: Any) -> Any:
    return value.plain if isinstance(value, _Elsewhere) else value


def _moved(place: torch.device, value: Any) -> Any:
    return _Elsewhere(value, place) if isinstance(value, Tensor) and not isinstance(value, _Elsewhere) else value


class _Counting(TorchDispatchMode):
    """Runs every operator on the CPU values and counts it where one of its tensors is elsewhere."""

    def __init__(self, counts: Counts, widths: Widths) -> None:
        super().__init__()
        self.counts, self.widths = counts, widths

    def wait(self, why: str) -> None:
        self.counts.waits += 1
        self.counts.where[why] += 1

    def launched(self, tensors: Sequence[Tensor], launches: int = 1, flops: int = 0) -> None:
        self.counts.launches += launches
        self.counts.bytes += sum(map(self.widths.bytes, tensors))
        self.counts.flops += flops

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, keywords = operator._schema.name.split("::")[1], dict(kwargs or {})
        tensors = [leaf for leaf in pytree.tree_leaves((args, keywords)) if isinstance(leaf, Tensor)]
        here = not any(isinstance(tensor, _Elsewhere) for tensor in tensors)
        target = keywords.get("device")
        if target is not None:
            keywords["device"] = torch.device("cpu")
        to_host = target is not None and torch.device(target).type == "cpu"
        plain_args, plain_keywords = pytree.tree_map(_plain, (args, keywords))
        out = operator(*plain_args, **plain_keywords)
        if here and (target is None or to_host):
            return out
        if name in ("_to_copy", "copy_") and self._crosses(name, args, here, to_host):
            self.wait(name)
            if to_host:
                return out.clone() if out is plain_args[0] else out
        self._check(name, tensors, here)
        if name in _READS:
            self.wait(name)
        made = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        if name not in _NO_KERNEL:
            read = tensors[1:] if name == "copy_" else tensors  # what it held is not read
            self.launched([_plain(tensor) for tensor in read] + made, flops=self._flops(name, tensors))
        place = (
            next(tensor.device for tensor in tensors if isinstance(tensor, _Elsewhere)) if target is None else target
        )
        return self._given(operator, name, args, keywords, torch.device(place), out)

    @staticmethod
    def _crosses(name: str, args: Any, here: bool, to_host: bool) -> bool:
        if name == "copy_":
            return isinstance(args[0], _Elsewhere) != isinstance(args[1], _Elsewhere)
        return here or to_host

    def _check(self, name: str, tensors: Sequence[Tensor], here: bool) -> None:
        """What CUDA refuses is refused: a tensor of the host, not a number, among those of the device."""
        if here or name in ("copy_", "_to_copy"):
            return
        strays = [tensor for tensor in tensors if not isinstance(tensor, _Elsewhere) and tensor.dim() > 0]
        if len({tensor.device for tensor in tensors if isinstance(tensor, _Elsewhere)}) > 1:
            raise RuntimeError(f"{name}: tensors on two devices")
        if strays and name not in ("index", "index_put", "index_put_", "_index_put_impl_"):
            raise RuntimeError(f"{name}: tensors on two devices")
        for _ in strays:
            self.wait(f"{name} by the host's indices")
        if name.startswith(("index", "_index")) and any(tensor.dtype == torch.bool for tensor in tensors[1:]):
            self.wait(f"{name} by a mask")

    def _flops(self, name: str, tensors: Sequence[Tensor]) -> int:
        if name not in _PRODUCTS:
            return 0
        left, right = (self.widths.shape(tensor.shape) for tensor in tensors[-2:])
        return 2 * math.prod(left) * right[-1]

    @staticmethod
    def _given(operator: Any, name: str, args: Any, keywords: Any, place: torch.device, out: Any) -> Any:
        """The result at its place; what is written in place is the tensor that was given."""
        if out is None:
            return None
        if name.endswith("_") and args and isinstance(args[0], Tensor):
            return args[0]
        result = pytree.tree_map(partial(_moved, place), out)
        if any(value.alias_info is not None for value in operator._schema.returns):
            return return_and_correct_aliasing(operator, args, keywords, result)
        return result


class _Attention(torch.autograd.Function):
    """softmax(q k^T scale + mask) v as fused kernels are: nothing between is written, backward computes it again."""

    @staticmethod
    def forward(
        ctx: Any, mode: _Counting, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        with _uncounted(mode):
            scores = q @ k.transpose(-1, -2) * scale
            p = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            out = p @ v
        rows, keys = q.shape[-2], k.shape[-2]
        ctx.flops = 4 * math.prod(mode.widths.shape(q.shape)[:-2]) * rows * keys * mode.widths.shape(q.shape)[-1]
        mode.launched([_plain(t) for t in (q, k, v, out)], flops=ctx.flops)
        ctx.mode, ctx.scale, ctx.masked = mode, scale, mask if mask is not None and mask.requires_grad else None
        ctx.save_for_backward(q, k, v, p)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (g,), (q, k, v, p), mode = gradients, ctx.saved_tensors, ctx.mode
        with _uncounted(mode):
            of_p = g @ v.transpose(-1, -2)
            of_scores = p * (of_p - (of_p * p).sum(dim=-1, keepdim=True))
            found = [of_scores @ k * ctx.scale, of_scores.transpose(-1, -2) @ q * ctx.scale, p.transpose(-1, -2) @ g]
            of_mask = of_scores.sum_to_size(ctx.masked.shape) if ctx.masked is not None else None
        mode.launched([_plain(t) for t in (q, k, v, g, *found)], launches=2, flops=5 * ctx.flops // 2)
        return (None, *found, of_mask, None)


@contextlib.contextmanager
def _uncounted(mode: _Counting) -> Iterator[None]:
    kept, mode.counts = mode.counts, Counts()
    try:
        yield
    finally:
        mode.counts = kept


def _attention(mode: _Counting, real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if not isinstance(q, _Elsewhere):
            return real(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        with _uncounted(mode):
            if enable_gqa and k.shape[1] != q.shape[1]:
                k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], dim=1) for each in (k, v))
            if is_causal:
                later = torch.ones(q.shape[-2], k.shape[-2], dtype=q.dtype, device=q.device).triu(1)
                attn_mask = later * torch.finfo(q.dtype).min
            elif attn_mask is not None and attn_mask.dtype == torch.bool:
                attn_mask = (~attn_mask).to(q.dtype) * torch.finfo(q.dtype).min
        out: Tensor = _Attention.apply(mode, q, k, v, attn_mask, scale or q.shape[-1] ** -0.5)
        return out

    return attend


def _no_gradients(on: bool = True) -> contextlib.AbstractContextManager[None]:
    return torch.no_grad() if on else contextlib.nullcontext()


@contextlib.contextmanager
def counting(widths: Widths | None = None) -> Iterator[Counts]:
    """Count what runs elsewhere inside the block; models get there with `move_`.

    Args:
        widths: of the model, if it stands for a wider one.
    """
    counts = Counts()
    mode = _Counting(counts, widths or Widths())
    tensor, autocast, enabled = torch.tensor, torch.autocast, torch.is_autocast_enabled

    def make(data: Any, *, device: Any = None, **keywords: Any) -> Tensor:
        made = tensor(data, **keywords)
        return made if device is None else made.to(device)

    def to_list(self: _Elsewhere) -> Any:
        mode.wait("tolist")
        return self.plain.tolist()

    def like(self: _Elsewhere, data: Any) -> Tensor:
        return tensor(data, dtype=self.dtype).to(self.device)

    def cast(device_type: str, *arguments: Any, **keywords: Any) -> Any:
        return contextlib.nullcontext() if device_type == "meta" else autocast(device_type, *arguments, **keywords)

    def casts(device_type: str | None = None) -> bool:
        return device_type != "meta" and (enabled(device_type) if device_type else enabled())

    lifted = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with (
            mock.patch.object(torch, "tensor", make),
            mock.patch.object(torch, "autocast", cast),
            mock.patch.object(torch, "is_autocast_enabled", casts),
            mock.patch.object(torch, "inference_mode", _no_gradients),  # whose tensors know no subclass
            mock.patch.object(F, "scaled_dot_product_attention", _attention(mode, F.scaled_dot_product_attention)),
            mock.patch.object(_Elsewhere, "tolist", to_list, create=True),
            mock.patch.object(_Elsewhere, "new_tensor", like, create=True),
            mode,
        ):
            yield counts
    finally:
        torch._C._set_only_lift_cpu_tensors(lifted)


def move_(model: nn.Module) -> nn.Module:
    """Put a model's parameters and buffers elsewhere; tied ones stay tied."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                made = moved.setdefault(
                    id(parameter), nn.Parameter(_Elsewhere(parameter.detach()), requires_grad=False)
                )
                module._parameters[name] = made
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _Elsewhere(buffer.detach())
    return model


def elsewhere(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Named tensors, moved."""
    return {name: _Elsewhere(value.detach()) for name, value in values.items()}


def here(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their values on the CPU, uncounted."""
    return {name: _plain(value).clone() for name, value in values.items()}
