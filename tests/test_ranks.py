"""Several real processes as one worker: the same results as one process, and faults that end in good order."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from safetensors.torch import load_file

from dfmerge_studies.methods import METHODS
from dfmerge_studies.objective.derive import derive_problem
from dfmerge_studies.objective.loading import load_problem
from dfmerge_studies.objective.merger import Merger
from dfmerge_studies.objective.problem import Problem
from dfmerge_studies.points import Point
from dfmerge_studies.ranks import Ranks, launched
from dfmerge_studies.spec import StudySpec
from dfmerge_studies.study.session import Session, open_study, stored_study
from dfmerge_studies.trials.reading import results
from tests import ranks_child
from tests.processes import Forked, command, free_port
from tests.project import Project, cli_environment, make_project, start_ranks
from tests.ranks_child import ESTIMATORS, POINT, reseeded, weights, with_estimator
from tests.test_generate_tasks import generating
from tests.test_lm_eval import CASES, harness_project

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.timeout(1800)  # a dozen starts of torch, perhaps on a busy machine
SIZES = {"t5": 13, "gpt2": 7, "bert": 1, "writes": 5, "asks": 14}  # validation rows: odd numbers, and fewer than ranks
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node=2")  # which finds a free port by itself


def launch(*words: str, folder: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=folder,
        env=cli_environment(PYTHONPATH=str(ROOT), **environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def done(process: subprocess.Popen[str] | Forked) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=900)
    return process.returncode, output, errors


def trials(session: Session) -> list[Any]:
    return [[t.params, t.values, t.user_attrs["tasks"], t.user_attrs["fishers"]] for t in results(session.study)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What two processes found in projects of all three kinds."""
    folder = tmp_path_factory.mktemp("ranks")
    for family, rows in SIZES.items():
        if family == "writes":
            generating(folder / family, "llama", rows=rows)
        elif family == "asks":
            cases = {name: {**CASES[name][0], "test_split": "test"} for name in ("shots", "written")}
            asking = harness_project(folder / family, **cases)
            asking.write(search={**asking.spec["search"], "trials": 4})
        else:
            make_project(folder / family, family, rows=rows, samples=5, trials=4)
    ranks = start_ranks(ranks_child.main, folder, list(SIZES), folder=folder)
    ends = [done(rank) for rank in ranks]
    assert [code for code, _, _ in ends] == [0, 0], ends
    return folder, {**json.loads((folder / "result.json").read_text()), "errors": [errors for _, _, errors in ends]}


@pytest.fixture(scope="module")
def problem_of(two: tuple[Path, dict[str, Any]]) -> Callable[[str], Problem]:
    """A function from a family to what one process alone loads for its Fishers."""

    def load(family: str) -> Problem:
        return load_problem(with_estimator(StudySpec.from_yaml(two[0] / family / "spec.yaml"), ESTIMATORS[0]))

    return functools.cache(load)


@pytest.mark.slow
@pytest.mark.parametrize("family", SIZES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_fishers_of_two_ranks_are_those_of_one_process(
    two: tuple[Path, dict[str, Any]], problem_of: Callable[[str], Problem], family: str, estimator: str
) -> None:
    folder = two[0] / family
    loaded = problem_of(family)
    problem = derive_problem(loaded, with_estimator(loaded.spec, estimator))
    values, _ = Merger(problem, METHODS["df-merge"], None).importance(0, 0.7)
    found = load_file(folder / f"{estimator}.safetensors")
    assert found.keys() == values.keys()
    difference = sum(float((found[name].double() - values[name].double()).square().sum()) for name in values)
    norm = sum(float(value.double().square().sum()) for value in values.values())
    assert norm > 0
    assert (difference / norm) ** 0.5 < 1e-6  # sums in float32, in another order


@pytest.mark.slow
def test_a_rank_that_has_one_input_takes_the_fast_way_too(two: tuple[Path, dict[str, Any]]) -> None:
    assert not [errors for errors in two[1]["errors"] if "one row at a time" in errors]


@pytest.mark.slow
@pytest.mark.parametrize("family", SIZES)
def test_a_study_on_two_ranks_has_the_trials_and_scores_of_one_process(
    two: tuple[Path, dict[str, Any]], family: str
) -> None:
    folder, found = two[0] / family, two[1][family]
    spec = StudySpec.from_yaml(folder / "spec.yaml").derive(storage="sqlite:///one.db", cache=".one")
    session = open_study(spec)
    session.run()
    best = session.best()
    assert best is not None
    assert found["trials"] == json.loads(json.dumps(trials(session)))
    assert found["test"] == session.trial_scores(best, "test")
    assert found["experts"] == session.reference_scores("experts", "test")


@pytest.mark.slow
@pytest.mark.parametrize("family", SIZES)
def test_all_ranks_end_with_the_same_weights_bit_by_bit(two: tuple[Path, dict[str, Any]], family: str) -> None:
    folder, found = two[0] / family, two[1][family]["weights"]
    dynamic, *uniform = found
    assert dynamic[0] == dynamic[1]
    problem = load_problem(StudySpec.from_yaml(folder / "spec.yaml"))
    Merger(problem, METHODS["gta"], None).merge_(POINT)
    assert uniform[0] == [weights(problem)] * 2  # without a Fisher there is no rounding either
    derived = derive_problem(problem, reseeded(problem.spec))
    Merger(derived, METHODS["dare"], None).merge_(Point(POINT, {"drop_rate": 0.3}))
    assert uniform[1] == [weights(problem)] * 2


@pytest.mark.slow
def test_an_error_on_one_rank_is_raised_on_all_with_its_message(two: tuple[Path, dict[str, Any]]) -> None:
    found = two[1]["faults"]
    assert "rank 1 has another red than rank 0" in found["other"]
    assert "rank 1: 'a defect' is missing" in found["defect"]


@pytest.mark.slow
def test_a_rank_that_runs_out_of_memory_fails_the_trial_and_not_the_study(two: tuple[Path, dict[str, Any]]) -> None:
    found = two[1]["faults"]
    assert len(found["failed"]) == 1
    assert found["failed"][0].startswith("rank 1: out of memory")
    assert found["complete"] == 4


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux says which threads there are")
def test_a_group_that_was_left_leaves_no_thread_that_could_disturb_the_interpreter_s_end(
    two: tuple[Path, dict[str, Any]],
) -> None:
    """Such a thread aborts the process if it lets go of a tensor then (pytorch issue 190489)."""
    assert [json.loads((two[0] / f"threads-{rank}.json").read_text()) for rank in (0, 1)] == [[], []]


def test_shares_hold_every_input_once_and_cost_about_the_same() -> None:
    ranks = Ranks()
    costs = [(7 * i) % 23 + 1 for i in range(50)]
    assert ranks.shares(costs) == [list(range(50))]
    ranks.size = 3
    shares = ranks.shares(costs)
    assert sorted(i for share in shares for i in share) == list(range(50))
    sums = [sum(costs[i] for i in share) for share in shares]
    assert max(sums) - min(sums) <= max(costs)
    assert ranks.shares([5, 9]) == [[1], [0], []]


def test_one_process_is_no_group_and_does_not_import_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")  # some clusters set it for every job
    assert launched() == 1
    code = "import sys, dfmerge_studies.ranks; sys.exit('accelerate' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_launched_processes_cannot_share_is_refused(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    assert (
        "status is work for one process, but a launcher started 2" in project.cli("status", "spec.yaml", check=2).stderr
    )
    refused = project.cli("run", "spec.yaml", "--workers", "2", check=2)
    assert "--workers cannot be used in a group of 2 launched processes" in refused.stderr
    refused = project.cli("run", "spec.yaml", "--device", "mps", check=2)
    assert "2 processes cannot share the one device 'mps'" in refused.stderr


