"""What a Fisher depends on: the identity under which a cache keeps it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from dfmerge_studies.checkpoints.digest import json_digest

FORMAT_VERSION = 2  # 1 had sha256 alone as its checksum; its values mean the same and are read
_READABLE = (1,)


@dataclass(frozen=True)
class FisherKey:
    """What a Fisher depends on; equal keys mean equal values.

    Attributes:
        base: digest of the base.
        expert: digest of the expert.
        expert_name: for people; not part of the identity.
        coefficient: lambda, exactly: as `float.hex` writes it, or a digest of one per parameter.
        estimator: exact, sampled, empirical or mask-nodes.
        inputs: digest of the tokenised inputs, in order (data, prompts, tokenizer, truncation).
        indices: rows of the validation split that they are, by task.
        seed: of the draws of `sampled` and `mask-nodes`; None for the other estimators.
        parameters: digest of the parameter names.
        compute_dtype: of the weights.
        dtype: of the stored values.
        format_version: of the file.
    """

    base: str
    expert: str
    expert_name: str
    coefficient: str
    estimator: str
    inputs: str
    indices: Mapping[str, list[int]]
    seed: int | None
    parameters: str
    compute_dtype: str
    dtype: str
    format_version: int = FORMAT_VERSION

    @property
    def digest(self) -> str:
        """64 hexadecimal digits: the file's name."""
        return json_digest({name: value for name, value in asdict(self).items() if name != "expert_name"})

    @property
    def digests(self) -> tuple[str, ...]:
        """The names under which the values may be found: the key's own, then those of earlier versions."""
        earlier = _READABLE if self.format_version == FORMAT_VERSION else ()
        return (self.digest, *(replace(self, format_version=version).digest for version in earlier))


def key_metadata(key: FisherKey) -> dict[str, str]:
    """A key as texts, for the metadata of a file.

    Args:
        key: the key; whatever of it is not text becomes JSON.
    """
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in asdict(key).items()}
