"""Importances part by part of the parameters, where memory does not hold the sums of all of them at a time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from dfmerge_studies.checkpoints.factored import PlaceOf
from dfmerge_studies.errors import InputError
from dfmerge_studies.importance.cache import FisherKey
from dfmerge_studies.methods import Estimator, Importance, Method
from dfmerge_studies.params import OnDemand
from dfmerge_studies.points import Coefficient
from dfmerge_studies.progress import Progress, silent

if TYPE_CHECKING:
    from dfmerge_studies.objective.importances import Importances
    from dfmerge_studies.objective.problem import Problem


def check_parts(problem: Problem, method: Method, estimator: Estimator) -> None:
    """Refuse a method that needs the importance of all parameters at a time, where memory is for parts of them.

    Args:
        problem: what is loaded.
        method: row of the method table.
        estimator: of its importance.

    Raises:
        InputError: naming what needs all of them.
    """
    if len(problem.parts()) == 1 or (what := needing_all(problem, method, estimator)) is None:
        return
    more = "Give it more memory (validate says how much)" if problem.share is None else "Use fewer workers"
    raise InputError(
        f"there is memory for {len(problem.parts())} parts of the parameters in turn, and {what}",
        where=problem.spec.where("memory"),
        hint=f"{more}, or use df-merge or df-merge-scaled, or no importance",
    )


def needing_all(problem: Problem, method: Method, estimator: Estimator) -> str | None:
    """What of a merge needs the importance of all parameters at a time, in words; None where nothing does.

    Args:
        problem: what is loaded.
        method: row of the method table.
        estimator: of its importance.
    """
    if problem.spec.protect is not None:
        return "`protect` keeps factors of all linear layers"
    if method.importance is Importance.UNIFORM:
        return None
    if method.importance.blocks is not None:
        return f"the method {method.name!r} keeps the blocks of all layers and experts"
    if estimator is Estimator.MASK_NODES:
        return "mask-nodes spreads its masks over all parameters"
    return None


def gathered_on_host(problem: Problem, method: Method) -> bool:
    """Whether a merge in parts keeps the importances of all experts on the host, to look at them twice.

    A mean over all parameters is known when the last part is, and a slope is taken when the merge is done.

    Args:
        problem: what is loaded.
        method: row of the method table.
    """
    spec = problem.spec
    if len(problem.parts()) == 1 or method.importance is Importance.UNIFORM:
        return False
    return spec.search.descends or method.scale_for(spec.importance.scale).normalise == "expert"


class Float32(OnDemand[Tensor]):
    """Tensors as they are stored, each of them in float32 when it is asked for.

    Args:
        stored: by name.
        place: where each is asked for, if not where it is.
    """

    def __init__(self, stored: Mapping[str, Tensor], place: PlaceOf | None = None) -> None:
        super().__init__(stored)
        self._place = place

    def __getitem__(self, name: str) -> Tensor:
        found = self._source[name]
        return (found if self._place is None else found.to(self._place(name))).float()


@dataclass
class _Entry:
    """One Fisher: as it was found, or as it has gathered so far; on the leader."""

    key: FisherKey
    stored: Mapping[str, Tensor] | None = None
    looked: bool = False
    gathered: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0


class InParts:
    """The importances of one merge, part by part of the parameters, each part in passes of its own.

    In the cache they are what they would be in one part: a Fisher is looked up whole, and gathers on the host until it
    is whole, if there is a cache.

    Args:
        importances: of the problem.
        names: of all parts.
        progress: told how far it is.
    """

    def __init__(self, importances: Importances, names: Sequence[str], progress: Progress = silent) -> None:
        self._all = importances
        self._names = list(names)
        self._progress = progress
        self._entries: dict[int, _Entry] = {}

    def at(
        self, index: int, coefficient: Coefficient, part: Sequence[str], *, gather: bool = False
    ) -> tuple[Mapping[str, Tensor], bool]:
        """A part of one expert's importance.

        Args:
            index: position of the expert.
            coefficient: lambda.
            part: names.
            gather: whether all parts are kept on the host, also where there is no cache.

        Returns:
            As `Importances.at`.
        """
        own, ranks, place = self._all, self._all.problem.ranks, self._all.problem.resident.place_of
        if index not in self._entries:
            self._entries[index] = _Entry(own.key(index, coefficient, self._names))
        entry = self._entries[index]

        def found() -> dict[str, Tensor] | None:
            if not entry.looked:
                entry.stored, entry.looked = own.shelf.get(entry.key), True
            return None if entry.stored is None else {name: entry.stored[name] for name in part}

        stored = ranks.from_leader(found)
        if stored is not None:
            return Float32(stored, place), True
        start = time.perf_counter()
        which = f", from tensor {self._names.index(part[0]) + 1} of {len(self._names)}"
        values = own.computed(index, coefficient, part, part=which, progress=self._progress)

        def keep() -> dict[str, Tensor]:
            rounded = own.rounded(values)
            entry.seconds += time.perf_counter() - start
            if gather or own.shelf.cache is not None:
                entry.gathered.update({name: value.cpu() for name, value in rounded.items()})
            if len(entry.gathered) == len(self._names):
                own.put(index, coefficient, entry.key, entry.gathered, seconds=entry.seconds)
            return rounded

        kept = ranks.from_leader(keep)
        assert kept is not None
        values.clear()
        return Float32(kept, place), False

    def whole(self, index: int, coefficient: Coefficient) -> tuple[Mapping[str, Tensor], bool]:
        """All parts of one expert's importance, kept on the host; each value is copied when it is asked for.

        Args:
            index: position of the expert.
            coefficient: lambda.

        Returns:
            As `Importances.at`.
        """
        problem = self._all.problem
        hits = [self.at(index, coefficient, part, gather=True)[1] for part in problem.parts(self._names)]
        entry = self._entries[index]
        values = problem.ranks.from_leader(lambda: dict(entry.stored or entry.gathered))
        assert values is not None
        return Float32(values, problem.resident.place_of), all(hits)
