"""What every Fisher cache does, wherever it keeps its entries.

A cache saves work and never decides a result: an entry that is damaged, or that cannot be reached, is one that is not
there.  Several processes on several machines may share one.
"""

from __future__ import annotations

import logging
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfmerge_studies.errors import first_line
from dfmerge_studies.importance.cache.file import without_checksum
from dfmerge_studies.importance.cache.key import FisherKey, key_metadata
from dfmerge_studies.redact import masked_url

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)
PAUSE = 60.0  # seconds that a cache which failed is left alone: a dead server must not cost a time-out per Fisher


@dataclass(frozen=True)
class CacheEntry:
    """A Fisher in a cache.

    Attributes:
        digest: of its key.
        location: the file or object that holds it.
        size: bytes.
        used: when it was last read or written, seconds since the epoch.
        metadata: the key and the checksum, empty where it is unreadable.
    """

    digest: str
    location: str
    size: int
    used: float
    metadata: Mapping[str, str]


def is_digest(name: str) -> bool:
    """Tell whether a file's name, without its ending, is that of an entry."""
    return re.fullmatch(r"[0-9a-f]{64}", name) is not None


class FisherCache(ABC):
    """Fishers by key.

    Args:
        location: where the entries are, for messages.
        limit: bytes that the cache may take; the least recently used go first, except those in use.
    """

    def __init__(self, location: str, *, limit: int | None = None) -> None:
        self.location = masked_url(location)
        self.limit = limit
        self._away_until = 0.0

    def get(self, key: FisherKey) -> dict[str, Tensor] | None:
        """The values of a key, or None where they are absent, damaged or out of reach."""
        if time.monotonic() < self._away_until:
            return None
        for digest in key.digests:
            try:
                return self.load(digest)[0]
            except FileNotFoundError:
                continue
            except ValueError as error:
                self._damaged(digest, error)
            except OSError as error:
                self._lost("read", error)
                return None
        return None

    def _damaged(self, digest: str, error: ValueError) -> None:
        aside = self.set_aside(digest)
        if aside is not None:  # None: another process was quicker
            logger.warning(
                "damaged Fisher %s in %s (%s): set aside as %s, computed again",
                digest[:12],
                self.location,
                error,
                aside,
            )

    def put(self, key: FisherKey, values: Mapping[str, Tensor]) -> bool:
        """Store the values of a key; a full disk or a server that is away costs the entry, not the trial.

        Args:
            key: what they are.
            values: one tensor per parameter name, already in the stored dtype.

        Returns:
            Whether they are stored.
        """
        if time.monotonic() < self._away_until:
            return False
        try:
            self.save(key.digest, values, key_metadata(key))
            if self.limit is not None:
                self.prune(self.limit, keep=key.digest)
        except OSError as error:
            self._lost("written", error)
            return False
        return True

    def _lost(self, what: str, error: OSError) -> None:
        self._away_until = time.monotonic() + PAUSE
        logger.warning(
            "the Fisher cache %s cannot be %s (%s): going on without it for %d s",
            self.location,
            what,
            first_line(error),
            PAUSE,
        )

    @abstractmethod
    def load(self, digest: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Values and metadata of an entry, verified, and its use noted.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged; says how.
            OSError: the cache cannot be reached.
        """

    @abstractmethod
    def save(self, digest: str, values: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write an entry; readers see all of it or nothing.

        Args:
            digest: of its key.
            values: one tensor per parameter name.
            metadata: the key as texts.

        Raises:
            OSError: it cannot be written.
        """

    @abstractmethod
    def set_aside(self, digest: str) -> str | None:
        """Take an entry out of use without deleting it.

        Returns:
            Its new name; None where it was not there.
        """

    @abstractmethod
    def entries(self) -> Iterator[CacheEntry]:
        """All entries, the least recently used first.

        Raises:
            OSError: the cache cannot be reached.
        """

    @abstractmethod
    def digests(self) -> set[str]:
        """Which keys have an entry.

        Raises:
            OSError: the cache cannot be reached.
        """

    @abstractmethod
    def prune(self, limit: int, *, keep: str | None = None) -> list[str]:
        """Delete the least recently used entries until the rest fits; one that is in use is never deleted.

        Args:
            limit: bytes that may stay.
            keep: digest of an entry that is not deleted.

        Returns:
            Locations of what was deleted.

        Raises:
            OSError: the cache cannot be reached.
        """

    def verify(self) -> list[tuple[str, str]]:
        """Read every entry whole; damaged ones are set aside.

        Returns:
            Where each damaged entry is now, and what is wrong with it.

        Raises:
            OSError: the cache cannot be reached.
        """
        damaged = []
        for digest in sorted(self.digests()):
            try:
                self.load(digest)
            except FileNotFoundError:
                continue  # pruned by another process
            except ValueError as error:
                damaged.append((self.set_aside(digest) or digest, str(error)))
        return damaged


@dataclass(frozen=True)
class Copied:
    """What `copy_entries` did.

    Attributes:
        copied: digests of the entries that are there now and were not before.
        present: how many were there already.
        damaged: digests of the entries that were not copied, and why.
    """

    copied: list[str]
    present: int
    damaged: list[tuple[str, str]]


def copy_entries(source: FisherCache, target: FisherCache) -> Copied:
    """Copy every entry that the target does not have; each is verified on the way.

    Args:
        source: where from.
        target: where to; its limit is kept.

    Raises:
        OSError: one of the two cannot be reached; what was copied until then is whole.
    """
    there = target.digests()
    wanted = sorted(source.digests())
    copied, damaged = [], []
    for digest in wanted:
        if digest in there:
            continue
        try:
            values, metadata = source.load(digest)
        except FileNotFoundError:
            continue
        except ValueError as error:
            damaged.append((digest, str(error)))
            continue
        target.save(digest, values, without_checksum(metadata))
        copied.append(digest)
        if target.limit is not None:
            target.prune(target.limit, keep=digest)
    return Copied(copied, len(there.intersection(wanted)), damaged)
