"""What each type of layer leaves behind for its parameters' per-row gradients.

    a     input of the layer, rows first: (n, ..., in)
    g     gradient of the loss with respect to its output, rows first: (n, ..., out)
    n     rows of the pass that reached the layer (see `squares`), R rows at most in the forward pass

A layer is known by the function that it runs, not by its class's name: a subclass of `nn.Linear` with a `forward` of
its own is not a dense layer; what scales is known by trying it (`norms.py`).  Everything that is not known is run
again, row by row, with gradients: slow and exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from dfmerge_studies.errors import InputError
from dfmerge_studies.importance.norms import neutral_weight, unscaled
from dfmerge_studies.importance.squares import Outer, Part, Sparse, Whole


class Unseparable(InputError):
    """A batch does not show what each of its rows contributes to the gradient of a parameter."""


@dataclass(slots=True)
class Call:
    """One use of a module in a forward pass, with all that its parameters' gradients need.

    Attributes:
        module: the module.
        path: its name in the model, for messages.
        wanted: names of its own parameters that are asked for: {name in the module: name in the model}.
        batch: rows of the forward pass.
        args: its inputs, detached.
        kwargs: its keyword inputs, detached.
        inputs: the tensors among both.
        formula: of its gradients; None where the module has to be run again.
        outputs: its output tensors, detached; only kept where the module has to be run again.
        versions: version counters of the input tensors: a change in place would falsify them.
        arrived: gradients of the outputs in the current pass, by position.
    """

    module: nn.Module
    path: str
    wanted: Mapping[str, str]
    batch: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[Tensor] = field(init=False)
    formula: Formula | None = field(init=False)
    outputs: list[Tensor] = field(default_factory=list)
    versions: list[int] = field(init=False)
    arrived: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.inputs = tensors_of(self.args, self.kwargs)
        self.formula = _formula(self.module, self.inputs[0]) if len(self.inputs) == 1 else None
        self.versions = self._counters()

    def _counters(self) -> list[int]:
        return [tensor._version for tensor in self.inputs]

    def refuse(self, why: str) -> Unseparable:
        """The error that names this module.

        Args:
            why: what cannot be done, as a clause without a full stop.
        """
        return Unseparable(
            f"the Fisher information of {type(self.module).__name__} cannot be computed exactly in batches: {why}",
            where=f"module {self.path}",
            hint="Leave its parameters out of the merge, or use a model without such a module",
        )

    def check_unchanged(self) -> None:
        """Refuse inputs that the model has overwritten since."""
        if self._counters() != self.versions:
            raise self.refuse("the model overwrites the module's input in place")


def tensors_of(*trees: Any) -> list[Tensor]:
    """All tensors in nested containers, in order."""
    return [leaf for tree in trees for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def parts(call: Call, rows: Tensor, live: Tensor | None) -> dict[str, Part]:
    """Per-row gradients that the gradients arrived at this call give its parameters.

    Args:
        call: the call, with at least one gradient arrived.
        rows: (n,) numbers of the rows, on the CPU.
        live: (n,) positions of these rows in the batch, or `None` for all of them.

    Returns:
        {name of the parameter in the model: part}
    """
    call.check_unchanged()
    if call.formula is None:
        found: dict[str, Part] = dict(_run_again(call, rows, live))
    else:
        (g,), (a,) = call.arrived.values(), call.inputs
        a = a.to(g.device)  # in a spread model the layer before may be on another
        if a.shape[0] != call.batch:
            raise call.refuse(f"its input of shape {tuple(a.shape)} is not one row per input and choice")
        if live is not None:
            place = live.to(g.device)
            a, g = a.index_select(0, place), g.index_select(0, place)
        g = g.to(torch.promote_types(g.dtype, torch.float32))
        found = call.formula(call.module, a, g, rows)
    return {call.wanted[name]: part for name, part in found.items() if name in call.wanted}


def _middle(x: Tensor) -> Tensor:
    """(n, ..., d) as (n, T, d)."""
    return x.reshape(x.shape[0], -1, x.shape[-1]) if x.dim() != 2 else x[:, None]


def _linear(_: nn.Module, a: Tensor, g: Tensor, rows: Tensor) -> dict[str, Part]:
    return {"weight": Outer(rows, _middle(g), _middle(a)), "bias": Whole(rows, _middle(g).sum(1))}


def _conv1d(_: nn.Module, a: Tensor, g: Tensor, rows: Tensor) -> dict[str, Part]:
    return {"weight": Outer(rows, _middle(a), _middle(g)), "bias": Whole(rows, _middle(g).sum(1))}


def _embedding(module: nn.Module, ids: Tensor, g: Tensor, rows: Tensor) -> dict[str, Part]:
    flat, values = ids.reshape(ids.shape[0], -1), _middle(g)
    padding: Any = module.padding_idx
    if padding is not None:  # autograd gives this row of the matrix no gradient either
        values = values.masked_fill(flat.eq(padding)[..., None], 0.0)
    return {"weight": Sparse(rows, flat, values)}


def _layer_norm(module: nn.Module, a: Tensor, g: Tensor, rows: Tensor) -> dict[str, Part]:
    shape: Any = module.normalized_shape
    eps: Any = module.eps
    normal = F.layer_norm(a.to(g.dtype), shape, None, None, eps)
    return _scale_and_shift(normal, g, len(shape), rows)


def _rms_norm(module: nn.Module, a: Tensor, g: Tensor, rows: Tensor) -> dict[str, Part]:
    shape: Any = module.normalized_shape
    eps: Any = module.eps
    return _scale_and_shift(F.rms_norm(a.to(g.dtype), shape, None, eps), g, len(shape), rows)


def _scale(module: nn.Module, a: Tensor, g: Tensor, rows: Tensor) -> dict[str, Part]:
    return _scale_and_shift(unscaled(module, a).to(g.dtype), g, 1, rows)


def _scale_and_shift(normal: Tensor, g: Tensor, dims: int, rows: Tensor) -> dict[str, Part]:
    tokens = tuple(range(1, g.dim() - dims))
    scale = (g * normal).sum(tokens) if tokens else g * normal
    shift = g.sum(tokens) if tokens else g
    return {"weight": Whole(rows, scale), "bias": Whole(rows, shift)}


Formula = Callable[[nn.Module, Tensor, Tensor, Tensor], dict[str, Part]]


def _formula(module: nn.Module, a: Tensor) -> Formula | None:
    runs = type(module).forward
    if runs is nn.Linear.forward:
        return _linear
    if runs is nn.Embedding.forward:
        plain = module.max_norm is None and not module.scale_grad_by_freq
        return _embedding if plain else None
    if runs is nn.LayerNorm.forward:
        return _layer_norm
    if runs is nn.RMSNorm.forward:
        return _rms_norm
    # The transposed dense layer of GPT-2; looked up by name so that transformers need not be imported here.
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return _conv1d
    return _scale if neutral_weight(module, a.dim()) is not None else None


# --- modules without a formula ---------------------------------------------------------------------------------------


def _run_again(call: Call, rows: Tensor, live: Tensor | None) -> dict[str, Whole]:
    """Per-row gradients by running the module again, all rows at once where it only scales, else row by row."""
    places = torch.arange(call.batch) if live is None else live
    batched = _scaled_at_once(call, places)
    if batched is None:
        rows_of = [_row_gradients(call, int(place)) for place in places]
        batched = {name: torch.stack([row[name] for row in rows_of]) for name in call.wanted}
    return {name: Whole(rows, gradients) for name, gradients in batched.items()}


def _row_gradients(call: Call, place: int) -> dict[str, Tensor]:
    """Gradients of the module's own parameters from one row of the batch, by running it on that row alone."""
    args, kwargs = pytree.tree_map(lambda leaf: _row_of(call, leaf, place), (call.args, call.kwargs))
    own = {name: call.module._parameters[name].detach().requires_grad_() for name in call.wanted}  # type: ignore[union-attr]
    with torch.enable_grad():
        outputs = tensors_of(functional_call(call.module, own, args, kwargs))
        chosen = [outputs[k] for k in call.arrived]
        wanted = [g if call.batch == 1 else g[place : place + 1] for g in call.arrived.values()]
        for k, output in zip(call.arrived, chosen, strict=True):
            saved = call.outputs[k] if call.batch == 1 else call.outputs[k][place : place + 1]
            if output.shape != saved.shape or not _close(output, saved):
                raise call.refuse("a row of its output depends on other rows, or is not at the same place")
        found = torch.autograd.grad(chosen, list(own.values()), wanted, allow_unused=True)
    return {
        name: torch.zeros_like(own[name]) if gradient is None else gradient
        for name, gradient in zip(own, found, strict=True)
    }


