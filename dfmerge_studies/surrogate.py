"""One Gaussian process per task inside a trust region: the acquisition of `sampler: auto`.

    x        points, coefficients scaled to the unit cube          (n, d)
    s        task scores of completed trials                       (n, T)
    f_t      score of task t, a Gaussian process on the cube       functions of x
    a        threshold of each task, kept where f_t >= a_t         (T,), -inf where there is none
    u        utility of a vector of task scores                    (..., T) -> (...)
    B        trust region, a box around its centre                 (2, d)

The mean of the scores throws away which task moved; here every task is observed, and the acquisition is the expected
improvement of u(f_1(x), ..., f_T(x)) over the best of the points seen, in its log form for noisy observations (Ament
et al. 2023, arXiv 2310.20708; Balandat et al. 2020, arXiv 1910.06403), within B (TuRBO, Eriksson et al. 2019, arXiv
1910.01739).  Points that run elsewhere are pending: their scores are drawn from the processes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from botorch.acquisition.acquisition import AcquisitionFunction
from botorch.acquisition.logei import qLogNoisyExpectedImprovement
from botorch.acquisition.objective import GenericMCObjective
from botorch.exceptions.warnings import BotorchWarning
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.optim.optimize import optimize_acqf
from botorch.sampling.normal import SobolQMCNormalSampler
from botorch.settings import validate_input_scaling
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.priors import LogNormalPrior
from gpytorch.utils.warnings import GPInputWarning, NumericalWarning
from torch import Tensor

from dfmerge_studies.lattice import Steps, free_points

Utility = Callable[[Tensor], Tensor]
QUIET = (BotorchWarning, GPInputWarning, NumericalWarning, RuntimeWarning)  # of numerics that are provided for

HALF_WIDTH = 0.4  # of a new region, in the unit cube
SMALLEST = 0.05  # a region smaller than that has ended
PATIENCE = 4  # trials without gain after which a region is halved
DRAWS = 64  # of the processes, per evaluation of the acquisition
_LEAST, _MOST = 1e-6, 1e4  # variances of known errors, of values with deviation 1: of a whole score, of one unknown
_FEW = 8  # dimensions up to which processes are fitted to the end; beyond that it takes most of a suggestion's time
_STEPS = 40  # of the optimiser that fits them beyond that
_BATCH = 256  # points that are compared at once
_ELSEWHERE = 64  # points of the cube, outside the region too, where the gain is looked for
_SAMPLES = 512  # of the tasks' scores at the proposed point, from which the utility's mean and deviation follow

Merit = tuple[float, float]  # minus the violation of the constraints, then the value: larger is better


@dataclass(frozen=True)
class Region:
    """Where the next point is looked for.

    Attributes:
        centre: best point of this region's trials (d,), None where the whole cube is searched.
        half_width: of the box around it.
        best: merit of the centre.
        without_gain: trials in a row that did not improve on it, since the region was last halved.
        ended: centres of the regions before this one.
    """

    centre: tuple[float, ...] | None
    half_width: float
    best: Merit
    without_gain: int = 0
    ended: tuple[tuple[float, ...], ...] = ()

    def box(self, dimensions: int) -> Tensor:
        """Lower and upper corner, shape (2, d), cut at the cube."""
        if self.centre is None:
            return torch.stack([torch.zeros(dimensions), torch.ones(dimensions)]).double()
        centre = torch.tensor(self.centre, dtype=torch.float64)
        return torch.stack([(centre - self.half_width).clamp(0, 1), (centre + self.half_width).clamp(0, 1)])

    def inside(self, points: Tensor) -> Tensor:
        """Those of some points that lie in the box; all of them where none does.

        Args:
            points: shape (k, d).
        """
        lower, upper = self.box(points.shape[1])
        kept = ((points >= lower - 1e-9) & (points <= upper + 1e-9)).all(1)
        return points[kept] if bool(kept.any()) else points


WHOLE = Region(None, HALF_WIDTH, (-math.inf, -math.inf))  # no region: the cube


def utility(kind: str, weights: Sequence[float] | None) -> Utility:
    """What a vector of task scores is worth.

    Args:
        kind: "mean" or "min".
        weights: of the tasks, for a weighted mean; None for equal ones.
    """
    if kind == "min":
        return lambda y: y.amin(-1)
    if weights is None:
        return lambda y: y.mean(-1)
    shares = torch.tensor(weights, dtype=torch.float64)
    return lambda y: (y * shares).sum(-1) / shares.sum()


def of_some(worth: Utility, places: Sequence[int]) -> Utility:
    """A utility of some of the scores of a vector, as one of the whole vector: guards are worth nothing.

    Args:
        worth: of the scores at these places alone.
        places: in the vector.
    """
    return lambda y: worth(y[..., list(places)])


def scalarisation(s: Tensor, seed: int) -> Utility:
    """A utility whose best point lies on the Pareto front, another part of it for another seed.

    The augmented Chebyshev scalarisation under weights that are uniform on the simplex, of scores scaled to their
    range (ParEGO, Knowles 2006; with noise: Daulton et al. 2021, arXiv 2105.08195).

    Args:
        s: task scores seen so far (n, T).
        seed: of the weights.
    """
    low, span = s.amin(0), (s.amax(0) - s.amin(0)).clamp_min(1e-9)
    generator = torch.Generator().manual_seed(seed)
    weights = -torch.rand(s.shape[1], generator=generator, dtype=torch.float64).clamp_min(1e-12).log()
    weights = weights / weights.sum()

    def worth(y: Tensor) -> Tensor:
        shares = weights * (y - low) / span
        return shares.amin(-1) + 0.05 * shares.sum(-1)

    return worth


def region_after(points: Sequence[tuple[float, ...]], merits: Sequence[Merit], startup: int) -> Region:
    """The region that a history of trials has led to; nothing else is remembered between two trials.

    The first region stands around the best startup point.  A trial that improves on the region's best moves it there;
    after `PATIENCE` trials that do not, it is halved.  One that has become too small has ended, and the next stands
    around the best point that lies outside all former ones, so that a second basin is found.

    Args:
        points: completed trials in the order of their places, in the unit cube.
        merits: what they are worth.
        startup: how many of them, at least 1, came before the first region.
    """
    first = max(range(startup), key=merits.__getitem__)
    region = Region(points[first], HALF_WIDTH, merits[first])
    for index in range(startup, len(points)):
        if merits[index] > region.best:
            region = replace(region, centre=points[index], best=merits[index], without_gain=0)
        elif region.without_gain + 1 < PATIENCE:
            region = replace(region, without_gain=region.without_gain + 1)
        elif region.half_width / 2 >= SMALLEST:
            region = replace(region, half_width=region.half_width / 2, without_gain=0)
        else:
            region = _restarted(region, points[: index + 1], merits)
    return region


def _restarted(region: Region, points: Sequence[tuple[float, ...]], merits: Sequence[Merit]) -> Region:
    ended = region.ended if region.centre is None else (*region.ended, region.centre)
    outside = [
        index
        for index, point in enumerate(points)
        if all(max(abs(a - b) for a, b in zip(point, centre, strict=True)) > HALF_WIDTH for centre in ended)
    ]
    if not outside:
        return Region(None, HALF_WIDTH, (-math.inf, -math.inf), ended=ended)
    start = max(outside, key=merits.__getitem__)
    return Region(points[start], HALF_WIDTH, merits[start], ended=ended)


@dataclass(frozen=True)
class History:
    """What a proposal is made from.

    Attributes:
        x: known points in the unit cube (n, d), n >= 2.
        s: their task scores (n, T), larger is better.
        pending: points that run elsewhere (m, d), or None.
        thresholds: a (T,), -inf for tasks without; None without any.
        errors: standard errors (n, T) of scores that were estimated on a part of the rows; 0 of those on all of them,
            inf where nothing is known. None where all scores are whole.
    """

    x: Tensor
    s: Tensor
    pending: Tensor | None = None
    thresholds: Tensor | None = None
    errors: Tensor | None = None

    @property
    def is_whole(self) -> Tensor:
        """Of which points all scores are on all rows (n,)."""
        return torch.ones(len(self.x), dtype=torch.bool) if self.errors is None else (self.errors == 0).all(1)

    @property
    def whole(self) -> Tensor:
        """The scores of those points."""
        return self.s[self.is_whole]


@dataclass(frozen=True)
class Proposal:
    """A point, and what is expected of it.

    Attributes:
        point: in the unit cube (d,).
        mean: of u at the point.
        deviation: of u at the point, without the noise of a score.
        tasks: mean and deviation of every f_t at the point (T, 2).
        gain: largest expected improvement of u over the best so far that was found anywhere in the cube.
    """

    point: Tensor
    mean: float
    deviation: float
    tasks: Tensor
    gain: float


def proposal(history: History, worth: Utility, *, region: Region, seed: int, steps: Steps | None = None) -> Proposal:
    """The next point, where the acquisition is largest.

    Args:
        history: completed and running trials.
        worth: u.
        region: where to look.
        seed: of the draws and of the optimiser's starting points.
        steps: the lattice to stay on, in the unit cube; None for a continuous space.
    """
    dimensions = history.x.shape[1]
    with warnings.catch_warnings(), validate_input_scaling(False), torch.random.fork_rng(devices=[]):
        for category in QUIET:
            warnings.simplefilter("ignore", category)
        torch.manual_seed(seed)
        acquisition, model = _acquisition(history, worth, seed)
        best, _ = optimize_acqf(
            acquisition,
            bounds=region.box(dimensions),
            q=1,
            num_restarts=4,
            raw_samples=128,
            options={"batch_limit": 4, "maxiter": 100},
        )
        point: Tensor = best.detach()[0]
        with torch.no_grad():
            if steps is not None:
                taken = history.x if history.pending is None else torch.cat([history.x, history.pending])
                free = region.inside(free_points(steps, point, taken))
                point = free[_values(acquisition, free).argmax()]
            elsewhere = torch.rand(_ELSEWHERE, dimensions, dtype=torch.float64)  # under the fork's own seed
            gain = _values(acquisition, torch.cat([point[None], elsewhere])).max().exp().item()
            tasks = _expected(model, history.s, point)
            noise = torch.randn(_SAMPLES, len(tasks), dtype=torch.float64)
            value = worth(tasks[:, 0] + noise * tasks[:, 1])
    return Proposal(point, value.mean().item(), value.std().item(), tasks, gain)


def _values(acquisition: AcquisitionFunction, points: Tensor) -> Tensor:
    return torch.cat([acquisition(part.unsqueeze(1)) for part in torch.split(points, _BATCH)])


def _scale(s: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (T,) that scores are standardised by."""
    deviation = s.std(0, unbiased=False)
    return s.mean(0), torch.where(deviation > 1e-9, deviation, 1.0)


