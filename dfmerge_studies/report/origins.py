"""Where a merge comes from, as others may read it: names and licenses of its models, without the paths of a machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfmerge_studies.checkpoints.reference import Checkpoint
from dfmerge_studies.redact import masked_text

CARD = "README.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LICENSE = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Origin:
    """One of the models that a merge is made of.

    Attributes:
        name: a Hub id, or the last folder of a local path.
        models: Hub ids that the merge may say it is made of: its own, or what its card names as its base.
        license: the license's fields of its card, if it has any.
    """

    name: str
    models: tuple[str, ...] = ()
    license: Mapping[str, str] = field(default_factory=dict)


def origin_of(checkpoint: Checkpoint, root: Path) -> Origin:
    """What may be said of a model.

    Args:
        checkpoint: as it was found; its card is read where it has one.
        root: folder that relative paths start from: what is one of them is no Hub id.
    """
    card = _metadata(checkpoint.path / CARD)
    terms = {name: str(card[name]) for name in _LICENSE if isinstance(card.get(name), str)}
    repository = checkpoint.reference.partition("@")[0]
    if is_local(checkpoint):
        bases = card.get("base_model") or ()
        named = [bases] if isinstance(bases, str) else list(bases) if isinstance(bases, list) else []
        ids = [name for name in named if isinstance(name, str) and _HUB_ID.fullmatch(name)]
        models = tuple(name for name in ids if not (root / name).exists() and not Path(name).exists())
    else:
        models = () if repository.startswith("package:") else (repository,)
    return Origin(public_name(checkpoint.reference, local=is_local(checkpoint)), models, terms)


def is_local(checkpoint: Checkpoint) -> bool:
    """Whether a model is a folder of this machine, and neither the Hub's nor a package's.

    Args:
        checkpoint: as it was found.
    """
    reference = checkpoint.reference
    return not reference.startswith("package:") and not _is_snapshot(checkpoint.path)


def adapter_base(checkpoint: Checkpoint) -> str:
    """What an adapter's configuration names as its base: the Hub's id, or a folder of this machine.

    Args:
        checkpoint: the base.
    """
    if is_local(checkpoint) or checkpoint.reference.startswith("package:"):
        return str(checkpoint.path)
    return checkpoint.reference.partition("@")[0]


def _is_snapshot(path: Path) -> bool:
    """Whether a folder is one that huggingface_hub keeps a repository's files in."""
    return path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--")


def public_name(reference: str, *, local: bool) -> str:
    """A model or data set as other people may read its name.

    Args:
        reference: as the spec writes it.
        local: whether it is a path of this machine, of which only the last folder says something to others.
    """
    text = masked_text(reference)
    odd = Path(text).expanduser().is_absolute() or text.startswith((".", "~")) or "\\" in text
    return re.split(r"[/\\]", text.rstrip("/\\"))[-1] if local or odd else text


def shared_license(origins: Mapping[str, Origin]) -> dict[str, str]:
    """The license's fields for a card: those that all models with a license share; otherwise `other`.

    Args:
        origins: of base and experts, by what they are.
    """
    known = {tuple(sorted(origin.license.items())) for origin in origins.values() if origin.license}
    if len(known) == 1:
        return dict(known.pop())
    return {"license": "other", "license_name": "several"} if known else {}


def license_lines(origins: Mapping[str, Origin]) -> list[str]:
    """What a card says of licenses, as Markdown: each model's where they differ, and who says none.

    Args:
        origins: of base and experts, by what they are.
    """
    if not any(origin.license for origin in origins.values()):
        return ["The models' own cards state no license.", ""]
    terms = {
        what: origin.license.get("license_name") or origin.license.get("license") for what, origin in origins.items()
    }
    if len(set(terms.values())) == 1:
        return [f"All models are under the license `{next(iter(terms.values()))}`, as their cards say.", ""]
    said = [f"{what}: {f'`{name}`' if name else 'none stated'}" for what, name in terms.items()]
    return [f"Licenses, as the models' own cards state them: {'; '.join(said)}.", ""]


def _metadata(card: Path) -> dict[str, Any]:
    """The front matter of a card; nothing where there is no card, or none that can be read."""
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    try:
        return (metadata_load(card) or {}) if card.is_file() else {}
    except (OSError, ValueError, YAMLError):  # a card is somebody's text: what is wrong with it stops no export
        return {}
