"""Factors of an importance in blocks: second moments of linear layers' inputs and output gradients, from the hooks.

    W        weight of a linear layer that is used in one module
    a        input of the layer at a position (token) of a row         (i,)
    g        gradient of the row's loss at its output there, times the square root of the row's weight   (o,)
    w        weight of the row: p(c|x) of a choice, else 1
    A        sum of w a a^T / sum of w       over rows and positions that their losses depend on          (i, i)
    G        sum of g g^T, mean over the inputs                                                           (o, o)

A (x) G is the Kronecker-factored Fisher information of W (Martens and Grosse, 2015, arXiv 1503.05671), A alone the Gram
matrix of RegMean (Jin et al., 2022, arXiv 2212.09849).  Of a row with one position it is the product of two means where
the Fisher has the mean of products.  All other parameters keep their diagonal.  A position that padding fills, or that
the loss does not depend on, has no gradient but for rounding, and does not count.

    W inputs    sum of w a a^T        W tokens   sum of w, (1,)        W outputs   sum of g g^T
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dfmerge_studies.blocks import Block
from dfmerge_studies.importance.capture import Capture, Stage, check_names, refuse_unused
from dfmerge_studies.importance.layers import Unseparable
from dfmerge_studies.importance.squares import Outer, Part
from dfmerge_studies.methods import Blocks
from dfmerge_studies.params import at_least_float32

LARGEST = 8192  # features: a layer with more on either side, such as an output vocabulary, keeps its diagonal
_ROUNDING = 1000  # times the precision, of the largest gradient of a row
INPUTS, OUTPUTS, TOKENS = " inputs", " outputs", " tokens"


def block_names(model: nn.Module, names: Collection[str]) -> dict[str, bool]:
    """Which of some parameters have a block: weights of linear layers, each used by one module.

    Args:
        model: the model.
        names: of parameters.

    Returns:
        {name: whether the inputs stand left of it, as transformers' Conv1D has them}.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, leaf))
    found = {}
    for name, parameter in model.named_parameters():
        (module, leaf), *others = owners[id(parameter)]
        left = type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"
        linear = left or type(module).forward is nn.Linear.forward
        if name in names and linear and leaf == "weight" and not others and max(parameter.shape) <= LARGEST:
            found[name] = left
    return found


def factor_entries(model: nn.Module, names: Collection[str], blocks: Blocks) -> int:
    """Numbers that the importance of one expert has in blocks.

    Args:
        model: the model.
        names: of the parameters that are merged.
        blocks: inputs alone, or both factors and the diagonal of other parameters.
    """
    left, total = block_names(model, names), 0
    for name, parameter in model.named_parameters():
        if name in left:
            inputs, outputs = parameter.shape if left[name] else reversed(parameter.shape)
            total += inputs**2 + (outputs**2 if blocks == "kfac" else 0) + 1
        elif name in names and blocks == "kfac":
            total += parameter.numel()
    return total


def reached_positions(g: Tensor) -> Tensor:
    """Which positions of each row have a gradient that is more than rounding: (n, T).

    Args:
        g: (n, T, o).
    """
    sizes = g.abs().amax(-1)
    return sizes > _ROUNDING * torch.finfo(g.dtype).eps * sizes.amax(1, keepdim=True)


class FactorCapture(Capture):
    """Sums of the factors of linear layers, and of squared gradients of other parameters, through the same hooks.

    Args:
        model: the model.
        names: names of the wanted parameters.
        gram: whether inputs alone are wanted, and nothing of other parameters.

    Raises:
        InputError: a name that the model does not have.
    """

    def __init__(self, model: nn.Module, names: Collection[str], *, gram: bool) -> None:
        check_names(model, names)
        self._left = block_names(model, names)
        super().__init__(model, list(self._left) if gram else names)
        self._gram = gram
        self._weights: Tensor | None = None
        parameters = dict(model.named_parameters())
        for name, left in self._left.items():
            del self.sums[name]
            weight = parameters[name]
            inputs, outputs = weight.shape if left else reversed(weight.shape)
            kind: dict[str, Any] = {"dtype": at_least_float32(weight), "device": weight.device}
            self.sums[name + INPUTS] = torch.zeros(inputs, inputs, **kind)
            self.sums[name + TOKENS] = torch.zeros(1, **kind)
            if not gram:
                self.sums[name + OUTPUTS] = torch.zeros(outputs, outputs, **kind)

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
        """The same pass; the squares of a direction in the space of losses are the weights of its rows."""
        self._weights = gradient.detach().square() if gradient.dim() == 1 else None
        try:
            return super().backward(stage, output, gradient, rows, inputs, keep=keep)
        finally:
            self._weights = None

    def finish(self) -> dict[str, Tensor]:
        """The sums; every wanted parameter has been seen.

        Raises:
            InputError: a parameter's module never ran.
        """
        plain = [name for name in self.sums if name in self._name_of.values()]
        refuse_unused({*plain, *self._left} - self.visited)
        for name in plain:
            self.sums[name].clamp_min_(0)
        return self.sums

    def _take(self, found: dict[str, Part]) -> None:
        others = {}
        for name, part in found.items():
            if name in self._left:
                if not isinstance(part, Outer):
                    raise Unseparable(f"{name} has no factors", hint="Use a method with a diagonal importance")
                self._add_(name, part)
            else:
                others[name] = part
        super()._take(others)

    def _add_(self, name: str, part: Outer) -> None:
        a, g = (part.left, part.right) if self._left[name] else (part.right, part.left)
        dtype = self.sums[name + TOKENS].dtype
        reached = reached_positions(g).to(dtype)  # (n, T)
        current = self._pass
        if self._weights is not None and current is not None:
            weights = self._weights.to(g.device)  # the losses may be on another than the layer
            live = weights if current.live is None else weights[current.live.to(g.device)]
            reached = reached * live.to(dtype)[:, None]
        with torch.autocast(g.device.type, enabled=False):
            flat = a.to(dtype).flatten(0, 1)
            self.sums[name + INPUTS].add_((flat * reached.flatten()[:, None]).T @ flat)
            self.sums[name + TOKENS].add_(reached.sum())
            if not self._gram:
                wide = g.to(dtype).flatten(0, 1)
                self.sums[name + OUTPUTS].add_(wide.T @ wide)


def blocks_of(
    model: nn.Module, values: Mapping[str, Tensor], names: Collection[str], *, shrink: float = 1.0
) -> dict[str, Tensor | Block]:
    """An expert's importance as a merge takes it: a block for each linear layer, the diagonal of others, or 1.

    Args:
        model: the model that the values are of.
        values: by parameter and factor, means over the inputs.
        names: of the parameters that are merged.
        shrink: factor of the off-diagonal entries of Gram matrices.
    """
    found: dict[str, Tensor | Block] = {}
    parameters, left = dict(model.named_parameters()), block_names(model, names)
    for name in names:
        if name not in left:
            like = parameters[name]
            ones = torch.ones((), dtype=at_least_float32(like), device=like.device).expand(like.shape)
            found[name] = values.get(name, ones)
            continue
        inputs = values[name + INPUTS] / values[name + TOKENS].clamp(min=torch.finfo(torch.float32).tiny)
        outputs = values.get(name + OUTPUTS)
        block = Block(inputs, outputs) if left[name] else Block(outputs, inputs)
        found[name] = block.shrunk(shrink) if outputs is None else block
    return found
