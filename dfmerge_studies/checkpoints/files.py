"""Refuse files that cannot be a model's, from headers and configurations: nothing heavy is imported here."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from dfmerge_studies.boundary import check_regular, kind_of, read_json, reading
from dfmerge_studies.checkpoints.reference import Checkpoint
from dfmerge_studies.errors import InputError

_MEND = "Copy the file again"
_LARGEST_HEADER = 100_000_000  # bytes, the limit of the format
# Bits of an element, by the names of the format: https://github.com/huggingface/safetensors
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
_COUNTS = re.compile(r"layers?$|blocks?$|experts$|^depths?$")  # fields that say how many modules a model is built of
_MOST_COUNTED = 1000  # where the weights do not tell how many there are
_LARGEST_NUMBER = 2**40  # no field of a configuration is larger
_LARGEST_RANK = 2**16  # of an adapter, which is built before its weights are read


def check_files(checkpoint: Checkpoint) -> None:
    """Refuse weights that are truncated or no safetensors at all, before anything large is allocated.

    Args:
        checkpoint: a model or an adapter.

    Raises:
        InputError: naming the file.
    """
    for file in sorted(checkpoint.path.iterdir()):
        with reading(str(file), "cannot be looked at", _MEND):
            kind = kind_of(file)
        if kind not in (None, "", "folder"):
            raise InputError(f"this is a {kind}, not a file", where=str(file), mend="Remove it, or put the file there")
    for index in sorted(checkpoint.path.glob("*.index.json")):
        _check_index(index)
    tensors = sum(_check_safetensors(file) for file in sorted(checkpoint.path.glob("*.safetensors")))
    for name in ("config.json", "adapter_config.json"):
        file = checkpoint.path / name
        if file.is_file():
            _check_numbers(read_json(file, mend=_MEND), str(file), max(tensors, _MOST_COUNTED))


def _check_index(index: Path) -> None:
    content = read_json(index, mend=_MEND)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise InputError("not a weights index: no weight_map of file names", where=str(index), mend=_MEND)
    for shard in sorted(set(shards.values())):
        if Path(shard).name != shard:
            raise InputError(f"the shard {shard!r} lies in another folder", where=str(index), mend=_MEND)
        with reading(str(index), f"the shard {shard!r} cannot be looked at", _MEND):
            missing = not (index.parent / shard).is_file()
        if missing:
            raise InputError(f"the shard {shard} that it lists is missing", where=str(index), mend=_MEND)


def _check_safetensors(file: Path) -> int:
    """Check a file's header against itself and its size; returns the number of tensors."""
    check_regular(file, str(file), _MEND)
    with reading(str(file), "not a safetensors file", _MEND):
        size = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
            whole = 8 + length <= size and length <= _LARGEST_HEADER
            header = json.loads(stream.read(length), object_pairs_hook=_without_doubles) if whole else None
    if not isinstance(header, dict):
        raise InputError(f"not a safetensors file, or cut short ({size} bytes)", where=str(file), mend=_MEND)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise InputError("its header's __metadata__ does not hold texts", where=str(file), mend=_MEND)
    spans = []
    for name, entry in header.items():
        what = _wrong_entry(entry)
        if what is not None:
            raise InputError(f"tensor {name} in its header {what}", where=str(file), mend=_MEND)
        spans.append((*entry["data_offsets"], name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            what = "overlap with another's" if start < end else "leave a gap before them"
            raise InputError(f"the bytes of tensor {name} {what}", where=str(file), mend=_MEND)
        end = stop
    expected = 8 + length + end
    if size != expected:
        raise InputError(f"{size} bytes where its header promises {expected}", where=str(file), mend=_MEND)
    return len(header)


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


def _check_numbers(config: Any, where: str, most: int) -> None:
    """Refuse numbers that no model has: building it would take hours, or all memory, before its weights are read."""
    for name, value in config.items() if isinstance(config, Mapping) else ():
        if isinstance(value, Mapping):
            _check_numbers(value, where, most)
        if type(value) is not int:
            continue
        limit = most if _COUNTS.search(name) else _LARGEST_NUMBER
        if where.endswith("adapter_config.json"):
            limit = _LARGEST_RANK
        if abs(value) > limit:
            shown = value if abs(value) < 10**20 else f"a number of {len(str(abs(value)))} digits"
            raise InputError(
                f"{name} is {shown}, expected at most {limit}: its weights have fewer parts",
                where=where,
                mend="Copy the configuration that belongs to these weights",
            )
