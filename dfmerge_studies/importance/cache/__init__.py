"""The Fisher cache: a Fisher is found by everything that decides its values, and computed once."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from dfmerge_studies.boundary import kind_of, local_path
from dfmerge_studies.errors import InputError
from dfmerge_studies.importance.cache.base import CacheEntry, Copied, FisherCache, copy_entries
from dfmerge_studies.importance.cache.file import load_fisher, save_fisher
from dfmerge_studies.importance.cache.key import FORMAT_VERSION, FisherKey, key_metadata
from dfmerge_studies.importance.cache.local import LocalCache
from dfmerge_studies.importance.cache.remote import RemoteCache
from dfmerge_studies.importance.cache.shelf import Policy, Shelf

__all__ = [
    "FORMAT_VERSION",
    "CacheEntry",
    "Copied",
    "FisherCache",
    "FisherKey",
    "LocalCache",
    "Policy",
    "RemoteCache",
    "Shelf",
    "copy_entries",
    "default_limit",
    "key_metadata",
    "load_fisher",
    "open_cache",
    "save_fisher",
]


_LARGEST_DEFAULT = 10_000_000_000  # bytes
_SHARE_OF_DISK = 10


def default_limit(location: str | None, folder: Path) -> int | None:
    """What a cache may take where nobody said: 10 GB, or a tenth of the disk's free space if that is less.

    What the cache holds already counts as free, so that the limit does not sink while the cache grows.

    Args:
        location: as for `open_cache`.
        folder: ditto.

    Returns:
        Bytes; None for a cache that is behind a URL, or that is nowhere.
    """
    if location is None or _is_url(location):
        return None
    cache = open_cache(location, folder)
    assert isinstance(cache, LocalCache)
    there = next(place for place in (cache.folder, *cache.folder.parents) if place.is_dir())
    free = shutil.disk_usage(there).free + sum(entry.size for entry in cache.entries())
    return min(_LARGEST_DEFAULT, free // _SHARE_OF_DISK)


def open_cache(
    location: str | None, folder: Path, limit: int | None = None, *, where: str = "cache"
) -> FisherCache | None:
    """The cache that a spec names.

    Args:
        location: a folder, relative to `folder`, or an fsspec URL; None for no cache.
        folder: the spec's folder.
        limit: bytes, or None.
        where: what names the location, for messages.

    Raises:
        InputError: the location is a file, or a URL that cannot be used.
    """
    if location is None:
        return None
    if _is_url(location):
        if re.search(r"://([^/]*|[^/]*:.*)@", location):
            raise InputError(
                "the URL holds a user name or a password",
                where=where,
                hint="Leave them out; put credentials into the environment or into fsspec's configuration",
            )
        if not location.partition("://")[2]:  # what fsspec says of it is about arguments of a class
            raise InputError(
                f"the URL {location!r} names no place", where=where, hint="Name one, such as s3://bucket/x"
            )
        return RemoteCache(location, limit=limit, where=where)
    path = local_path(location.removeprefix("file://"), folder, where)
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a {kind_of(path) or 'file'}", where=where, hint="Name a folder")
    return LocalCache(path, limit=limit)


def _is_url(location: str) -> bool:
    """Whether a place is behind fsspec, and no folder of this machine."""
    return "://" in location and not location.startswith("file://")
