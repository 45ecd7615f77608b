"""TIES and DARE against few-line formulas, and together with linear merging against peft's merge utilities."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from peft.utils.merge_utils import dare_linear, prune, task_arithmetic, ties
from torch import Tensor, nn

from dfmerge_studies.merging import WeightedSum
from dfmerge_studies.methods import METHODS
from dfmerge_studies.params import TaskVector
from dfmerge_studies.tasks.sampling import seeded_generator
from dfmerge_studies.transforms import TRANSFORMS, Prepared, Streams, start_of

SHAPES = {"a.weight": (7, 5), "a.bias": (7,), "b": (4, 3, 2)}
M = 3
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def streams(*labels: str, seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(int(seeded_generator(seed, *labels).integers(2**62)))


def prepared_by(method: str, vectors: Sequence[TaskVector], drawn: Streams = streams) -> Prepared:
    """A method's transform of some task vectors."""
    return TRANSFORMS[METHODS[method].transform].prepare(vectors, drawn)


@pytest.fixture(params=DTYPES, ids=str)
def experts(request: pytest.FixtureRequest) -> tuple[dict[str, Tensor], list[TaskVector]]:
    generator = torch.Generator().manual_seed(5)

    def draw() -> dict[str, Tensor]:
        full = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
        return {name: tensor.to(request.param) for name, tensor in full.items()}

    return draw(), [TaskVector(f"expert{i}", draw()) for i in range(M)]


def flat(tensors: dict[str, Tensor] | TaskVector) -> Tensor:
    """All of a task vector as one vector."""
    deltas = tensors.deltas if isinstance(tensors, TaskVector) else tensors
    return torch.cat([deltas[name].flatten() for name in SHAPES])


def merged(
    method: str, base: dict[str, Tensor], vectors: Sequence[TaskVector], lam: Sequence[float], **given: float
) -> Tensor:
    """What our equation makes of a method's transform, in the precision that sums are kept in, as one vector."""
    total = WeightedSum(list(base), floor=1e-12)
    transformed = prepared_by(method, vectors)(METHODS[method].complete(given))
    for vector, coefficient in zip(transformed, lam, strict=True):
        total.add(vector, coefficient, None)
    wide = {name: tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for name, tensor in base.items()}
    parameters = {name: nn.Parameter(torch.empty_like(tensor)) for name, tensor in wide.items()}
    total.write_into_(parameters, start_of(transformed, wide))
    return flat({name: p.detach() for name, p in parameters.items()})


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours.double(), expected.double(), rtol=1e-5, atol=1e-5)  # sums in float32