def _row_of(call: Call, leaf: Any, place: int) -> Any:
    """One row of a module's input: tensors with a row per batch row are cut, those shared by all rows are not."""
    if not isinstance(leaf, Tensor) or call.batch == 1 or leaf.dim() == 0 or leaf.shape[0] == 1:
        return leaf
    if leaf.shape[0] != call.batch:
        raise call.refuse(f"an input of shape {tuple(leaf.shape)} has not one row per input and choice")
    return leaf[place : place + 1]


def _scaled_at_once(call: Call, places: Tensor) -> dict[str, Tensor] | None:
    """Per-row gradients of a norm of an unknown class: each row gets its own copy of the scale, all rows run at once.

    Returns:
        {parameter: (n, d)}, or `None` when the module is not such a norm; the first row, done alone, must agree.
    """
    own = {name: call.module._parameters[name] for name in call.wanted}
    inputs, outputs = call.inputs, call.outputs
    if len(inputs) != 1 or len(outputs) != 1 or inputs[0].dim() < 2 or inputs[0].shape[0] != call.batch:
        return None
    if call.batch == 1 or not type(call.module).__name__.endswith("Norm"):
        return None
    if any(p is None or p.shape != inputs[0].shape[-1:] for p in own.values()):
        return None
    lead = [call.batch] + [1] * (inputs[0].dim() - 2)
    copies = {name: p.detach().expand(*lead, -1).clone().requires_grad_() for name, p in own.items() if p is not None}
    (g,) = call.arrived.values()
    with torch.enable_grad():
        try:
            output = functional_call(call.module, copies, call.args, call.kwargs)
        except RuntimeError:  # a norm over another dimension, which happens to be as long as the last
            return None
        if not isinstance(output, Tensor) or output.shape != outputs[0].shape or not _close(output, outputs[0]):
            return None
        found = torch.autograd.grad(output, list(copies.values()), g, allow_unused=True)
    gradients = {
        name: torch.zeros_like(copies[name]) if gradient is None else gradient
        for name, gradient in zip(copies, found, strict=True)
    }
    shaped = {
        name: gradient.reshape(call.batch, -1)[places.to(gradient.device)] for name, gradient in gradients.items()
    }
    alone = _row_gradients(call, int(places[0])) if len(places) else {}
    if not all(_close(shaped[name][0], alone[name]) for name in alone):
        return None
    return shaped


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of their precision, in size against the larger of the two."""
    tolerance = math.sqrt(torch.finfo(a.dtype).eps) if a.is_floating_point() else 0.0
    a, b = a.detach().double(), b.detach().double()
    return bool((a - b).norm() <= tolerance * torch.maximum(a.norm(), b.norm()) + 1e-30)
