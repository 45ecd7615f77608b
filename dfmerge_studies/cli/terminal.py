"""The boundary to the terminal: streams that are closed, full or gone, and text that a terminal must not obey.

What commands print goes through here.  Names in it may come from anywhere: a spec, a data set, a shared cache, a
database that others write.
"""

from __future__ import annotations

import codecs
import io
import json
import math
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfmerge_studies.errors import UNPRINTABLE, DFMergeError, InputError, RunError, first_line, out_of_memory, printable

if TYPE_CHECKING:
    from rich.console import Console


_WIDE = 10_000  # columns of what goes to a file or a pipe: nothing is folded or cut

_SPELLED = "dfmerge.spelled"  # name of an error handler of encodings
_SIGNS = {"±": "+-", "…": "...", "·": "-", "→": "->", "×": "x", "–": "-", "—": "-"}  # noqa: RUF001


def prepare(*, debug: bool) -> None:
    """Make the standard streams usable, whatever they are; nothing happens where another program has replaced them.

    Args:
        debug: whether libraries may tell of their troubles in their own words.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # closed: the next file to be opened would take its place, and get what we print
            _to_nowhere(number)
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115
    if not isinstance(sys.stdout, io.TextIOWrapper) or sys.__stdout__ not in (None, sys.stdout):
        return
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_SPELLED)  # names that are no Unicode, and all that the locale does not know
    sys.stdout, sys.stderr = _Guarded(sys.stdout, _unwritten), _Guarded(sys.stderr)
    if not debug:
        warnings.formatwarning = lambda message, *_rest: f"WARNING: {printable(str(message))}\n"
        threading.excepthook = _tell_of_thread
        sys.unraisablehook = lambda _failed: None  # of destructors; nothing hangs on them


def _spell(error: UnicodeError) -> tuple[str, int]:
    """What stands for characters that an encoding does not have: signs in ASCII, escapes for all else."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = error.object[error.start : error.end]
    return "".join(_SIGNS.get(c) or c.encode("ascii", "backslashreplace").decode() for c in found), error.end


codecs.register_error(_SPELLED, _spell)


def _tell_of_thread(failed: threading.ExceptHookArgs) -> None:
    if failed.exc_value is not None:
        warn(f"WARNING: {first_line(failed.exc_value)}")


class _Guarded:
    """A standard stream that leads to nothing once it has failed, so that it fails once.

    Args:
        stream: the stream.
        failed: what to raise then; by default nothing, and no work ends because nobody can hear of it.
    """

    def __init__(self, stream: Any, failed: Callable[[OSError], BaseException] | None = None) -> None:
        self._stream = stream
        self._failed = failed

    def write(self, text: str) -> int:
        """Write a text."""
        if text == "":  # with which click looks what kind of stream this is; it would swallow the failure
            return 0
        with self._guard():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Hand over what has been written."""
        with self._guard():
            self._stream.flush()

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            _to_nowhere(self._stream.fileno())
            if self._failed is not None:
                raise self._failed(error) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _unwritten(error: OSError) -> BaseException:
    if isinstance(error, BrokenPipeError):  # a reader such as `head` that has enough needs no word
        return SystemExit(1)
    return RunError(f"cannot be written: {first_line(error)}", where="standard output", hint="Send it to another place")


def _to_nowhere(number: int) -> None:
    """Let a file descriptor lead to nothing."""
    nothing = os.open(os.devnull, os.O_RDWR)
    if nothing != number:
        os.dup2(nothing, number)
        os.close(nothing)


def check_working_directory() -> None:
    """Refuse to work where relative paths mean nothing.

    Raises:
        InputError: the working directory has been deleted.
    """
    try:
        Path.cwd()
    except OSError as error:
        raise InputError(
            "the working directory does not exist any more", hint="Change to a folder that does"
        ) from error


def unforeseen(error: BaseException) -> DFMergeError:
    """What to say of an error that no boundary has translated."""
    if isinstance(error, OSError):
        where = str(error.filename) if error.filename is not None else None
        reason = first_line(OSError(error.errno, error.strerror)) if error.strerror else first_line(error)
        return RunError(reason, where=where, hint="Check the path, its permissions and its disk")
    return out_of_memory(error) or RunError(
        f"this was not foreseen: {first_line(error)}", hint="Run again with --debug for the traceback, and report it"
    )


def say(text: str, *, end: str = "\n") -> None:
    """Print a line on standard output."""
    print(printable(text), end=end, flush=True)


def warn(text: str) -> None:
    """Print a line on standard error."""
    print(printable(text), file=sys.stderr, flush=True)


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """Print one JSON value on standard output.

    Args:
        value: what `json.dumps` takes; numbers that JSON does not have (NaN, infinity) become null.
        indent: None for a single line.
    """
    unicode = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")
    text = json.dumps(_finite(value), indent=indent, ensure_ascii=not unicode, allow_nan=False)
    print(UNPRINTABLE.sub(lambda found: f"\\u{ord(found.group()):04x}", text), flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def problems_json(problems: Iterable[DFMergeError]) -> list[dict[str, str | None]]:
    """Errors as `--json` shows them."""
    return [{"where": p.where, "what": p.what, "mend": p.hint} for p in problems]


def output() -> Console:
    """Standard output: results; to a file or a pipe, tables are as wide as they need."""
    return _console() if sys.stdout.isatty() else _console(soft_wrap=True, width=_WIDE)


def messages() -> Console:
    """Standard error: progress and logs."""
    return _console(stderr=True)


def _console(**options: Any) -> Console:
    from rich.console import Console, RenderableType
    from rich.segment import Segment
    from rich.table import Table
    from rich.text import Text

    def spelled(shown: Any, encoding: str) -> Any:
        """What is shown, before it is laid out: what stands for a character may be wider than it."""
        if isinstance(shown, str):
            return shown.encode(encoding, _SPELLED).decode(encoding)
        if isinstance(shown, Text):
            copy = shown.copy()
            copy.plain = spelled(shown.plain, encoding)
            return copy
        if isinstance(shown, Table):
            shown.title = spelled(shown.title, encoding)
            for column in shown.columns:
                column.header = spelled(column.header, encoding)
                column._cells[:] = [spelled(cell, encoding) for cell in column._cells]
        return shown

    class Literal(Console):
        """A console that obeys no markup in what it shows, and lets no control character through."""

        def print(self, *objects: Any, **options: Any) -> None:
            super().print(*(spelled(each, self.encoding) for each in objects), **options)

        def render(self, renderable: RenderableType, options: Any = None) -> Iterable[Segment]:
            for text, style, control in super().render(renderable, options):
                yield Segment(text if control else printable(text), style, control)

    return Literal(highlight=False, markup=False, emoji=False, **options)
