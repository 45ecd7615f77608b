"""`cache ls | verify | prune | push | pull`: look after the Fisher cache."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfmerge_studies.cli import common
from dfmerge_studies.errors import InputError, RunError, first_line

if TYPE_CHECKING:
    from dfmerge_studies.importance.cache import FisherCache

app = typer.Typer(help="Look after the Fisher cache.", no_args_is_help=True, rich_markup_mode=None)


@app.command("ls", epilog=common.example("dfmerge cache ls spec.yaml"))
def ls(spec: common.SpecArgument = None, cache: common.CacheOption = None, json: common.JsonOption = False) -> None:
    """List the entries, the least recently used first."""
    with _reachable(_open(spec, cache)) as opened:
        entries = list(opened.entries())
    if json:
        common.print_json(
            [{"file": e.location, "bytes": e.size, "used": e.used, **_short(e.metadata)} for e in entries]
        )
        return
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("key", "expert", "coefficient", "estimator", "MB", "last used"):
        table.add_column(name, justify="right" if name in ("coefficient", "MB") else "left", overflow="fold")
    for entry in entries:
        short = _short(entry.metadata)
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        table.add_row(
            entry.digest[:12],
            short["expert"] or "(unreadable)",
            "-" if short["coefficient"] is None else f"{short['coefficient']:.4g}",
            short["estimator"] or "-",
            f"{entry.size / 1e6:.1f}",
            used,
        )
    out = common.output()
    out.print(table)
    out.print(f"{len(entries)} entries, {sum(e.size for e in entries) / 1e6:.1f} MB")


@app.command("verify", epilog=common.example("dfmerge cache verify spec.yaml"))
def verify(spec: common.SpecArgument = None, cache: common.CacheOption = None, json: common.JsonOption = False) -> None:
    """Read every entry whole; damaged ones are set aside. Exit code 1 if there were any."""
    with _reachable(_open(spec, cache)) as opened:
        total = len(opened.digests())
        damaged = opened.verify()
    if json:
        common.print_json({"entries": total, "damaged": [{"file": file, "what": what} for file, what in damaged]})
    else:
        for file, what in damaged:
            common.warn(f"damaged: {file}: {what}")
        common.output().print(f"{total - len(damaged)} of {total} entries are whole")
    if damaged:
        raise typer.Exit(1)


@app.command("prune", epilog=common.example("dfmerge cache prune spec.yaml --keep 20GB"))
def prune(
    spec: common.SpecArgument = None,
    cache: common.CacheOption = None,
    keep: Annotated[str, typer.Option("--keep", metavar="SIZE", help="What may stay, e.g. 20GB.")] = "0",
    json: common.JsonOption = False,
) -> None:
    """Delete the least recently used entries until the rest fits; one that is in use stays."""
    from dfmerge_studies.spec import parse_size

    try:
        limit = parse_size(keep)
    except ValueError as error:
        raise InputError(str(error), where="--keep", hint="Correct the size") from error
    with _reachable(_open(spec, cache)) as opened:
        deleted = opened.prune(limit)
    if json:
        common.print_json({"deleted": deleted})
    else:
        common.output().print(f"{len(deleted)} entries deleted")


@app.command("push", epilog=common.example("dfmerge cache push spec.yaml --to s3://bucket/fishers"))
def push(
    to: Annotated[str, typer.Option("--to", metavar="URL", help="The shared cache: a folder or an fsspec URL.")],
    spec: common.SpecArgument = None,
    cache: common.CacheOption = None,
    json: common.JsonOption = False,
) -> None:
    """Copy the entries that a shared cache does not have from the spec's cache. Exit code 1 if some are damaged."""
    _copy(_open(spec, cache), _other(spec, to, "--to"), json)


@app.command("pull", epilog=common.example("dfmerge cache pull spec.yaml --from s3://bucket/fishers"))
def pull(
    origin: Annotated[str, typer.Option("--from", metavar="URL", help="The shared cache: a folder or an fsspec URL.")],
    spec: common.SpecArgument = None,
    cache: common.CacheOption = None,
    json: common.JsonOption = False,
) -> None:
    """Copy the entries that the spec's cache does not have from a shared cache. Exit code 1 if some are damaged."""
    _copy(_other(spec, origin, "--from"), _open(spec, cache), json)


def _copy(source: FisherCache, target: FisherCache, as_json: bool) -> None:
    from dfmerge_studies.importance.cache import copy_entries

    with _reachable(source), _reachable(target):
        done = copy_entries(source, target)
    if as_json:
        damaged = [{"key": digest, "what": what} for digest, what in done.damaged]
        common.print_json({"copied": done.copied, "present": done.present, "damaged": damaged})
    else:
        for digest, what in done.damaged:
            common.warn(f"damaged, not copied: {digest}: {what}")
        common.output().print(
            f"{len(done.copied)} entries copied to {target.location}, {done.present} were there already", markup=False
        )
    if done.damaged:
        raise typer.Exit(1)


@contextmanager
def _reachable(cache: FisherCache) -> Iterator[FisherCache]:
    """Turn a cache that cannot be reached into one message: here, unlike in a trial, nothing goes on without it."""
    try:
        yield cache
    except OSError as error:
        raise RunError(
            f"the cache cannot be reached: {first_line(error)}",
            where=cache.location,
            hint="Check the place and the credentials",
        ) from error


def _other(spec: Path | None, location: str, flag: str) -> FisherCache:
    from dfmerge_studies.importance.cache import open_cache

    opened = open_cache(location, common.load_spec(spec).workdir, where=flag)
    assert opened is not None
    return opened


def _open(spec: Path | None, cache: str | None) -> FisherCache:
    from dfmerge_studies.study.fishers import spec_cache

    settings = common.load_spec(spec, cache=cache)
    opened = spec_cache(settings)
    if opened is None:
        raise InputError("the spec has no cache", where=settings.where("cache"), hint="Name one with --cache")
    return opened


def _short(metadata: Mapping[str, str]) -> dict[str, Any]:
    coefficient = None
    with suppress(ValueError, OverflowError):  # whoever shares the cache may have written anything
        coefficient = float.fromhex(metadata["coefficient"]) if "coefficient" in metadata else None
    return {
        "expert": metadata.get("expert_name"),
        "coefficient": coefficient,
        "estimator": metadata.get("estimator"),
    }
