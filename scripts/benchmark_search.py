"""Compare searches of coefficients: how far from the best known merge each is after so many trials.

    python scripts/benchmark_search.py record --out scripts/surfaces/quickstart.npz     every merge of the quickstart
    python scripts/benchmark_search.py grid scripts/surfaces/quickstart.npz --out out   searches of the recorded merges
    python scripts/benchmark_search.py real SPEC --step 0.05 --out out                  searches of real merges
    python scripts/benchmark_search.py table out                                        the tables again

`record` takes a quarter of an hour of one core for each variant, and goes on where it was cut (its logs stand beside
the file; `--part 0/2` and `--part 1/2` share the work between two processes, a last call without `--part` gathers it).
Surfaces that the file has and that are not recorded again stay in it.
`grid` searches recorded surfaces, `real` merges and scores at every trial. All samplers start with the coefficients 1/M
and share their uniform startup points, but for those that have a start of their own (`cmaes`, `qmc`).

    gap          best known score minus the best found so far, points, the mean over seeds (the worst seed)
    at an edge   share of the proposals after the startup with two or more coefficients at 0 or 1
    s            seconds of the processor per proposal
    test         test score of the best trial by validation, points

Samplers: default is a study by this project's default search, which descends first, for `real` only; auto (from uniform
points) and gp are this project's; tpe, cmaes, qmc and random are Optuna's, CMA-ES from 1/M with a deviation of
1/6 (that of mergekit-evolve); bayes_opt is the paper's library with its expected improvement, xi 0.01.  cmaes and
bayes_opt need the extra `benchmark`.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import multiprocessing
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch

from dfmerge_studies import StudySpec, load_problem
from dfmerge_studies.search import make_sampler
from dfmerge_studies.tasks.splits import SPLITS
from dfmerge_studies.trials.marks import TASKS
from dfmerge_studies.trials.space import Space

try:
    from scripts.search_tables import plot, tables
    from scripts.surfaces import VARIANTS, Array, Grid, Merges, RealSurface, Surface, append, gathered, read_log, record
except ModuleNotFoundError:  # run as a file
    from search_tables import plot, tables
    from surfaces import VARIANTS, Array, Grid, Merges, RealSurface, Surface, append, gathered, read_log, record

DEFAULT = "default"
Point = dict[str, float]


@dataclass(frozen=True)
class Setting:
    """One search.

    Attributes:
        names: of the coefficients.
        seed: of the draws.
        trials: how many.
        startup: uniform ones among them, 1/M first.
        step: of the coefficients, None where they are continuous.
    """

    names: tuple[str, ...]
    seed: int
    trials: int
    startup: int
    step: float | None = None

    def start(self) -> list[Point]:
        """1/M and uniform points, the same for all samplers of a seed."""
        draws = np.random.default_rng(self.seed).random((self.startup - 1, len(self.names)))
        rows = [[1 / len(self.names)] * len(self.names), *draws.tolist()]
        return [{name: self.rounded(value) for name, value in zip(self.names, row, strict=True)} for row in rows]

    def rounded(self, value: float) -> float:
        """A coefficient on the step, without the rounding of its products."""
        return value if self.step is None else round(round(value / self.step) * self.step, 10)


def optuna_search(
    setting: Setting, surface: Surface, sampler: optuna.samplers.BaseSampler, *, start: bool
) -> list[Any]:
    """Search with a sampler of Optuna; (point, scores, seconds of the proposal) per trial."""
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for point in setting.start() if start else setting.start()[:1]:
        study.enqueue_trial(point)
    found = []
    for _ in range(setting.trials):
        begin = time.process_time()
        trial = study.ask()
        ranges = {name: trial.suggest_float(name, 0.0, 1.0, step=setting.step) for name in setting.names}
        point = {name: setting.rounded(value) for name, value in ranges.items()}
        seconds = time.process_time() - begin
        scores = surface(point)
        trial.set_user_attr(TASKS, {f"task {i}": score / 100 for i, score in enumerate(scores)})
        study.tell(trial, float(scores.mean()) / 100)
        found.append((point, scores, seconds))
    return found


def ours(name: str) -> Callable[[Setting, Surface], list[Any]]:
    """A sampler of this project."""

    def search(setting: Setting, surface: Surface) -> list[Any]:
        space = Space(setting.names, 0.0, 1.0, step=setting.step)
        sampler = make_sampler(
            name, seed=setting.seed, study_name="benchmark", space=space, startup_trials=setting.startup
        )
        return optuna_search(setting, surface, sampler, start=True)

    return search


def tpe(setting: Setting, surface: Surface) -> list[Any]:
    """Optuna's tree-structured Parzen estimator."""
    sampler = optuna.samplers.TPESampler(seed=setting.seed, n_startup_trials=setting.startup, multivariate=True)
    return optuna_search(setting, surface, sampler, start=True)


