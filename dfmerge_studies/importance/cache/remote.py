"""A Fisher cache behind an fsspec URL: an object store, or whatever else fsspec reaches.

    DIGEST.SHA.safetensors   the values; SHA begins the sha256 of the object
    DIGEST.json              the manifest: which object holds the values, the key
    DIGEST.used              written anew when the entry is used; its time is the time of use

DIGEST is the digest of the key.  The data is written first and the manifest last, so whoever sees a manifest finds all
of its data.  Data objects are named by their content: two workers that compute one key at the same time write two
objects or the same one, and either manifest is valid.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

from dfmerge_studies.errors import InputError, first_line
from dfmerge_studies.importance.cache.base import CacheEntry, FisherCache, is_digest
from dfmerge_studies.importance.cache.file import STRONG, checksum, parse_fisher
from dfmerge_studies.redact import masked_url

if TYPE_CHECKING:
    from torch import Tensor

GRACE = 600.0  # seconds: an entry used in the last so many is in use; data without a manifest so old is left over
_DATA, _MANIFEST, _USED = ".safetensors", ".json", ".used"


class RemoteCache(FisherCache):
    """Fishers in an object store.

    Args:
        url: an fsspec URL of a folder, such as s3://bucket/prefix; credentials come from the environment.
        limit: bytes that the cache may take.
        grace: seconds for which an entry counts as in use after each use.
        where: what names the URL, for messages.

    Raises:
        InputError: fsspec does not know the protocol, a package for it is missing, or a server that is asked at once
            does not answer.
    """

    def __init__(self, url: str, *, limit: int | None = None, grace: float = GRACE, where: str = "cache") -> None:
        super().__init__(url, limit=limit)
        self._grace = grace
        self._files, self._root = _open(url, where)
        self._noted: dict[str, float] = {}  # when this process last noted a use: not for every read

    def load(self, digest: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """See `FisherCache.load`."""
        with _failures_as_os_errors():
            manifest = self._manifest(self._files.cat_file(self._path(digest + _MANIFEST)))
            self._note_use(digest)
            try:
                data = self._files.cat_file(self._path(manifest["data"]))
            except FileNotFoundError:
                raise ValueError("the manifest names data that is not there") from None
        if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
            raise ValueError("the checksum does not match the data")
        return parse_fisher(data)

    def save(self, digest: str, values: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """See `FisherCache.save`."""
        from safetensors.torch import save

        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in values.items()}
        described = {**metadata, STRONG: checksum(tensors)}
        data = save(tensors, described)
        sha = hashlib.sha256(data).hexdigest()
        name = f"{digest}.{sha[:16]}{_DATA}"
        manifest = {"data": name, "sha256": sha, "size": len(data), "metadata": described}
        with _failures_as_os_errors():
            self._files.makedirs(self._root, exist_ok=True)
            self._files.pipe_file(self._path(name), data)
            self._files.pipe_file(self._path(digest + _MANIFEST), json.dumps(manifest).encode())

    def set_aside(self, digest: str) -> str | None:
        """See `FisherCache.set_aside`; the manifest is renamed, the data becomes left over and goes in time."""
        path = self._path(digest + _MANIFEST)
        aside = f"{path}.damaged-{uuid.uuid4().hex[:8]}"
        try:
            with _failures_as_os_errors():
                self._files.mv(path, aside)
        except OSError:
            return None
        return aside

    def entries(self) -> Iterator[CacheEntry]:
        """See `FisherCache.entries`."""
        listing = self._listing()
        for digest, used in sorted(self._uses(listing).items(), key=lambda item: item[1]):
            path = self._path(digest + _MANIFEST)
            try:
                with _failures_as_os_errors():
                    manifest = self._manifest(self._files.cat_file(path))
            except FileNotFoundError:
                continue  # pruned by another process
            except ValueError:
                manifest = {"metadata": {}, "data": "", "size": 0}
            yield CacheEntry(digest, self._path(manifest["data"]), manifest["size"], used, manifest["metadata"])

    def digests(self) -> set[str]:
        """See `FisherCache.digests`."""
        return {name.removesuffix(_MANIFEST) for name in self._listing() if name.endswith(_MANIFEST)}

    def prune(self, limit: int, *, keep: str | None = None) -> list[str]:
        """See `FisherCache.prune`; left-over data goes too."""
        listing, now = self._listing(), time.time()
        uses = self._uses(listing)
        total = sum(size for name, (size, _) in listing.items() if name.endswith(_DATA))
        doomed = [
            name
            for name, (_, written) in listing.items()
            if name.split(".")[0] not in uses and now - written > self._grace and not _is_aside(name)
        ]
        total -= sum(listing[name][0] for name in doomed if name.endswith(_DATA))
        deleted = []
        for digest, used in sorted(uses.items(), key=lambda item: item[1]):
            if total <= limit or now - used <= self._grace:
                break  # the rest was used later still
            if digest == keep:
                continue
            # The manifest first: from then on nobody looks for the data.
            mine = [name for name in listing if name.startswith(f"{digest}.") and not _is_aside(name)]
            doomed += sorted(mine, key=lambda name: not name.endswith(_MANIFEST))
            total -= sum(listing[name][0] for name in mine if name.endswith(_DATA))
            deleted.append(self._path(digest + _MANIFEST))
        with _failures_as_os_errors():
            for name in doomed:
                self._remove(name)
        return deleted

    def _remove(self, name: str) -> None:
        try:
            self._files.rm_file(self._path(name))
        except FileNotFoundError:
            return  # another process was quicker

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @staticmethod
    def _manifest(data: bytes) -> dict[str, Any]:
        try:
            manifest = json.loads(data)
            return {
                "data": str(manifest["data"]),
                "sha256": str(manifest["sha256"]),
                "size": int(manifest["size"]),
                "metadata": {str(name): str(text) for name, text in manifest["metadata"].items()},
            }
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"the manifest is damaged: {first_line(error)}") from error

    def _note_use(self, digest: str) -> None:
        """Before the data is read: from now on, and for the grace, nobody deletes the entry."""
        if time.monotonic() - self._noted.get(digest, -self._grace) > self._grace / 2:
            try:
                self._files.pipe_file(self._path(digest + _USED), b"used")
            except PermissionError:
                return  # a cache that we may only read
            self._noted[digest] = time.monotonic()

    def _listing(self) -> dict[str, tuple[int, float]]:
        """Size and time of every object of ours, by name."""
        with _failures_as_os_errors():
            self._files.invalidate_cache()
            try:
                found = self._files.ls(self._root, detail=True)
            except FileNotFoundError:
                return {}
        named = {item["name"].rstrip("/").rsplit("/", 1)[-1]: item for item in found if item["type"] == "file"}
        return {
            name: (int(item["size"] or 0), _seconds(item))
            for name, item in named.items()
            if is_digest(name.split(".")[0])  # others are not ours, whatever the folder is
        }

    @staticmethod
    def _uses(listing: Mapping[str, tuple[int, float]]) -> dict[str, float]:
        """When each entry was last used."""
        manifests = [name.removesuffix(_MANIFEST) for name in listing if name.endswith(_MANIFEST)]
        return {
            digest: max(listing[digest + _MANIFEST][1], listing.get(digest + _USED, (0, 0.0))[1])
            for digest in manifests
        }


def _open(url: str, where: str) -> tuple[Any, str]:
    import fsspec

    protocol = url.split("://")[0]
    try:
        # Others write too: no listing may be older than the question.
        files, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        extra = "pip install 'dfmerge-studies[s3]'" if protocol == "s3" else first_line(error)
        raise InputError(f"a package for {protocol}:// is not installed", where=where, hint=extra) from error
    except ValueError as error:
        raise InputError(
            f"{masked_url(url)!r}: {first_line(error)}",
            where=where,
            hint="Name a folder, or a URL that fsspec knows, such as s3://bucket/x",
        ) from error
    except Exception as error:  # some file systems connect at once; each has types of its own for what goes wrong
        raise InputError(
            f"{masked_url(url)!r} cannot be opened: {first_line(error)}",
            where=where,
            hint="Correct the URL, or check its server and the connection",
        ) from error
    return files, root.rstrip("/")


@contextmanager
def _failures_as_os_errors() -> Iterator[None]:
    """Whatever a file system behind fsspec raises when it is out of reach, as an OSError; each has types of its own."""
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:
        raise OSError(first_line(error)) from error


def _is_aside(name: str) -> bool:
    return ".damaged-" in name


def _seconds(item: Mapping[str, Any]) -> float:
    """When an object was written, whatever its file system calls that."""
    for field in ("LastModified", "last_modified", "mtime", "modified", "updated", "created"):
        value = item.get(field)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, (int, float)):
            return float(value)
    return time.time()  # unknown: never old enough to be deleted
