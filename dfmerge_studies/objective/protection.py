"""Directions of a protected task, along which a merged step is damped (after AlignMerge, 2025, arXiv 2512.16245).

    F        Fisher of the protected task at the base, G (x) A for each linear layer, see `importance.factors`
    E[k]     its K leading eigenvectors, as matrices u v^T: u of G, v of A                 (m, n), orthonormal
    D        merged step theta* - theta_pre of the layer                                   (m, n)

    D  <-  D - strength sum_k <D, E[k]> E[k]

The E[k] are orthogonal in the metric of F, too: of D^T F D exactly their shares are damped, by (1 - strength)^2, and
those of all other directions stay.  The leading eigenvalues of a Kronecker product are products of its factors'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dfmerge_studies.blocks import Block
from dfmerge_studies.errors import InputError
from dfmerge_studies.importance.factors import block_names, blocks_of
from dfmerge_studies.importance.task_fisher import task_fisher
from dfmerge_studies.methods import Estimator
from dfmerge_studies.objective.problem import Problem
from dfmerge_studies.progress import Progress, counted, silent
from dfmerge_studies.tasks.answers import writer_of
from dfmerge_studies.tasks.sampling import draw_rows, seeded_generator, torch_generator

LEFT, RIGHT = " left", " right"


@dataclass(frozen=True)
class Directions:
    """E of one matrix.

    Attributes:
        left: u, (m, K).
        right: v, (n, K).
    """

    left: Tensor
    right: Tensor

    def shares(self, step: Tensor) -> Tensor:
        """<D, E[k]>, (K,)."""
        return (self.left * (step.to(self.left.dtype) @ self.right)).sum(0)

    def damped(self, step: Tensor, strength: float) -> Tensor:
        """The step, less so much of its part along the directions.

        Args:
            step: D.
            strength: 0 leaves the step as it is; 1 leaves nothing of that part.
        """
        return step - ((strength * self.shares(step) * self.left) @ self.right.T).to(step.dtype)


def leading(block: Block, rank: int) -> Directions:
    """The leading eigenvectors of one block.

    Args:
        block: with both factors.
        rank: K, or as many as there are.
    """
    assert block.left is not None
    assert block.right is not None
    sizes, bases = zip(*(torch.linalg.eigh(each.double()) for each in (block.left, block.right)), strict=True)
    products = sizes[0].clamp(min=0)[:, None] * sizes[1].clamp(min=0)[None]
    chosen = products.flatten().topk(min(rank, products.numel())).indices
    rows, columns = chosen // len(sizes[1]), chosen % len(sizes[1])
    return Directions(*(basis[:, index].float() for basis, index in zip(bases, (rows, columns), strict=True)))


def directions_(problem: Problem, progress: Progress = silent) -> dict[str, Directions]:
    """The protected directions of every linear layer that an expert changed; leaves the base in the resident model.

    Args:
        problem: the loaded spec, whose `protect` names the task.
        progress: told how far it is.

    Raises:
        InputError: no linear layer was changed, or the Fisher of the task cannot be computed.
        RunError: a loss is not finite.
    """
    spec, resident, protect = problem.spec, problem.resident, problem.spec.protect
    assert protect is not None
    names = list(block_names(resident.model, resident.names))
    if not names:
        raise InputError("no expert changed a linear layer", where=spec.where("protect"), hint="Leave it out")
    inputs = problem.tasks[protect.task]
    rows = draw_rows(
        len(inputs.validation), spec.importance.samples, seeded_generator(spec.search.seed, "fisher", protect.task)
    )
    examples = inputs.fisher or [inputs.validation[row] for row in rows]  # a guard has no Fisher inputs of its own
    writer, estimator = writer_of(spec.tasks[protect.task], resident.tokenizer), Estimator(spec.importance.estimator)
    if any(each.text is not None for each in examples):
        estimator = Estimator.EMPIRICAL
    elif writer is not None:
        estimator = estimator.of_texts
    if estimator is Estimator.MASK_NODES:
        estimator = Estimator.SAMPLED
    resident.load_base_()
    resident.use_head_(protect.task)
    values = task_fisher(
        resident.model,
        problem.kinds[protect.task],
        examples,
        pad_id=problem.pad_id,
        names=names,
        estimator=estimator,
        writer=writer,
        generator=torch_generator(spec.search.seed, "sampled", protect.task),
        row_budget=problem.row_budget,
        blocks="kfac",
        progress=counted(progress, f"{protect.task}: directions", len(examples)),
        ranks=problem.ranks,
    ).values

    def found() -> dict[str, Tensor]:
        blocks = blocks_of(resident.model, values, names)
        each = {name: leading(block, protect.rank) for name, block in blocks.items() if isinstance(block, Block)}
        sides = ((LEFT, "left"), (RIGHT, "right"))
        return {name + suffix: getattr(own, side) for name, own in each.items() for suffix, side in sides}

    shared = problem.ranks.from_leader(found)  # the sums are right on the leader alone
    assert shared is not None
    return {name: Directions(shared[name + LEFT], shared[name + RIGHT]) for name in names}


@torch.no_grad()
def damp_(
    parameters: Mapping[str, nn.Parameter],
    base: Mapping[str, Tensor],
    directions: Mapping[str, Directions],
    strength: float,
) -> None:
    """Damp a merge that is in a model.

    Args:
        parameters: the model's parameters by name, theta*.
        base: theta_pre.
        directions: by name of the parameter.
        strength: see `Directions.damped`.
    """
    if strength == 0.0:
        return
    for name, own in directions.items():
        step = parameters[name].to(torch.promote_types(base[name].dtype, torch.float32)) - base[name]
        parameters[name].copy_(own.damped(step, strength) + base[name])
