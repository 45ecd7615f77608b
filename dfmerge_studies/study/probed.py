"""What probes have found, and how a study keeps it: as JSON in an attribute, under names that do not change.

dfmerge:probe:interpolation     `ScoredLines`
dfmerge:probe:ratios            `Rechosen`
dfmerge:probe:landscape:I:J     `ScoredPlane` of the experts at places I and J
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import optuna

from dfmerge_studies.tasks.splits import Split

PROBE = "dfmerge:probe"
INTERPOLATION, RATIOS, LANDSCAPE = "interpolation", "ratios", "landscape"


def stored_probe(study: optuna.Study, name: str) -> dict[str, Any] | None:
    """What a probe found, as it is stored, if it has been made."""
    found = study.user_attrs.get(f"{PROBE}:{name}")
    return dict(found) if found is not None else None


def keep_probe(study: optuna.Study, name: str, found: Mapping[str, Any]) -> None:
    """Write what a probe found, as it is stored."""
    study.set_user_attr(f"{PROBE}:{name}", dict(found))


@dataclass(frozen=True)
class ScoredLines:
    """Scores along theta_pre + lam * tau[i], for each expert i.

    Attributes:
        lambdas: positions, from 0 (the base) to 1 (the expert).
        scores: per expert whose line is whole, task scores at every position.
    """

    lambdas: Sequence[float]
    scores: Mapping[str, Sequence[Mapping[str, float]]]

    @classmethod
    def of(cls, study: optuna.Study) -> ScoredLines | None:
        """What a study has of them, if any."""
        stored = stored_probe(study, INTERPOLATION)
        return None if stored is None else cls(stored["lambdas"], stored["scores"])

    def keep(self, study: optuna.Study) -> None:
        """Write it."""
        keep_probe(study, INTERPOLATION, asdict(self))


@dataclass(frozen=True)
class Rechosen:
    """The trials that would have been chosen on a share of the validation rows.

    Attributes:
        ratios: shares, rising.
        split: where the chosen trials are scored: test where all tasks have one, else validation.
        chosen: per draw of the rows, a trial's number per ratio.
        scores: by number of a chosen trial, what it is worth on the whole split.
        trials: numbers of those that could be chosen, rising.
    """

    ratios: Sequence[float]
    split: Split
    chosen: Sequence[Sequence[int]]
    scores: Mapping[int, float]
    trials: Sequence[int]

    @classmethod
    def of(cls, study: optuna.Study) -> Rechosen | None:
        """What a study has of them, if any."""
        stored = stored_probe(study, RATIOS)
        if stored is None:
            return None
        scores = {int(number): score for number, score in stored["scores"].items()}
        return cls(stored["ratios"], stored["split"], stored["chosen"], scores, stored["trials"])

    def keep(self, study: optuna.Study) -> None:
        """Write it."""
        scores = {str(number): score for number, score in self.scores.items()}
        keep_probe(study, RATIOS, {**asdict(self), "scores": scores})


class ScoredPlace(NamedTuple):
    """A merge in a plane: its place along both axes, and its score."""

    x: float
    y: float
    score: float


@dataclass(frozen=True)
class BestPlace:
    """Where a study's best trial lies in a plane: its method, its number, its place along both axes."""

    method: str
    number: int
    place: tuple[float, float]


@dataclass(frozen=True)
class ScoredPlane:
    """Merges of two experts over a grid of coefficients, in their plane.

    Attributes:
        experts: the two.
        tasks: those whose mean is the score.
        lambdas: coefficients of either expert.
        corners: places of the two experts.
        methods: per method, the merge at lambdas[i], lambdas[j], by (i, j); some may be missing after an interruption.
        best: of the study, where it has no other expert.
    """

    experts: tuple[str, str]
    tasks: Sequence[str]
    lambdas: Sequence[float]
    corners: tuple[tuple[float, float], tuple[float, float]]
    methods: Mapping[str, Mapping[tuple[int, int], ScoredPlace]]
    best: BestPlace | None = None

    @classmethod
    def of(cls, study: optuna.Study, first: int, second: int) -> ScoredPlane | None:
        """What a study has of the experts at two places, if any."""
        stored = stored_probe(study, _plane_name(first, second))
        if stored is None:
            return None
        methods = {
            method: {_cell(key): ScoredPlace(*cell) for key, cell in cells.items()}
            for method, cells in stored["methods"].items()
        }
        (a, b), (u, v), best = stored["experts"], stored["corners"], stored.get("best")
        return cls(
            (a, b),
            stored["tasks"],
            stored["lambdas"],
            ((u[0], u[1]), (v[0], v[1])),
            methods,
            None if best is None else BestPlace(best["method"], best["number"], (best["place"][0], best["place"][1])),
        )

    def keep(self, study: optuna.Study, first: int, second: int) -> None:
        """Write it."""
        stored = {
            "experts": list(self.experts),
            "tasks": list(self.tasks),
            "lambdas": list(self.lambdas),
            "corners": [list(corner) for corner in self.corners],
            "methods": {
                method: {f"{i} {j}": list(place) for (i, j), place in cells.items()}
                for method, cells in self.methods.items()
            },
        }
        if self.best is not None:
            stored["best"] = {**asdict(self.best), "place": list(self.best.place)}
        keep_probe(study, _plane_name(first, second), stored)

    @property
    def whole(self) -> bool:
        """Whether every merge is there."""
        return bool(self.methods) and all(len(cells) == len(self.lambdas) ** 2 for cells in self.methods.values())


def _cell(key: str) -> tuple[int, int]:
    i, j = key.split()
    return int(i), int(j)


def _plane_name(first: int, second: int) -> str:
    """Name under which a pair's plane is kept; by place, since an expert's name may hold anything."""
    return f"{LANDSCAPE}:{first}:{second}"
