"""Which files hold weights; refuse what cannot be a model's, from headers and configurations.

Nothing heavy is imported here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dfmerge_studies.boundary import check_regular, kind_of, read_json, reading
from dfmerge_studies.checkpoints.header import read_header
from dfmerge_studies.checkpoints.reference import ADAPTER_CONFIG, Checkpoint
from dfmerge_studies.errors import InputError

_HINT = "Copy the file again"
_INDEX = ".index.json"
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
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
        with reading(str(file), "cannot be looked at", _HINT):
            kind = kind_of(file)
        if kind not in (None, "", "folder"):
            raise InputError(f"this is a {kind}, not a file", where=str(file), hint="Remove it, or put the file there")
    tensors = 0
    for file in weights_files(checkpoint):
        check_regular(file, str(file), _HINT)
        if file.suffix == ".safetensors":
            with reading(str(file), "cannot be read", _HINT), file.open("rb") as stream:
                tensors += len(read_header(file, stream)[0])
    for name in ("config.json", ADAPTER_CONFIG):
        file = checkpoint.path / name
        if file.is_file():
            _check_numbers(read_json(file, hint=_HINT), str(file), max(tensors, _MOST_COUNTED))


def weights_files(checkpoint: Checkpoint) -> list[Path]:
    """The files that transformers and peft read a checkpoint's weights from; others beside them do not matter.

    Args:
        checkpoint: a model or an adapter.

    Raises:
        InputError: there are none, or they lie elsewhere.
    """
    names = _ADAPTER if checkpoint.is_adapter else tuple(f"{name}{end}" for name in _WHOLE for end in ("", _INDEX))
    chosen = None if checkpoint.is_adapter else checkpoint.read_config().get("transformers_weights")
    if isinstance(chosen, str):  # transformers' own field for weights of another name
        names = (chosen,)
    file = next((checkpoint.path / name for name in names if (checkpoint.path / name).is_file()), None)
    if file is None or file.parent != checkpoint.path:
        raise InputError(
            f"no weights in {checkpoint.path}: none of {', '.join(names)}",
            where=str(checkpoint.path),
            hint="Name a directory that save_pretrained wrote",
        )
    return _shards(file) if file.name.endswith(_INDEX) else [file]


def _shards(index: Path) -> list[Path]:
    content = read_json(index, hint=_HINT)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise InputError("not a weights index: no weight_map of file names", where=str(index), hint=_HINT)
    found = sorted(set(shards.values()))
    for shard in found:
        if Path(shard).name != shard:
            raise InputError(f"the shard {shard!r} lies in another folder", where=str(index), hint=_HINT)
        with reading(str(index), f"the shard {shard!r} cannot be looked at", _HINT):
            missing = not (index.parent / shard).is_file()
        if missing:
            raise InputError(f"the shard {shard} that it lists is missing", where=str(index), hint=_HINT)
    return [index.with_name(shard) for shard in found]


def _check_numbers(config: Any, where: str, most: int) -> None:
    """Refuse numbers that no model has: building it would take hours, or all memory, before its weights are read."""
    for name, value in config.items() if isinstance(config, Mapping) else ():
        if isinstance(value, Mapping):
            _check_numbers(value, where, most)
        if type(value) is not int:
            continue
        limit = most if _COUNTS.search(name) else _LARGEST_NUMBER
        if where.endswith(ADAPTER_CONFIG):
            limit = _LARGEST_RANK
        if abs(value) > limit:
            shown = value if abs(value) < 10**20 else f"a number of {len(str(abs(value)))} digits"
            raise InputError(
                f"{name} is {shown}, expected at most {limit}: its weights have fewer parts",
                where=where,
                hint="Copy the configuration that belongs to these weights",
            )
