"""Content digests: the same files under another path are the same model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dfmerge_studies.boundary import reading
from dfmerge_studies.checkpoints.reference import ADAPTER_CONFIG, Checkpoint, read_json_object
from dfmerge_studies.errors import RunError

_CONTENT = (
    "*.safetensors",
    "pytorch_model*.bin",
    "adapter_model.bin",
    "*.py",
    "tokenizer.json",
    "*.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
)
# Written anew by every save, without any meaning for the model.
_PROVENANCE_KEYS = ("_name_or_path", "transformers_version", "base_model_name_or_path", "peft_version")


_SETTINGS = ("config.json", ADAPTER_CONFIG)


class Contents:
    """What the files of checkpoints held when they were read: two reads of one file must agree.

    It is handed from one read to the next, so that a file that is replaced in between is noticed, and the digest of a
    model is the digest of what was read into memory.
    """

    def __init__(self) -> None:
        self._known: dict[Path, str] = {}

    def add(self, file: Path, digest: str) -> None:
        """Note what a file held.

        Args:
            file: that was read.
            digest: of what was read, from `file_digest` for weights and `content_digest` for others.

        Raises:
            RunError: it held something else before.
        """
        if self._known.setdefault(file.absolute(), digest) != digest:
            raise RunError(
                "changed while it was being read", where=str(file), hint="Run again when nothing writes to it any more"
            )

    def open(self, checkpoint: Checkpoint) -> None:
        """Note what a checkpoint's settings and vocabulary are, before and after other libraries read them.

        Args:
            checkpoint: a model or an adapter.

        Raises:
            InputError: a file cannot be read.
            RunError: a file holds something else than before.
        """
        for file in _content_files(checkpoint):
            if not _holds_weights(file):
                self.add(file, content_digest(file))

    def digest(self, checkpoint: Checkpoint) -> str:
        """`model_digest` of a checkpoint as it was read; files that were not read are read now.

        Args:
            checkpoint: a model or an adapter.

        Raises:
            InputError: a file cannot be read.
            RunError: settings or vocabulary are not what they were when they were first read.
        """
        self.open(checkpoint)
        total = hashlib.sha256()
        for file in _content_files(checkpoint):
            if file.absolute() not in self._known:
                self.add(file, content_digest(file))
            total.update(f"{file.name}:{self._known[file.absolute()]}\n".encode())
        return total.hexdigest()


def model_digest(checkpoint: Checkpoint) -> str:
    """sha256 of everything that makes a checkpoint what it is: weights, configuration, vocabulary.

    Args:
        checkpoint: a model or an adapter on disk.

    Returns:
        64 hexadecimal digits.

    Raises:
        InputError: a file cannot be read.
    """
    return Contents().digest(checkpoint)


def content_digest(file: Path) -> str:
    """sha256 of what a file means: of its bytes, or of a configuration without what every save writes anew.

    Raises:
        InputError: the file cannot be read.
    """
    if file.name not in _SETTINGS:
        return file_digest(file)
    return json_digest({key: value for key, value in read_json_object(file).items() if key not in _PROVENANCE_KEYS})


def _content_files(checkpoint: Checkpoint) -> list[Path]:
    """In the order that the digest takes them."""
    found = {file for pattern in _CONTENT for file in checkpoint.path.glob(pattern) if file.is_file()}
    settings = [checkpoint.path / name for name in _SETTINGS]
    return sorted(found) + [file for file in settings if file.is_file()]


def _holds_weights(file: Path) -> bool:
    return file.suffix in (".safetensors", ".bin")


def file_digest(file: Path) -> str:
    """sha256 of a file's bytes.

    Raises:
        InputError: the file cannot be read.
    """
    with reading(str(file), "cannot be read", "Check its permissions"), file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def json_digest(value: Any) -> str:
    """sha256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def ids_digest(rows: Iterable[Any]) -> str:
    """sha256 of a sequence of JSON values, without holding their text at once.

    Args:
        rows: JSON values; each is dropped once it has been hashed.
    """
    total = hashlib.sha256()
    for row in rows:
        total.update(json.dumps(row, separators=(",", ":")).encode())
        total.update(b"\n")
    return total.hexdigest()
