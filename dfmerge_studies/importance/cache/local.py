"""A Fisher cache in a folder: one safetensors file per Fisher, named by its key's digest.

Files are written under a temporary name and renamed, so that a reader sees a whole file or none.  A reader holds a
shared lock while it reads; deleting needs the exclusive one.  Locks end with their process.
"""

from __future__ import annotations

import contextlib
import os
import stat
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING

from dfmerge_studies.importance.cache.base import CacheEntry, FisherCache, is_digest
from dfmerge_studies.importance.cache.file import FAST, parse_fisher, read_metadata, save_fisher

if TYPE_CHECKING:
    from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows: there, a file that is open cannot be deleted anyway
    fcntl = None  # type: ignore[assignment]  # a module or nothing

_SUFFIX = ".safetensors"


class LocalCache(FisherCache):
    """Fishers in a folder that one or several machines see.

    Args:
        folder: where the files are; made when the first one is written.
        limit: bytes that the cache may take.
    """

    def __init__(self, folder: Path, *, limit: int | None = None) -> None:
        super().__init__(str(folder), limit=limit)
        self.folder = folder

    def file_of(self, digest: str) -> Path:
        """Path of an entry, whether it exists or not."""
        return self.folder / f"{digest}{_SUFFIX}"

    def load(self, digest: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """See `FisherCache.load`."""
        file = self.file_of(digest)
        with file.open("rb") as stream:
            _lock(stream, exclusive=False)
            data = stream.read()
        parsed = parse_fisher(data)
        with contextlib.suppress(OSError):  # pruned by another process, or a cache that we may only read
            os.utime(file)
        return parsed

    def save(self, digest: str, values: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """See `FisherCache.save`."""
        save_fisher(self.file_of(digest), values, metadata, checksum_kind=FAST)

    def set_aside(self, digest: str) -> str | None:
        """See `FisherCache.set_aside`."""
        file = self.file_of(digest)
        aside = file.with_name(f"{file.name}.damaged-{uuid.uuid4().hex[:8]}")
        try:
            file.rename(aside)
        except OSError:
            return None
        return str(aside)

    def entries(self) -> Iterator[CacheEntry]:
        """See `FisherCache.entries`."""
        for file, state in self._files():
            try:
                metadata = read_metadata(file)
            except (ValueError, OSError):
                metadata = {}
            yield CacheEntry(file.name.removesuffix(_SUFFIX), str(file), state.st_size, state.st_mtime, metadata)

    def digests(self) -> set[str]:
        """See `FisherCache.digests`."""
        return {file.name.removesuffix(_SUFFIX) for file, _ in self._files()}

    def prune(self, limit: int, *, keep: str | None = None) -> list[str]:
        """See `FisherCache.prune`."""
        files = self._files()
        total = sum(state.st_size for _, state in files)
        deleted = []
        for file, state in files:
            if total <= limit:
                break
            if keep is not None and file == self.file_of(keep):
                continue
            if _delete_unless_in_use(file):
                deleted.append(str(file))
                total -= state.st_size
        return deleted

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        """The entries that are there, the least recently used first; others may be deleting at the same time."""
        found = []
        for file in self.folder.glob(f"*{_SUFFIX}"):
            if not is_digest(file.name.removesuffix(_SUFFIX)):
                continue  # not ours: a model's folder may be named as a cache by mistake
            with contextlib.suppress(OSError):
                state = file.stat()
                if stat.S_ISREG(state.st_mode):  # whoever shares the folder may have put a pipe there
                    found.append((file, state))
        return sorted(found, key=lambda item: item[1].st_mtime)


def _delete_unless_in_use(file: Path) -> bool:
    """Delete a file that nobody reads; True if it is gone."""
    try:
        with file.open("rb") as stream:
            if not _lock(stream, exclusive=True):
                return False
            file.unlink(missing_ok=True)
    except FileNotFoundError:
        return True
    except PermissionError:
        return False
    return True


def _lock(stream: IO[bytes], *, exclusive: bool) -> bool:
    """Lock an open file until it is closed; False where another process holds it (only asked if exclusive)."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(stream, (fcntl.LOCK_EX | fcntl.LOCK_NB) if exclusive else fcntl.LOCK_SH)
    except BlockingIOError:
        return False
    except OSError:
        return not exclusive  # a file system without locks: read on, delete nothing
    return True
