"""The errors that a user can meet, one root class for all of them.

Every message says what was found, where, and how to mend it.  The command line prints the message alone and exits
with the error's `exit_code`: 2 for bad input that the user can correct, 1 for a run that failed.  No message shows a
password or a token.
"""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from dfmerge_studies.redact import masked_text

# Control characters, surrogates, and what turns the direction of text: a terminal must not obey a file's name.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# The name of an exception's class, which libraries put before their message: "KeyError: ", "(sqlite3.DataError) ".
_CLASS_NAME = re.compile(
    r"(?<![\w./\\'\"-])\(?(?:(?:\w+\.)*[A-Z]\w*(?:Error|Exception|Warning)\b\)?(?:: ?|\s+|(?=[(.,;]|$))|Exception: )"
)
_LONGEST = 300  # characters of another library's message


class DFMergeError(Exception):
    """Root of every error raised on purpose by this package.

    Args:
        what: what was found and what was expected, as a sentence without a closing full stop.
        where: the file and the field, tensor or row at fault, if there is one.
        hint: what the reader can do about it, as a sentence without a closing full stop.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.what = masked_text(what)
        self.where = masked_text(where) if where else where
        self.hint = masked_text(hint) if hint else hint
        super().__init__(self.what, self.where, self.hint)

    def __str__(self) -> str:
        where = self.where.replace("\n", "\\n") if self.where else None
        text = f"{where}: {self.what}" if where else self.what
        if not self.hint:
            return text
        stop = "" if text.endswith(("\n", ".", "!", "?")) else "."  # a list ends with its line
        hint = self.hint if self.hint.endswith("?") else f"{self.hint}."
        return f"{text}{stop}{hint}" if text.endswith("\n") else f"{text}{stop} {hint}"


class InputError(DFMergeError):
    """Something that the user gave (a spec, a flag, a file) cannot be used as it is."""

    exit_code = 2


class RunError(DFMergeError):
    """Valid input, but the work itself failed (non-finite values, no memory, a lost database)."""

    exit_code = 1


# What has no type of its own: torch on a CPU, drivers, and libraries that fail to allocate what they work in. A handle
# of a library that cannot be made is memory, too, in a process whose device has answered before.
_LACKING = re.compile(
    r"""
    not\ enough\ memory | can(no|')t\ allocate\ memory | \bout\ of\ memory\b | \bbad_alloc\b |
    \b(CU|HIP)[A-Z]+_(STATUS_)?(INTERNAL_ERROR_(HOST|DEVICE)_)?ALLOC(ATION)?_FAILED\b |
    \b(CU|HIP)(BLAS|DNN)_STATUS_NOT_INITIALIZED\b | \bwhen\ calling\ `(cu|hip)[A-Za-z]+Create\( |
    \bcudaErrorMemoryAllocation\b | \bCUDA_ERROR_OUT_OF_MEMORY\b | \bhipErrorOutOfMemory\b |
    \brocblas_status_memory_error\b | \bmiopenStatusAllocFailed\b
    """,
    re.VERBOSE | re.IGNORECASE,
)


def out_of_memory(error: BaseException) -> RunError | None:
    """The error to show where memory ran out, on any device; None for an error of another kind."""
    kinds = {kind.__name__ for kind in type(error).__mro__}  # by name, for torch's own without importing it
    named = bool(kinds & {"MemoryError", "OutOfMemoryError"})
    said = isinstance(error, RuntimeError) and _LACKING.search(str(error)) is not None
    numbered = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if not (named or said or numbered):
        return None
    return RunError("out of memory", hint="Lower importance.row_budget and token_budget, or use dtype: bfloat16")


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn running out of memory, on any device, into a `RunError` that fails the trial and not the study."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's own out-of-memory errors are RuntimeErrors
        lacking = out_of_memory(error)
        if lacking is None:
            raise
        raise lacking from error


def did_you_mean(found: str, known: Iterable[str]) -> str | None:
    """A question that names the nearest of the known names, None where none is near."""
    near = difflib.get_close_matches(found, list(known), n=1)
    return f"Did you mean {near[0]!r}?" if near else None


def first_line(error: BaseException) -> str:
    """What another library's error says: one line of at most 300 characters, without the name of its class."""
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror[0].lower() + error.strerror[1:]
        named = str(error.filename) if error.filename is not None else ""
        return f"{reason}: {named}" if 0 < len(named) <= _LONGEST else reason
    if isinstance(error, OverflowError) and len(error.args) == 2:  # of powers: a number and words
        return str(error.args[1])
    if isinstance(error, UnicodeDecodeError):
        return f"not {error.encoding.upper()} text (byte {error.object[error.start]:#04x} at position {error.start})"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, KeyError) and len(error.args) == 1:
        return f"{error.args[0]!r} is missing"
    text = re.sub(r"<class '([^']*)'>", r"\1", str(error))
    text = re.sub(r"^Error while [a-z ]+: ", "", text)  # how the Rust libraries begin
    lines = [line.strip() for line in _CLASS_NAME.sub("", text).splitlines()]
    told = [line for line in lines if re.search(r"\w", line)]
    if not told:
        return "no reason is given"
    text = " ".join(told[:2]) if told[0].endswith(":") else told[0]
    return text.rstrip(":.")[:_LONGEST]


def printable(text: str) -> str:
    """A text that a terminal shows and does not obey: control characters become escapes, lines and tabs stay.

    Args:
        text: any text; names in it may come from anywhere.
    """
    return UNPRINTABLE.sub(lambda found: found.group().encode("unicode_escape").decode(), text)
