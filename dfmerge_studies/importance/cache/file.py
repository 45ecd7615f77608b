"""A Fisher as a safetensors file: values by parameter name, the key and a checksum among the metadata.

safetensors notices bytes that are missing or too many, but loads a flipped bit silently: hence the checksum.  What
stays on this machine's file systems has a fast one, xxh3_128; what leaves it has sha256, which nobody can forge.

Torch is imported where values are: `dfmerge cache ls` reads metadata only.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash
from safetensors import SafetensorError

from dfmerge_studies.errors import first_line
from dfmerge_studies.temporary import beside

if TYPE_CHECKING:
    from torch import Tensor

_LARGEST_HEADER = 100_000_000  # bytes, the limit of the format
_HEADER = 8  # bytes that say how long the JSON header is
FAST, STRONG = "xxh3_128", "sha256"  # kinds of checksums, and their names among the metadata
CHECKSUMS: Mapping[str, Callable[[], Any]] = {FAST: xxhash.xxh3_128, STRONG: hashlib.sha256}


def save_fisher(
    file: Path, values: Mapping[str, Tensor], metadata: Mapping[str, str], *, checksum_kind: str = STRONG
) -> None:
    """Write importance values as safetensors, atomically, with a checksum among the metadata.

    Args:
        file: where to.
        values: one tensor per parameter name.
        metadata: texts to keep beside them.
        checksum_kind: one of `CHECKSUMS`.

    Raises:
        OSError: no space, no permission.
    """
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in values.items()}
    temporary = beside(file)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(tensors, temporary, {**metadata, checksum_kind: checksum(tensors, checksum_kind)})
        temporary.chmod(mode)  # safetensors lets nobody but the owner read, and others may share the folder
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.replace(file)
    except SafetensorError as error:  # how the writer reports a full disk
        raise OSError(first_line(error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def load_fisher(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read importance values and verify them.

    Args:
        file: one that `save_fisher` wrote.

    Raises:
        ValueError: the file is damaged; says how.
        OSError: it cannot be read; FileNotFoundError where there is none.
    """
    return parse_fisher(file.read_bytes())


def parse_fisher(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The values and the metadata of a file's bytes, verified.

    The bytes are read, not mapped: a mapped file on a file system that goes away ends the process.

    Raises:
        ValueError: it is damaged; says how.
    """
    from safetensors.torch import load

    try:
        values = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:  # a type that torch lacks, say
        raise ValueError(f"no values of tensors: {first_line(error)}") from error
    metadata = parse_metadata(data)
    kind = next((kind for kind in CHECKSUMS if kind in metadata), None)
    if kind is None or metadata[kind] != checksum(values, kind):
        raise ValueError("the checksum does not match the values")
    return values, metadata


def parse_metadata(data: bytes) -> dict[str, str]:
    """The metadata of a file, from its bytes or from so many of them that the header is whole.

    Raises:
        ValueError: that is no header.
    """
    length = int.from_bytes(data[:_HEADER], "little")
    try:
        metadata = json.loads(data[_HEADER : _HEADER + length]).get("__metadata__") or {}
        return {str(name): str(text) for name, text in metadata.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError("no safetensors header") from error


def read_metadata(file: Path) -> dict[str, str]:
    """The metadata of a file without its values.

    Args:
        file: one that `save_fisher` wrote.

    Raises:
        ValueError: it has no header.
        OSError: it cannot be read.
    """
    with file.open("rb") as stream:
        start = stream.read(_HEADER)
        length = int.from_bytes(start, "little")
        if length > min(file.stat().st_size, _LARGEST_HEADER):
            raise ValueError("the header is longer than the file, or than any header")
        return parse_metadata(start + stream.read(length))


def checksum(values: Mapping[str, Tensor], kind: str = STRONG) -> str:
    """Checksum over names and values, in the order of the names.

    Args:
        values: one tensor per parameter name.
        kind: one of `CHECKSUMS`.
    """
    import torch

    total = CHECKSUMS[kind]()
    for name in sorted(values):
        total.update(name.encode())
        total.update(values[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return str(total.hexdigest())


def without_checksum(metadata: Mapping[str, str]) -> dict[str, str]:
    """The key among a file's metadata, for a file that gets a checksum of its own."""
    return {name: text for name, text in metadata.items() if name not in CHECKSUMS}
