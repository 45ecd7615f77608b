"""In which form a merge is written: type, folders per task; what cannot be had is refused before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from dfmerge_studies.checkpoints.precision import Precision
from dfmerge_studies.checkpoints.write import HEADS, SHARD_SIZE
from dfmerge_studies.errors import InputError
from dfmerge_studies.spec import StudySpec
from dfmerge_studies.tasks.encoding import HEADED

_OF_MODELS = frozenset({HEADS, "additional_chat_templates"})  # folders that a model directory itself may have


@dataclass(frozen=True)
class Form:
    """How a merge is written.

    Attributes:
        precision: type of the weights; by default that of the base's files.
        split_heads: of classifiers, whether each task also gets a folder of its own with the whole classifier.
        shard_size: largest size of one weights file.
        adapter: whether it is written as a LoRA adapter on the base; of classifiers, one per task.
        rank: of the adapter; by default the sum of the experts' ranks.
    """

    precision: Precision = Precision.BASE
    split_heads: bool = False
    shard_size: str = SHARD_SIZE
    adapter: bool = False
    rank: int | None = None


def check_form(spec: StudySpec, form: Form) -> None:
    """Refuse a form that the spec's models cannot have.

    Args:
        spec: whose models are merged.
        form: that is wanted.

    Raises:
        InputError: naming the flag.
    """
    if form.rank is not None and not form.adapter:
        raise InputError("it is the rank of an adapter, and none is written", where="--rank", hint="Add --as-adapter")
    if form.split_heads and form.adapter:
        raise InputError(
            "the adapters of classifiers have a folder per task already", where="--split-heads", hint="Leave it out"
        )
    if form.adapter and spec.tokenizer == "union":
        raise InputError(
            "an adapter on the base cannot add tokens, and the spec has tokenizer: union",
            where="--as-adapter",
            hint="Export the whole model, or use tokenizer: base",
        )
    if form.split_heads:
        _check_heads(spec)


def _check_heads(spec: StudySpec) -> None:
    for name, task in spec.tasks.items():
        if task.type not in HEADED:
            raise InputError(
                f"the task {name} is of the type {task.type}, whose models have no head per task",
                where="--split-heads",
                hint="Leave it out: the exported directory is the whole model",
            )
        if name in _OF_MODELS:
            raise InputError(
                f"the folder of the task {name} would be one of the model's own",
                where="--split-heads",
                hint="Give the task another name",
            )
