"""Write a model directory that `from_pretrained` loads: beside its place first, then renamed into it."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

from dfmerge_studies.checkpoints.load import quiet_transformers
from dfmerge_studies.errors import InputError, RunError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HEADS = "heads"  # folder of the per-task classification heads
SHARD_SIZE = "5GB"


def check_target(out: Path, *, force: bool) -> None:
    """Refuse a directory that exists, before anything is computed.

    Args:
        out: where the model is to go.
        force: replace it.

    Raises:
        InputError: it exists and `force` is not given, or its parent is a file.
    """
    if out.exists() and not force:
        raise InputError(f"{out} exists already", where="--out", mend="Choose another directory, or add --force")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file", where="--out", mend="Choose a directory")
    parent = next(parent for parent in out.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise InputError(f"{parent} is a file", where="--out", mend="Choose another directory")


def write_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    source: Path,
    heads: Mapping[str, Mapping[str, Tensor]],
    texts: Mapping[str, str],
    force: bool = False,
    shard_size: str = SHARD_SIZE,
) -> None:
    """Write weights, configuration, tokenizer, generation config, chat template and accompanying texts.

    Of a classifier only the shared encoder is written as the model; every task's head goes to `heads/TASK.safetensors`
    under the names that its parameters have in the whole classifier.

    Args:
        model: the merged model.
        tokenizer: the base's tokenizer.
        out: directory to make.
        source: directory of the base, whose own code files are copied where it brings any.
        heads: parameters of each task's head.
        texts: further files by name: the model card, the provenance.
        force: replace a directory that exists.
        shard_size: largest size of one weights file.

    Raises:
        InputError: the directory exists.
        RunError: it cannot be written; nothing is left behind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    check_target(out, force=force)
    out = out.absolute()
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        temporary.mkdir(parents=True)
        whole = cast("PreTrainedModel", model.base_model) if heads else model
        with quiet_transformers():
            whole.save_pretrained(temporary, max_shard_size=shard_size)
        tokenizer.save_pretrained(temporary)
        for file in source.glob("*.py"):
            shutil.copy2(file, temporary)
        for task, head in heads.items():
            (temporary / HEADS).mkdir(exist_ok=True)
            save_file(
                {n: t.detach().cpu().contiguous() for n, t in head.items()}, temporary / HEADS / f"{task}.safetensors"
            )
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        for weights in temporary.rglob("*.safetensors"):  # which safetensors lets nobody but the owner read
            shutil.copymode(temporary / "config.json", weights)
        _move_into_place(temporary, out)
    except (OSError, SafetensorError) as error:  # the latter is how safetensors reports a full disk
        raise RunError(
            f"cannot be written: {error}", where=str(out), mend="Free space or choose another place"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move_into_place(temporary: Path, out: Path) -> None:
    """Rename; an old directory is moved away first and deleted only when the new one stands."""
    if not out.exists():
        temporary.rename(out)
        return
    old = out.with_name(f".{out.name}.{uuid.uuid4().hex[:12]}.old")
    out.rename(old)
    try:
        temporary.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
