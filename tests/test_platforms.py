"""Systems that lack what Linux has: their absence is simulated in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys

import pytest

# What Python has on Linux alone, or on POSIX alone, of what the package could use.
ABSENT = {
    "windows": """
import builtins, os, signal, sys
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGKILL", "SIGSTOP", "SIGALRM", "SIGCHLD", "SIGCONT"):
    if hasattr(signal, name): delattr(signal, name)
for name in ("fork", "getuid", "geteuid", "getpgid", "setsid", "killpg", "sched_getaffinity", "mkfifo", "O_DIRECTORY",
             "O_NOFOLLOW", "O_NONBLOCK", "uname"):
    if hasattr(os, name): delattr(os, name)
""",
    "macos": """
import builtins, os, sys
for name in ("sched_getaffinity", "sched_setaffinity", "posix_fallocate", "O_TMPFILE"):
    if hasattr(os, name): delattr(os, name)
""",
}
MISSING = {"windows": {"fcntl", "pwd", "grp", "resource", "termios", "tty", "pty"}, "macos": set[str]()}
REFUSE = """
real = builtins.__import__
def refusing(name, *arguments, **options):
    if name.partition(".")[0] in {missing!r}: raise ModuleNotFoundError("No module named " + repr(name))
    return real(name, *arguments, **options)
builtins.__import__ = refusing
for name in {missing!r}: sys.modules.pop(name, None)
"""


def on(system: str, code: str) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter without what a system lacks."""
    start = ABSENT[system] + REFUSE.format(missing=MISSING[system]) + code
    return subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("system", ["windows", "macos"])
@pytest.mark.parametrize("command", [[], ["run"], ["status"], ["export"], ["cache", "push"]], ids=" ".join)
def test_help_starts_everywhere(system: str, command: list[str]) -> None:
    shown = on(system, f"from dfmerge_studies.cli.app import main\nmain({[*command, '--help']!r})")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "Usage: dfmerge" in shown.stdout


@pytest.mark.slow
@pytest.mark.parametrize("system", ["windows", "macos"])
def test_every_module_of_the_package_that_is_its_own_code_can_be_imported(system: str) -> None:
    modules = [
        "errors", "signals", "temporary", "ranks", "importance.cache.local", "trials.guards", "study.pool", "storage",
    ]  # those that ask the system for signals, locks, processes or cores  # fmt: skip
    # The libraries first: what they need of a system is their own affair.
    code = "\n".join(f"import dfmerge_studies.{name}" for name in modules)
    libraries = "import optuna, psutil, torch, sqlalchemy, optuna.storages\n"
    done = subprocess.run(
        [sys.executable, "-c", libraries + ABSENT[system] + REFUSE.format(missing=MISSING[system]) + code],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_worker_stops_itself_where_there_is_no_signal_for_it() -> None:
    code = """
import threading, time
from dfmerge_studies.signals import STOP, stop_this_process
assert STOP == signal.SIGINT
threading.Timer(0.2, stop_this_process).start()
try:
    while True: time.sleep(0.05)
except KeyboardInterrupt:
    print("stopped")
"""
    done = on("windows", code)
    assert done.stdout.strip() == "stopped", done.stderr
