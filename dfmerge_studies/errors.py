"""The errors that a user can meet, one root class for all of them.

Every message says what was found, where, and how to mend it.  The command line prints the message alone and exits
with the error's `exit_code`: 2 for bad input that the user can correct, 1 for a run that failed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DFMergeError(Exception):
    """Root of every error raised on purpose by this package.

    Args:
        what: what was found and what was expected, as a sentence without a closing full stop.
        where: the file and the field, tensor or row at fault, if there is one.
        mend: what the reader can do about it, as a sentence without a closing full stop.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, mend: str | None = None) -> None:
        self.what = what
        self.where = where
        self.mend = mend
        super().__init__(what, where, mend)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        if not self.mend:
            return text
        stop = "" if text.endswith(("\n", ".", "!", "?")) else "."  # a list ends with its line
        mend = self.mend if self.mend.endswith("?") else f"{self.mend}."
        return f"{text}{stop}{mend}" if text.endswith("\n") else f"{text}{stop} {mend}"


class InputError(DFMergeError):
    """Something that the user gave (a spec, a flag, a file) cannot be used as it is."""

    exit_code = 2


class RunError(DFMergeError):
    """Valid input, but the work itself failed (non-finite values, no memory, a lost database)."""

    exit_code = 1


def out_of_memory(error: BaseException) -> RunError | None:
    """The error to show where memory ran out, on any device; None for an error of another kind.

    Args:
        error: what was raised.
    """
    kinds = {kind.__name__ for kind in type(error).__mro__}  # by name, for torch's own without importing it
    words = ("not enough memory", "can't allocate memory")  # torch on a CPU raises no type of its own
    lacking = isinstance(error, RuntimeError) and any(each in str(error) for each in words)
    if not kinds & {"MemoryError", "OutOfMemoryError"} and not lacking:
        return None
    return RunError("out of memory", mend="Lower importance.row_budget and token_budget, or use dtype: bfloat16")


def did_you_mean(found: str, known: Iterable[str]) -> str | None:
    """A question that names the nearest of the known names, None where none is near.

    Args:
        found: what was written.
        known: what could have been meant.
    """
    near = difflib.get_close_matches(found, list(known), n=1)
    return f"Did you mean {near[0]!r}?" if near else None


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line of at most 300 characters.

    Args:
        error: the error.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