def cmaes(setting: Setting, surface: Surface) -> list[Any]:
    """CMA-ES from 1/M."""
    first = setting.start()[0]
    sampler = optuna.samplers.CmaEsSampler(x0=first, sigma0=1 / 6, seed=setting.seed, n_startup_trials=1)
    return optuna_search(setting, surface, sampler, start=False)


def qmc(setting: Setting, surface: Surface) -> list[Any]:
    """Scrambled Sobol points."""
    sampler = optuna.samplers.QMCSampler(scramble=True, seed=setting.seed, warn_independent_sampling=False)
    return optuna_search(setting, surface, sampler, start=False)


def bayes_opt(setting: Setting, surface: Surface) -> list[Any]:
    """The paper's library, with its expected improvement."""
    from bayes_opt import BayesianOptimization, acquisition

    ranges = dict.fromkeys(setting.names, (0.0, 1.0))
    search = BayesianOptimization(
        None,
        ranges,
        acquisition_function=acquisition.ExpectedImprovement(xi=0.01, random_state=setting.seed),
        random_state=setting.seed,
        verbose=0,
        allow_duplicate_points=True,
    )
    found: list[Any] = []
    for start in [*setting.start(), *[None] * (setting.trials - setting.startup)]:
        begin = time.process_time()
        point = {n: setting.rounded(float(v)) for n, v in (start or search.suggest()).items()}
        seconds = time.process_time() - begin
        scores = surface(point)
        search.register(point, float(scores.mean()) / 100)
        found.append((point, scores, seconds))
    return found


SAMPLERS: dict[str, Callable[[Setting, Surface], list[Any]]] = {
    "auto": ours("auto"),
    "gp": ours("gp"),
    "random": ours("random"),
    "bayes_opt": bayes_opt,
    "tpe": tpe,
    "cmaes": cmaes,
    "qmc": qmc,
}


def by_study(real: RealSurface) -> Callable[[Setting, Surface], list[Any]]:
    """The default search, which asks for slopes besides scores; its proposals are not timed."""

    def search(setting: Setting, surface: Surface) -> list[Any]:
        return [(point, scores, float("nan")) for point, scores in real.search(setting.trials, setting.startup)]

    return search


def run(
    search: Callable[[Setting, Surface], list[Any]], setting: Setting, surface: Surface, test: Surface | None
) -> dict[str, Any]:
    """One search, as it is logged."""
    found = search(setting, surface)
    values = [float(scores.mean()) for _, scores, _ in found]
    best = int(np.argmax(values))
    return {
        "trials": [[point[n] for n in setting.names] for point, _, _ in found],
        "scores": [[round(float(score), 3) for score in scores] for _, scores, _ in found],
        "startup": setting.startup,
        "seconds": sum(seconds for _, _, seconds in found[setting.startup :]) / max(1, len(found) - setting.startup),
        "test": None if test is None else [round(float(score), 3) for score in test(found[best][0])],
    }


def done(log: Path) -> set[tuple[str, str, int]]:
    """Which searches a log has, by variant, sampler and seed."""
    return {(line["variant"], line["sampler"], line["seed"]) for line in read_log(log)}


def on_grid(job: tuple[Path, str, str, Setting]) -> dict[str, Any]:
    """One search of a recorded surface."""
    file, variant, sampler, setting = job
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    grid = Grid.load(file)
    test = grid.surface(variant, "test") if variant in grid.test else None
    found = run(SAMPLERS[sampler], setting, grid.surface(variant), test)
    return {"variant": variant, "sampler": sampler, "seed": setting.seed, **found}


def search_grid(options: argparse.Namespace, log: Path) -> None:
    """Search recorded surfaces, several at once."""
    grid, known = Grid.load(options.surface), done(log)
    jobs = [
        (options.surface, variant, sampler, Setting(tuple(grid.experts), seed, options.trials, options.startup))
        for variant in options.variants or list(grid.validation)
        for seed in range(options.seeds)
        for sampler in options.samplers
        if (variant, sampler, seed) not in known
    ]
    if options.jobs == 1:
        for job in jobs:
            append(log, on_grid(job))
        return
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for line in pool.imap(on_grid, jobs):
            append(log, line)


