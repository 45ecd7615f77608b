"""Content digests: the same files under another path are the same model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dfmerge_studies.boundary import reading
from dfmerge_studies.checkpoints.reference import Checkpoint, read_json_object

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


def model_digest(checkpoint: Checkpoint) -> str:
    """sha256 of everything that makes a checkpoint what it is: weights, configuration, vocabulary.

    Args:
        checkpoint: a model or an adapter on disk.

    Returns:
        64 hexadecimal digits.

    Raises:
        InputError: a file cannot be read.
    """
    total = hashlib.sha256()
    for file in sorted({file for pattern in _CONTENT for file in checkpoint.path.glob(pattern) if file.is_file()}):
        total.update(f"{file.name}:{file_digest(file)}\n".encode())
    for name in ("config.json", "adapter_config.json"):
        file = checkpoint.path / name
        if file.is_file():
            config = read_json_object(file)
            meaning = {key: value for key, value in config.items() if key not in _PROVENANCE_KEYS}
            total.update(f"{name}:{json_digest(meaning)}\n".encode())
    return total.hexdigest()


def file_digest(file: Path) -> str:
    """sha256 of a file's bytes.

    Args:
        file: the file to read.

    Raises:
        InputError: the file cannot be read.
    """
    with reading(str(file), "cannot be read", "Check its permissions"), file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def json_digest(value: Any) -> str:
    """sha256 of a JSON value, independent of the order of keys.

    Args:
        value: what `json.dumps` takes.
    """
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
