"""The slope of the tasks' loss along every coefficient, at a merge whose importance is held fixed.

    L           weighted mean over tasks of the mean loss of the right answers of some validation rows
    g           dL/dtheta at the merge
    C_i         importance of expert i as the merge used it, the floor included; 1 where all parameters count alike

    theta*      =  theta_pre + M (sum_j C_j)^-1 sum_i C_i lambda_i Phi_i
    dL/dlambda_i  =  sum over the parameters of  g * M (sum_j C_j)^-1 C_i Phi_i

A group's coefficient has the sum over the group's parameters.  That the importance of df-merge changes with lambda is
left out: its derivative would need third derivatives of the loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dfmerge_studies.errors import RunError
from dfmerge_studies.merging import Weights
from dfmerge_studies.objective.groups import Groups
from dfmerge_studies.objective.problem import Problem
from dfmerge_studies.params import TaskVector, at_least_float32, evaluating, stacked, tracking
from dfmerge_studies.points import fine_name
from dfmerge_studies.progress import Progress, counted
from dfmerge_studies.tasks.evaluate import length_batches, pass_in_tokens, token_cost
from dfmerge_studies.tasks.supervised import answer_losses


@dataclass(frozen=True)
class Sample:
    """What a loss is taken of.

    Attributes:
        rows: positions of validation inputs, by task.
        weights: of the tasks, adding up to 1.
        optional: whether a merge whose slope cannot be had is scored all the same.
    """

    rows: Mapping[str, Sequence[int]]
    weights: Mapping[str, float]
    optional: bool = False


@dataclass(frozen=True)
class Slope:
    """The loss at a merge, and how it changes.

    Attributes:
        loss: L.
        slopes: dL/dlambda, by expert, or by `EXPERT.GROUP` where its groups have a coefficient each.
    """

    loss: float
    slopes: Mapping[str, float]


def loss_gradient(problem: Problem, sample: Sample, progress: Progress) -> tuple[float, dict[str, Tensor]]:
    """The loss of the resident model as it stands, and its gradient; several ranks share the rows.

    Args:
        problem: the loaded spec.
        sample: the rows and the tasks' weights.
        progress: told how far it is.

    Returns:
        L, and g by name of the parameter, in float32 at least; on other ranks than the leader of no use.

    Raises:
        RunError: a loss is not finite, or memory ran out.
    """
    resident, ranks = problem.resident, problem.ranks
    wanted = {name: p for name, p in resident.model.named_parameters() if name in set(resident.names)}
    sums = {name: torch.zeros_like(p, dtype=at_least_float32(p), requires_grad=False) for name, p in wanted.items()}

    def compute() -> float:
        with evaluating(resident.model), torch.enable_grad(), tracking(resident.model, resident.names):
            return sum(_add_task_(problem, task, sample, wanted, sums, progress) for task in sample.rows)

    loss = sum(ranks.agreed(compute))
    ranks.sum_on_leader_(sums[name] for name in sorted(sums))
    return loss, sums


def _add_task_(
    problem: Problem,
    task: str,
    sample: Sample,
    wanted: Mapping[str, nn.Parameter],
    sums: Mapping[str, Tensor],
    progress: Progress,
) -> float:
    """Add this rank's share of a task's gradient; its share of the loss."""
    kind, ranks, everything = problem.kinds[task], problem.ranks, problem.examples(task, "validation")
    examples = [everything[row] for row in sample.rows[task]]
    share = ranks.shares([token_cost(example, kind) for example in examples])[ranks.rank]
    mine, weight = [examples[i] for i in share], sample.weights[task] / len(examples)
    done, found = counted(progress, f"{task}: gradient", len(mine)), 0.0
    problem.resident.use_head_(task)
    padding = pass_in_tokens(problem.resident.model)
    for chunk in length_batches(mine, kind, problem.row_budget, padding=padding):
        ranks.check()
        losses = answer_losses(problem.resident.model, kind, [mine[i] for i in chunk], pad_id=problem.pad_id)
        loss = losses.sum() * weight
        if not bool(loss.isfinite()):
            raise RunError(f"the loss of {task} is not finite", hint="Lower the coefficients, or compute in float32")
        found += float(loss.detach())
        gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        for name, gradient in zip(wanted, gradients, strict=True):
            if gradient is not None:
                sums[name].add_(gradient)
        done(len(chunk))
    return found


@torch.no_grad()
def slopes_along(
    gradient: dict[str, Tensor],
    vectors: Sequence[TaskVector],
    importances: Sequence[Weights | None],
    groups: Groups,
    *,
    floor: float,
) -> dict[str, float]:
    """dL/dlambda of every coefficient, from the gradient in the weights.

    Args:
        gradient: g by name of the parameter; used up.
        vectors: Phi, one per expert.
        importances: of the experts, in their order, without the floor; all None for C = 1.
        groups: names of the parameters that share a coefficient; empty where an expert has one.
        floor: added to every entry of an importance.

    Returns:
        By expert, or by expert and group.
    """
    for name, g in gradient.items():
        found = [_diagonal(each, name) for each in importances if each is not None]
        if found:  # one tensor after the other: there is no second copy of all importances
            total = torch.zeros_like(g)
            for each in found:
                total.add_(each).add_(floor)
            g.mul_(len(found)).div_(total)
    places: list[str] = []
    sums: list[Tensor] = []
    zero = next(iter(gradient.values())).new_zeros((), dtype=torch.float64)
    for vector, importance in zip(vectors, importances, strict=True):
        for group, names in (groups or {"": tuple(gradient)}).items():
            place = fine_name(vector.expert, group) if groups else vector.expert
            parts = [_along(gradient[name], vector, importance, name, floor) for name in names if name in vector.deltas]
            places.append(place)
            sums.append(stacked(parts).sum() if parts else zero)
    values: list[float] = stacked(sums).tolist()  # one wait for the device
    return dict(zip(places, values, strict=True))


def _along(g: Tensor, vector: TaskVector, importance: Weights | None, name: str, floor: float) -> Tensor:
    step = vector.deltas[name].to(g.dtype)
    weighted = step if importance is None else step * (_diagonal(importance, name) + floor)
    return (g * weighted).sum(dtype=torch.float64)


def _diagonal(importance: Weights, name: str) -> Tensor:
    found = importance[name]
    assert isinstance(found, Tensor), "blocks have been refused"
    return found
