"""Surfaces that searches are compared on: what a merge scores at a point, from a recorded grid or by merging.

    point     coefficients by expert                         {name: float}
    scores    validation score per task, in points of 100    (T,)
    surface   point -> scores

A recorded surface has the scores of every merge of a grid over [0, 1]; between its points each task's score is
interpolated linearly along every coefficient.  A real one merges and scores, at points of a step, so that one Fisher
per expert and step serves all searches.  A variant is a method with settings of its importance.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from optuna.trial import TrialState
from transformers import BertModel

from dfmerge_studies import Merger, StudySpec, load_problem, open_study
from dfmerge_studies.importance.cache import open_cache
from dfmerge_studies.methods import METHODS, Scale
from dfmerge_studies.objective.derive import derive_problem
from dfmerge_studies.objective.problem import Problem
from dfmerge_studies.tasks.splits import Split
from dfmerge_studies.trials.marks import TASKS, place_of

VARIANTS: dict[str, tuple[str, Scale]] = {
    "df-merge": ("df-merge", Scale()),
    "df-merge-root": ("df-merge", Scale("none", 0.5)),
    "df-merge-expert": ("df-merge", Scale("expert")),
    "df-merge-expert-root": ("df-merge", Scale("expert", 0.5)),
    "df-merge-tensor": ("df-merge", Scale("tensor")),
    "df-merge-tensor-root": ("df-merge", Scale("tensor", 0.5)),
    "gta": ("gta", Scale()),
}
Array = NDArray[np.float64]
Surface = Callable[[Mapping[str, float]], Array]


class Merges:
    """Merges of one loaded problem, under any variant, which share their Fishers.

    Args:
        problem: the loaded spec.
        cache: folder of Fishers; None: one that ends with this object.
    """

    def __init__(self, problem: Problem, cache: Path | None) -> None:
        self.problem = problem
        self._folder = TemporaryDirectory(prefix="dfmerge-") if cache is None else None
        self._cache = open_cache(self._folder.name if self._folder is not None else str(cache), Path.cwd())
        self._mergers: dict[str, Merger] = {}
        self._scorer = Merger(problem, METHODS["gta"], None)
        score_faster_(problem)

    def merge_(self, variant: str, point: Mapping[str, float]) -> None:
        """Write the merge at a point into the resident model."""
        if variant not in self._mergers:
            method, scale = VARIANTS[variant]
            spec = self.problem.spec.derive(importance=asdict(scale))
            problem = derive_problem(self.problem, spec, indices=self.problem.fisher_indices())
            self._mergers[variant] = Merger(problem, METHODS[method], self._cache)
        self._mergers[variant].merge_(point)

    def scores(self, split: Split, problem: Problem | None = None) -> Array:
        """Points per task of the model as it stands.

        Args:
            split: of the tasks' data.
            problem: one derived from this one, for other rows.
        """
        merger = self._scorer if problem is None else Merger(problem, METHODS["gta"], None)
        found = merger.scores(split)
        return np.array([100.0 * found[task] for task in self.problem.tasks])


def score_faster_(problem: Problem) -> None:
    """Let a BERT compute once per batch what all merges have in common, and not what its pooler does not read.

    The former are the layers below the first one that an expert changes, the latter the last layer's feed-forward part
    at all positions but the first. Scores stay the same; passes for gradients and other models are left as they are.

    Args:
        problem: whose resident model is scored.
    """
    bert, changed = problem.resident.model.base_model, set(problem.resident.names)
    if not isinstance(bert, BertModel) or bert.pooler is None:
        return
    names = {id(parameter): name for name, parameter in problem.resident.model.named_parameters()}
    untouched = [
        changed.isdisjoint(names[id(p)] for p in part.parameters()) for part in (bert.embeddings, *bert.encoder.layer)
    ]
    lower = list(bert.encoder.layer)[: max(0, [*untouched, False].index(False) - 1)]
    forwards, outputs = [layer.forward for layer in lower], dict[bytes, torch.Tensor]()

    def through_all(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        key = xxhash.xxh3_128_digest(hidden.cpu().numpy())
        if key not in outputs:
            outputs[key] = functools.reduce(lambda below, forward: forward(below, *args, **kwargs), forwards, hidden)
        return outputs[key]

    def through(hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden

    for layer, forward, scoring in zip(lower, forwards, [through_all, *[through] * len(lower)], strict=False):
        layer.forward = _unless_gradients(forward, scoring)
    last = bert.encoder.layer[-1]
    feed = last.feed_forward_chunk
    last.feed_forward_chunk = _unless_gradients(feed, lambda hidden: feed(hidden[:, :1]))


def _unless_gradients(usual: Callable[..., torch.Tensor], scoring: Callable[..., torch.Tensor]) -> Any:
    @functools.wraps(usual)  # transformers looks at how many arguments it takes
    def either(*args: Any, **kwargs: Any) -> torch.Tensor:
        return (usual if torch.is_grad_enabled() else scoring)(*args, **kwargs)

    return either


@dataclass
class Grid:
    """A recorded surface.

    Attributes:
        experts: names, one axis each.
        tasks: names.
        validation: scores by variant, shape (K, ..., K, T).
        test: the same on test.
    """

    experts: list[str]
    tasks: list[str]
    validation: dict[str, Array] = field(default_factory=dict)
    test: dict[str, Array] = field(default_factory=dict)

    def surface(self, variant: str, split: Literal["validation", "test"] = "validation") -> Surface:
        """The surface of a variant, linear between grid points along every coefficient."""
        values = (self.validation if split == "validation" else self.test)[variant]
        steps = values.shape[0] - 1

        def at(point: Mapping[str, float]) -> Array:
            place = steps * np.clip([point[name] for name in self.experts], 0.0, 1.0)
            low = np.minimum(place.astype(int), steps - 1)
            part, total = place - low, np.zeros(len(self.tasks))
            for corner in itertools.product((0, 1), repeat=len(self.experts)):
                weight = np.prod([p if c else 1 - p for p, c in zip(part, corner, strict=True)])
                total += weight * values[tuple(low + corner)]
            return total

        return at

    def best(self, variant: str) -> float:
        """The best mean of validation scores; linear pieces have their largest value at a grid point."""
        return float(self.validation[variant].mean(-1).max())

    def save(self, file: Path) -> None:
        """Write it, scores in hundredths of a point."""
        arrays = {f"{split}.{name}": np.round(100 * values).astype(np.uint16) for split, name, values in self._parts()}
        names = {"experts": np.array(self.experts), "tasks": np.array(self.tasks)}
        np.savez_compressed(file, **names, **arrays)

    def _parts(self) -> Iterator[tuple[str, str, Array]]:
        yield from (("validation", name, values) for name, values in self.validation.items())
        yield from (("test", name, values) for name, values in self.test.items())

    @classmethod
    def load(cls, file: Path) -> Grid:
        """Read it."""
        with np.load(file) as stored:
            grid = cls(stored["experts"].tolist(), stored["tasks"].tolist())
            for key in stored.files:
                split, _, name = key.partition(".")
                if name:
                    (grid.validation if split == "validation" else grid.test)[name] = stored[key] / 100.0
        return grid


def record(
    spec: StudySpec, variant: str, logs: Mapping[Split, Path], *, steps: int = 10, part: tuple[int, int] = (0, 1)
) -> None:
    """Score every merge of a grid; what the logs have is not done again.

    Args:
        spec: what is merged.
        variant: row of `VARIANTS`.
        logs: by what is scored; one JSON line per point is appended, see `gathered`.
        steps: of the grid, per coefficient.
        part: which of how many equal parts, so that several processes can share the work.
    """
    every = list(itertools.product(range(steps + 1), repeat=len(spec.experts)))[part[0] :: part[1]]
    known = {split: {tuple(line["x"]) for line in read_log(log)} for split, log in logs.items()}
    missing = {x: lacking for x in every if (lacking := [split for split in logs if x not in known[split]])}
    if not missing:
        return
    merges = Merges(load_problem(spec), None)
    for x, lacking in missing.items():
        merges.merge_(variant, {name: k / steps for name, k in zip(merges.problem.experts, x, strict=True)})
        for split in lacking:
            append(logs[split], {"x": x, "scores": merges.scores(split).round(4).tolist()})


def gathered(grid: Grid, logs: Mapping[tuple[str, Split], Path], steps: int = 10) -> Grid:
    """A grid with the surfaces of logs, by variant and split; those that lack points are left out."""
    for (variant, split), log in logs.items():
        values = np.full((*(steps + 1,) * len(grid.experts), len(grid.tasks)), np.nan)
        for line in read_log(log):
            values[tuple(line["x"])] = line["scores"]
        missing = int(np.isnan(values).any(-1).sum())
        if missing:
            print(f"{log} lacks {missing} points of {variant} on {split}")
            continue
        (grid.validation if split == "validation" else grid.test)[variant] = values
    return grid


def read_log(file: Path) -> list[dict[str, Any]]:
    """The lines of a log, none where there is no file; a last line that was cut is left out."""
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def append(file: Path, line: Mapping[str, Any]) -> None:
    """Add a line to a log, in the place of a last one that was cut."""
    with file.open("a+b") as stream:
        stream.seek(0)
        stream.truncate(stream.read().rfind(b"\n") + 1)
        stream.write(json.dumps(line).encode() + b"\n")


@dataclass(frozen=True)
class RealSurface:
    """Real merges of one variant, scored on the validation rows of one seed.

    Attributes:
        merges: of the loaded spec.
        variant: row of `VARIANTS`.
        rows: the problem with that seed's rows.
    """

    merges: Merges
    variant: str
    rows: Problem

    @classmethod
    def of_seed(cls, merges: Merges, variant: str, seed: int) -> RealSurface:
        """Other validation rows than another seed's; the Fisher inputs are the same."""
        problem = merges.problem
        spec = problem.spec.derive(search={"seed": seed})
        return cls(merges, variant, derive_problem(problem, spec, indices=problem.fisher_indices()))

    def __call__(self, point: Mapping[str, float], split: Split = "validation") -> Array:
        """Merge at a point and score."""
        self.merges.merge_(self.variant, point)
        return self.merges.scores(split, self.rows)

    def search(self, trials: int, startup: int) -> list[tuple[dict[str, float], Array]]:
        """A study of its own by the default search, whose startup descends: points and scores, in the order of places.

        Args:
            trials: how many.
            startup: steps down the loss among them.
        """
        (method, scale), rows = VARIANTS[self.variant], self.rows
        search = {"sampler": "auto", "startup": "descent", "startup_trials": startup, "trials": trials, "holdout": 0}
        with TemporaryDirectory(prefix="dfmerge-") as folder:
            spec = rows.spec.derive(
                storage=f"sqlite:///{folder}/study.db",
                method=method,
                importance={**asdict(scale), "indices": rows.fisher_indices()},
                search=search,
                cache="none",
            )
            session = open_study(spec, problem=rows)
            session.run(name_winner=False)
            done = sorted(session.study.get_trials(states=[TrialState.COMPLETE]), key=place_of)
        return [(each.params, np.array([100.0 * each.user_attrs[TASKS][task] for task in rows.tasks])) for each in done]
