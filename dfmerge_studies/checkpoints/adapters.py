"""Load PEFT adapters strictly and fold them into dense weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dfmerge_studies.checkpoints.files import check_files
from dfmerge_studies.checkpoints.load import LOADING_ERRORS, ModelClass, quiet_transformers, refused
from dfmerge_studies.checkpoints.reference import Checkpoint
from dfmerge_studies.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load_adapter(
    checkpoint: Checkpoint, base: Checkpoint, model_class: ModelClass, *, dtype: torch.dtype
) -> PreTrainedModel:
    """Load a PEFT adapter on a fresh copy of the base and fold it into dense weights.

    Args:
        checkpoint: the directory of the adapter.
        base: the whole model that it sits on.
        model_class: the auto class that reads the base.
        dtype: of the base's weights in memory.

    Raises:
        InputError: peft is not installed, or the adapter does not fit the base.
    """
    try:
        from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftConfig, PeftModel
    except ImportError as error:
        raise InputError(
            "this expert is a PEFT adapter and the package peft is not installed",
            where=str(checkpoint.path),
            mend="Run: pip install peft",
        ) from error
    import transformers

    check_files(checkpoint)
    labels = _adapter_labels(checkpoint) if model_class is ModelClass.CLASSIFICATION else {}
    try:
        with quiet_transformers():
            model = getattr(transformers, model_class.value).from_pretrained(
                base.path, dtype=dtype, trust_remote_code=base.trust_remote_code, weights_only=True, **labels
            )
            config = PeftConfig.from_pretrained(str(checkpoint.path))
            config.inference_mode = True
            wrapped = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)(model, config)
            # PeftModel.from_pretrained only warns of what is missing, and leaves it random.
            result = wrapped.load_adapter(str(checkpoint.path), "default")
            folded = wrapped.merge_and_unload()
    except LOADING_ERRORS as error:
        what = f"this adapter does not fit the base {base.path}"
        raise refused(error, str(checkpoint.path), what, "Name the base that the adapter was trained on") from error
    for what, names in (("is missing", result.missing_keys), ("has no place in the base", result.unexpected_keys)):
        if names:
            raise InputError(
                f"tensor {min(names)} of the adapter {what}",
                where=str(checkpoint.path),
                mend="Copy the adapter again, or name the base that it was trained on",
            )
    folded.eval()
    return folded  # type: ignore[no-any-return]  # peft types its return as Module


def _adapter_labels(checkpoint: Checkpoint) -> dict[str, Any]:
    """Number of classes of an adapter: from its config.json, otherwise from the shape of the head that it brings."""
    config = checkpoint.read_config()
    if "id2label" in config:
        return {"num_labels": len(config["id2label"])}
    from safetensors import safe_open

    for file in checkpoint.path.glob("adapter_model.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # safe_open is no mapping
                leaf = name.removesuffix(".weight").rsplit(".", 1)[-1]
                if "lora_" not in name and name.endswith(".weight") and leaf in ("classifier", "score", "out_proj"):
                    return {"num_labels": tensors.get_slice(name).get_shape()[0]}
    raise InputError(
        "cannot tell the number of classes: the adapter has neither a config.json with id2label nor a classifier",
        where=str(checkpoint.path),
        mend="Train it with modules_to_save=['classifier'], or put config.json beside it",
    )
