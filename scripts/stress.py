"""Workers on one study, killed, stopped and cut off from their database at random; one line of verdict.

    python scripts/stress.py --database postgres --minutes 10 --seed 3

The objective is cheap, everything else is real: processes, signals, the database and its server (PostgreSQL comes with
the extra `test`).  The seed fixes what is done and after how long; what it meets is up to the machine.  Exit code 0:
every result is there once, the total is exact, and nothing is stuck.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from optuna.trial import TrialState

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dfmerge_studies.trials.marks import OWNER
from dfmerge_studies.trials.reading import counts
from tests.place import Crowd, Place
from tests.servers import PostgresServer, running_postgres

ACTIONS = {"kill": 6, "short stop": 2, "stop past the grace": 1, "sigterm": 1}
RESTARTS = {"fast restart": 1, "immediate restart": 1}
GRACE_SECONDS = 3
PATIENCE_SECONDS = 10  # that a kill waits for a trial at work


def main() -> None:
    """Parse the command line, run, print the verdict."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--database", choices=["sqlite", "journal", "postgres"], default="sqlite")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        server = stack.enter_context(running_postgres()) if given.database == "postgres" else None
        url = server.database() if server else f"{given.database}:///{folder}/study"
        place = Place(
            Path(folder),
            url,
            seconds=0.05,
            target=10,
            heartbeat=1,
            grace=GRACE_SECONDS,
            sampler="random",
            constraints=1,
        )
        try:
            done = torment(place, server, given.workers, 60 * given.minutes, random.Random(given.seed))
            place.check_whole(deaths=True)
        except AssertionError as error:
            print(f"FAILED: {given.database}, seed {given.seed}: {error}")
            sys.exit(1)
        now = counts(place.study())
        evaluated = len(place.evaluations())
    acts = ", ".join(f"{count} x {what}" for what, count in sorted(done.items()))
    print(
        f"ok: {given.database}, seed {given.seed}, {given.workers} workers, {given.minutes:g} minutes ({acts}): "
        f"{now['complete']} results, each there once, total exact; {evaluated} evaluations, "
        f"{now['failed']} points given up after four deaths"
    )


def torment(
    place: Place, server: PostgresServer | None, size: int, seconds: float, moments: random.Random
) -> collections.Counter[str]:
    """Do harm until the time is over, then let the workers finish.

    Args:
        place: where they work.
        server: what may be restarted.
        size: number of workers.
        seconds: how long.
        moments: decides what happens when.

    Returns:
        How often each thing was done.

    Raises:
        AssertionError: a worker ended as it should not.
    """
    weights = {**ACTIONS, **(RESTARTS if server is not None else {})}
    done: collections.Counter[str] = collections.Counter()
    end = time.monotonic() + seconds
    with Crowd(place, size) as crowd:
        while time.monotonic() < end:
            crowd.fill()
            time.sleep(moments.uniform(0.0, 1.0))
            (action,) = moments.choices(list(weights), list(weights.values()))
            done[action] += 1
            if action == "kill":
                done["kill of a trial at work"] += kill_at_work(crowd, moments)
            elif server is not None and action.endswith("restart"):
                crowd.excused = list(crowd.workers)
                server.stop(action.split()[0])
                time.sleep(moments.uniform(0.0, 2.0))
                server.start()
            else:
                signal_one(crowd, action, moments)
        crowd.fill()
        place.settings["target"] += 10
        crowd.wait()
    place.run()
    return done


def kill_at_work(crowd: Crowd, moments: random.Random) -> bool:
    """Kill a worker while it runs a trial, not while it starts; any worker where none comes to one in time.

    Args:
        crowd: the workers.
        moments: chooses the worker.

    Returns:
        Whether the worker had a running trial.
    """
    until = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < until:
        with contextlib.suppress(Exception):  # the server may be away
            running = crowd.place.study().get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            owners = {trial.user_attrs.get(OWNER, {}).get("pid") for trial in running}
            victims = [worker for worker in crowd.workers if worker.is_alive() and worker.pid in owners]
            if victims:
                victim = moments.choice(victims)
                victim.kill()
                victim.join()
                return True
        time.sleep(0.05)
    crowd.kill(moments)
    return False


def signal_one(crowd: Crowd, action: str, moments: random.Random) -> None:
    """Send a signal to one of the workers.

    Args:
        crowd: the workers.
        action: what to do.
        moments: chooses the worker.
    """
    victim = moments.choice(crowd.workers)
    if victim.pid is None or not victim.is_alive():
        return
    if action == "sigterm":
        os.kill(victim.pid, signal.SIGTERM)
        return
    os.kill(victim.pid, signal.SIGSTOP)
    time.sleep(2 * GRACE_SECONDS if action == "stop past the grace" else moments.uniform(0.0, 1.0))
    os.kill(victim.pid, signal.SIGCONT)


if __name__ == "__main__":
    main()
