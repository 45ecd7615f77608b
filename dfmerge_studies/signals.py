"""Signals, on systems that do not have all of them.  Nothing heavy is imported: `--help` reads this."""

from __future__ import annotations

import _thread
import os
import signal

INTERRUPTS = (signal.SIGINT, signal.SIGTERM)  # the first is obeyed in good order, a second at once

# Stops a worker as the first of these does, and never as the second: safe to send to a process that is stopping.
# Windows has no such signal; there a worker stops itself as Ctrl-C would.
STOP = getattr(signal, "SIGUSR1", signal.SIGINT)


def stop_this_process() -> None:
    """Send STOP to this process, from any of its threads."""
    if STOP in INTERRUPTS:
        _thread.interrupt_main()  # on Windows os.kill would end the process at once
    else:
        os.kill(os.getpid(), STOP)
