"""The header of a safetensors file, checked against itself and the file's size: nothing heavy is imported here."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeGuard

from dfmerge_studies.boundary import reading
from dfmerge_studies.errors import InputError

_HINT = "Copy the file again"
_LENGTH = 8  # bytes that say how long the header is
_LARGEST = 100_000_000  # bytes of a header, the limit of the format
# Bits of an element, by the names of the format: https://github.com/huggingface/safetensors
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


@dataclass(frozen=True)
class HeaderEntry:
    """One tensor in the header of a safetensors file.

    Attributes:
        dtype: its type, as the format names it.
        shape: its shape.
        begin: its first byte, counted from behind the header.
        end: the byte behind its last one.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(file: Path, stream: IO[bytes]) -> tuple[dict[str, HeaderEntry], bytes]:
    """The tensors that a safetensors file promises, in the order of their bytes.

    Args:
        file: its name, for messages.
        stream: the file, at its beginning; it is left where the first tensor begins.

    Returns:
        The tensors by name, and the bytes that were read.

    Raises:
        InputError: it is cut short, or no safetensors file; names the tensor at fault.
    """
    with reading(str(file), "not a safetensors file", _HINT):
        size = stream.seek(0, 2)
        stream.seek(0)
        head = stream.read(_LENGTH)
        length = int.from_bytes(head, "little") if len(head) == _LENGTH else size
        whole = _LENGTH + length <= size and length <= _LARGEST
        head += stream.read(length) if whole else b""
        header = json.loads(head[_LENGTH:], object_pairs_hook=_without_doubles) if whole else None
    if not isinstance(header, dict):
        raise InputError(f"not a safetensors file, or cut short ({size} bytes)", where=str(file), hint=_HINT)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise InputError("its header's __metadata__ does not hold texts", where=str(file), hint=_HINT)
    entries = {}
    for name, entry in header.items():
        what = _wrong_entry(entry)
        if what is not None:
            raise InputError(f"tensor {name} in its header {what}", where=str(file), hint=_HINT)
        entries[name] = HeaderEntry(entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end, item[0])))
    end = 0
    for name, tensor in entries.items():
        if tensor.begin != end:
            what = "overlap with another's" if tensor.begin < end else "leave a gap before them"
            raise InputError(f"the bytes of tensor {name} {what}", where=str(file), hint=_HINT)
        end = tensor.end
    if size != len(head) + end:
        raise InputError(f"{size} bytes where its header promises {len(head) + end}", where=str(file), hint=_HINT)
    return entries, head


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("its header names a tensor twice")
    return content


def _wrong_entry(entry: Any) -> str | None:
    """What is wrong with a tensor's entry in a header, None where nothing is."""
    if not isinstance(entry, dict):
        return f"is {entry!r:.40}, expected its type, shape and place"
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BITS:
        return f"has the type {dtype!r:.40}, which is not known"
    if not _are_sizes(shape):
        return f"has the shape {shape!r:.80}, expected sizes from 0 up"
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"has the place {offsets!r:.80}, expected where its bytes begin and end"
    bits = math.prod(shape) * _BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        return f"has {offsets[1] - offsets[0]} bytes, but {dtype} of the shape {shape!r:.80} takes {bits // 8}"
    return None


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)
