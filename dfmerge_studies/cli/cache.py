"""`cache ls | verify | prune`: look after the Fisher cache."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfmerge_studies.cli import common
from dfmerge_studies.errors import InputError

if TYPE_CHECKING:
    from dfmerge_studies.importance.cache import FisherCache

app = typer.Typer(help="Look after the Fisher cache.", no_args_is_help=True, rich_markup_mode=None)


@app.command("ls")
def ls(spec: common.SpecArgument = None, cache: common.CacheOption = None, json: common.JsonOption = False) -> None:
    """List the entries, the least recently used first."""
    entries = list(_open(spec, cache).entries())
    if json:
        common.print_json(
            [{"file": str(e.file), "bytes": e.size, "used": e.used, **_short(e.metadata)} for e in entries]
        )
        return
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("key", "expert", "coefficient", "estimator", "MB", "last used"):
        table.add_column(name, justify="right" if name in ("coefficient", "MB") else "left")
    for entry in entries:
        short = _short(entry.metadata)
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        table.add_row(
            entry.file.stem[:12],
            short["expert"] or "(unreadable)",
            "-" if short["coefficient"] is None else f"{short['coefficient']:.4g}",
            short["estimator"] or "-",
            f"{entry.size / 1e6:.1f}",
            used,
        )
    out = common.output()
    out.print(table)
    out.print(f"{len(entries)} entries, {sum(e.size for e in entries) / 1e6:.1f} MB")


@app.command("verify")
def verify(spec: common.SpecArgument = None, cache: common.CacheOption = None, json: common.JsonOption = False) -> None:
    """Read every entry whole; damaged ones are set aside. Exit code 1 if there were any."""
    opened = _open(spec, cache)
    total = sum(1 for _ in opened.entries())
    damaged = opened.verify()
    if json:
        common.print_json({"entries": total, "damaged": [{"file": str(f), "what": what} for f, what in damaged]})
    else:
        for file, what in damaged:
            typer.echo(f"damaged: {file}: {what}", err=True)
        common.output().print(f"{total - len(damaged)} of {total} entries are whole")
    if damaged:
        raise typer.Exit(1)


@app.command("prune")
def prune(
    spec: common.SpecArgument = None,
    cache: common.CacheOption = None,
    keep: Annotated[str, typer.Option("--keep", metavar="SIZE", help="What may stay, e.g. 20GB.")] = "0",
    json: common.JsonOption = False,
) -> None:
    """Delete the least recently used entries until the rest fits."""
    from dfmerge_studies.spec import parse_size

    try:
        limit = parse_size(keep)
    except ValueError as error:
        raise InputError(str(error), where="--keep", mend="Correct the size") from error
    deleted = _open(spec, cache).prune(limit)
    if json:
        common.print_json({"deleted": [str(file) for file in deleted]})
    else:
        common.output().print(f"{len(deleted)} entries deleted")


def _open(spec: Path | None, cache: str | None) -> FisherCache:
    from dfmerge_studies.study.session import spec_cache

    settings = common.load_spec(spec, cache=cache)
    opened = spec_cache(settings)
    if opened is None:
        raise InputError("the spec has no cache", where=settings.where("cache"), mend="Name one with --cache")
    return opened


def _short(metadata: Mapping[str, str]) -> dict[str, Any]:
    coefficient = metadata.get("coefficient")
    return {
        "expert": metadata.get("expert_name"),
        "coefficient": float.fromhex(coefficient) if coefficient else None,
        "estimator": metadata.get("estimator"),
    }
