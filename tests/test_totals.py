"""`--add` at one moment: nothing that was asked for is lost, on any storage."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable

import optuna
import pytest

from dfmerge_studies.storage import open_storage
from dfmerge_studies.study.totals import TARGET, add_trials, state_total, stored_total


def in_threads(count: int, job: Callable[[int], None]) -> None:
    """Do a thing several times at one moment, each with a connection of its own."""
    barrier = threading.Barrier(count)

    def one(number: int) -> None:
        barrier.wait()
        job(number)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("kind", ["sqlite", "journal", "postgres", "grpc"])
def test_six_that_add_three_to_two_make_twenty(kind: str, new_storage: Callable[[str], str]) -> None:
    url = new_storage(kind)
    study = optuna.create_study(storage=open_storage(url), study_name="s")
    study.set_user_attr(TARGET, 2)  # as an earlier version wrote it
    in_threads(
        6, lambda number: add_trials(optuna.load_study(study_name="s", storage=open_storage(url)), 3, at_least=2)
    )
    assert stored_total(optuna.load_study(study_name="s", storage=open_storage(url))) == 20


def test_a_stated_total_replaces_what_was_added_before() -> None:
    study = optuna.create_study()
    add_trials(study, 5, at_least=10)
    assert stored_total(study) == 15
    state_total(study, 12)
    assert stored_total(study) == 12
    add_trials(study, 1, at_least=10)
    assert stored_total(study) == 13


def test_a_worker_that_was_told_a_total_does_not_undo_what_was_added_since() -> None:
    study = optuna.create_study()
    state_total(study, 4)
    add_trials(study, 3, at_least=4)
    state_total(study, 4, lower=False)
    assert stored_total(study) == 7


def test_a_spec_that_states_more_than_the_study_has_is_what_is_added_to() -> None:
    study = optuna.create_study()
    state_total(study, 4)
    add_trials(study, 3, at_least=10)
    assert stored_total(study) == 13


@pytest.mark.slow
def test_add_on_the_command_line_counts_each_time(project) -> None:
    project.cli("run", "spec.yaml", "--trials", "2", "--no-test")
    project.cli("run", "spec.yaml", "--set", "search.trials=2", "--add", "1", "--no-test")
    project.cli("run", "spec.yaml", "--set", "search.trials=2", "--add", "1", "--no-test")
    (file,) = project.folder.glob("*.db")
    (name,) = optuna.get_all_study_names(f"sqlite:///{file}")
    study = optuna.load_study(study_name=name, storage=f"sqlite:///{file}")
    assert stored_total(study) == len([t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]) == 4


@pytest.mark.slow
def test_workers_go_on_to_what_was_added_while_they_worked_and_their_parent_does_not_undo_it(project) -> None:
    project.write(search={**project.spec["search"], "trials": 2})
    project.cli("run", "spec.yaml", "--no-test")
    process = project.start("run", "spec.yaml", "--workers", "2", "--add", "1", "--no-test", "--json")
    assert any(": process " in line for line in process.stderr)  # the first worker has joined: the total is told
    study = optuna.load_study(study_name="colours", storage=open_storage(f"sqlite:///{project.folder}/colours.db"))
    assert stored_total(study) == 3
    add_trials(study, 2, at_least=2)  # what another `--add 2` does
    output, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    trials = json.loads(output)["trials"]
    assert (trials["target"], trials["complete"], stored_total(study)) == (5, 5, 5)


@pytest.mark.parametrize(
    ("arguments", "note"),
    [
        ("--method task-arithmetic --trials 5", "tries the 11 points of its grid; --trials has no say"),
        ("--method task-arithmetic --add 100", "tries the 11 points of its grid; --add has no say"),
        ("--method averaging --trials 5", "tries its one point; --trials has no say"),
        ("--method fisher --workers 2 --add 5", "tries its one point; --add has no say"),
        (
            "--method averaging --trials 5 --acquisition ei",
            "tries its one point; --trials and --acquisition have no say",
        ),
    ],
)
def test_a_method_that_does_not_search_says_that_it_has_its_own_number_of_trials(project, arguments, note) -> None:
    done = project.cli("run", "spec.yaml", *arguments.split(), "--no-test", "--json")
    method = arguments.split()[1]
    assert [line for line in done.stderr.splitlines() if "no say" in line] == [f"note: {method} {note}"]
    trials = json.loads(done.stdout)["trials"]
    assert trials["complete"] == trials["target"] == (11 if method == "task-arithmetic" else 1)


@pytest.mark.parametrize("arguments", ["--method task-arithmetic", "--trials 1", "--add 1"])
def test_nothing_is_said_of_flags_that_were_not_given_or_that_are_heard_nor_of_baselines(project, arguments) -> None:
    project.write(baselines=["averaging"], search={**project.spec["search"], "trials": 1})
    assert "no say" not in project.cli("run", "spec.yaml", *arguments.split(), "--no-test").stderr