def _expected(model: SingleTaskGP, s: Tensor, point: Tensor) -> Tensor:
    """Mean and deviation (T, 2) of every task's score at a point."""
    mean, deviation = _scale(s)
    there = model.posterior(point[None])
    return torch.stack([there.mean[0] * deviation + mean, there.variance[0].clamp_min(0).sqrt() * deviation], dim=1)


def _acquisition(history: History, worth: Utility, seed: int) -> tuple[AcquisitionFunction, SingleTaskGP]:
    """The log of the expected improvement of the utility, and the processes that it rests on."""
    x, s = history.x, history.s
    mean, deviation = _scale(s)
    errors = None if history.errors is None else history.errors / deviation
    model = fitted(x, (s - mean) / deviation, errors)
    shared: dict[str, Any] = {
        "model": model,
        "X_baseline": x[history.is_whole],
        "sampler": SobolQMCNormalSampler(torch.Size([DRAWS]), seed=seed),
        "constraints": _limits(history.thresholds, mean, deviation),
        "X_pending": history.pending,
        "cache_root": False,
    }

    def objective(y: Tensor, X: Tensor | None = None) -> Tensor:
        return worth(y * deviation + mean)

    wanted = GenericMCObjective(objective)
    return qLogNoisyExpectedImprovement(objective=wanted, prune_baseline=False, **shared), model


