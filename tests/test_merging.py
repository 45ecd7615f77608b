"""The one equation against few-line formulas of each method, in float64."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dfmerge_studies.errors import RunError
from dfmerge_studies.merging import WeightedSum
from dfmerge_studies.params import TaskVector

FLOOR = 1e-12
SHAPES = {"layer.weight": (4, 3), "layer.bias": (4,), "only_first": (2, 2)}
M = 3


@pytest.fixture
def experts():
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    base = {name: draw(shape) for name, shape in SHAPES.items()}
    deltas = [{name: draw(shape) for name, shape in SHAPES.items() if name != "only_first" or i == 0} for i in range(M)]
    fishers = [{name: draw(shape) ** 2 for name, shape in SHAPES.items()} for _ in range(M)]
    coefficients = [0.2, 0.9, 0.5]
    return base, [TaskVector(f"expert{i}", d) for i, d in enumerate(deltas)], fishers, coefficients


def merged(base, vectors, coefficients, fishers: list[Mapping[str, Tensor]] | None) -> dict[str, Tensor]:
    total = WeightedSum(list(base), floor=FLOOR)
    for i, vector in enumerate(vectors):
        total.add(vector, coefficients[i], fishers[i] if fishers is not None else None)
    parameters = {name: nn.Parameter(torch.empty_like(tensor)) for name, tensor in base.items()}
    total.write_into_(parameters, base)
    return {name: p.detach() for name, p in parameters.items()}


def delta(vector: TaskVector, name: str, like: Tensor) -> Tensor:
    return vector.deltas.get(name, torch.zeros_like(like))


def assert_close(ours: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name, tensor in expected.items():
        # Sums are kept in float32.
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_averaging_is_the_mean_of_the_experts(experts):
    base, vectors, _, _ = experts
    mean = {n: sum(t + delta(v, n, t) for v in vectors) / M for n, t in base.items()}
    assert_close(merged(base, vectors, [1 / M] * M, None), mean)


def test_task_arithmetic_adds_the_scaled_task_vectors(experts):
    base, vectors, _, _ = experts
    assert_close(
        merged(base, vectors, [0.4] * M, None),
        {n: t + 0.4 * sum(delta(v, n, t) for v in vectors) for n, t in base.items()},
    )


def test_gta_adds_each_task_vector_with_its_own_coefficient(experts):
    base, vectors, _, lam = experts
    assert_close(
        merged(base, vectors, lam, None),
        {n: t + sum(a * delta(v, n, t) for a, v in zip(lam, vectors, strict=True)) for n, t in base.items()},
    )


def test_fisher_merging_is_the_fisher_weighted_mean_of_the_experts(experts):
    """Matena and Raffel's closed form: sum F theta / sum F."""
    base, vectors, fishers, _ = experts
    expected = {}
    for name, start in base.items():
        weights = [f[name] + FLOOR for f in fishers]
        thetas = [start + delta(v, name, start) for v in vectors]
        expected[name] = sum(w * t for w, t in zip(weights, thetas, strict=True)) / sum(weights)
    assert_close(merged(base, vectors, [1 / M] * M, fishers), expected)


def test_df_merge_is_equation_8(experts):
    base, vectors, fishers, lam = experts
    expected = {}
    for name, start in base.items():
        weights = [f[name] + FLOOR for f in fishers]
        top = sum(w * a * delta(v, name, start) for w, a, v in zip(weights, lam, vectors, strict=True))
        expected[name] = start + M * top / sum(weights)
    assert_close(merged(base, vectors, lam, fishers), expected)


def test_an_expert_with_coefficient_zero_still_holds_the_others_back(experts):
    base, vectors, fishers, _ = experts
    with_it = merged(base, vectors, [0.0, 0.9, 0.5], fishers)
    name = "layer.bias"
    weights = [f[name] + FLOOR for f in fishers]
    step = M * (weights[1] * 0.9 * vectors[1].deltas[name] + weights[2] * 0.5 * vectors[2].deltas[name])
    torch.testing.assert_close(with_it[name], base[name] + step / sum(weights), rtol=1e-5, atol=1e-6)


def test_parameters_that_no_input_touches_fall_back_to_uniform_importance(experts):
    base, vectors, fishers, lam = experts
    silent = [{name: torch.zeros_like(tensor) for name, tensor in f.items()} for f in fishers]
    assert_close(merged(base, vectors, lam, silent), merged(base, vectors, lam, None))


def test_a_parameter_that_no_expert_changed_stays_the_base_bit_for_bit(experts):
    base, vectors, fishers, lam = experts
    unchanged = [TaskVector(v.expert, {n: d for n, d in v.deltas.items() if n != "layer.bias"}) for v in vectors]
    assert torch.equal(merged(base, unchanged, lam, fishers)["layer.bias"], base["layer.bias"])


def test_an_importance_that_is_not_finite_fails_the_merge_and_names_expert_and_tensor(experts):
    base, vectors, fishers, lam = experts
    fishers[1]["layer.bias"][2] = float("nan")
    with pytest.raises(RunError, match=r"expert1.*layer\.bias"):
        merged(base, vectors, lam, fishers)


def test_merged_weights_that_are_not_finite_fail_the_merge_and_name_the_tensor(experts):
    base, vectors, _, lam = experts
    vectors[2].deltas["layer.weight"][0, 0] = float("inf")
    with pytest.raises(RunError, match=r"layer\.weight"):
        merged(base, vectors, lam, None)


class _Waits(TorchDispatchMode):
    """Counts how often the host asks for a value, for which it would wait on an accelerator."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name in ("aten::_local_scalar_dense", "aten::item")
        return func(*args, **(kwargs or {}))


def test_a_merge_waits_for_the_device_once_however_many_parameters_and_experts(experts):
    base, vectors, fishers, lam = experts
    for weights in (fishers, None):
        with _Waits() as waits:
            merged(base, vectors, lam, weights)
        assert waits.count == 1


def test_the_first_importance_that_is_not_finite_is_named_before_the_merged_weights(experts):
    base, vectors, fishers, lam = experts
    fishers[1]["layer.bias"][2] = torch.nan
    fishers[2]["layer.weight"][0] = torch.inf
    with pytest.raises(RunError, match=r"importance of expert 'expert1' is not finite at layer\.bias"):
        merged(base, vectors, lam, fishers)


def test_sums_of_parameters_of_different_precision_are_looked_at_together(experts):
    base, vectors, fishers, lam = experts
    for fisher in fishers:
        fisher["layer.bias"] = fisher["layer.bias"].float()
    merged(base, vectors, lam, fishers)
    fishers[0]["only_first"][0] = torch.nan
    with pytest.raises(RunError, match="only_first"):
        merged(base, vectors, lam, fishers)
