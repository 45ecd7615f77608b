"""Where commands write: `--force` replaces what this program wrote there, and never what a study stands on.

A folder is recognised by its mark: an export by `dfmerge.json`, a Fisher file by its metadata, a report by its page.
Whatever else is in the way is refused before anything is computed, and again before anything is written.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dfmerge_studies.boundary import local_path
from dfmerge_studies.checkpoints.write import PROVENANCE, check_target
from dfmerge_studies.errors import InputError
from dfmerge_studies.spec import StudySpec
from dfmerge_studies.tasks.settings import HarnessTask

_WHERE = "--out"
_OTHER = "Choose another place"
_ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
_FISHER_FIELDS = frozenset({"estimator", "coefficient", "inputs", "format_version", "sha256"})


def model_target(spec: StudySpec, out: Path, *, force: bool, mark: str = PROVENANCE) -> Path:
    """The directory that an exported model goes to.

    Args:
        spec: what the study stands on.
        out: as it was given.
        force: whether an export of ours that is there is replaced.
        mark: file by which such a directory is known.

    Returns:
        The absolute path, without links: it is what a link leads to that is replaced.

    Raises:
        InputError: something else is there, or a part of the study is in it.
    """
    place = local_path(out, Path.cwd(), _WHERE)
    if force and place.is_dir():
        _refuse_parts(spec, place)
    check_target(place, force=force, mark=mark)
    return place


def fisher_target(spec: StudySpec, out: Path, *, force: bool) -> Path:
    """The file that a Fisher goes to.

    Args:
        spec: what the study stands on.
        out: as it was given.
        force: whether a Fisher file of ours that is there is replaced.

    Returns:
        The absolute path, without links.

    Raises:
        InputError: something else is there, or it is an entry of the cache.
    """
    place = local_path(out, Path.cwd(), _WHERE)
    if not place.exists():
        return place
    if not force:
        raise InputError(
            f"{out} exists already",
            where=_WHERE,
            hint="Choose another file, or add --force if this program wrote that one",
        )
    _refuse_parts(spec, place)
    cache = _cache(spec)
    if cache is not None and _ENTRY.fullmatch(place.name) and place.parent == cache.resolve():
        raise InputError(f"{place} is an entry of the cache", where=_WHERE, hint=_OTHER)
    if not _is_fisher(place):
        raise InputError(f"{place} is not a Fisher file that this program wrote", where=_WHERE, hint=_OTHER)
    return place


def report_target(spec: StudySpec, out: Path, *, force: bool) -> Path:
    """The directory that a report goes to, beside whatever else is in it.

    Args:
        spec: what the study stands on.
        out: as it was given.
        force: whether it was asked to replace what is there.

    Returns:
        The path, with the home directory for `~`.

    Raises:
        InputError: a part of the study is in it, or with `force` it is the working directory or the home directory.
    """
    place = local_path(out, Path.cwd(), _WHERE)
    _refuse_parts(spec, place, around=force)
    return out.expanduser()


def _refuse_parts(spec: StudySpec, place: Path, *, around: bool = True) -> None:
    """Refuse a place that is, or holds, what the study stands on: by identity, so under any of its names.

    With `around`, the working directory and the home directory too, whatever they hold.
    """
    if not place.exists():
        return
    for what, part in (*(_around() if around else ()), *_parts(spec)):
        for each in {Path(os.path.abspath(part)), part.resolve()}:  # noqa: PTH100  a link, and what it leads to
            for holder in (each, *each.parents):
                if holder.exists() and holder.samefile(place):
                    verb = "is" if holder == each else "holds"
                    raise InputError(f"{place} {verb} {what}, {part}", where=_WHERE, hint=_OTHER)


def _around() -> Iterator[tuple[str, Path]]:
    """What a command must not replace, whatever it is about."""
    yield "the working directory", Path.cwd()
    yield "the home directory", Path("~").expanduser()


def _parts(spec: StudySpec) -> Iterator[tuple[str, Path]]:
    """What a study stands on, with a word for each."""
    from dfmerge_studies.storage import resolve_url, storage_file
    from dfmerge_studies.trials.outbox import outboxes

    yield "the spec", spec.file
    database = storage_file(resolve_url(spec.storage_url, spec.workdir))
    if database is not None:
        yield "the study's storage", database
    yield "the outbox", outboxes(spec.workdir)
    cache = _cache(spec)
    if cache is not None:
        yield "the Fisher cache", cache
    models = {"base": spec.base, **{f"expert {name}": expert.model for name, expert in spec.experts.items()}}
    if spec.multi_task is not None:
        models["multi-task model"] = spec.multi_task
    for name, reference in models.items():
        folder = spec.root / Path(reference).expanduser()
        if folder.exists():
            yield f"the {name}", folder
    if isinstance(spec.importance.indices, str):
        yield "the file of Fisher rows", spec.root / spec.importance.indices
    for name, task in spec.tasks.items():
        for text in _texts(task.include_path if isinstance(task, HarnessTask) else task.dataset):
            for file in glob.iglob(str(spec.root / text)):  # noqa: PTH207  absolute patterns too
                yield f"data of the task {name}", Path(file)


def _cache(spec: StudySpec) -> Path | None:
    place = spec.cache_place
    if place is None or ("://" in place and not place.startswith("file://")):
        return None
    return spec.workdir / Path(place.removeprefix("file://")).expanduser()


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(inner)


def _is_fisher(file: Path) -> bool:
    """Whether a file begins with the header of a Fisher that `fisher` wrote."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length)) if length < file.stat().st_size else {}
        return bool(header.get("__metadata__", {}).keys() >= _FISHER_FIELDS)
    except (OSError, ValueError, AttributeError):
        return False
