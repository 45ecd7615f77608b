"""Rights of a user who is not root, in whatever user the suite runs as."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import pytest


def without_rights(job: Callable[[], Any]) -> Any:
    """What a job gives in a child process that may read or write no file against its mode, as root otherwise may."""
    if not sys.platform.startswith("linux"):
        pytest.skip("rights are given up as Linux has them")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _give_up_overriding()
            answer = {"answer": job()}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        os.write(writer, json.dumps(answer).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        told = json.load(stream)
    os.waitpid(child, 0)
    assert "error" not in told, told["error"]
    return told["answer"]


def _give_up_overriding() -> None:
    """Drop CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH (capabilities(7)) from this process, for good."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()  # twice: effective, permitted, inheritable
    assert libc.capget(header, sets) == 0, os.strerror(ctypes.get_errno())
    for place in (0, 1, 2):
        sets[place] &= ~(1 << 1 | 1 << 2)
    assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())
