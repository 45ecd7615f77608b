"""Norms and other layers that scale: known by what they compute, whatever class they are.

    y = (c + w) * n(x) + b        x (..., d), w and b (d,), c 0 or 1, elementwise

So are the RMS norms of T5, Llama and Qwen (c = 0), of Gemma (c = 1), layer norms with classes of their own, and layers
that only scale.  Whether a module is one is tried once, on numbers, with parameters made for that.  Then n(x) is what
the module itself gives at w = 1 - c, b = 0, its rounding and its epsilon included.  The gradient of w is the sum over
tokens of g n(x), that of b the sum of g.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_TOLERANCE = 1e-5  # of float32, against the largest entry
_found: WeakKeyDictionary[nn.Module, dict[int, float | None]] = WeakKeyDictionary()


def neutral_weight(module: nn.Module, dims: int) -> float | None:
    """The weight at which a module that scales gives n(x) itself: 1 - c.

    Args:
        module: any module.
        dims: dimensions of its input.

    Returns:
        1 or 0; None where the module is of another kind.
    """
    known = _found.setdefault(module, {})
    if dims not in known:
        known[dims] = _tried(module, dims) if _may_scale(module, dims) else None
    return known[dims]


@torch.no_grad()
def unscaled(module: nn.Module, x: Tensor) -> Tensor:
    """n(x).

    Args:
        module: one that has a neutral weight.
        x: its input.
    """
    weight = neutral_weight(module, x.dim())
    assert weight is not None
    own = {
        n: torch.full_like(p, weight if n == "weight" else 0.0) for n, p in module._parameters.items() if p is not None
    }
    return _run(module, own, x)


def _may_scale(module: nn.Module, dims: int) -> bool:
    """Whether its parts are those of a layer that scales: a weight, perhaps a bias, no other tensor."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    if dims < 2 or "weight" not in own or own.keys() - {"weight", "bias"} or own["weight"].dim() != 1:
        return False
    if any(p.shape != own["weight"].shape for p in own.values()) or module._modules or module._buffers:
        return False
    others = {n: v for n, v in vars(module).items() if n != "_parameters"}
    if ("forward" in others and not _only_moved(module)) or any(isinstance(value, Tensor) for value in others.values()):
        return False
    try:
        return len(inspect.signature(type(module).forward).parameters) == 2
    except (TypeError, ValueError):
        return False


def _only_moved(module: nn.Module) -> bool:
    """Whether a module's own `forward` is accelerate's, which moves inputs and runs that of its class."""
    inner = getattr(vars(module).get("_old_forward"), "__func__", None)
    return hasattr(module, "_hf_hook") and inner is type(module).forward


@torch.no_grad()
def _tried(module: nn.Module, dims: int) -> float | None:
    draws = torch.Generator().manual_seed(0)
    size = len(module._parameters["weight"])  # type: ignore[arg-type]

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws)

    names = [name for name, p in module._parameters.items() if p is not None]
    neutral = {at: {n: torch.full((size,), at if n == "weight" else 0.0) for n in names} for at in (1.0, 0.0)}
    left = list(neutral)
    try:
        for scale in (1.0, 1e-3):  # the second is where an epsilon counts
            x, own = scale * drawn(3, *range(2, dims), size), {name: 3.0 * drawn(size) for name in names}
            y = _run(module, own, x)
            if not _same(_run(module, own, x[1:2]), y[1:2]):
                return None
            bias = own.get("bias", torch.zeros(size))
            left = [at for at in left if _same((1.0 - at + own["weight"]) * _run(module, neutral[at], x) + bias, y)]
    except Exception:  # whatever a module of unknown kind does with numbers that it was not made for
        return None
    return left[0] if left else None


def _run(module: nn.Module, own: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The module's forward with other parameters, without its hooks."""
    other: nn.Module = object.__new__(type(module))
    other.__dict__.update(vars(module), _parameters=dict(own))
    result = type(module).forward(other, x)
    if not isinstance(result, Tensor) or result.shape != x.shape:
        raise TypeError("no layer that scales")
    return result


def _same(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= _TOLERANCE * torch.maximum(a.abs().max(), b.abs().max()))
