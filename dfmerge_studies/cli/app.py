"""`dfmerge` and `python -m dfmerge_studies`: the commands, and what becomes of errors.

Only light modules are imported here: `--help` must answer at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from dfmerge_studies.cli import (
    cache,
    common,
    compare,
    dashboard,
    init,
    inspect,
    models,
    repair,
    report,
    run,
    schema,
    terminal,
    workers,
)
from dfmerge_studies.errors import DFMergeError, InputError
from dfmerge_studies.ranks import launched, launched_rank
from dfmerge_studies.redact import masked_text

_SHARED_WORK = frozenset(
    {"run", "merge", "fisher", "evaluate", "export"}
)  # commands whose work launched processes share


class _Commands(TyperGroup):
    """The commands; a Ctrl-C is told here, since typer makes a silent exit of it."""

    def invoke(self, ctx: Any) -> Any:  # click's context, or that of typer's own click
        """Run a command.

        Raises:
            typer.Exit: with 130, after an interruption.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            terminal.warn("interrupted")
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    help="Merge fine-tuned language models with Dynamic Fisher-weighted Merging, as Optuna studies.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# name, function, example
_COMMANDS = (
    ("init", init.init, "dfmerge init base a b --data a.val.jsonl --data b.val.jsonl"),
    ("run", run.run, "dfmerge run spec.yaml --trials 60 --workers 2"),
    ("status", inspect.status, "dfmerge status spec.yaml --watch"),
    ("list", inspect.list_studies, "dfmerge list --storage sqlite:///spec.db"),
    ("merge", models.merge, "dfmerge merge spec.yaml --coefficients a=0.4,b=0.9 --out merged"),
    ("fisher", models.fisher, "dfmerge fisher spec.yaml --expert a --out a.safetensors"),
    ("evaluate", models.evaluate, "dfmerge evaluate spec.yaml --model merged --split test"),
    ("export", models.export, "dfmerge export spec.yaml --out merged"),
    ("compare", compare.compare, "dfmerge compare spec.yaml --methods averaging,df-merge --seeds 3"),
    ("validate", inspect.validate, "dfmerge validate spec.yaml"),
    ("schema", schema.schema, "dfmerge schema"),
    ("repair", repair.repair, "dfmerge repair spec.yaml --apply"),
    ("report", report.report, "dfmerge report spec.yaml --out report"),
    ("dashboard", dashboard.dashboard, "dfmerge dashboard spec.yaml --port 8080"),
)
for _name, _function, _example in _COMMANDS:
    app.command(_name, epilog=common.example(_example))(_function)
app.command("worker", hidden=True)(workers.worker)
app.add_typer(cache.app, name="cache")


# The root of what typer raises for a wrong command line; newer releases of typer bring a click of their own.
_UsageError: type[typer.BadParameter] = typer.BadParameter.__bases__[0]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        terminal.say(version("dfmerge-studies"))
        raise typer.Exit


def _usage(error: typer.BadParameter) -> InputError:
    """A wrong command line as one message, as all other errors are."""
    message = " ".join(error.format_message().split())
    path = error.ctx.command_path if error.ctx is not None else "dfmerge"
    return InputError(f"{message[0].lower()}{message[1:]}", hint=f"'{path} -h' lists what there is")


@app.callback()
def _root(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks (anywhere on the line).")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Merge fine-tuned language models with Dynamic Fisher-weighted Merging, as Optuna studies."""
    command = context.invoked_subcommand
    if launched() > 1 and command not in _SHARED_WORK:
        raise InputError(
            f"{command} is work for one process, but a launcher started {launched()}",
            hint="Start it without accelerate launch or torchrun",
        )
    terminal.check_working_directory()


def _show_traceback() -> NoReturn:
    """What `--debug` shows, without what is secret in it."""
    terminal.warn(masked_text(traceback.format_exc()).rstrip())
    sys.exit(1)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 bad input, 1 a failed run, 130 interrupted.

    Args:
        arguments: without the program's name; those of the process by default.
    """
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given or bool(os.environ.get("DFMERGE_DEBUG"))
    terminal.prepare(debug=debug)
    with _terminated_as_interrupted():
        code = _exit_code(given, debug=debug)
    sys.exit(code)


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM, by which schedulers stop a process, clean up as Ctrl-C does.

    Not for launched ranks: one that waits for another would not come to it, and the launcher would have to wait.
    """
    ours = threading.current_thread() is threading.main_thread() and launched() == 1
    if not ours or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _exit_code(given: list[str], *, debug: bool) -> int:
    """Run a command line and tell its errors; with `--debug` they pass."""
    try:
        code = app(args=[item for item in given if item != "--debug"], prog_name="dfmerge", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            return error.exit_code
        return _tell(_usage(error), given)
    except DFMergeError as error:
        if debug:
            _show_traceback()
        return _tell(error, given)
    except KeyboardInterrupt:
        terminal.warn("interrupted")
        return 130
    except SystemExit:
        raise
    except BaseException as error:  # panics of Rust libraries are no Exception
        if debug:
            _show_traceback()
        return _tell(terminal.unforeseen(error), given)


def _tell(error: DFMergeError, given: list[str]) -> int:
    """Tell an error; returns the exit code."""
    rank = launched_rank()  # one that follows another has only errors of its own to tell
    terminal.warn(f"error: {f'rank {rank}: ' if rank else ''}{error}")
    if "--json" in given and not rank:
        try:
            terminal.print_json({"ok": False, "problems": terminal.problems_json([error])})
        except DFMergeError as unwritten:  # it cannot be told there; from now on the stream leads to nothing
            terminal.warn(f"error: {unwritten}")
            return unwritten.exit_code
    return error.exit_code
