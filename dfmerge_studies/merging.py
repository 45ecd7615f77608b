"""The one equation that merges (paper, eq. 7 and 8).

    theta* = theta_pre + M * (sum_i C[i])^-1 * sum_i C[i] * lam[i] * tau[i]          elementwise

    theta_pre   base parameters                {name: tensor}
    tau[i]      task vector of expert i        {name: tensor}, shapes of theta_pre; absent names are zero
    lam[i]      coefficient of expert i        number, or one per name
    C[i]        importance, F[i] + floor       {name: tensor}, shapes of theta_pre; None: uniform, C[i] = 1
                of a linear layer also a block, see `blocks`
    M           number of experts

Experts are folded in one after the other, so that only one importance is in memory at a time beside two sums.  Blocks
cannot be summed: those of all experts are kept until the merge is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from dfmerge_studies.blocks import Block, merged_step
from dfmerge_studies.errors import RunError
from dfmerge_studies.params import TaskVector, at_least_float32, stacked
from dfmerge_studies.points import Coefficient, coefficient_at

Weights = Mapping[str, Tensor] | Mapping[str, Tensor | Block]


class WeightedSum:
    """The two sums of the equation, fed expert by expert.

    An expert whose coefficient is 0 still counts in the denominator: its importance holds the others back.

    Args:
        names: parameters that are merged; all others stay the base's.
        floor: added to every entry of an importance, so that parameters that no input touches fall back to C = 1.
    """

    def __init__(self, names: Sequence[str], *, floor: float) -> None:
        self._names = names
        self._floor = floor
        self._numerator: dict[str, Tensor] = {}
        self._denominator: dict[str, Tensor] = {}
        self._blocks: dict[str, list[Block]] = {}
        self._plain: dict[str, Tensor] = {}  # sum of lam[i] tau[i] of names that have blocks
        self._experts = 0
        self._uniform: bool | None = None
        self._sums: list[tuple[str | None, str, Tensor]] = []  # expert (None: the merge), parameter, sum of its entries

    @property
    def is_uniform(self) -> bool:
        """Whether experts were folded in without an importance."""
        return bool(self._uniform)

    @torch.no_grad()
    def add(self, task_vector: TaskVector, coefficient: Coefficient, importance: Weights | None) -> None:
        """Fold in one expert.

        Args:
            task_vector: tau[i].
            coefficient: lam[i].
            importance: F[i] for every merged name, or None for uniform importance; all experts alike.

        Raises:
            ValueError: some experts have an importance and others none.
        """
        if self._uniform is None:
            self._uniform = importance is None
        elif self._uniform != (importance is None):
            raise ValueError("either all experts have an importance or none")
        self._experts += 1
        for name in self._names:
            delta, lam = task_vector.deltas.get(name), coefficient_at(coefficient, name)
            if importance is None:
                if delta is not None:
                    self._accumulate(self._numerator, name, delta.to(at_least_float32(delta)) * lam)
                continue
            fisher = importance[name]
            if isinstance(fisher, Block):
                self._add_block(task_vector.expert, name, fisher, delta, lam)
                continue
            weight = fisher.to(at_least_float32(fisher)) + self._floor
            self._sums.append((task_vector.expert, name, weight.sum()))
            if delta is not None:
                self._accumulate(self._numerator, name, (weight * delta).mul_(lam))
            self._accumulate(self._denominator, name, weight)

    def _add_block(self, expert: str, name: str, block: Block, delta: Tensor | None, lam: float) -> None:
        self._blocks.setdefault(name, []).append(block)
        self._sums += [(expert, name, each.sum()) for each in (block.left, block.right) if each is not None]
        if delta is not None:
            scaled = delta.to(at_least_float32(delta)) * lam
            self._accumulate(self._numerator, name, block(scaled))
            self._accumulate(self._plain, name, scaled)

    @torch.no_grad()
    def write_into_(self, parameters: Mapping[str, nn.Parameter], base: Mapping[str, Tensor]) -> None:
        """Write theta* into a model's parameters, and forget the sums.

        Args:
            parameters: the model's parameters by name.
            base: theta_pre.

        Raises:
            RunError: an importance or a merged weight is not finite; the parameters are overwritten all the same.
        """
        for name, merged in self.merged(base):
            parameters[name].copy_(merged)
        self._check_finite()

    @torch.no_grad()
    def merged_on_host(self, parameters: Mapping[str, nn.Parameter], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Theta* in the types of a model's parameters, in the host's memory; forgets the sums.

        Args:
            parameters: the model's parameters by name.
            base: theta_pre.

        Raises:
            RunError: an importance or a merged weight is not finite.
        """
        found = {name: merged.to("cpu", parameters[name].dtype) for name, merged in self.merged(base)}
        self._check_finite()
        return found

    def merged(self, base: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Theta* by name; a sum is forgotten as its name comes.

        Args:
            base: theta_pre.
        """
        for name in self._names:
            start = base[name]
            step, blocks = self._numerator.pop(name, None), self._blocks.pop(name, None)
            if step is None:
                yield name, start
                continue
            if blocks is not None:
                step = merged_step(blocks, step.mul_(self._experts), self._plain.pop(name))
            elif not self._uniform:
                step.mul_(self._experts).div_(self._denominator.pop(name))
            # C = 1: M * (sum_i 1)^-1 is 1.
            merged = step.add_(start)
            self._sums.append((None, name, merged.sum()))
            yield name, merged

    def _check_finite(self) -> None:
        """Look at all sums at once: asking for one by one would make the host wait for the device each time."""
        sums, self._sums = self._sums, []
        if not sums:
            return
        finite = torch.isfinite(stacked([total for _, _, total in sums]))
        if bool(finite.all()):
            return
        expert, name, _ = sums[finite.tolist().index(False)]
        if expert is None:
            raise RunError(f"the merged weights are not finite at {name}", hint="Choose smaller coefficients")
        raise RunError(
            f"the importance of expert {expert!r} is not finite at {name}",
            hint="Lower the coefficient, or compute in float32",
        )

    @staticmethod
    def _accumulate(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
        if name in sums:
            sums[name].add_(value)
        else:
            sums[name] = value


def merge_into_(
    model: nn.Module,
    base: Mapping[str, Tensor],
    task_vectors: Sequence[TaskVector],
    coefficients: Mapping[str, Coefficient],
    importance: Callable[[int], Weights | None],
    *,
    floor: float,
) -> dict[str, float]:
    """Write theta* into a model, expert by expert.

    Args:
        model: the model; `importance` may overwrite it meanwhile.
        base: theta_pre of the parameters that are merged.
        task_vectors: tau, one per expert.
        coefficients: lambda per expert.
        importance: from the position of an expert to its F, or None for C = 1.
        floor: see `WeightedSum`.

    Returns:
        Seconds by phase: fisher, merge.

    Raises:
        RunError: an importance or a merged weight is not finite.
    """
    total, seconds = WeightedSum(list(base), floor=floor), _Phases()
    _fold(total, task_vectors, coefficients, importance, seconds)
    with seconds("merge"):
        total.write_into_(dict(model.named_parameters()), base)
    return seconds.found


@torch.no_grad()
def merge_parts_into_(
    model: nn.Module,
    base: Mapping[str, Tensor],
    task_vectors: Sequence[TaskVector],
    coefficients: Mapping[str, Coefficient],
    importance: Callable[[int, Sequence[str]], Weights | None],
    parts: Sequence[Sequence[str]],
    *,
    floor: float,
) -> dict[str, float]:
    """The same, part by part of the parameters, so that sums and importances of one part are in memory at a time.

    Merged values wait on the host until all parts are done, since an importance needs experts in the model; without
    one they are written at once.

    Args:
        model: the model; `importance` may overwrite it meanwhile.
        base: theta_pre of the parameters that are merged.
        task_vectors: tau, one per expert.
        coefficients: lambda per expert.
        importance: from the position of an expert and the names of a part to its F, or None for C = 1.
        parts: the names of `base`, in parts.
        floor: see `WeightedSum`.

    Returns:
        Seconds by phase: fisher, merge.

    Raises:
        RunError: an importance or a merged weight is not finite.
    """
    parameters = dict(model.named_parameters())
    seconds, waiting = _Phases(), dict[str, Tensor]()
    for names in parts:
        total = WeightedSum(names, floor=floor)
        _fold(total, task_vectors, coefficients, partial(_of_part, importance, names), seconds)
        with seconds("merge"):
            if total.is_uniform:
                total.write_into_(parameters, base)
            else:
                waiting.update(total.merged_on_host(parameters, base))
    with seconds("merge"):
        for name in list(waiting):
            parameters[name].copy_(waiting.pop(name))
    return seconds.found


def _of_part(
    importance: Callable[[int, Sequence[str]], Weights | None], names: Sequence[str], index: int
) -> Weights | None:
    return importance(index, names)


class _Phases:
    """Seconds by phase of a merge.

    Attributes:
        found: fisher, merge.
    """

    def __init__(self) -> None:
        self.found = {"fisher": 0.0, "merge": 0.0}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count what is done within to a phase."""
        start = time.perf_counter()
        yield
        self.found[phase] += time.perf_counter() - start


def _fold(
    total: WeightedSum,
    task_vectors: Sequence[TaskVector],
    coefficients: Mapping[str, Coefficient],
    importance: Callable[[int], Weights | None],
    seconds: _Phases,
) -> None:
    """Fold in one expert after the other."""
    for index, vector in enumerate(task_vectors):
        with seconds("fisher"):
            values = importance(index)
        with seconds("merge"):
            total.add(vector, coefficients[vector.expert], values)
        del values  # before the next one is computed
