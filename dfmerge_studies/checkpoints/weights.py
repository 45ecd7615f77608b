"""Read weights once into memory of our own, and take the digest of the very bytes that were read.

A mapped file would let whoever writes over it change a model that is in use, and end the process if it is cut short.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor

from dfmerge_studies.boundary import reading
from dfmerge_studies.checkpoints.digest import Contents, content_digest
from dfmerge_studies.checkpoints.files import weights_files
from dfmerge_studies.checkpoints.header import read_header
from dfmerge_studies.checkpoints.reference import ADAPTER_CONFIG, Checkpoint
from dfmerge_studies.errors import InputError

if TYPE_CHECKING:
    from hashlib import _Hash

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_WIDENED = (torch.float16, torch.bfloat16, torch.float32)
_COPY = "Copy the file again"


def read_weights(checkpoint: Checkpoint, contents: Contents, *, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a whole model or an adapter, from the files that transformers and peft would take.

    Args:
        checkpoint: a model or an adapter.
        contents: is told what each file held.
        dtype: narrower floating-point numbers are widened to it as they are read, so that there is one copy of them.

    Raises:
        InputError: a file is damaged, or holds more than weights.
        RunError: a file holds something else than when it was read before.
    """
    tensors: dict[str, Tensor] = {}
    for file in weights_files(checkpoint):
        tensors.update(read_tensors(file, contents, dtype=dtype))
    return tensors


@contextmanager
def private_copy(checkpoint: Checkpoint, contents: Contents) -> Iterator[Path]:
    """A folder of our own with an adapter's settings and weights, for a library that reads files by itself.

    Args:
        checkpoint: an adapter.
        contents: is told what each file held when it was copied.

    Raises:
        InputError: a file cannot be read.
        RunError: a file holds something else than when it was read before.
    """
    contents.open(checkpoint)
    with TemporaryDirectory(prefix="dfmerge-") as folder:
        for file in [checkpoint.path / ADAPTER_CONFIG, *weights_files(checkpoint)]:
            copy = Path(folder) / file.name
            with reading(str(file), "cannot be copied", "Free space for it in the folder of temporary files"):
                shutil.copyfile(file, copy)
            contents.add(file, content_digest(copy))
        yield Path(folder)


def read_tensors(file: Path, contents: Contents, *, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one file, in memory of their own.

    Args:
        file: safetensors, or a pickle of plain weights.
        contents: is told what the file held.
        dtype: as for `read_weights`.

    Raises:
        InputError: it is damaged, or holds more than weights.
        RunError: it holds something else than when it was read before.
    """
    digest = hashlib.sha256()
    with reading(str(file), "cannot be read", "Copy the file again"), file.open("rb") as stream:
        if file.suffix == ".safetensors":
            tensors = _read_safetensors(file, stream, digest, dtype)
        else:
            data = stream.read()
            digest.update(data)
            tensors = _unpickled(file, data)
    contents.add(file, digest.hexdigest())
    return tensors


def _read_safetensors(file: Path, stream: IO[bytes], digest: _Hash, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensor by tensor in the order of the file, so that no second copy of it is in memory."""
    entries, head = read_header(file, stream)
    digest.update(head)
    tensors = {}
    for name, entry in sorted(entries.items(), key=lambda item: item[1].begin):
        kind = _DTYPES.get(entry.dtype)
        if kind is None:
            raise InputError(
                f"tensor {name} is of type {entry.dtype!r}, which cannot be merged",
                where=str(file),
                hint=f"Save the model as one of {', '.join(_DTYPES)}",
            )
        data = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
        view: memoryview = data.numpy().data
        if stream.readinto(view) != len(view):  # type: ignore[attr-defined]  # of every buffered reader
            raise InputError(f"cut short in tensor {name}", where=str(file), hint=_COPY)
        digest.update(view)
        tensor = data.view(kind).reshape(entry.shape)
        widen = kind in _WIDENED and torch.promote_types(kind, dtype) == dtype
        tensors[name] = tensor.to(dtype) if widen else tensor
    if stream.read(1):
        raise InputError("has more bytes than its header promises", where=str(file), hint=_COPY)
    return tensors


def _unpickled(file: Path, data: bytes) -> dict[str, Tensor]:
    """The weights of a pickle; nothing in it is run (torch's `weights_only`)."""
    hint = "Save the model again with save_pretrained, as safetensors"
    try:
        content: Any = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            "holds more than plain weights; it was not unpickled, since that can run any code",
            where=str(file),
            hint=hint,
        ) from error
    if not isinstance(content, Mapping) or not all(isinstance(each, Tensor) for each in content.values()):
        raise InputError("holds something else than tensors by name", where=str(file), hint=hint)
    return dict(content)
