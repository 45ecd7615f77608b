"""The launching examples of scripts/launch, run as a user runs them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.processes import free_port
from tests.project import Project, cli_environment
from tests.test_workers import check_whole, study_of

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "scripts" / "launch"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


def launch(project: Project, script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return subprocess.Popen(
        ["bash", str(LAUNCH / script), *arguments],
        cwd=project.folder,
        env=cli_environment(PYTHONPATH=path, **environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("script", sorted(file.name for file in LAUNCH.iterdir()))
def test_launching_scripts_are_sound_bash(script: str) -> None:
    done = subprocess.run(["bash", "-n", LAUNCH / script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert os.access(LAUNCH / script, os.X_OK)


@pytest.mark.slow
def test_the_terminals_script_starts_workers_that_share_a_study(project: Project) -> None:
    process = launch(project, "terminals.sh", "spec.yaml", "2", "--trials", "4")
    _, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    check_whole(study_of(project), 4)
    for number in (1, 2):
        assert "4 of 4 trials complete" in (project.folder / f"worker-{number}.log").read_text()


@pytest.mark.slow
def test_a_slurm_array_task_is_a_worker_and_hands_its_trial_back_before_its_time_limit(project: Project) -> None:
    slurm = {"SLURM_CPUS_PER_TASK": "1", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    process = launch(project, "slurm-array.sbatch", "spec.yaml", "--trials", "500", **slurm)
    assert process.stderr is not None
    assert any("/500  trial " in line for line in process.stderr)  # the study has a result
    process.send_signal(signal.SIGTERM)  # to the batch script alone, as --signal=B:TERM@120 does
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    complete = project.json("status", "spec.yaml")["trials"]["complete"]
    assert 0 < complete < 500
    process = launch(project, "slurm-array.sbatch", "spec.yaml", "--trials", str(complete + 1), **slurm)
    _, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    check_whole(study_of(project), complete + 1)


@pytest.mark.slow
def test_the_script_for_several_nodes_builds_a_command_line_that_accelerate_takes(
    project: Project, tmp_path: Path
) -> None:
    """Slurm itself is not here: `srun` and `scontrol` are stand-ins that say one node and run what they are given."""
    for name, text in {
        "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
        "scontrol": "echo 127.0.0.1",
    }.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "here",
        "SLURM_NODEID": "0",
        "PROCESSES_PER_NODE": "2",
        "MAIN_PORT": str(free_port()),
    }
    process = launch(project, "slurm-accelerate.sbatch", "spec.yaml", "--trials", "2", "--json", **environment)
    output, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    assert json.loads(output[output.index("{") :])["trials"]["complete"] == 2
