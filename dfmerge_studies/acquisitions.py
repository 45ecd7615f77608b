"""The upper confidence bound (paper, eq. 12), through Optuna's BoTorch sampler; needs the extra `ucb`.

    x        point, coefficients scaled to the unit cube           (d,)
    y        values of completed trials, mean 0, deviation 1       (n, 1)
    c        constraints of completed trials, <= 0 where kept      (n, k)
    mu, s    posterior mean and deviation of a Gaussian process    functions of x
    kappa    weight of the deviation; beta = kappa^2

    alpha(x)  =  mu(x) + kappa s(x)                                       without constraints
    alpha(x)  =  (mu(x) + kappa s(x) - min y) * prod_k P(c_k(x) <= 0)     with them

Points that run elsewhere are taken to give what the process expects of them: mu stays, s shrinks around them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from botorch.acquisition.acquisition import AcquisitionFunction
from botorch.acquisition.analytic import UpperConfidenceBound
from botorch.exceptions.warnings import BotorchWarning
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.model import Model
from botorch.optim.optimize import optimize_acqf
from botorch.settings import validate_input_scaling
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.utils.warnings import GPInputWarning, NumericalWarning
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from optuna_integration import BoTorchSampler
from torch import Tensor

from dfmerge_studies.joint import JointSampler
from dfmerge_studies.lattice import Steps, free_points

_QUIET = (ExperimentalWarning, BotorchWarning, GPInputWarning, NumericalWarning)  # of numerics that are provided for


class UCBSampler(JointSampler):
    """Proposes one trial where the upper confidence bound is largest; nothing is proposed in the startup trials.

    Args:
        kappa: weight of the posterior deviation.
        startup_trials: completed trials before it proposes, at least 1.
        seed: of the optimiser's starting points.
        steps: the lattice to stay on, None for a continuous space.
    """

    def __init__(self, *, kappa: float, startup_trials: int, seed: int, steps: Steps | None) -> None:
        self._kappa = kappa
        self._startup_trials = startup_trials
        self._seed = seed
        self._steps = steps

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Propose all coefficients together; empty in the startup trials.

        Args:
            study: whose completed and running trials count, in whatever order.
            trial: the trial to be drawn.
            search_space: ranges by name.
        """
        if len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))) < self._startup_trials:
            return {}
        with warnings.catch_warnings(), validate_input_scaling(False):
            for category in _QUIET:
                warnings.simplefilter("ignore", category)
            sampler = BoTorchSampler(
                candidates_func=candidates_function(self._kappa, self._steps),
                n_startup_trials=0,
                consider_running_trials=True,
                seed=self._seed,
            )
            proposed: dict[str, Any] = sampler.sample_relative(study, trial, search_space)
            return proposed


Candidates = Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor | None], Tensor]


def candidates_function(kappa: float, steps: Steps | None = None) -> Candidates:
    """What a `BoTorchSampler` calls for the next point.

    Args:
        kappa: weight of the posterior deviation.
        steps: the lattice to stay on, None for a continuous space.

    Returns:
        A function of points (n, d), values (n, 1), constraints (n, k) or None, bounds (2, d) and running points (m, d)
        or None, to the next point (1, d); the order of the rows does not matter.
    """

    def candidates(
        points: Tensor, values: Tensor, constraints: Tensor | None, bounds: Tensor, pending: Tensor | None
    ) -> Tensor:
        # The sums inside the process depend, in their last bits, on the order of the rows.
        order = _order(points, values)
        low, width = bounds[0], bounds[1] - bounds[0]
        x = (points[order] - low) / width
        waiting = (pending[_order(pending)] - low) / width if pending is not None and len(pending) else None
        acquisition = upper_confidence_bound(
            x, values[order], constraints[order] if constraints is not None else None, waiting, kappa=kappa
        )
        best, _ = optimize_acqf(
            acquisition,
            bounds=torch.stack([torch.zeros_like(low), torch.ones_like(low)]),
            q=1,
            num_restarts=10,
            raw_samples=512,
            options={"batch_limit": 10, "maxiter": 200},
        )
        if steps is None:
            return low + best.detach() * width
        taken = points if pending is None else torch.cat([points, pending])
        chosen = free_points(steps, low + best.detach()[0] * width, taken)
        with torch.no_grad():
            scores = acquisition(((chosen - low) / width).unsqueeze(1))
        return chosen[scores.argmax()].unsqueeze(0)

    return candidates


class ConstrainedUpperConfidenceBound(AcquisitionFunction):
    """The upper confidence bound above the worst value seen, times the probability that all constraints are kept.

    Args:
        bound: the acquisition without constraints, on a model of the values.
        limits: a model of each constraint, kept where it is at most 0.
        worst: smallest value seen; without it the product would have no meaning where the bound is negative.
    """

    def __init__(self, bound: UpperConfidenceBound, limits: Sequence[SingleTaskGP], *, worst: Tensor) -> None:
        super().__init__(bound.model)
        self.bound = bound
        self.limits = list(limits)
        self.worst = worst

    def forward(self, X: Tensor) -> Tensor:
        """Alpha at points (b, 1, d), shape (b,).

        Args:
            X: the points, in the unit cube.
        """
        alpha: Tensor = self.bound(X) - self.worst
        for limit in self.limits:
            posterior = limit.posterior(X)
            deviation = posterior.variance.clamp_min(1e-12).sqrt()
            alpha = alpha * torch.special.ndtr(-posterior.mean / deviation).flatten()
        return alpha


def upper_confidence_bound(
    x: Tensor, values: Tensor, constraints: Tensor | None, pending: Tensor | None, *, kappa: float
) -> AcquisitionFunction:
    """The acquisition after fitting a Gaussian process to completed trials.

    Args:
        x: points in the unit cube (n, d).
        values: what they gave (n, 1), to be maximised; scaled to mean 0 and deviation 1 in here.
        constraints: (n, k), or None.
        pending: points that are being evaluated (m, d), or None.
        kappa: weight of the posterior deviation.

    Returns:
        The function from points (b, 1, d) to alpha (b,).
    """
    y = (values - values.mean()) / _deviation(values)
    model: Model = (fitted := _fitted(x, y))
    if pending is not None:
        model = fitted.condition_on_observations(pending, fitted.posterior(pending).mean.detach())
    bound = UpperConfidenceBound(model, beta=kappa**2)
    if constraints is None:
        return bound
    limits = [_fitted(x, column / _deviation(column)) for column in constraints.T[..., None]]
    return ConstrainedUpperConfidenceBound(bound, limits, worst=y.min())


def _fitted(x: Tensor, y: Tensor) -> SingleTaskGP:
    model = SingleTaskGP(x, y, outcome_transform=None)
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    return model


def _deviation(column: Tensor) -> Tensor:
    """The standard deviation of a column; 1 where it does not vary."""
    deviation = column.std(unbiased=False)
    return torch.where(deviation > 1e-9, deviation, 1.0)


def _order(*columns: Tensor) -> list[int]:
    """Row numbers in lexicographic order of the rows."""
    rows = torch.cat(columns, dim=1).tolist()
    return sorted(range(len(rows)), key=rows.__getitem__)
