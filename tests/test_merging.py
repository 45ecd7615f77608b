"""The one equation against few-line formulas of each method, in float64."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from dfmerge_studies.errors import InputError, RunError
from dfmerge_studies.merging import WeightedSum
from dfmerge_studies.methods import (
    DROP_RATE,
    METHODS,
    SHARED,
    Coefficients,
    check_drop_rate,
    coefficient_range,
    expand,
    fixed_coefficients,
    importance_coefficient,
)
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


def test_the_method_table_has_the_rows_of_the_paper():
    assert importance_coefficient(METHODS["df-merge"], 0.3) == 0.3
    assert importance_coefficient(METHODS["fisher"], 0.3) == 1.0
    assert METHODS["averaging"].coefficients is Coefficients.FIXED
    assert METHODS["gta"].coefficients is Coefficients.PER_EXPERT
    tenths = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    assert METHODS["task-arithmetic"].grid == {SHARED: tenths}
    assert METHODS["dare"].grid == {SHARED: tenths, DROP_RATE: (0.1, 0.3, 0.5, 0.7, 0.9)}
    assert METHODS["ties"].grid == {SHARED: (0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8)}


def test_a_shared_coefficient_is_expanded_to_every_expert():
    assert expand(METHODS["ties"], {SHARED: 0.9}, ["a", "b"]) == ({"a": 0.9, "b": 0.9}, None)
    assert expand(METHODS["ties"], {SHARED: 0.9}, [SHARED, "b"]) == ({SHARED: 0.9, "b": 0.9}, None)
    assert expand(METHODS["dare"], {SHARED: 0.3, DROP_RATE: 0.7}, ["a", "b"]) == ({"a": 0.3, "b": 0.3}, 0.7)
    assert expand(METHODS["gta"], {"b": 0.1, "a": 0.2}, ["a", "b"]) == ({"a": 0.2, "b": 0.1}, None)
    assert fixed_coefficients(["a", "b", "c", "d"]) == dict.fromkeys("abcd", 0.25)


def test_a_merge_may_be_asked_for_what_a_study_of_its_method_could_have():
    assert coefficient_range(METHODS["df-merge"], (0.0, 1.0)) == (0.0, 1.0)
    assert coefficient_range(METHODS["ties"], (0.0, 1.0)) == (0.0, 1.8)
    assert coefficient_range(METHODS["dare"], (0.2, 1.5)) == (0.0, 1.5)


@pytest.mark.parametrize(("method", "rate"), [("dare", None), ("dare", 1.0), ("dare", -0.1), ("ties", 0.5)])
def test_a_drop_rate_that_does_not_go_with_the_method_is_refused(method, rate):
    with pytest.raises(InputError, match="drop rate"):
        check_drop_rate(METHODS[method], rate)
    check_drop_rate(METHODS["dare"], 0.0)
    check_drop_rate(METHODS["gta"], None)
