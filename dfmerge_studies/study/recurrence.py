"""Which Fishers of a study will be asked for again, and what a whole study writes to the cache.

A coefficient that a continuous search proposes is not proposed again.  Those that recur are: all of a method that
estimates at the experts themselves, those on a step, the bounds (a search often ends there), and points that are known
by name, which other seeds, baselines and people ask for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dfmerge_studies.methods import Importance
from dfmerge_studies.points import Coefficient
from dfmerge_studies.study.plan import Plan


@dataclass(frozen=True)
class WrittenFishers:
    """What a whole study writes to the Fisher cache.

    Attributes:
        fishers: files, at most where they recur; about, where each best trial so far is kept.
        bytes: that they take together.
    """

    fishers: int
    bytes: int


class Recurrence:
    """How often the Fishers of a study's trials are asked for again.

    Args:
        plan: the study's.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._experts = list(plan.spec.experts)
        search = plan.spec.search
        names = [*plan.space.tied, *self._experts]
        named = [search.bounds, *([point[name] for name in names if name in point] for point in plan.points)]
        self._named = {float(value) for values in named for value in values}

    @property
    def steps(self) -> int | None:
        """Different coefficients at which an expert's Fisher is estimated; None where they are continuous."""
        method, search = self._plan.method, self._plan.spec.search
        if not method.importance.at_scaled_expert:
            return 1
        low, high = search.bounds
        return None if search.step is None else round((high - low) / search.step) + 1

    def uses(self, index: int, coefficient: Coefficient) -> float:
        """How often a Fisher will be asked for again, 0 where nothing is known to.

        Args:
            index: position of the expert.
            coefficient: at which it is estimated.
        """
        if isinstance(coefficient, Mapping):  # one per parameter: a vector does not recur
            return 0.0
        if self.steps is not None:
            return max(1.0, self._plan.trials / self.steps)
        return float(any(abs(coefficient - value) < 1e-12 for value in self._named))

    def written(self, size: int, policy: Literal["auto", "all"]) -> WrittenFishers:
        """What the study writes, if its trials are as many as the spec says.

        Args:
            size: bytes of one Fisher.
            policy: which Fishers are kept.
        """
        method, trials = self._plan.method, self._plan.trials
        if method.importance is Importance.UNIFORM or self._plan.spec.cache_place is None:
            return WrittenFishers(0, 0)
        each = trials if self.steps is None else min(trials, self.steps)
        if policy == "auto" and self.steps is None:
            first = len(self._plan.points)
            bests = sum(1.0 / (number + 1) for number in range(first, trials))
            each = min(trials, first + round(bests))
        return WrittenFishers(each * len(self._experts), each * len(self._experts) * size)
