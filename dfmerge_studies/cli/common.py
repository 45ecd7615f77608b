"""What the commands share: options, the spec, consoles, progress."""

from __future__ import annotations

import atexit
import gc
import inspect
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfmerge_studies.boundary import check_is_text
from dfmerge_studies.cli.pulse import Pulse
from dfmerge_studies.cli.terminal import messages as messages
from dfmerge_studies.cli.terminal import output as output
from dfmerge_studies.cli.terminal import print_json as print_json
from dfmerge_studies.cli.terminal import say as say
from dfmerge_studies.cli.terminal import warn as warn
from dfmerge_studies.errors import printable
from dfmerge_studies.methods import all_parameters
from dfmerge_studies.redact import masked_override, masked_text

if TYPE_CHECKING:
    from dfmerge_studies.progress import Progress
    from dfmerge_studies.ranks import Ranks
    from dfmerge_studies.report.tracking import Tracking
    from dfmerge_studies.spec import Examined, StudySpec

SpecArgument = Annotated[
    Path | None, typer.Argument(metavar="SPEC", help="A YAML spec; without one, the shipped quickstart.")
]
RequiredSpec = Annotated[Path, typer.Argument(metavar="SPEC", help="A YAML spec.")]
StorageOption = Annotated[
    str | None,
    typer.Option("--storage", metavar="URL", envvar="DFMERGE_STORAGE", help="Optuna storage instead of the spec's."),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override any field, e.g. search.step=0.1.")
]
DeviceOption = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:1.")]
CacheOption = Annotated[
    str | None,
    typer.Option(
        "--cache", metavar="URL", help="Fisher cache instead of the spec's: auto, all, none, a folder or an fsspec URL."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what this program wrote there, and nothing else.")]

TrackerOption = Annotated[
    list[str] | None,
    typer.Option(
        "--tracker",
        metavar="NAME[=PLACE]",
        help="Also send trials to wandb (=PROJECT), mlflow (=URI or folder) or tensorboard (=folder); repeatable.",
    ),
]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run code that comes with a checkpoint, or that a spec names: a spec alone cannot say so.",
    ),
]

MethodParameters = dict[str, float] | None  # those that were given; see `with_method_parameters`

QUICKSTART = "quickstart"


def with_method_parameters(command: Callable[..., None]) -> Callable[..., None]:
    """A command with a flag for every parameter that some method has.

    Args:
        command: its `parameters` gets the values that were given, by name.
    """
    flags = {}
    for name, by_method in all_parameters().items():
        first = next(iter(by_method.values()))
        words = "; ".join(f"{method}: {each.meaning}" for method, each in by_method.items())
        option = typer.Option(first.flag, metavar="X", help=f"Of {words}.")
        flags[name] = inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[float | None, option]
        )

    def with_flags(**given: Any) -> None:
        values = {name: value for name in flags if (value := given.pop(name)) is not None}
        command(**given, parameters=values)

    own = inspect.signature(command, eval_str=True).parameters.values()
    kept = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own if each.name != "parameters"]
    everything = [*kept, *flags.values()]
    with_flags.__doc__ = command.__doc__
    with_flags.__annotations__ = {each.name: each.annotation for each in everything}
    with_flags.__signature__ = inspect.Signature(everything)  # type: ignore[attr-defined]  # what typer reads
    return with_flags


@contextmanager
def tracking_of(texts: list[str] | None) -> Iterator[Tracking | None]:
    """What `--tracker` asks for, to be told of studies; nothing where it asks for nothing.

    Raises:
        InputError: a tracker cannot be had or reached.
    """
    if not texts:
        yield None
        return
    from dfmerge_studies.report.tracking import Tracking, check_places, wanted_trackers

    wanted = wanted_trackers(texts)
    check_places(wanted)
    with Tracking(wanted, warn) as tracking:
        yield tracking


def load_spec(file: Path | None, overrides: list[str] | None = None, **flags: str | int | None) -> StudySpec:
    """The spec of a command line.

    Args:
        file: its path, None for the quickstart, whose outputs go to the working directory.
        overrides: values of `--set`.
        **flags: further overrides by dotted key with `__` for the dots; None means not given.
    """
    from dfmerge_studies.spec import StudySpec

    return StudySpec.from_yaml(*_spec_arguments(file, overrides, flags), workdir=_workdir(file))


def examine_spec(
    file: Path | None, overrides: list[str] | None = None, **flags: str | int | None
) -> Examined[StudySpec]:
    """All that is wrong with the spec of a command line, and what is left of it."""
    from dfmerge_studies.spec import StudySpec

    return StudySpec.examine(*_spec_arguments(file, overrides, flags), workdir=_workdir(file))


def _spec_arguments(
    file: Path | None, overrides: list[str] | None, flags: Mapping[str, str | int | None]
) -> tuple[Path, list[str]]:
    given = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in flags.items() if value is not None]
    if file is None:
        file = Path(str(files("dfmerge_studies").joinpath(QUICKSTART, f"{QUICKSTART}.yaml")))
        check_is_text(Path.cwd(), "the working directory")
    check_is_text(file.absolute(), "SPEC")
    return file, [*(overrides or []), *given]