# Faults of whole processes, through the command line


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """A project, and the trials of its study in one process."""
    project = make_project(tmp_path_factory.mktemp("faults") / "p", rows=12, samples=4, trials=6)
    spec = StudySpec.from_yaml(project.file).derive(storage="sqlite:///one.db", cache=None)
    session = open_study(spec)
    session.run()
    return project.folder, trials(session)


def fresh(folder: Path, storage: str) -> StudySpec:
    """The project's spec with a database of its own."""
    spec = StudySpec.from_yaml(folder / "spec.yaml").derive(storage=f"sqlite:///{storage}", cache=None)
    (folder / f"{storage}.yaml").write_text(json.dumps(spec.model_dump(mode="json")))
    return spec


def after_first_trial(process: subprocess.Popen[str] | Forked, act: Callable[[], None]) -> tuple[int, str]:
    """Wait until a trial is told of, do something, and wait for the end."""
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "/6  trial" in line:
            act()
            break
    code, _, errors = done(process)
    return code, "".join(lines) + errors


def check_handed_back(spec: StudySpec) -> None:
    study = stored_study(spec)
    assert 1 <= len(results(study)) < 6
    assert not study.get_trials(states=(TrialState.RUNNING,))


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_with_a_message_and_running_again_completes_the_study(
    uninterrupted: tuple[Path, list[Any]],
) -> None:
    folder, expected = uninterrupted
    spec = fresh(folder, "killed.db")
    leader, other = start_ranks(command, ["run", "killed.db.yaml"], folder=folder)
    code, errors = after_first_trial(leader, other.kill)
    assert code == 1
    assert "one of the 2 processes died or does not answer" in errors
    check_handed_back(spec)
    session = open_study(spec)
    session.run()
    assert [t[:3] for t in trials(session)] == [t[:3] for t in expected]


@pytest.mark.slow
def test_sigterm_to_the_launcher_hands_the_trial_back_and_accelerate_on_two_machines_goes_on(
    uninterrupted: tuple[Path, list[Any]],
) -> None:
    folder, expected = uninterrupted
    spec = fresh(folder, "term.db")
    process = launch(*TORCHRUN, "-m", "dfmerge_studies", "run", "term.db.yaml", folder=folder)
    code, errors = after_first_trial(process, process.terminate)
    assert code != 0
    assert "trial" in errors
    check_handed_back(spec)
    port = free_port()
    shared = (
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes=2",
        "--num_machines=2",
        "--mixed_precision=no",
    )
    machines = [
        launch(
            *(*shared, f"--machine_rank={rank}", "--main_process_ip=127.0.0.1", f"--main_process_port={port}"),
            *("-m", "dfmerge_studies", "run", "term.db.yaml", "--json"),
            folder=folder,
        )
        for rank in range(2)
    ]
    (code, output, errors), (second, nothing, more) = map(done, machines)
    assert (code, second, nothing) == (0, 0, ""), (errors, more)
    assert json.loads(output)["trials"]["complete"] == 6
    assert [t[:3] for t in trials(open_study(spec))] == [t[:3] for t in expected]


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run_after_the_time_limit(uninterrupted: tuple[Path, list[Any]]) -> None:
    folder, _ = uninterrupted
    spec = fresh(folder, "hung.db")
    leader, other = start_ranks(command, ["run", "hung.db.yaml"], folder=folder, DFMERGE_RANK_TIMEOUT="5")
    try:
        code, errors = after_first_trial(leader, lambda: other.send_signal(signal.SIGSTOP))
    finally:
        other.kill()
    assert code == 1
    assert "one of the 2 processes died or does not answer" in errors
    check_handed_back(spec)
