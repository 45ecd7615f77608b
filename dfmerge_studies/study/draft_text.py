"""Texts and lists as a first spec writes them in YAML."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

_READ_OTHERWISE = ("yes", "no", "on", "off", "true", "false", "null", "y", "n")


def yaml_text(value: str) -> str:
    """A text as YAML, in quotes where it would read as something else."""
    plain = re.fullmatch(r"[A-Za-z_./][\w./@-]*", value) and value.lower() not in _READ_OTHERWISE
    return value if plain else json.dumps(value, ensure_ascii=False)


def yaml_flow(value: Mapping[str, str] | Sequence[str]) -> str:
    """A mapping or a list of texts as YAML, in one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{yaml_text(name)}: {yaml_text(inner)}" for name, inner in value.items()) + "}"
    return "[" + ", ".join(map(yaml_text, value)) + "]"
