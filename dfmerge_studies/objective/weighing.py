"""C of one merge: every expert's importance at its coefficient, scaled; whole, or part by part of the parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dfmerge_studies.importance.factors import blocks_of
from dfmerge_studies.importance.scale import scaled
from dfmerge_studies.merging import Weights
from dfmerge_studies.methods import Importance, Method, importance_coefficient
from dfmerge_studies.objective.importances import Importances
from dfmerge_studies.objective.in_parts import InParts, gathered_on_host
from dfmerge_studies.points import Coefficient
from dfmerge_studies.progress import Progress, silent


class Weighing:
    """Weighs the experts of one merge; called with an expert's position, and the names of a part in a merge in parts.

    Args:
        importances: of the problem's experts.
        method: row of the method table.
        at: lambda by expert.
        names: of the parameters that are merged.
        alpha: of importance in blocks, what is kept of entries off the diagonal.
        keep: whether what was given stays, for a slope.
        progress: told how far it is.

    Attributes:
        kept: C by position of the expert, in their order, None for C = 1; empty if it need not stay.
        hits: by position of the expert whose importance was needed, whether it came from the cache.
    """

    def __init__(
        self,
        importances: Importances,
        method: Method,
        at: Mapping[str, Coefficient],
        names: Sequence[str],
        *,
        alpha: float = 1.0,
        keep: bool = False,
        progress: Progress = silent,
    ) -> None:
        problem = importances.problem
        self.kept: dict[int, Weights | None] = {}
        self.hits: dict[int, bool] = {}
        self._importances = importances
        self._method = method
        self._at = at
        self._alpha = alpha
        self._keep = keep
        self._progress = progress
        self._uniform = method.importance is Importance.UNIFORM
        self._scale = method.scale_for(problem.spec.importance.scale)
        self._parts = InParts(importances, names, progress)
        self._gather = keep or gathered_on_host(problem, method)
        self._gathered: dict[int, Weights] = {}

    def __call__(self, index: int, names: Sequence[str] | None = None) -> Weights | None:
        """C of one expert; of more parameters than were asked for, where they are there."""
        if self._uniform:
            found: Weights | None = None
        elif names is not None and self._gather:
            if index not in self._gathered:
                self._gathered[index] = self._weighed(index, names)
            found = self._gathered[index]
        else:
            found = self._weighed(index, names)
        if self._keep:
            self.kept[index] = found
        return found

    def _weighed(self, index: int, names: Sequence[str] | None) -> Weights:
        problem = self._importances.problem
        coefficient = importance_coefficient(self._method, self._at[problem.experts[index]])
        if names is None:
            values, hit = self._importances.at(index, coefficient, progress=self._progress)
        elif self._gather:
            values, hit = self._parts.whole(index, coefficient)
        else:
            values, hit = self._parts.at(index, coefficient, names)
        self.hits.setdefault(index, hit)  # the parts that follow are found as the first one was
        if self._method.importance.blocks is not None:
            return blocks_of(problem.resident.model, values, list(problem.resident.base), shrink=self._alpha)
        return scaled(values, self._scale)
