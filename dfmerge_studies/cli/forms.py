"""Flags of `merge` and `export` that say in which form a merge is written, and where else it goes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfmerge_studies import limits
from dfmerge_studies.checkpoints.precision import Precision
from dfmerge_studies.cli import common
from dfmerge_studies.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dfmerge_studies.report.export import Exported
    from dfmerge_studies.tasks.metrics import Guarded

_DTYPES = [precision.value for precision in Precision]

DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="|".join(_DTYPES),
        help="Of the written weights; base: as the base's files have them. Scores are checked in it.",
    ),
]
SplitOption = Annotated[
    bool,
    typer.Option(
        "--split-heads", help="Classifiers: also a folder per task, with encoder and head, that pipeline() opens."
    ),
]
AdapterOption = Annotated[
    bool,
    typer.Option(
        "--as-adapter", help="Where every expert is a LoRA adapter: write one, by SVD of what the merge changes."
    ),
]
RankOption = Annotated[
    int | None,
    typer.Option("--rank", metavar="R", min=1, max=limits.COUNT, help="Of --as-adapter; default: the experts' summed."),
]
PushOption = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub", metavar="REPO", help="Also a repository on the Hub, OWNER/NAME; made where it is not there."
    ),
]
PrivateOption = Annotated[bool, typer.Option("--private", help="With --push-to-hub: a private repository.")]


def precision_of(dtype: str) -> Precision:
    """The value of `--dtype`.

    Raises:
        InputError: there is no such type.
    """
    if dtype not in _DTYPES:
        raise InputError(
            f"{dtype!r} is no type of weights",
            where="--dtype",
            hint=f"One of {', '.join(_DTYPES)}",
        )
    return Precision(dtype)


def check_push(repository: str | None, private: bool) -> None:
    """Refuse, before anything is computed, what cannot be pushed.

    Raises:
        InputError: naming the flag.
    """
    if repository is not None:
        from dfmerge_studies.report import hub

        hub.check_push(repository)
    elif private:
        raise InputError("it says how to push, and nothing is pushed", where="--private", hint="Add --push-to-hub REPO")


def outcome(exported: Exported, out: Path, repository: str | None, private: bool) -> dict[str, Any]:
    """What was written, for `--json`, after it has been pushed where that is wanted.

    Raises:
        RunError: it cannot be pushed.
    """
    described = exported.described()
    if repository is None:
        return described
    from dfmerge_studies.report.hub import push

    return {**described, "hub": push(out, repository, private=private)}


def tell(exported: Exported, result: dict[str, Any]) -> None:
    """Say what an adapter keeps, what the written model scores where it was scored again, and where it was pushed."""
    if exported.adapter is not None:
        common.output().print(exported.adapter.line(), markup=False)
    if exported.checked is not None:
        common.output().print(exported.checked.line(), markup=False)
        for warning in exported.checked.warnings():
            common.warn(f"warning: {warning}")
    tell_guards(exported.guards)
    if "hub" in result:
        common.output().print(f"pushed to {result['hub']}", markup=False)


def guards_json(guards: Mapping[str, Guarded]) -> dict[str, Any]:
    """How a model stands to the guards, for `--json`; nothing where there are none."""
    return {"guards": {task: found.described() for task, found in guards.items()}} if guards else {}


def tell_guards(guards: Mapping[str, Guarded]) -> None:
    """Say how a model stands to the guards; a broken one is a warning."""
    for task, found in guards.items():
        way = "loses" if found.drop > 0 else "gains"
        text = f"guard {task}: {way} {abs(found.drop):.1f} points against the base, {found.allowed:g} may be lost"
        if found.kept:
            common.output().print(text, markup=False)
        else:
            common.warn(f"warning: {text}")