def _workdir(file: Path | None) -> Path | None:
    return Path.cwd() if file is None else None


def trusting(overrides: list[str] | None, trust: bool) -> list[str]:
    """Overrides with the flag that lets foreign code run among them, so that later commands get it too."""
    return [*(overrides or []), *(["trust_remote_code=true"] if trust else [])]


def check_early(spec: StudySpec, *, models: bool = True, storage: bool = False, create: bool = True) -> None:
    """Refuse what can be refused in a moment, before the heavy libraries are imported.

    Args:
        spec: the settings.
        models: whether the command needs the models and the data.
        storage: whether it needs the storage.
        create: whether a storage that is not there will be made.

    Raises:
        InputError: the first problem.
    """
    from dfmerge_studies.ranks import launched_rank

    if storage and launched_rank() == 0:
        from dfmerge_studies.storage import check_url, resolve_url

        check_url(resolve_url(spec.storage_url, spec.workdir), create=create)
        from dfmerge_studies.objective.preflight import check_extras

        check_extras(spec)
    if models:
        from dfmerge_studies.objective.preflight import check_inputs

        check_inputs(spec)


def join_ranks(spec: StudySpec) -> Ranks:
    """Join the processes that a launcher started together with this one; one process by itself is one rank.

    Only the leader returns.  The others work for it, print nothing, and end when it does.
    """
    from dfmerge_studies.ranks import SOLO, Group, launched

    if launched() == 1:
        return SOLO
    if spec.device_map is not None:
        from dfmerge_studies.objective.cards import refused_in_group

        raise refused_in_group(spec, launched())
    quiet_libraries()
    group = Group(spec.device)
    atexit.register(group.leave)  # however the command ends, the others end with it
    if not group.leader:
        group.follow()
        raise typer.Exit(0)
    return group


def again(
    file: Path | None, *, storage: str | None = None, overrides: list[str] | None, **flags: str | int | None
) -> list[str]:
    """The words that must follow a command's name to mean the same study: the spec and what changes it.

    Args:
        file: the spec, None for the quickstart.
        storage: value of `--storage`; what is secret in it is not shown.
        overrides: values of `--set`; likewise.
        **flags: as `load_spec` takes them; told as values of `--set`, which every command has.
    """
    words = [] if file is None else [str(file)]
    if storage is not None and storage != os.environ.get("DFMERGE_STORAGE"):
        from dfmerge_studies.storage import safe_url

        words += ["--storage", safe_url(storage)]
    given = [f"{key.replace('__', '.')}={value}" for key, value in flags.items() if value is not None]
    for override in (*(overrides or ()), *given):
        words += ["--set", masked_override(override)]
    return words


def command_line(*words: str) -> str:
    """A command of this program as a shell takes it.

    >>> command_line("run", "my spec.yaml")
    "dfmerge run 'my spec.yaml'"
    """
    return shlex.join(["dfmerge", *words])


def tell_next(*commands: list[str]) -> None:
    """Print what may be done next, as lines to copy: a terminal does not break them.

    Args:
        *commands: the words of each, without the program's name.
    """
    lines = [f"  {command_line(*words)}" for words in commands]
    output().print("\n".join(["next:", *lines]), markup=False, soft_wrap=True)


class _OneLine(logging.Formatter):
    """A level and a message; what was raised is told by whoever tells the error."""

    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname}: {printable(masked_text(record.getMessage()))}"  # a library may log a URL


def quiet_libraries() -> None:
    """Our own warnings on standard error, nothing of Optuna's and transformers' chatter."""
    import warnings

    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("transformers").setLevel(logging.ERROR)


def load_libraries() -> None:
    """Import what loads models, once, and without a look for garbage meanwhile.

    The imports make a million objects that stay to the end; looking among them for unreachable ones again and again
    takes a second of a core.
    """
    quiet_libraries()
    if "transformers" in sys.modules:
        return
    gc.disable()
    try:
        import datasets  # noqa: F401
        import transformers.modeling_utils  # noqa: F401

        import dfmerge_studies.study.session  # noqa: F401
    finally:
        gc.enable()
    gc.freeze()


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on standard error for work in named phases, of which nothing remains; to a file, a line now and then."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from dfmerge_studies.ranks import launched_rank

    first = launched_rank() == 0
    watched = sys.stderr.isatty() and first
    pulse = Pulse(lambda text: messages().print(text, markup=False, soft_wrap=True), on=first and not watched)
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with pulse, Progress(*columns, console=messages(), transient=True, disable=not watched) as bars:
        shown = bars.add_task("loading", total=None)

        def show(what: str, done: int, total: int) -> None:
            bars.update(shown, description=what, completed=done, total=total)
            pulse.doing(what, done, total)

        yield show


def example(text: str) -> str:
    """An example as the last lines of a command's help."""
    return f"\b\nExample:\n  {text}"
