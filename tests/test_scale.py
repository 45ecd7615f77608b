"""The scale of importances, against the formula written out entry by entry."""

from __future__ import annotations

import pytest
import torch

from dfmerge_studies.importance.scale import scaled
from dfmerge_studies.methods import Scale

F = {"a": torch.tensor([[1.0, 4.0], [0.0, 9.0]]), "b": torch.tensor([16.0, 25.0])}


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_an_expert_is_divided_by_the_mean_of_all_its_entries(power: float) -> None:
    entries = [x**power for name in F for x in F[name].flatten().tolist()]
    mean = sum(entries) / len(entries)
    for name, value in scaled(F, Scale("expert", power)).items():
        wanted = [x**power / mean for x in F[name].flatten().tolist()]
        assert value.flatten().tolist() == pytest.approx(wanted)
        assert value.shape == F[name].shape


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_a_tensor_is_divided_by_its_own_mean(power: float) -> None:
    for name, value in scaled(F, Scale("tensor", power)).items():
        entries = [x**power for x in F[name].flatten().tolist()]
        assert value.flatten().tolist() == pytest.approx([x / (sum(entries) / len(entries)) for x in entries])


def test_a_power_alone_divides_by_nothing() -> None:
    assert scaled(F, Scale("none", 0.5))["b"].tolist() == pytest.approx([4.0, 5.0])


def test_the_plain_importance_is_handed_on_as_it_is() -> None:
    assert scaled(F, Scale("none", 1.0)) is F


@pytest.mark.parametrize("normalise", ["expert", "tensor"])
def test_an_importance_that_is_zero_everywhere_stays_zero(normalise: str) -> None:
    value = scaled({"a": torch.zeros(3)}, Scale(normalise))  # type: ignore[arg-type]
    assert value["a"].tolist() == [0.0, 0.0, 0.0]


def test_the_scale_of_a_fisher_no_longer_matters() -> None:
    once = scaled(F, Scale("expert", 1.0))
    thousandfold = scaled({name: 1000 * value for name, value in F.items()}, Scale("expert", 1.0))
    assert all(torch.allclose(once[name], thousandfold[name]) for name in F)