def test_ties_is_trim_elect_and_disjoint_mean_over_whole_task_vectors(experts) -> None:
    base, vectors = experts
    tau = torch.stack([flat(v) for v in vectors]).double()
    d = tau.shape[1]
    expected = flat(base).double()
    trimmed = torch.zeros_like(tau)
    for i in range(M):
        for entry in tau[i].abs().argsort(descending=True)[: d // 5]:
            trimmed[i, entry] = tau[i, entry]
    for entry in range(d):
        sign = trimmed[:, entry].sum().sign()
        agreeing = [value for value in trimmed[:, entry] if value.sign() == sign and sign != 0]
        expected[entry] += 1.3 * sum(agreeing) / max(1, len(agreeing))
    # In 16 bits several entries may share the threshold's magnitude; all of them are kept.
    if base["b"].dtype != torch.bfloat16:
        close(merged("ties", base, vectors, [1.3] * M), expected)


def test_ties_with_equal_magnitudes_at_the_threshold_keeps_them_all() -> None:
    delta = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, 0.5, 0.5, 0.5, 0.5, 0.5])
    kept = prepared_by("ties", [TaskVector("one", {"x": delta})])({"density": 0.2})[0].deltas["x"]
    assert kept.tolist() == [1.0, -1.0, 1.0, 1.0, -1.0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("density", [0.2, 0.5])
@pytest.mark.parametrize("lam", [[1.0, 1.0, 1.0], [0.8, 1.8, 0.3]])
def test_ties_agrees_with_peft(experts, lam: list[float], density: float) -> None:
    base, vectors = experts
    if base["b"].dtype == torch.bfloat16:
        pytest.skip("peft computes in the tensors' own precision, and keeps some of equal magnitudes by chance")
    step = ties([flat(v) for v in vectors], torch.tensor(lam, dtype=torch.float64), density=density)
    close(merged("ties", base, vectors, lam, density=density), flat(base) + step)


def test_linear_merging_agrees_with_peft(experts) -> None:
    base, vectors = experts
    lam = [0.2, 0.9, 0.5]
    step = task_arithmetic([flat(v).double() for v in vectors], torch.tensor(lam, dtype=torch.float64))
    close(merged("gta", base, vectors, lam), flat(base).double() + step)


def masks(vectors: Sequence[TaskVector], rate: float) -> list[Tensor]:
    """What dropping keeps, seen on task vectors of ones."""
    ones = [TaskVector(v.expert, {name: torch.ones_like(d) for name, d in v.deltas.items()}) for v in vectors]
    return [flat(dict(v.deltas.items())) > 0 for v in prepared_by("dare", ones)({"drop_rate": rate})]


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_dare_drops_entries_and_rescales_the_others(experts, rate: float) -> None:
    base, vectors = experts
    expected = flat(base).double()
    for vector, mask in zip(vectors, masks(vectors, rate), strict=True):
        expected += 0.4 * flat(vector).double() * mask / (1 - rate)
    close(merged("dare", base, vectors, [0.4] * M, drop_rate=rate), expected)
    if rate == 0.0:
        assert torch.equal(
            merged("dare", base, vectors, [0.4] * M, drop_rate=rate), merged("gta", base, vectors, [0.4] * M)
        )


def test_dare_agrees_with_peft_given_the_same_mask(experts, monkeypatch: pytest.MonkeyPatch) -> None:
    base, vectors = experts
    lam, rate = [0.2, 0.9, 0.5], 0.3
    drawn = iter(masks(vectors, rate))
    # peft takes its mask from torch.bernoulli, without a generator: it gets ours.
    monkeypatch.setattr(torch, "bernoulli", lambda probabilities: next(drawn).to(probabilities.dtype))
    step = dare_linear([flat(v).double() for v in vectors], torch.tensor(lam, dtype=torch.float64), density=1 - rate)
    close(merged("dare", base, vectors, lam, drop_rate=rate), flat(base).double() + step)


def test_dare_drops_as_many_as_peft_does_and_keeps_the_mean() -> None:
    delta = torch.ones(200_000)
    for rate in (0.1, 0.5, 0.9):
        ours = prepared_by("dare", [TaskVector("one", {"x": delta})])({"drop_rate": rate})[0].deltas["x"]
        theirs = prune(delta, 1 - rate, method="random", rescale=True)
        for result in (ours, theirs):
            spread = (rate / (1 - rate) / len(delta)) ** 0.5
            assert abs(result.mean().item() - 1) < 5 * spread
        torch.testing.assert_close(ours.max(), theirs.max())


def test_masks_depend_on_seed_expert_and_tensor_only_and_those_of_smaller_rates_lie_inside() -> None:
    delta = torch.ones(50, 20)
    vectors = [TaskVector(e, {"x": delta, "y": delta}) for e in ("one", "two")]
    alone = [TaskVector("two", {"y": delta})]

    def dropped(vectors: Sequence[TaskVector], index: int, name: str, rate: float = 0.5, seed: int = 0) -> Tensor:
        prepared = prepared_by("dare", vectors, lambda *labels: streams(*labels, seed=seed))
        return prepared({"drop_rate": rate})[index].deltas[name] == 0

    here = dropped(vectors, 1, "y")
    assert torch.equal(here, dropped(alone, 0, "y"))
    assert torch.equal(here, dropped(vectors, 1, "y"))
    for other in (dropped(vectors, 0, "y"), dropped(vectors, 1, "x"), dropped(vectors, 1, "y", seed=1)):
        assert 0.4 < (here == other).float().mean() < 0.6
    assert not (dropped(vectors, 1, "y", 0.3) & ~here).any()


def test_an_entry_that_no_expert_agrees_on_or_changes_stays_the_base_s() -> None:
    vectors = [TaskVector("one", {"x": torch.tensor([2.0, 1.0])}), TaskVector("two", {"x": torch.tensor([-2.0, 1.0])})]
    three = [*vectors, TaskVector("three", {})]
    for given in (vectors, three):
        prepared = prepared_by("ties", given)({"density": 0.2})
        assert sum(v.deltas["x"] for v in prepared if v.deltas).tolist() == [0.0, 0.0]


def test_what_counts_as_the_whole_task_vector_is_every_tensor_that_some_expert_changed() -> None:
    """Ten entries in all, so two are kept, of an expert that changed five of them only."""
    one = TaskVector("one", {"x": torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])})
    two = TaskVector("two", {"y": torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])})
    prepared = prepared_by("ties", [one, two])({"density": 0.2})
    assert prepared[0].deltas["x"].tolist() == [5.0, 4.0, 0, 0, 0]
    assert prepared[1].deltas["y"].tolist() == [0, 0, 0, 4.0, 5.0]


def test_one_preparation_of_ties_serves_several_densities() -> None:
    prepared = prepared_by("ties", [TaskVector("one", {"x": torch.tensor([3.0, -2.0, 1.0, 4.0])})])
    for density, kept in ((0.25, [0, 0, 0, 4.0]), (0.5, [3.0, 0, 0, 4.0]), (0.25, [0, 0, 0, 4.0])):
        assert prepared({"density": density})[0].deltas["x"].tolist() == kept
