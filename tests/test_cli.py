"""The command line: help, JSON, exit codes, the cache commands, the shipped quickstart."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import optuna
import pytest

from dfmerge_studies.cli import common
from dfmerge_studies.cli.app import main
from dfmerge_studies.errors import InputError, RunError
from dfmerge_studies.methods import METHODS
from dfmerge_studies.objective.loading import load_problem
from dfmerge_studies.objective.merger import Merger
from dfmerge_studies.spec import StudySpec
from tests.processes import Forked
from tests.project import Project, cli_environment

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("run", "status", "list", "merge", "fisher", "evaluate", "export", "validate", "cache", "compare", "report")


@pytest.mark.slow
def test_help_names_every_command_and_imports_nothing_heavy(project):
    shown = project.process("--help").stdout
    assert all(re.search(rf"^\s+{command}\b", shown, re.MULTILINE) for command in COMMANDS)
    heavy = "import sys, dfmerge_studies.cli.app; print(sorted({'torch', 'transformers', 'optuna'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", [*COMMANDS, "cache ls", "cache verify", "cache prune"])
def test_every_command_has_help_with_every_option_explained(project, command):
    shown = project.cli(*command.split(), "--help").stdout
    assert "Usage: dfmerge" in shown
    # A name and its explanation on every option's line, or the explanation on the next one.
    for match in re.finditer(r"^ {2}(?:-\w, )?--[\w/-]+.*(?:\n {20,}.*)*", shown, re.MULTILINE):
        assert re.search(r" {2,}\S", match[0].strip()), match[0]


def test_the_version_is_the_package_s(project):
    from importlib.metadata import version

    assert project.cli("--version").stdout.strip() == version("dfmerge-studies")


def test_errors_print_one_line_and_debug_shows_the_traceback(project):
    failed = project.process("status", "nowhere.yaml", check=2)
    assert failed.stderr.startswith("error: nowhere.yaml")
    assert "Traceback" not in failed.stderr
    assert "Traceback" in project.process("status", "nowhere.yaml", "--debug", check=1).stderr


def test_an_error_says_where_what_and_how_to_mend_it():
    assert str(InputError("no such thing", where="file: field", hint="Add it")) == "file: field: no such thing. Add it."
    assert str(RunError("lost")) == "lost"
    assert (InputError("x").exit_code, RunError("x").exit_code) == (2, 1)


def test_json_goes_to_standard_output_alone(project):
    done = project.process("run", "spec.yaml", "--trials", "1", "--json")
    json.loads(done.stdout)
    assert done.stderr.splitlines() == [line for line in done.stderr.splitlines() if line.startswith("colours: 1/1")]


def _interrupted_while_loading(number: signal.Signals, *words: str) -> None:
    common.load_libraries = lambda: signal.raise_signal(number)
    main([*words])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("words", [("run", "spec.yaml", "--no-test"), ("merge", "spec.yaml", "--coefficients", "0.5")])
def test_ctrl_c_or_sigterm_before_the_work_begins_is_answered(
    project: Project, number: signal.Signals, words: tuple[str, ...]
) -> None:
    words = (*words, "--out", "out") if words[0] == "merge" else words
    process = Forked(_interrupted_while_loading, number, *words, folder=project.folder, environment=cli_environment())
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, (output, errors)
    assert errors.splitlines() == ["interrupted"]


def test_progress_is_said_line_by_line_where_nobody_watches(project):
    done = project.process("run", "spec.yaml", "--trials", "2")
    assert "colours: 1/2  trial 0" in done.stderr
    assert "colours: 2/2  trial 1" in done.stderr
    assert "winner: trial" in done.stdout
    assert "dfmerge export spec.yaml" in done.stdout


def test_every_phase_of_a_merge_tells_whoever_follows_it_how_far_it_is(project):
    merger = Merger(load_problem(StudySpec.from_yaml(project.file)), METHODS["df-merge"], None)
    told: dict[str, list[int]] = {}
    merger.progress = lambda what, done, total: told.setdefault(what, []).append(done * 100 // total)  # as `run` does
    merger.run({"red": 0.3, "blue": 0.7})
    assert set(told) == {"red: fisher", "blue: fisher", "red: validation", "blue: validation"}
    for percents in told.values():
        assert percents[0] == 0
        assert percents[-1] == 100
        assert percents == sorted(percents)


@pytest.mark.slow
def test_local_work_asks_nothing_of_the_network(project_of, tmp_path):
    """Without HF_HUB_OFFLINE, and with every look-up of a host made an error that cannot be overlooked."""
    families = ("t5", "bert")
    for family in families:
        project_of(family)
    watched = (
        "import os, socket, sys\n"
        "def refuse(*arguments, **options):\n"
        "    print('LOOK-UP', arguments, file=sys.stderr)\n"
        "    os._exit(99)\n"
        "socket.getaddrinfo = refuse\n"
        "from dfmerge_studies.cli.app import main\n"
        "for folder in sys.argv[1:]:\n"
        "    try:\n"
        "        main(['run', f'{folder}/spec.yaml', '--trials', '1', '--json'])\n"
        "    except SystemExit as end:\n"
        "        print('ended with', end.code, file=sys.stderr)\n"
    )
    environment = {k: v for k, v in cli_environment().items() if k != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-c", watched, *families],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("ended with 0") == len(families)


def test_cache_commands_list_verify_and_prune(project):
    project.json("run", "spec.yaml", "--trials", "2", "--cache", "all")
    entries = project.json("cache", "ls", "spec.yaml")
    assert len(entries) == 4
    assert {entry["expert"] for entry in entries} == {"red", "blue"}
    assert all(0 <= entry["coefficient"] <= 1 and entry["estimator"] == "exact" for entry in entries)
    assert project.json("cache", "verify", "spec.yaml") == {"entries": 4, "damaged": []}
    file = Path(entries[0]["file"])
    file.write_bytes(file.read_bytes()[:-1])
    damaged = project.cli("cache", "verify", "spec.yaml", check=1)
    assert file.name in damaged.stderr
    assert "3 of 4 entries are whole" in damaged.stdout
    assert len(project.json("cache", "prune", "spec.yaml", "--keep", "1GB")["deleted"]) == 0
    assert len(project.json("cache", "prune", "spec.yaml")["deleted"]) == 3
    assert project.json("cache", "ls", "spec.yaml") == []


def test_evaluate_scores_an_expert_and_the_base(project):
    for model in ("base", "red"):
        printed = project.json("evaluate", "spec.yaml", "--model", model, "--split", "test")
        assert printed["split"] == "test"
        assert printed["tasks"]["red"]["n"] == 24
        assert printed["mean"] == pytest.approx(sum(t["score"] for t in printed["tasks"].values()) / 2)


@pytest.mark.slow
def test_evaluating_a_trial_s_export_respects_the_limit(project):
    tasks = {name: {**task, "limit": 9} for name, task in project.spec["tasks"].items()}
    project.write(tasks=tasks)
    best = project.json("run", "spec.yaml", "--trials", "2")["best"]
    project.json("export", "spec.yaml", "--out", "merged")
    printed = project.json("evaluate", "spec.yaml", "--model", "merged")
    assert printed["tasks"]["red"]["n"] == 9
    assert {task: entry["score"] for task, entry in printed["tasks"].items()} == best["tasks"]


@pytest.mark.slow
def test_seed_and_set_change_what_they_say(project):
    indices = {}
    for name, seed in (("one", 5), ("two", 5), ("three", 6)):
        project.json("run", "spec.yaml", "--trials", "1", "--seed", str(seed), "--set", f"name={name}")
        study = optuna.load_study(study_name=name, storage=f"sqlite:///{project.folder / (name + '.db')}")
        indices[name] = study.user_attrs["dfmerge:fisher_indices"]
    assert indices["one"] == indices["two"] != indices["three"]


def test_validate_tells_what_a_run_needs(project):
    estimate = project.json("validate", "spec.yaml")["estimate"]
    assert estimate["parameters"] == estimate["changed_parameters"]
    assert estimate["peak_bytes"] > 4 * estimate["parameters"] * 4
    assert estimate["available_bytes"] > 0


@pytest.mark.slow
def test_the_quickstart_runs_and_the_method_is_ahead_of_every_baseline_after_twelve_of_its_twenty_trials(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "dfmerge_studies", "run", "--trials", "12", "--json"],
        cwd=tmp_path,
        env=cli_environment(),
        capture_output=True,
        text=True,
        timeout=580,
        check=True,
    )
    printed = json.loads(done.stdout)
    rows = {row["name"].split(" (")[0]: row for row in printed["rows"]}
    for split in ("validation", "test"):
        ours = rows["df-merge"][split]["mean"]
        for baseline in ("averaging", "fisher", "task-arithmetic"):
            assert ours > rows[baseline][split]["mean"], (split, baseline)
        experts, base = rows["each task's own expert"][split]["tasks"], rows["base, unmerged"][split]["tasks"]
        assert all(experts[task] > base[task] + 0.2 for task in experts)
    assert {file.name for file in tmp_path.iterdir()} >= {"quickstart.db", ".dfmerge"}
    exported = Project(tmp_path, "minilm").json("export", "--out", "merged")
    assert exported["trial"] == printed["best"]["number"]


def test_the_shipped_quickstart_is_small():
    folder = ROOT / "dfmerge_studies" / "quickstart"
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 8_000_000
