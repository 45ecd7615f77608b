"""Breadcrumbs, DELLA and LoRE against few-line formulas in float64, and peft where it has a part of them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge, magnitude_based_pruning
from torch import Tensor

from dfmerge_studies import StudySpec, load_problem, merge
from dfmerge_studies.params import TaskVector
from dfmerge_studies.transforms import Moved
from dfmerge_studies.transforms.low_rank import alternate, shrunk
from tests.test_transforms import SHAPES, M, close, experts, flat, merged, prepared_by, streams

assert experts  # the fixture, by its name


def breadcrumbs(tensor: Tensor, density: float, gamma: float) -> Tensor:
    """Sorted by magnitude, what lies below the largest share gamma, as many as density says."""
    order = tensor.abs().flatten().argsort()
    count = len(order)
    kept = max(1, int(density * count))
    first = max(0, count - kept - int(gamma * count))
    mask = torch.zeros(count)
    mask[order[first : first + kept]] = 1
    return tensor * mask.reshape(tensor.shape)


@pytest.mark.parametrize(("density", "gamma"), [(0.15, 0.007), (0.4, 0.2), (0.9, 0.3), (1.0, 0.0)])
def test_breadcrumbs_masks_the_largest_and_the_smallest_of_each_tensor(experts, density: float, gamma: float):
    base, vectors = experts
    if base["b"].dtype == torch.bfloat16:
        pytest.skip("in 16 bits several entries share a magnitude; all of them are kept")
    steps = [{n: breadcrumbs(d.double(), density, gamma) for n, d in v.deltas.items()} for v in vectors]
    expected = flat(base).double() + sum(0.3 * flat(step) for step in steps)
    close(merged("breadcrumbs", base, vectors, [0.3] * M, density=density, gamma=gamma), expected)


def test_breadcrumbs_without_outliers_is_peft_s_pruning_of_each_tensor(experts):
    base, vectors = experts
    if base["b"].dtype == torch.bfloat16:
        pytest.skip("peft keeps some of equal magnitudes by chance")
    theirs = [{n: magnitude_based_pruning(d, 0.5) for n, d in v.deltas.items()} for v in vectors]
    expected = flat(base) + sum(0.7 * flat(each) for each in theirs)
    close(merged("breadcrumbs", base, vectors, [0.7] * M, density=0.5, gamma=0.0), expected)


def chances(tensor: Tensor, drop_rate: float, window: float) -> Tensor:
    """Row by row: the smallest entry is dropped with p + w/2, the largest with p - w/2, the others evenly between."""
    rows = tensor.flatten(1) if tensor.dim() > 1 else tensor[None]
    found = torch.zeros(rows.shape, dtype=torch.float64)
    for row, values in enumerate(rows):
        for place, entry in enumerate(values.abs().argsort(stable=True)):
            found[row, entry] = 1 - drop_rate - window / 2 + window * place / (len(values) - 1)
    return found.reshape(tensor.shape)


@pytest.mark.parametrize(("drop_rate", "window"), [(0.3, 0.14), (0.5, 0.6), (0.7, 0.0)])
def test_della_drops_by_rank_rescales_elects_and_shares_the_mean(experts, drop_rate: float, window: float):
    base, vectors = experts
    pruned: list[Tensor] = []
    for vector in vectors:
        parts = {}
        for name, delta in vector.deltas.items():
            keep = chances(delta, drop_rate, window)
            drawn = torch.rand(delta.shape, generator=streams("della", vector.expert, name)) < keep
            parts[name] = delta.double() * drawn / keep
        pruned.append(flat(parts))
    stacked = torch.stack(pruned)
    step = disjoint_merge(stacked, calculate_majority_sign_mask(stacked))  # peft's elect and fuse
    ours = merged("della", base, vectors, [1.1] * M, drop_rate=drop_rate, window_size=window)
    close(ours, flat(base).double() + 1.1 * step)


def test_della_drops_the_small_more_often_and_keeps_the_mean_of_every_rank():
    delta = torch.arange(1.0, 6.0).repeat(40_000, 1)
    given = prepared_by("della", [TaskVector("one", {"x": delta})])
    found = given({"drop_rate": 0.5, "window_size": 0.4})[0].deltas["x"]
    kept = (found != 0).double().mean(0)
    torch.testing.assert_close(kept, torch.tensor([0.3, 0.4, 0.5, 0.6, 0.7]).double(), atol=0.01, rtol=0)
    torch.testing.assert_close(found.mean(0), delta[0], rtol=0.05, atol=0)


@pytest.mark.parametrize("drop_rate", [0.0, 0.02, 0.98])
def test_a_window_that_would_leave_what_can_be_drawn_is_narrowed(drop_rate: float):
    vectors = [TaskVector("one", {"x": torch.randn(30, 20), "y": torch.ones(1)})]
    found = prepared_by("della", vectors)({"drop_rate": drop_rate, "window_size": 0.5})[0].deltas
    assert all(bool(torch.isfinite(each).all()) for each in found.values())
    if drop_rate == 0.0:
        torch.testing.assert_close(found["x"], vectors[0].deltas["x"])


def svt(matrix: Tensor, mu: float) -> Tensor:
    """By singular vectors on both sides."""
    wide = matrix.flatten(1) if matrix.dim() > 1 else matrix[:, None]
    u, s, v = torch.linalg.svd(wide, full_matrices=False)
    return (u @ torch.diag((s - mu).clamp(min=0)) @ v).reshape(matrix.shape)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6,), (4, 3, 2), (1, 3)])
@pytest.mark.parametrize("mu", [0.0, 0.5, 2.0, 50.0])
def test_singular_values_are_lowered_by_the_threshold(shape: tuple[int, ...], mu: float):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(shrunk(matrix, mu), svt(matrix, mu), rtol=1e-7, atol=1e-7)  # eigenvalues are squares


def test_lore_alternates_between_the_base_and_low_rank_task_vectors():
    generator = torch.Generator().manual_seed(2)
    theta = torch.randn(M, 6, 4, generator=generator, dtype=torch.float64)
    delta = torch.zeros_like(theta)
    for _ in range(20):
        start = (theta - delta).mean(0)
        delta = torch.stack([svt(each - start, 0.4) for each in theta])
    found = alternate(theta, 0.4)
    torch.testing.assert_close(found[0], start, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1], delta, rtol=1e-6, atol=1e-6)


def objective(theta: Tensor, start: Tensor, delta: Tensor, mu: float) -> float:
    fit = 0.5 * ((start + delta - theta) ** 2).sum()
    return float(fit + mu * sum(torch.linalg.svdvals(each).sum() for each in delta))


def test_no_small_change_of_lore_s_estimates_makes_its_objective_smaller():
    generator = torch.Generator().manual_seed(3)
    theta = torch.randn(M, 6, 4, generator=generator, dtype=torch.float64)
    start, delta = alternate(theta, 1.0)
    least = objective(theta, start, delta, 1.0)
    assert least < objective(theta, theta.mean(0), torch.zeros_like(theta), 1.0)
    for _ in range(20):
        for scale in (0.3, 0.03):
            moved = [scale * torch.randn(each.shape, generator=generator, dtype=each.dtype) for each in (start, delta)]
            assert objective(theta, start + moved[0], delta + moved[1], 1.0) > least


def lore(base: dict[str, Tensor], vectors: Sequence[TaskVector]) -> Tensor:
    return merged("lore", base, vectors, [0.7] * M, mu=0.3)


def test_a_lore_merge_starts_at_its_own_base_and_does_not_need_the_weights_of_another(experts):
    base, vectors = experts
    thetas = [{name: base[name].double() + v.deltas[name].double() for name in SHAPES} for v in vectors]
    expected = {}
    for name in SHAPES:
        start, delta = alternate(torch.stack([theta[name] for theta in thetas]), 0.3)
        expected[name] = start + 0.7 * delta.sum(0)
    close(lore(base, vectors), flat(expected))
    if base["b"].dtype == torch.bfloat16:
        return  # a difference of 16-bit weights is not that of the weights
    first = thetas[0]  # an expert in the place of the base
    others = [
        TaskVector(v.expert, {n: theta[n] - first[n] for n in SHAPES}) for v, theta in zip(vectors, thetas, strict=True)
    ]
    others[0] = TaskVector(vectors[0].expert, {})  # which has not changed at all
    close(lore(first, others), flat(expected))


def test_lore_keeps_its_estimates_for_the_next_trial():
    vectors = [TaskVector(e, {"x": torch.randn(3, 3)}) for e in ("one", "two")]
    prepared = prepared_by("lore", vectors)
    first = prepared({"mu": 0.1})
    assert isinstance(first, Moved)
    assert prepared({"mu": 0.1}) is first


def test_lore_merges_without_the_base_s_weights_where_an_expert_is_named_as_base(project):
    def weights(base: str) -> Tensor:
        problem = load_problem(StudySpec.from_yaml(project.write(base=base)))
        merge(problem, {"red": 0.7, "blue": 0.7}, method="lore")
        return torch.cat([value.detach().flatten() for value in problem.resident.model.parameters()])

    torch.testing.assert_close(weights("red"), weights("base"), rtol=1e-4, atol=1e-4)
