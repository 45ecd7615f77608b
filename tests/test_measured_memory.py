"""What `validate` says a trial takes, beside what a process of its own does take: a T5 of 60M parameters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.memory import NO_LEFTOVERS

SCRIPT = Path(__file__).parent.parent / "scripts" / "memory.py"


def measured(*arguments: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "measure", *arguments, "--json"],
        capture_output=True,
        text=True,
        check=True,
        timeout=800,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **NO_LEFTOVERS},
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is the Linux kernel's"),
]


def test_a_process_takes_what_was_estimated_and_stays_within_the_memory_that_it_is_given() -> None:
    found = measured("--size", "small", "--tokens", "8", "--inputs", "1", "--experts", "2", "--memory", "1.5GB")
    assert found["parts"] > 1
    assert found["estimate"] <= 1.5e9
    assert found["estimate"] == pytest.approx(found["peak"], rel=0.1)
    assert found["peak"] <= 1.05 * 1.5e9