def _limits(thresholds: Tensor | None, mean: Tensor, deviation: Tensor) -> list[Utility] | None:
    """Constraints as functions of standardised scores, kept where they are at most 0."""
    if thresholds is None:
        return None

    def limit(task: int) -> Utility:
        return lambda y: (thresholds[task] - mean[task]) / deviation[task] - y[..., task]

    return [limit(task) for task in range(len(mean)) if math.isfinite(thresholds[task])] or None


def fitted(x: Tensor, y: Tensor, errors: Tensor | None = None) -> SingleTaskGP:
    """A Gaussian process per column, with a noise of its own, fitted by marginal likelihood.

    Args:
        x: points (n, d).
        y: values (n, T), mean 0 and deviation 1.
        errors: known standard errors of the values (n, T), whose squares come on top of the fitted noise; inf where a
            value is not known at all.
    """
    if errors is None:
        model = SingleTaskGP(x, y, outcome_transform=None)
    else:
        known = errors.square().clamp(_LEAST, _MOST)
        noise = FixedNoiseGaussianLikelihood(
            known.T.squeeze(0) if y.shape[1] == 1 else known.T,
            learn_additional_noise=True,
            batch_shape=torch.Size([] if y.shape[1] == 1 else [y.shape[1]]),
        )
        noise.second_noise_covar.register_prior(
            "noise_prior", LogNormalPrior(-4.0, 1.0), lambda own: own.noise, lambda own, value: own._set_noise(value)
        )  # that of BoTorch's own likelihood
        model = SingleTaskGP(x, y, train_Yvar=known, likelihood=noise, outcome_transform=None)
    likelihood = ExactMarginalLogLikelihood(model.likelihood, model)
    if x.shape[1] <= _FEW:
        fit_gpytorch_mll(likelihood)
    else:
        fit_gpytorch_mll(likelihood, optimizer_kwargs={"options": {"maxiter": _STEPS}})
    return model
