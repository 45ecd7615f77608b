"""Hooks on a model that collect the sum of squared per-row gradients while ordinary batched passes run.

    stage    one forward pass of a part of the model (encoder, decoder, all of it) on a batch of rows
    root     output of the first layers whose parameters are wanted, where the autograd graph is made to begin
    pass     one backward pass through a stage; its batch positions stand for rows of the chunk (-1: for none)
    chunk    the inputs whose graphs are alive together

Weights ask autograd for nothing: forward hooks keep each layer's input, tensor hooks get the gradient of its output,
and the layer's share is squared and added as soon as it is complete.  A parameter that is used once in a chunk is
complete when its gradient arrives; one that is used several times, when all passes of its stages are done.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from dfmerge_studies.errors import InputError
from dfmerge_studies.importance.layers import Call, Unseparable, parts, tensors_of
from dfmerge_studies.importance.squares import Part, Whole, add_squares_
from dfmerge_studies.params import at_least_float32, evaluating, tracking


@dataclass(slots=True)
class Stage:
    """One forward pass: its batch size, the roots of its graph, and how often it uses each parameter."""

    batch: int
    roots: list[Tensor] = field(default_factory=list)
    uses: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class _Pass:
    """One backward pass: which stage, the rows that its batch positions stand for, and which positions those are."""

    stage: Stage
    rows: Tensor
    live: Tensor | None
    later: list[Call] = field(default_factory=list)


def check_names(model: nn.Module, names: Collection[str]) -> None:
    """Refuse names of parameters that can have no Fisher information.

    Args:
        model: the model.
        names: names of the wanted parameters, as `named_parameters()` gives them.

    Raises:
        InputError: a name that the model does not have, or a parameter that is not of floating point.
    """
    parameters = dict(model.named_parameters())
    for name in names:
        if name not in parameters:
            raise InputError(f"the model has no parameter {name}", hint="Use the names of named_parameters()")
        if not parameters[name].is_floating_point():
            raise InputError("a parameter of integers has no gradient", where=f"parameter {name}")


def refuse_unused(names: Collection[str]) -> None:
    """Refuse parameters that a model has and that no input reaches.

    Args:
        names: of parameters that were wanted and never used.

    Raises:
        InputError: there are any.
    """
    if names:
        raise InputError(
            f"the model does not use {len(names)} of the parameters whose importance is wanted, "
            f"so they have no Fisher information: {', '.join(sorted(names)[:5])}",
            hint="Leave them out of the merge, or use the class of model that uses them",
        )


class Capture:
    """Sum of squared per-row gradients of a model's parameters; to be entered with `attached`.

    Args:
        model: the model.
        names: names of the wanted parameters, as `named_parameters()` gives them.

    Attributes:
        sums: by name, in the precision of the parameter, or float32 where that is narrower.
        visited: names that a stage has used.

    Raises:
        InputError: a name that the model does not have, or a parameter that is not of floating point.
    """

    def __init__(self, model: nn.Module, names: Collection[str]) -> None:
        self.model = model
        check_names(model, names)
        parameters = dict(model.named_parameters())
        wanted = set(names)
        self._name_of = {id(p): name for name, p in parameters.items() if name in wanted}
        self.sums = {
            name: torch.zeros(p.shape, dtype=at_least_float32(p), device=p.device)
            for name, p in parameters.items()
            if name in wanted
        }
        self.visited: set[str] = set()
        self._stage: Stage | None = None
        self._pass: _Pass | None = None
        self._uses: Counter[str] = Counter()
        self._pending: dict[str, list[Part]] = {}
        self._inside: list[nn.Module] = []
        self._bias_ids: Tensor | None = None
        self._watch = True

    def trust_(self) -> None:
        """Look for no use of a parameter outside its module: the same passes have been looked at before."""
        self._watch = False

    # --- attaching ---------------------------------------------------------------------------------------------------

    @contextmanager
    def attached(self) -> Iterator[Capture]:
        """Hooks on, weights without gradients, evaluation mode; afterwards all as before, also after an error."""
        handles: list[Any] = []
        try:
            for path, module in self.model.named_modules():
                own = {name: p for name, p in module._parameters.items() if p is not None}
                wanted = {name: self._name_of[id(p)] for name, p in own.items() if id(p) in self._name_of}
                if wanted:
                    handles.append(module.register_forward_pre_hook(self._entered, with_kwargs=True))
                    after = partial(self._ran, path or type(self.model).__name__, wanted)
                    handles.append(module.register_forward_hook(after, with_kwargs=True))
                bias = getattr(module, "relative_attention_bias", None)
                if isinstance(bias, nn.Embedding) and id(bias.weight) in self._name_of:
                    before = partial(self._expand_relative_bias, path, bias)
                    handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            with tracking(self.model, ()), evaluating(self.model):
                yield self
        finally:
            for handle in handles:
                handle.remove()
            self._stage = self._pass = None
            self._pending.clear()

    @contextmanager
    def stage(self, batch: int) -> Iterator[Stage]:
        """Forward passes of `batch` rows made inside are recorded; those made outside are not.

        Args:
            batch: rows of the forward passes; an input or an (input, choice) pair is a row.
        """
        stage = self._stage = Stage(batch)
        try:
            with torch.enable_grad():
                if self._watch:
                    with _OutsideUses(self.model, self._name_of, self._inside):
                        yield stage
                else:
                    yield stage
        finally:
            self._stage = None
            self._inside.clear()
        self._uses += stage.uses
        self.visited.update(stage.uses)

    # --- forward -----------------------------------------------------------------------------------------------------

    def _entered(self, module: nn.Module, _args: Any, _kwargs: Any) -> None:
        if self._stage is not None:
            self._inside.append(module)

    def _ran(
        self, path: str, wanted: dict[str, str], module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> Any:
        if self._stage is None:
            return None
        if self._inside and self._inside[-1] is module:
            self._inside.pop()
        if self._bias_ids is not None:  # inside `_expand_relative_bias`, which does the rest
            self._bias_ids = args[0].detach()
            return None
        call = Call(module, path, wanted, self._stage.batch, *pytree.tree_map(_detached, (args, kwargs)))
        if call.formula is not None and isinstance(module, nn.Embedding):
            output = self._one_row_each(call, output)
        outputs = tensors_of(output)
        if call.formula is None:
            call.outputs = [tensor.detach() for tensor in outputs]
        for name in wanted.values():
            self._stage.uses[name] += 1
        if len(outputs) == 1 and isinstance(output, Tensor) and not output.requires_grad:
            root = output.detach().requires_grad_()
            self._follow(call, 0, root)
            return root.clone()  # a model may overwrite what a layer gives it, but not a leaf
        for k, tensor in enumerate(outputs):
            if tensor.is_floating_point():
                self._follow(call, k, tensor)
        return output

    def _one_row_each(self, call: Call, output: Tensor) -> Tensor:
        """Position embeddings are looked up once for all rows; here every row gets its own copy."""
        (ids,) = call.inputs
        if ids.dim() == 1 and call.batch != 1 and ids.shape[0] != call.batch:
            raise call.refuse(f"its output of shape {tuple(output.shape)} is not one row per input and choice")
        if ids.shape[0] == 1 and call.batch > 1:
            call.inputs = [ids.expand(call.batch, *ids.shape[1:])]
            return output.expand(call.batch, *output.shape[1:])
        if ids.dim() == 1 and call.batch == 1:
            raise call.refuse("its output has no dimension for the rows")
        return output

    def _follow(self, call: Call, k: int, tensor: Tensor) -> None:
        assert self._stage is not None
        if not tensor.requires_grad:
            tensor.requires_grad_()
        if tensor.is_leaf:
            self._stage.roots.append(tensor)
        tensor.register_hook(partial(self._arrived, call, k))  # type: ignore[no-untyped-call]  # torch's own

    def _expand_relative_bias(
        self, path: str, bias: nn.Embedding, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """T5's relative position bias is one for all rows; here it is computed beforehand, a copy for every row."""
        stage = self._stage
        if stage is None or kwargs.get("position_bias") is not None:
            return None
        wanted = {"weight": self._name_of[id(bias.weight)]}
        compute: Any = getattr(module, "compute_bias", None)
        call = Call(bias, f"{path}.relative_attention_bias", wanted, stage.batch, (), {})
        takes = inspect.signature(compute).parameters if compute is not None else {}
        if "query_length" not in takes or "position_bias" not in inspect.signature(module.forward).parameters:
            raise call.refuse(f"{type(module).__name__} computes it in a way that is not known")
        states = args[0] if args else kwargs["hidden_states"]
        self._bias_ids = torch.empty(0)
        try:
            with torch.no_grad():
                values = compute(states.shape[1], states.shape[1], device=states.device)  # (1, heads, q, k)
            ids = self._bias_ids
        finally:
            self._bias_ids = None
        root = values.expand(stage.batch, -1, -1, -1).detach().clone().requires_grad_()
        stage.roots.append(root)
        stage.uses[wanted["weight"]] += 1
        root.register_hook(partial(self._bias_arrived, wanted["weight"], ids, bias.num_embeddings))
        return args, {**kwargs, "position_bias": root}

    # --- backward ----------------------------------------------------------------------------------------------------

    def backward(
        self,
        stage: Stage,
        output: Tensor,
        gradient: Tensor,
        rows: Sequence[int],
        inputs: Sequence[Tensor] = (),
        *,
        keep: bool = False,
    ) -> list[Tensor]:
        """One pass: squares of the gradients of `output` in the direction `gradient`, row by row.

        Args:
            stage: the stage that made `output`.
            output: its result.
            gradient: direction, shape of `output`; zero at positions that stand for no row.
            rows: number of the row in the chunk that each batch position stands for, -1 for none.
            inputs: further tensors whose gradients are wanted.
            keep: keep the graph for another pass.

        Returns:
            Gradients of `inputs`.
        """
        targets = [*inputs, *stage.roots]
        if not targets or not output.requires_grad:
            return [torch.zeros_like(tensor) for tensor in inputs]
        numbers = torch.tensor(rows)
        alive = numbers >= 0
        live = None if bool(alive.all()) else alive.nonzero().squeeze(1)
        current = self._pass = _Pass(stage, numbers[alive], live)
        try:
            found = torch.autograd.grad(output, targets, gradient, retain_graph=keep, allow_unused=True)
            for call in current.later:
                self._take(parts(call, current.rows, current.live))
                call.arrived.clear()
        finally:
            self._pass = None
        for name in [name for name in self._pending if stage.uses[name] == self._uses[name]]:
            add_squares_(self.sums[name], self._pending.pop(name))
        pairs = zip(inputs, found[: len(inputs)], strict=True)
        return [torch.zeros_like(tensor) if g is None else g for tensor, g in pairs]

    def end_chunk(self) -> None:
        """Square what had to wait for several stages, and forget the chunk."""
        for name, found in self._pending.items():
            add_squares_(self.sums[name], found)
        self._pending.clear()
        self._uses.clear()
        self._watch = False

    def finish(self) -> dict[str, Tensor]:
        """The sums; every wanted parameter has been seen, and none is below zero by rounding.

        Raises:
            InputError: a parameter's module never ran.
        """
        refuse_unused(set(self.sums) - self.visited)
        for total in self.sums.values():
            total.clamp_min_(0)
        return self.sums

    def _arrived(self, call: Call, k: int, g: Tensor) -> None:
        current = self._pass
        if current is None:
            return
        if call.formula is not None:
            call.arrived = {0: g}
            self._take(parts(call, current.rows, current.live))
            call.arrived = {}
        else:
            if not call.arrived:
                current.later.append(call)
            call.arrived[k] = g

    def _bias_arrived(self, name: str, ids: Tensor, buckets: int, g: Tensor) -> None:
        current = self._pass
        if current is None:
            return
        g = g if current.live is None else g.index_select(0, current.live.to(g.device))
        # A product is faster here than `index_add_`, and its order of sums does not vary between runs.
        within = ids.flatten() == torch.arange(buckets, device=ids.device)[:, None]  # (buckets, q k)
        gradients = g.flatten(2) @ within.to(g.dtype).T  # (n, heads, buckets)
        self._take({name: Whole(current.rows, gradients.transpose(1, 2))})

    def _take(self, found: dict[str, Part]) -> None:
        for name, part in found.items():
            if self._uses[name] == 1:
                add_squares_(self.sums[name], [part])
            else:
                self._pending.setdefault(name, []).append(part)


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


class _OutsideUses(TorchFunctionMode):
    """Refuses a forward pass in which a wanted parameter is used while none of its own modules runs.

    No hook would see such a use, and its share would silently be missing.  Reading a shape or a dtype is no use.
    """

    def __init__(self, model: nn.Module, name_of: dict[int, str], inside: list[nn.Module]) -> None:
        super().__init__()
        self.model = model
        self.name_of = name_of
        self.inside = inside

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in (*args, *(kwargs or {}).values()):
            if id(tensor) in self.name_of and tensors_of(result):
                if any(p is tensor for module in self.inside for p in module._parameters.values()):
                    continue
                raise Unseparable(
                    f"{type(self.model).__name__} uses the parameter outside the module that owns it "
                    f"(in {getattr(func, '__name__', func)}), where its gradient cannot be seen",
                    where=f"parameter {self.name_of[id(tensor)]}",
                    hint="Leave it out of the merge, or use a model without such a module",
                )
        return result
