"""The sampler `gradient`, and the startup of `auto`: each trial's point is a step down the loss from the one before.

    x[k]    coefficients of the k-th trial of the path
    g[k]    slope of the loss at x[k] along each coefficient, which the trial keeps
    rate    length of a step

The steps are Adam's (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1), cut at the range of each coefficient.  All
slopes cost one forward and backward pass over a few rows, whatever the number of coefficients: that is what makes one
per expert and layer cheap (AdaMerging, Yang et al. 2024, arXiv 2310.02575, has them, under an entropy without labels).
Nothing is kept between two trials: the path is read from the stored trials, in the order of places.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from optuna.distributions import BaseDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from dfmerge_studies.joint import JointSampler
from dfmerge_studies.trials.marks import GRADIENT, PROPOSAL, place_of
from dfmerge_studies.trials.reading import violation
from dfmerge_studies.trials.space import Space

if TYPE_CHECKING:
    from optuna.study import Study

RATE = 0.05  # of the range of a coefficient
DECAYS = (0.9, 0.999)  # of the means of slopes and of their squares
_EPSILON = 1e-8
FROM = "from"  # of a proposal: place of the trial that its path starts at

Slopes = Mapping[str, float]


class DescentSampler(JointSampler):
    """Proposes one trial, a step from the path's last one; nothing is proposed while no trial has a slope.

    Trials that run or have failed since the last one with a slope are taken for steps in the same direction, so that
    several workers try several lengths of it and a point that cannot be merged is not proposed again.  Only places
    before the trial's own count: on a storage that is no database, a process may be killed between the mark of a step
    and its point, whose place the next trial takes.

    Args:
        space: what is searched.
        rate: length of a step, as a share of the range.

    Attributes:
        expected: where the path of the proposed point started, as the trial keeps it; None before.
    """

    def __init__(self, *, space: Space, rate: float = RATE) -> None:
        self._space = space
        self._rate = rate
        self.expected: dict[str, Any] | None = None

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Propose all coefficients together; empty while no trial has a slope.

        Args:
            study: whose trials make the path.
            trial: the trial to be drawn.
            search_space: ranges by name.
        """
        others = [each for each in study.get_trials(deepcopy=False) if each.number != trial.number]
        known = sorted(filter(self._has_slope, others), key=place_of)
        if not known:
            return {}
        start = _start(known, study.direction is StudyDirection.MAXIMIZE)
        path = [start, *(each for each in known if FROM in _proposal(each))]
        between = range(place_of(path[-1]) + 1, place_of(trial))
        ahead = {place_of(each) for each in others if FROM in _proposal(each)}.intersection(between)
        self.expected = {FROM: place_of(start)}
        return self._stepped(path[-1].params, [_slopes(each) for each in path], 1 + len(ahead))

    def _has_slope(self, trial: FrozenTrial) -> bool:
        return (
            trial.state == TrialState.COMPLETE
            and set(self._space.names) <= _slopes(trial).keys()
            and set(self._space.names) <= trial.params.keys()
        )

    def _stepped(self, point: Mapping[str, float], slopes: Sequence[Slopes], times: int) -> dict[str, float]:
        """The point some steps further, each of them the step that follows on these slopes."""
        found = {}
        for name in self._space.names:
            low, high = self._space.range_of(name)
            step = adam_step([each[name] for each in slopes]) * self._rate * (high - low)
            found[name] = min(max(float(point[name]) - times * step, low), high)
        return found


def _start(known: Sequence[FrozenTrial], larger: bool) -> FrozenTrial:
    """Where the path started; the best of the trials that were given or drawn, where there is no path yet.

    Args:
        known: trials with slopes.
        larger: whether larger values are better.
    """
    begun = next((_proposal(each)[FROM] for each in known if FROM in _proposal(each)), None)
    starts = [each for each in known if place_of(each) == begun] if begun is not None else known

    def worth(trial: FrozenTrial) -> tuple[float, float, int]:
        value = float(trial.values[0])
        return -violation(trial), value if larger else -value, -place_of(trial)

    return max(starts or known, key=worth)


def adam_step(slopes: Sequence[float]) -> float:
    """What is subtracted after a series of slopes, for a rate of 1 (Kingma and Ba 2015, algorithm 1).

    Args:
        slopes: of one coefficient, at least one, the last one latest.
    """
    mean = square = 0.0
    slow, slower = DECAYS
    for slope in slopes:
        mean = slow * mean + (1 - slow) * slope
        square = slower * square + (1 - slower) * slope * slope
    count = len(slopes)
    return mean / (1 - slow**count) / (math.sqrt(square / (1 - slower**count)) + _EPSILON)


def _slopes(trial: FrozenTrial) -> Slopes:
    found: Slopes = trial.user_attrs.get(GRADIENT, {}).get("slopes", {})
    return found


def _proposal(trial: FrozenTrial) -> Mapping[str, Any]:
    found: Mapping[str, Any] = trial.user_attrs.get(PROPOSAL, {})
    return found
