"""Refuse weights that are cut short or no weights at all, from their headers: nothing heavy is imported here."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from dfmerge_studies.checkpoints.reference import Checkpoint
from dfmerge_studies.errors import InputError

_MEND = "Copy the file again"


def check_files(checkpoint: Checkpoint) -> None:
    """Refuse weights that are truncated or no safetensors at all, before anything large is allocated.

    Args:
        checkpoint: a model or an adapter.

    Raises:
        InputError: naming the file.
    """
    for index in sorted(checkpoint.path.glob("*.index.json")):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError("not a weights index", where=str(index), mend=_MEND) from error
        for shard in sorted(map(str, shards)):
            if not (checkpoint.path / shard).is_file():
                raise InputError(f"the shard {shard} that it lists is missing", where=str(index), mend=_MEND)
    for file in sorted(checkpoint.path.glob("*.safetensors")):
        _check_safetensors(file)


def _check_safetensors(file: Path) -> None:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
            header = json.loads(stream.read(length)) if 8 + length <= size else None
        ends = None
        if isinstance(header, dict):
            ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(file), mend="Check its permissions") from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError("not a safetensors file", where=str(file), mend=_MEND) from error
    if ends is None:
        raise InputError(f"not a safetensors file, or cut short ({size} bytes)", where=str(file), mend=_MEND)
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise InputError(f"{size} bytes where its header promises {expected}", where=str(file), mend=_MEND)
