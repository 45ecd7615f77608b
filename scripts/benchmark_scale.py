"""How many workers one study carries: cheap trials through the real loop, on every storage engine.

    python scripts/benchmark_scale.py --engines sqlite journal postgres --workers 1 4 8 --trials 64
    python scripts/benchmark_scale.py --engines sqlite --workers 4 --seconds 1      # trials that take a second each
    python scripts/benchmark_scale.py --gp 50 100 200                               # CPU seconds of one suggestion

Every worker is a process that calls `trials.loop.work`, as `dfmerge run` does, with random proposals and an objective
that costs nothing, or sleeps.  The clock runs from the moment when all have joined to the end of the last.  Statements
are those that the workers send to the database, transactions' begin and end aside.  CPU seconds are the workers' own,
so they mean something on a busy machine too; their reciprocal is the most that one core gives.  `postgres` starts a
server on loopback, `grpc` a storage proxy in front of it; both come from the test fixtures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def worker(settings: dict[str, Any]) -> None:
    """Join, say so, wait for the word, work, and report."""
    import optuna
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    from dfmerge_studies.search import make_sampler
    from dfmerge_studies.storage import join_study, open_storage
    from dfmerge_studies.trials.loop import work
    from dfmerge_studies.trials.results import TrialResult
    from dfmerge_studies.trials.space import Space

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    statements = 0

    def count(*arguments: Any) -> None:
        nonlocal statements
        statements += 1

    space = Space(tuple(f"expert{i}" for i in range(settings["coefficients"])))
    sampler = make_sampler("random", seed=0, study_name="scale", space=space)
    study = join_study(open_storage(settings["url"]), "scale", directions=["maximize"], sampler=sampler)
    print("ready", flush=True)
    sys.stdin.readline()
    event.listen(Engine, "before_cursor_execute", count)

    def evaluate(point: dict[str, float], place: int) -> TrialResult:
        time.sleep(settings["seconds"])
        return TrialResult((sum(point.values()),), {"tasks": point, "seconds": {"merge": 0.0}, "coefficients": point})

    begun = time.process_time()
    summary = work(study, space, evaluate, target=settings["trials"])
    used = time.process_time() - begun
    print(json.dumps({"completed": summary.completed, "statements": statements, "cpu": used}), flush=True)


@contextlib.contextmanager
def storage(engine: str, folder: Path) -> Iterator[str]:
    """The URL of an empty storage of one engine."""
    from tests.servers import ProxyServer, running_postgres

    if engine in ("sqlite", "journal"):
        yield f"{engine}:///{folder}/study.{'db' if engine == 'sqlite' else 'log'}"
        return
    with running_postgres() as server:
        url = server.database()
        if engine == "postgres":
            yield url
            return
        proxy = ProxyServer(url)
        proxy.start()
        try:
            yield proxy.url
        finally:
            proxy.kill()


def measure(engine: str, workers: int, trials: int, seconds: float, coefficients: int) -> dict[str, Any]:
    """Run one study to its total; check that the total is exact."""
    from dfmerge_studies.storage import load_study, open_storage
    from dfmerge_studies.trials.reading import counts

    with tempfile.TemporaryDirectory() as folder, storage(engine, Path(folder)) as url:
        settings = {"url": url, "trials": trials, "seconds": seconds, "coefficients": coefficients}
        processes = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", __file__, "--worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for _ in range(workers)
        ]
        for process in processes:
            print(json.dumps(settings), file=process.stdin, flush=True)
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        begun = time.perf_counter()
        for process in processes:
            print(file=process.stdin, flush=True)
        reports = [json.loads(process.communicate()[0]) for process in processes]
        elapsed = time.perf_counter() - begun
        assert counts(load_study(open_storage(url), "scale"))["complete"] == trials
        assert sum(report["completed"] for report in reports) == trials
    rate = trials / elapsed
    return {
        "engine": engine,
        "workers": workers,
        "trials": trials,
        "seconds": round(elapsed, 2),
        "trials_per_second": round(rate, 2),
        "ideal": round(workers / seconds, 2) if seconds else None,
        "cpu_per_trial": round(sum(report["cpu"] for report in reports) / trials, 4),
        "statements_per_trial": round(sum(report["statements"] for report in reports) / trials, 1) or None,
    }


def suggestion_seconds(trials: int, coefficients: int) -> float:
    """CPU seconds that the Gaussian process takes for one suggestion after so many completed trials."""
    import optuna

    from dfmerge_studies.search import make_sampler
    from dfmerge_studies.trials.space import Space

    space = Space(tuple(f"expert{i}" for i in range(coefficients)))
    study = optuna.create_study(
        direction="maximize", sampler=make_sampler("gp", seed=0, study_name="gp", space=space), study_name="gp"
    )
    draw = make_sampler("random", seed=1, study_name="gp", space=space)
    points = optuna.create_study(direction="maximize", sampler=draw)
    for _ in range(trials):
        trial = points.ask(space.distributions())
        points.tell(trial, -sum((value - 0.4) ** 2 for value in trial.params.values()))
    study.add_trials(points.trials)
    begun = time.process_time()
    study.ask(space.distributions())
    return time.process_time() - begun


def main() -> None:
    """Measure what the arguments ask for; one JSON line each."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--engines", nargs="*", default=[], choices=["sqlite", "journal", "postgres", "grpc"])
    options.add_argument("--workers", nargs="+", type=int, default=[1, 4])
    options.add_argument("--trials", type=int, default=64)
    options.add_argument("--seconds", type=float, default=0.0, help="that a trial takes")
    options.add_argument("--coefficients", type=int, default=6)
    options.add_argument("--gp", nargs="*", type=int, default=[], help="completed trials before a timed suggestion")
    options.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.worker:
        worker(json.loads(sys.stdin.readline()))
        return
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for engine in given.engines:
        for workers in given.workers:
            print(json.dumps(measure(engine, workers, given.trials, given.seconds, given.coefficients)), flush=True)
    if given.gp:
        suggestion_seconds(12, given.coefficients)  # what is loaded and compiled once
    for trials in given.gp:
        seconds = suggestion_seconds(trials, given.coefficients)
        print(json.dumps({"gp_trials": trials, "suggestion_seconds": round(seconds, 3)}), flush=True)


if __name__ == "__main__":
    main()
