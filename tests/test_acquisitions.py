"""The upper confidence bound against its closed form, and what a study makes of it."""

from __future__ import annotations

from typing import Any

import optuna
import pytest
import torch
from optuna.trial import TrialState, create_trial
from torch import Tensor

from dfmerge_studies.acquisitions import Steps, candidates_function, upper_confidence_bound
from dfmerge_studies.search import make_sampler
from dfmerge_studies.trials.space import Space

pytestmark = pytest.mark.filterwarnings("ignore::botorch.exceptions.warnings.BotorchWarning")
KAPPA = 2.576
SPACE = Space(("a", "b"))


def data(n: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Points, values and one constraint of a smooth function with noise."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(n, 2, generator=generator, dtype=torch.float64)
    noise = 0.02 * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    y = (-((x - 0.4) ** 2).sum(1, keepdim=True) + noise) * 30 + 5
    return x, y, x[:, :1] - 0.5


def posterior(model: Any, x: Tensor, y: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of a Gaussian process, by its textbook formula, from its kernel, constant mean and noise."""
    with torch.no_grad():
        kernel = lambda a, b: model.covar_module(a, b).to_dense()  # noqa: E731
        inverse = torch.linalg.inv(kernel(x, x) + model.likelihood.noise * torch.eye(len(x), dtype=x.dtype))
        mean = model.mean_module.constant + kernel(at, x) @ inverse @ (y - model.mean_module.constant)
        variance = kernel(at, at).diagonal() - (kernel(at, x) @ inverse @ kernel(x, at)).diagonal()
    return mean.squeeze(-1), variance.sqrt()


@pytest.fixture
def at() -> Tensor:
    return torch.rand(20, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_the_acquisition_is_mean_plus_kappa_deviations(at: Tensor) -> None:
    x, values, _ = data()
    acquisition = upper_confidence_bound(x, values, None, None, kappa=KAPPA)
    y = (values - values.mean()) / values.std(unbiased=False)
    mean, deviation = posterior(acquisition.model, x, y, at)
    torch.testing.assert_close(acquisition(at.unsqueeze(1)), mean + KAPPA * deviation, rtol=1e-5, atol=1e-5)


def test_points_that_run_elsewhere_shrink_the_deviation_and_leave_the_mean(at: Tensor) -> None:
    x, values, _ = data()
    pending = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
    alone = upper_confidence_bound(x, values, None, None, kappa=KAPPA)
    acquisition = upper_confidence_bound(x, values, None, pending, kappa=KAPPA)
    y = (values - values.mean()) / values.std(unbiased=False)
    mean, before = posterior(alone.model, x, y, at)
    expected, _ = posterior(alone.model, x, y, pending)
    everything = torch.cat([x, pending])
    same, after = posterior(alone.model, everything, torch.cat([y, expected.unsqueeze(1)]), at)
    torch.testing.assert_close(same, mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(acquisition(at.unsqueeze(1)), mean + KAPPA * after, rtol=1e-4, atol=1e-4)
    assert (after <= before + 1e-9).all()


def test_with_constraints_it_is_the_height_above_the_worst_times_the_probability_of_keeping_them(at: Tensor) -> None:
    x, values, constraint = data()
    constraints = torch.cat([constraint, 0.2 - x[:, 1:]], dim=1)
    acquisition = upper_confidence_bound(x, values, constraints, None, kappa=KAPPA)
    y = (values - values.mean()) / values.std(unbiased=False)
    mean, deviation = posterior(acquisition.bound.model, x, y, at)
    expected = mean + KAPPA * deviation - y.min()
    for index, model in enumerate(acquisition.limits):
        column = constraints[:, [index]] / constraints[:, index].std(unbiased=False)
        centre, spread = posterior(model, x, column, at)
        expected *= torch.distributions.Normal(centre, spread.clamp_min(1e-6)).cdf(torch.zeros(()))
    torch.testing.assert_close(acquisition(at.unsqueeze(1)), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_the_order_of_rows_does_not_matter_and_the_proposal_is_where_the_bound_is_largest() -> None:
    x, values, constraint = data()
    bounds = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    shuffled = [4, 2, 0, 8, 6, 1, 7, 5, 3]
    proposals = []
    for rows in (list(range(9)), shuffled):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            proposals.append(candidates_function(KAPPA)(x[rows], values[rows], constraint[rows], bounds, None))
    assert torch.equal(*proposals)
    ticks = torch.linspace(0, 1, 41, dtype=torch.float64)
    grid = torch.cartesian_prod(ticks, ticks).unsqueeze(1)
    order = sorted(range(9), key=lambda row: x[row].tolist())
    acquisition = upper_confidence_bound(x[order], values[order], constraint[order], None, kappa=KAPPA)
    with torch.no_grad():
        assert acquisition(proposals[0].unsqueeze(1)) >= acquisition(grid).max() - 1e-6


@pytest.mark.parametrize("dimensions", [2, 6])
def test_on_a_lattice_a_point_that_was_tried_or_runs_is_not_proposed_again(dimensions: int) -> None:
    steps = Steps(0.0, 0.25, 5)
    propose = candidates_function(KAPPA, steps)
    bounds = torch.stack([torch.full((dimensions,), -0.125), torch.full((dimensions,), 1.125)]).double()
    seen = torch.tensor([[0.5] * dimensions, [0.0] * dimensions], dtype=torch.float64)
    pending = torch.tensor([[1.0] * dimensions], dtype=torch.float64)
    for _ in range(4):
        value = -((seen - 0.5) ** 2).sum(1, keepdim=True)
        point = propose(seen, value, None, bounds, pending)
        assert torch.equal((point / 0.25).round() * 0.25, point)
        assert point.tolist()[0] not in [*seen.tolist(), *pending.tolist()]
        seen = torch.cat([seen, point])


def test_a_lattice_that_is_used_up_still_gives_a_point() -> None:
    steps = Steps(0.0, 1.0, 2)
    seen = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    bounds = torch.tensor([[-0.5], [1.5]], dtype=torch.float64)
    point = candidates_function(KAPPA, steps)(seen, seen, None, bounds, None)
    assert point.tolist() in ([[0.0]], [[1.0]])


def test_values_that_never_vary_and_a_single_trial_are_no_obstacle() -> None:
    bounds = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    for n in (1, 5):
        x, values, constraint = data(n)
        point = candidates_function(KAPPA)(x, torch.zeros_like(values), torch.zeros_like(constraint), bounds, None)
        assert ((point >= 0) & (point <= 1)).all()


def test_a_study_sees_running_trials_as_pending_and_starts_after_completed_trials_only() -> None:
    def proposal(running: list[dict[str, float]]) -> dict[str, float]:
        sampler = make_sampler("ucb", seed=0, study_name="s", space=SPACE, startup_trials=3)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        x, values, _ = data(4)
        for row, value in zip(x.tolist(), values.flatten().tolist(), strict=True):
            params = dict(zip("ab", row, strict=True))
            study.add_trial(create_trial(value=value, params=params, distributions=SPACE.distributions()))
        for params in running:
            study.add_trial(create_trial(state=TrialState.RUNNING, params=params, distributions=SPACE.distributions()))
        return study.ask(SPACE.distributions()).params

    # The trial that is drawn has a place, hence a seed, of its own: two running trials each time.
    far = proposal([{"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 0.0}])
    near = proposal([far, far])
    assert max(abs(near[name] - far[name]) for name in "ab") > 0.02

    sampler = make_sampler("ucb", seed=0, study_name="s", space=SPACE, startup_trials=1)
    empty = optuna.create_study(direction="maximize", sampler=sampler)
    assert len([empty.ask(SPACE.distributions()).params for _ in range(3)]) == 3  # running, none completed
