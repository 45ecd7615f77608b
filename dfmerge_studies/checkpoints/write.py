"""Write a model directory that `from_pretrained` loads: beside its place first, then renamed into it."""

from __future__ import annotations

import copy
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dfmerge_studies.checkpoints.load import quiet_transformers
from dfmerge_studies.errors import InputError, RunError, first_line
from dfmerge_studies.temporary import beside, sweep

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HEADS = "heads"  # folder of the per-task classification heads
CLASSES = "classes"  # key of a head's metadata: a JSON list of the names of its classes, in its order
SHARD_SIZE = "5GB"
PROVENANCE = "dfmerge.json"  # by which an exported directory is known
FILES = "files"  # the field of it that lists what was written
# What exports without that list hold.
_ENDINGS = frozenset({".json", ".safetensors", ".txt", ".model", ".jinja", ".py", ".md", ".spm", ".bpe", ".codes"})
_FOLDERS = frozenset({"", HEADS, "additional_chat_templates"})
_LITTER = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})  # of file managers


def check_target(out: Path, *, force: bool, mark: str = PROVENANCE) -> None:
    """Refuse a directory that exists, before anything is computed.

    Args:
        out: where the model is to go.
        force: replace it, if an export wrote it and nothing else is in it.
        mark: file by which such a directory is known.

    Raises:
        InputError: it exists and may not be replaced, or its parent is a file.
    """
    if out.exists() and not force:
        raise InputError(
            f"{out} exists already",
            where="--out",
            hint="Choose another directory, or add --force if this program wrote that one",
        )
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file", where="--out", hint="Choose a directory")
    if out.exists():
        _refuse_foreign(out, mark)
    parent = next(parent for parent in out.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise InputError(f"{parent} is a file", where="--out", hint="Choose another directory")


def _refuse_foreign(out: Path, mark: str) -> None:
    """Refuse a directory that holds what no export wrote."""
    found = _files(out)
    if not found:
        return
    try:
        content = json.loads((out / mark).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or content.keys().isdisjoint({"coefficients", "settings"}):
        raise InputError(
            f"{out} is not a model directory that this program wrote: it has no {mark} of ours",
            where="--out",
            hint="Choose another directory",
        )
    written = content.get(FILES)
    for name in found:
        path = Path(name)
        known = path.suffix in _ENDINGS and path.parent.name in _FOLDERS if written is None else name in written
        if not known:
            raise InputError(
                f"{out} holds {name}, which no export wrote",
                where="--out",
                hint="Move it away, or choose another directory",
            )


def _files(folder: Path) -> list[str]:
    """Paths of the files below a folder; links are not followed, and a folder that holds nothing counts as a file."""
    found = []
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        names = [*files, *links] or ([""] if not folders and Path(place) != folder else [])
        found += [(Path(place) / name).relative_to(folder).as_posix() for name in names]
    return sorted(name for name in found if name.split("/")[-1] not in _LITTER)


@contextmanager
def new_directory(out: Path, *, force: bool = False, mark: str = PROVENANCE) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when the context ends, and is gone where it ends with an error.

    Its files are listed in the mark, a JSON object among them, and may be read by whom any new file may be.

    Args:
        out: directory to make.
        force: replace a directory that exists, if it has the mark.
        mark: file by which such a directory is known.

    Raises:
        InputError: the directory exists and may not be replaced.
        RunError: it cannot be written; nothing is left behind.
    """
    from safetensors import SafetensorError

    check_target(out, force=force, mark=mark)
    out = out.absolute()
    temporary = beside(out)
    sweep(out.parent, out.name)  # what a killed process was writing to the same place
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if (temporary / mark).exists():
            content = json.loads((temporary / mark).read_text(encoding="utf-8"))
            content = {**content, FILES: _files(temporary)}
            (temporary / mark).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for weights in temporary.rglob("*.safetensors"):  # which safetensors lets nobody but the owner read
            shutil.copymode(next(temporary.rglob("*config.json")), weights)
        check_target(out, force=force, mark=mark)  # again: what was computed may have taken hours
        _move_into_place(temporary, out)
    except (OSError, SafetensorError) as error:  # the latter is how safetensors reports a full disk
        raise RunError(
            f"cannot be written: {first_line(error)}", where=str(out), hint="Free space or choose another place"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: Path,
    heads: Mapping[str, Mapping[str, Tensor]],
    classes: Mapping[str, Sequence[str]] | None = None,
    shard_size: str = SHARD_SIZE,
) -> None:
    """Put weights, configuration, tokenizer, generation config and chat template into a folder.

    Of a classifier only the shared encoder is written as the model; every task's head goes to `heads/TASK.safetensors`
    under the names that its parameters have in the whole classifier.

    Args:
        folder: that exists.
        model: the merged model.
        tokenizer: the base's tokenizer.
        source: directory of the base, whose own code files are copied where it brings any.
        heads: parameters of each task's head.
        classes: names of the classes of each task's head, as far as they are known; kept with the head.
        shard_size: largest size of one weights file.
    """
    from safetensors.torch import save_file

    from dfmerge_studies.checkpoints.spread import is_spread, on_host

    whole = cast("PreTrainedModel", model.base_model) if heads else model
    with quiet_transformers():
        whole.save_pretrained(
            folder, max_shard_size=shard_size, state_dict=on_host(whole) if is_spread(whole) else None
        )
    tokenizer.save_pretrained(folder)
    for file in source.glob("*.py"):
        shutil.copy2(file, folder)
    for task, head in heads.items():
        (folder / HEADS).mkdir(exist_ok=True)
        names = {CLASSES: json.dumps(list(classes[task]))} if classes and task in classes else None
        tensors = {n: t.detach().cpu().contiguous() for n, t in head.items()}
        save_file(tensors, folder / HEADS / f"{task}.safetensors", metadata=names)


def save_classifier(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: Path,
    labels: Sequence[str],
    problem_type: str | None,
    shard_size: str = SHARD_SIZE,
) -> None:
    """Put a whole classifier into a folder, encoder and head, as `pipeline()` opens it.

    Args:
        folder: that is made.
        model: with the head that it is to have.
        tokenizer: the base's tokenizer.
        source: directory of the base, whose own code files are copied where it brings any.
        labels: names of the head's classes, in its order.
        problem_type: of the head, as transformers' configurations have it.
        shard_size: largest size of one weights file.
    """
    folder.mkdir(exist_ok=True)
    shared = model.config
    model.config = copy.deepcopy(shared)
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: number for number, label in enumerate(labels)}
    model.config.problem_type = cast("Any", problem_type)
    try:
        save_model(folder, model, tokenizer, source=source, heads={}, shard_size=shard_size)
    finally:
        model.config = shared


def write_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    source: Path,
    heads: Mapping[str, Mapping[str, Tensor]],
    texts: Mapping[str, str],
    classes: Mapping[str, Sequence[str]] | None = None,
    force: bool = False,
    shard_size: str = SHARD_SIZE,
    mark: str = PROVENANCE,
) -> None:
    """Write a directory of a model as `save_model` fills it, with accompanying texts.

    Args:
        model: the merged model.
        tokenizer: the base's tokenizer.
        out: directory to make.
        source: directory of the base.
        heads: parameters of each task's head.
        texts: further files by name: the model card, the provenance.
        classes: names of the classes of each task's head.
        force: replace a directory that exists, if it has the mark.
        shard_size: largest size of one weights file.
        mark: which of the texts, a JSON object, is to list the files.

    Raises:
        InputError: the directory exists and may not be replaced.
        RunError: it cannot be written; nothing is left behind.
    """
    with new_directory(out, force=force, mark=mark) as folder:
        save_model(folder, model, tokenizer, source=source, heads=heads, classes=classes, shard_size=shard_size)
        write_texts(folder, texts)


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """Put further files into a folder.

    Args:
        folder: that exists.
        texts: by the files' names.
    """
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def read_classes(file: Path) -> tuple[str, ...]:
    """Names of the classes of a head that `write_model` wrote; nothing where it kept none.

    Raises:
        InputError: it is no such file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as head:
            return tuple(json.loads((head.metadata() or {}).get(CLASSES, "[]")))
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"not readable: {first_line(error)}", where=str(file), hint="Export it again") from error


def _move_into_place(temporary: Path, out: Path) -> None:
    """Rename; an old directory is moved away first and deleted only when the new one stands."""
    if not out.exists():
        temporary.rename(out)
        return
    old = out.with_name(f".{out.name}.{uuid.uuid4().hex[:12]}.old")
    out.rename(old)
    try:
        temporary.rename(out)
    except BaseException:  # Ctrl-C, too, must not leave the place empty
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
