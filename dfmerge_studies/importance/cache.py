"""The Fisher cache: one safetensors file per Fisher, found by everything that decides its values.

Files are written under a temporary name and renamed, so that a reader sees a whole file or none.  A file that does
not verify is set aside under another name, never used and never deleted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dfmerge_studies.checkpoints.digest import json_digest
from dfmerge_studies.errors import InputError

FORMAT_VERSION = 1
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FisherKey:
    """What a Fisher depends on; equal keys mean equal values.

    Attributes:
        base: digest of the base.
        expert: digest of the expert.
        expert_name: for people; not part of the identity.
        coefficient: lambda, exactly, as `float.hex` writes it.
        estimator: exact, sampled or empirical.
        inputs: digest of the tokenised inputs, in order (data, prompts, tokenizer, truncation).
        indices: rows of the validation split that they are, by task.
        seed: of the draws of `sampled`; None for the other estimators.
        parameters: digest of the parameter names.
        compute_dtype: of the weights.
        dtype: of the stored values.
        format_version: of the file.
    """

    base: str
    expert: str
    expert_name: str
    coefficient: str
    estimator: str
    inputs: str
    indices: Mapping[str, list[int]]
    seed: int | None
    parameters: str
    compute_dtype: str
    dtype: str
    format_version: int = FORMAT_VERSION

    @property
    def digest(self) -> str:
        """64 hexadecimal digits: the file's name."""
        return json_digest({name: value for name, value in asdict(self).items() if name != "expert_name"})


@dataclass(frozen=True)
class Entry:
    """A file of the cache.

    Attributes:
        file: where it is.
        size: bytes.
        used: when it was last read or written, seconds since the epoch.
        metadata: the key and the checksum, empty where the file is unreadable.
    """

    file: Path
    size: int
    used: float
    metadata: Mapping[str, str]


def save_fisher(file: Path, values: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write importance values as safetensors, atomically, with a checksum among the metadata.

    Args:
        file: where to.
        values: one tensor per parameter name.
        metadata: texts to keep beside them.

    Raises:
        OSError: no space, no permission.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in values.items()}
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        save_file(tensors, temporary, {**metadata, "sha256": _checksum(tensors)})
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.replace(file)
    except SafetensorError as error:  # how the writer reports a full disk
        raise OSError(str(error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def load_fisher(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read importance values and verify them.

    Args:
        file: a file of the cache, or one that `save_fisher` wrote elsewhere.

    Raises:
        ValueError: the file is damaged; says how.
        FileNotFoundError: there is none.
    """
    try:
        with safe_open(file, framework="pt") as stored:
            metadata = dict(stored.metadata() or {})
            values = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  # no mapping
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    if metadata.get("sha256") != _checksum(values):
        raise ValueError("the checksum does not match the values")
    return values, metadata


class FisherCache:
    """Fishers on disk.

    Several processes may read and write one cache at the same time: two that compute the same key write the same
    values, and the last rename wins.

    Args:
        folder: where the files are; made when the first one is written.
        limit: bytes that the cache may take; the least recently used go first.
    """

    def __init__(self, folder: Path, *, limit: int | None = None) -> None:
        self.folder = folder
        self.limit = limit

    def file_of(self, key: FisherKey) -> Path:
        """Path of a key's file, whether it exists or not.

        Args:
            key: what is asked for.
        """
        return self.folder / f"{key.digest}.safetensors"

    def get(self, key: FisherKey) -> dict[str, Tensor] | None:
        """The values of a key, or None where they are absent or damaged.

        Args:
            key: what is asked for.
        """
        file = self.file_of(key)
        try:
            values, _ = load_fisher(file)
        except FileNotFoundError:
            return None
        except (ValueError, OSError) as error:
            aside = self._set_aside(file)
            if aside is None:  # another process was quicker
                return None
            logger.warning("damaged Fisher file %s (%s): set aside as %s, computed again", file.name, error, aside.name)
            return None
        with contextlib.suppress(OSError):  # pruned by another process, or a cache that we may only read
            os.utime(file)
        return values

    def put(self, key: FisherKey, values: Mapping[str, Tensor]) -> None:
        """Store the values of a key; a full disk costs the entry, not the trial.

        Args:
            key: what they are.
            values: one tensor per parameter name, already in the stored dtype.
        """
        try:
            save_fisher(self.file_of(key), values, key_metadata(key))
        except OSError as error:
            logger.warning("the Fisher cache %s cannot be written (%s): going on without", self.folder, error)
            return
        if self.limit is not None:
            self.prune(self.limit, keep=self.file_of(key))

    def entries(self) -> Iterator[Entry]:
        """All entries, the least recently used first."""
        for file, state in self._files():
            try:
                with safe_open(file, framework="pt") as stored:
                    metadata = dict(stored.metadata() or {})
            except (SafetensorError, OSError):
                metadata = {}
            yield Entry(file, state.st_size, state.st_mtime, metadata)

    def verify(self) -> list[tuple[Path, str]]:
        """Read every entry whole; damaged ones are set aside.

        Returns:
            The damaged files, as they are named now, and what is wrong with each.
        """
        damaged = []
        for entry in list(self.entries()):
            try:
                load_fisher(entry.file)
            except (ValueError, OSError) as error:
                damaged.append((self._set_aside(entry.file) or entry.file, str(error)))
        return damaged

    def prune(self, limit: int, *, keep: Path | None = None) -> list[Path]:
        """Delete the least recently used entries until the rest fits.

        Args:
            limit: bytes that may stay.
            keep: an entry that is not deleted.

        Returns:
            What was deleted.
        """
        files = self._files()
        total = sum(state.st_size for _, state in files)
        deleted = []
        for file, state in files:
            if total <= limit:
                break
            if file == keep:
                continue
            file.unlink(missing_ok=True)
            deleted.append(file)
            total -= state.st_size
        return deleted

    def _set_aside(self, file: Path) -> Path | None:
        aside = file.with_name(f"{file.name}.damaged-{uuid.uuid4().hex[:8]}")
        try:
            file.rename(aside)
        except OSError:
            return None
        return aside

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        """The entries that are there, the least recently used first; others may be deleting at the same time."""
        found = []
        for file in self.folder.glob("*.safetensors"):
            with contextlib.suppress(FileNotFoundError):
                found.append((file, file.stat()))
        return sorted(found, key=lambda item: item[1].st_mtime)


def open_cache(location: str | None, folder: Path, limit: int | None) -> FisherCache | None:
    """The cache that a spec names.

    Args:
        location: a folder, relative to `folder`; None for no cache.
        folder: the spec's folder.
        limit: bytes, or None.

    Raises:
        InputError: the location is a file, or a URL.
    """
    if location is None:
        return None
    if "://" in location:
        raise InputError(f"{location!r} is a URL", where="cache", mend="Name a folder on this machine")
    path = (folder / Path(location).expanduser()).resolve()
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file", where="cache", mend="Name a folder")
    return FisherCache(path, limit=limit)


def key_metadata(key: FisherKey) -> dict[str, str]:
    """A key as texts, for the metadata of a file.

    Args:
        key: the key; whatever of it is not text becomes JSON.
    """
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in asdict(key).items()}


def _checksum(values: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(values):
        total.update(name.encode())
        total.update(values[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