def search_real(options: argparse.Namespace, log: Path) -> None:
    """Search real merges; the same point is merged and scored once per variant and seed."""
    spec = StudySpec.from_yaml(options.spec)
    merges = Merges(load_problem(spec), options.fishers)
    names, known = tuple(merges.problem.experts), done(log)
    for seed in range(options.seeds):
        for variant in options.variants or list(VARIANTS):
            real = RealSurface.of_seed(merges, variant, seed)
            memory: dict[tuple[float, ...], Array] = {}

            def surface(point: Mapping[str, float], real: RealSurface = real, memory: Any = memory) -> Array:
                at = tuple(point.values())
                if at not in memory:
                    memory[at] = real(point)
                return memory[at]

            for sampler in options.samplers:
                if (variant, sampler, seed) in known:
                    continue
                setting = Setting(names, seed, options.trials, options.startup, options.step)
                search = by_study(real) if sampler == DEFAULT else SAMPLERS[sampler]
                found = run(search, setting, surface, lambda point, real=real: real(point, "test"))
                append(log, {"variant": variant, "sampler": sampler, "seed": seed, **found})
                print(json.dumps({"variant": variant, "sampler": sampler, "seed": seed}), flush=True)


def part_of(text: str) -> tuple[int, int]:
    """`0/2` as (0, 2)."""
    which, _, of = text.partition("/")
    return int(which), int(of)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="score every merge of the quickstart's grid")
    recording.add_argument("--out", type=Path, required=True, help="file of the surfaces, .npz")
    recording.add_argument("--part", type=part_of, help="only this part of the points, e.g. 0/2; nothing is gathered")
    recording.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    recording.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS))
    for name in ("grid", "real"):
        each = commands.add_parser(name, help=f"search {'recorded' if name == 'grid' else 'real'} merges")
        if name == "grid":
            each.add_argument("surface", type=Path, help="file of the surfaces")
            each.add_argument("--jobs", type=int, default=1, help="searches at once")
        else:
            each.add_argument("spec", type=Path, help="spec with 3 to 6 experts")
            each.add_argument("--step", type=float, default=0.05, help="of the coefficients")
            each.add_argument("--fishers", type=Path, help="folder to keep the Fishers in")
        each.add_argument("--out", type=Path, required=True, help="folder for log, tables and plot")
        each.add_argument("--variants", nargs="+", choices=VARIANTS)
        samplers = [*SAMPLERS] if name == "grid" else [DEFAULT, *SAMPLERS]
        each.add_argument("--samplers", nargs="+", choices=samplers, default=samplers)
        each.add_argument("--seeds", type=int, default=8 if name == "grid" else 5)
        each.add_argument("--trials", type=int, default=60)
        each.add_argument("--startup", type=int, default=10)
    again = commands.add_parser("table", help="print the tables of a folder again")
    again.add_argument("out", type=Path, help="folder of `grid` or `real`")
    again.add_argument("--surface", type=Path, help="file of the surfaces that were searched")
    return parser.parse_args()


def main() -> None:
    """Run a command."""
    options = parse()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if options.command == "record":
        spec = StudySpec.from_yaml(
            Path(str(importlib.resources.files("dfmerge_studies") / "quickstart/quickstart.yaml"))
        )
        logs = {
            variant: {split: options.out.with_suffix(f".{variant}.{split}.jsonl") for split in options.splits}
            for variant in options.variants
        }
        for variant, each in logs.items():
            record(spec, variant, each, part=options.part or (0, 1))
        if options.part is None:
            grid = Grid.load(options.out) if options.out.exists() else Grid(list(spec.experts), list(spec.tasks))
            flat = {(variant, split): log for variant, each in logs.items() for split, log in each.items()}
            gathered(grid, flat).save(options.out)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "searches.jsonl"
    if options.command == "grid":
        search_grid(options, log)
    elif options.command == "real":
        search_real(options, log)
    surface = getattr(options, "surface", None)
    grid = Grid.load(surface) if surface else None
    text = "\n".join(tables(log, grid))
    print(text)
    (options.out / "tables.md").write_text(text + "\n", encoding="utf-8")
    plot(log, grid, options.out / "gaps.png")


if __name__ == "__main__":
    main()
