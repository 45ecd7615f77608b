"""Load PEFT adapters strictly and fold them into dense weights."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from dfmerge_studies.boundary import reading
from dfmerge_studies.checkpoints.digest import Contents
from dfmerge_studies.checkpoints.files import check_files, weights_files
from dfmerge_studies.checkpoints.folding import fold, plain
from dfmerge_studies.checkpoints.function import check_adapter_config
from dfmerge_studies.checkpoints.header import read_header
from dfmerge_studies.checkpoints.load import ModelClass, load_model, loading, quiet_transformers
from dfmerge_studies.checkpoints.missing import check_answers
from dfmerge_studies.checkpoints.reference import ADAPTER_CONFIG, ADAPTER_PREFIX, Checkpoint
from dfmerge_studies.checkpoints.token_rows import resize_, rows_of, tables_of
from dfmerge_studies.checkpoints.weights import private_copy
from dfmerge_studies.errors import InputError

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

TASK_TYPES = {
    ModelClass.SEQ2SEQ: "SEQ_2_SEQ_LM",
    ModelClass.CAUSAL: "CAUSAL_LM",
    ModelClass.CLASSIFICATION: "SEQ_CLS",
    ModelClass.TOKENS: "TOKEN_CLS",
}
# Besides those that peft itself counts as prompt learning.
_BESIDE_THE_WEIGHTS = ("ADAPTION_PROMPT", "XLORA", "POLY", "CARTRIDGE", "SHADOW")
_NOT_IN_THE_WEIGHTS = {
    "layer_replication": "the adapter's model has more layers than the base",
    "alora_invocation_tokens": "the adapter acts only after these tokens, so it is no change of weights",
    "arrow_config": "the adapter's share depends on the input, so it is no change of weights",
}
_OF_TRAINING_ALONE = ("corda", "lora_ga", "loftq")  # made from data, or from quantised weights
_CONVERT = "Save it as plain LoRA: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
_BRING_EVERYTHING = ("LORA", "ADALORA", "IA3", "LOHA", "LOKR", "LN_TUNING", "OFT", "BOFT")


def load_adapter(
    checkpoint: Checkpoint,
    base: Checkpoint,
    model_class: ModelClass,
    *,
    dtype: torch.dtype,
    config: PeftConfig | None = None,
    contents: Contents | None = None,
) -> PreTrainedModel:
    """Load a PEFT adapter on a fresh copy of the base and fold it into dense weights.

    Args:
        checkpoint: the directory of the adapter.
        base: the whole model that it sits on.
        model_class: the auto class that reads the base.
        dtype: of the base's weights in memory.
        config: from `read_config`, if it has been read.
        contents: what files held when they were read before; is told what they hold now.

    Raises:
        InputError: peft is not installed, the adapter does not fit the base, or folding would make another model of it.
        RunError: a file changed while it was being read, or between two reads.
    """
    import torch

    contents = contents or Contents()
    config = config or read_config(checkpoint, model_class, contents)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _folded(checkpoint, config, base, model_class, dtype, contents)
        if not _all_in_the_file(config):
            torch.manual_seed(1)
            anew = read_config(checkpoint, model_class, contents)
            again = _folded(checkpoint, anew, base, model_class, dtype, contents)
            _check_drawn_alike(model, again, config, str(checkpoint.path))
    return model


def other_base(checkpoint: Checkpoint, base: Checkpoint) -> str | None:
    """A note where an adapter names another base than the one it is folded into; None where it does not.

    Paths differ between machines and models get renamed, so only names are compared, and nothing is refused.

    Args:
        checkpoint: the adapter.
        base: the whole model that it sits on.
    """
    named = checkpoint.adapter_base
    name = _letters(named.replace("\\", "/").rstrip("/").rpartition("/")[2])
    known = [*base.path.parts[-3:], *base.reference.split("@")[0].split("/")]
    known.append(str(base.read_config().get("_name_or_path") or "").rpartition("/")[2])
    of_package = base.reference.startswith("package:") and name in _letters(base.reference)
    # The Hub's cache has folders such as models--google--flan-t5-base.
    if not name or of_package or name in [_letters(part.rpartition("--")[2]) for part in known]:
        return None
    return f"the adapter names the base {named}; it is folded into {base.path}"


def _letters(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def read_config(checkpoint: Checkpoint, model_class: ModelClass, contents: Contents) -> PeftConfig:
    """The adapter's configuration; what cannot be folded, or was not meant for such models, is refused by name.

    Args:
        checkpoint: the directory of the adapter.
        model_class: the auto class that reads the base.
        contents: what files held when they were read before.

    Raises:
        InputError: peft is not installed, a file is damaged or missing, or no change of weights is meant.
    """
    check_files(checkpoint)
    contents.open(checkpoint)
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise InputError(
            "this expert is a PEFT adapter and the package peft is not installed",
            where=str(checkpoint.path),
            hint="Run: pip install peft",
        ) from error

    file, written = checkpoint.path / ADAPTER_CONFIG, checkpoint.read_adapter_config()
    kind = written.get("peft_type")
    what = f"not the configuration of an adapter that the installed peft knows (peft_type {kind!r})"
    hint = "Install the version of peft that the adapter was trained with, or copy the file again"
    with reading(str(file), what, hint), quiet_transformers():
        config: PeftConfig = PeftConfig.from_pretrained(str(checkpoint.path))
    kind = _kind(config)
    if config.is_prompt_learning or kind in _BESIDE_THE_WEIGHTS:
        raise InputError(
            f"an adapter of the type {kind} acts beside the weights, not in them, so it has no task vector to merge",
            where=str(file),
            hint="Train one that adds to weights, such as LoRA",
        )
    for field, why in _NOT_IN_THE_WEIGHTS.items():
        if getattr(config, field, None):
            raise InputError(f"{field} is set: {why}", where=str(file), hint="Train the adapter without it")
    if (drawn := str(getattr(config, "init_lora_weights", ""))).lower().startswith(_OF_TRAINING_ALONE):
        raise InputError(
            f"init_lora_weights is {drawn!r}: the adapter adds to weights computed when its training started, "
            "and the base does not have them",
            where=str(file),
            hint=_CONVERT,
        )
    _check_task_type(config, model_class, str(file))
    for field in sorted(field for field, value in written.items() if value and not hasattr(config, field)):
        logger.warning("%s: the installed peft does not know the field %s and ignores it", file, field)
    config.inference_mode = True
    return config


def _kind(config: PeftConfig) -> str:
    """PEFT's name of the kind of adapter, such as LORA."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def _check_task_type(config: PeftConfig, model_class: ModelClass, where: str) -> None:
    expected = TASK_TYPES[model_class]
    found = config.task_type
    found = str(getattr(found, "value", found)) if found is not None else None
    if found not in (None, expected):
        raise InputError(
            f"task_type is {found}, but these tasks need adapters of the type {expected}",
            where=where,
            hint="Name an adapter that was trained for such tasks, or tasks of the adapter's kind",
        )


def _folded(
    checkpoint: Checkpoint,
    config: PeftConfig,
    base: Checkpoint,
    model_class: ModelClass,
    dtype: torch.dtype,
    contents: Contents,
) -> PreTrainedModel:
    """The base with the adapter folded into its weights."""
    where = str(checkpoint.path)
    classes = adapter_classes(checkpoint) if model_class.has_head else []
    loaded = load_model(base, model_class, dtype=dtype, classes=classes, headless=True, contents=contents)
    model = loaded.model
    check_adapter_config(checkpoint, model, base_file=str(base.path))
    resize_(model, _rows_of_its_own(checkpoint, model) or rows_of(model))
    what, hint = f"this adapter does not fit the base {base.path}", "Name the base that the adapter was trained on"
    with loading(where, what, hint), quiet_transformers():
        before = plain(model, tokens=_named_tokens(config), generator=model_class is ModelClass.SEQ2SEQ)
    wrapped, brought = attached(model, checkpoint, config, base, contents)
    what = f"this adapter of the type {_kind(config)} cannot be folded into weights"
    with loading(where, what, "Train one that only adds to weights, such as LoRA"), quiet_transformers():
        folded = fold(wrapped, before, where=where)
    check_answers(
        folded,
        loaded.missing - brought,
        where=where,
        owner=f"the adapter, nor in the base {base.path}",
        hint="Save it with the adapter (modules_to_save), or name the base that it was trained on",
    )
    return folded


def attached(
    model: PreTrainedModel, checkpoint: Checkpoint, config: PeftConfig, base: Checkpoint, contents: Contents
) -> tuple[Any, frozenset[str]]:
    """A model with an adapter on it, loaded and active.

    Args:
        model: the base, or a shell of it; peft changes its modules.
        checkpoint: the directory of the adapter.
        config: its settings, which peft fills in.
        base: where the base was read from.
        contents: what files held when they were read before; is told what they hold now.

    Returns:
        PEFT's model around the base, and the names of the tensors that the adapter brings.

    Raises:
        InputError: the adapter lacks a tensor, or has one without a place in the base.
        RunError: a file changed while it was being read, or between two reads.
    """
    from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel, load_peft_weights

    where = str(checkpoint.path)
    what, hint = f"this adapter does not fit the base {base.path}", "Name the base that the adapter was trained on"
    with loading(where, what, hint), quiet_transformers(), private_copy(checkpoint, contents) as folder:
        wrapped: Any = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type or "", PeftModel)(model, config)
        # PeftModel.from_pretrained only warns of what is missing, and leaves it random.
        result = wrapped.load_adapter(str(folder), "default")
        brought = {name.removeprefix(ADAPTER_PREFIX) for name in load_peft_weights(str(folder), device="cpu")}
    missing, odd = _missing(wrapped, result.missing_keys), _odd(config, result.unexpected_keys)
    for what, names in (("is missing", missing), ("has no place in the base", odd)):
        if names:
            raise InputError(
                f"tensor {min(names)} of the adapter {what}",
                where=where,
                hint="Copy the adapter again, or name the base that it was trained on",
            )
    return wrapped, frozenset(brought)


def _rows_of_its_own(checkpoint: Checkpoint, model: PreTrainedModel) -> int | None:
    """Rows of the embeddings that an adapter brings whole, as with tokens that were added in training; or None."""
    names = {f"{ADAPTER_PREFIX}{name}" for name in tables_of(model)}
    for file in weights_files(checkpoint):
        if file.suffix == ".safetensors":
            with file.open("rb") as stream:
                entries, _ = read_header(file, stream)
            for name, entry in entries.items():
                if name in names and name.endswith(".weight"):
                    return entry.shape[0]
    return None


def _missing(wrapped: Any, names: list[str]) -> list[str]:
    """What the file lacks, without second names of what it has."""
    parameters = dict(wrapped.named_parameters(remove_duplicate=False))
    known = {id(parameter) for name, parameter in parameters.items() if name not in names}
    return [name for name in names if name not in parameters or id(parameters[name]) not in known]


def _odd(config: PeftConfig, names: list[str]) -> list[str]:
    """What the file has too much, without the biases of a head that peft writes twice."""
    twice = ".modules_to_save.bias" if getattr(config, "bias", None) == "all" else None
    return [name for name in names if twice is None or not name.endswith(twice)]


def _named_tokens(config: PeftConfig) -> list[int]:
    """Token ids that an adapter trains on their own."""
    found: Any = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or []
    lists = found.values() if isinstance(found, dict) else [found]
    return [token for each in lists for token in each]


def _all_in_the_file(config: PeftConfig) -> bool:
    """Whether an adapter is known to bring all its numbers, so that none is drawn or computed when it is loaded."""
    known = getattr(config, "init_lora_weights", True) in (True, False, "gaussian", "eva", "orthogonal")
    return known and _kind(config) in _BRING_EVERYTHING


def _check_drawn_alike(a: PreTrainedModel, b: PreTrainedModel, config: PeftConfig, where: str) -> None:
    """Refuse an adapter whose numbers differ with the state of the random generator that it was loaded under."""
    others = dict(b.named_parameters())
    for name, parameter in a.named_parameters():
        if not parameter.equal(others[name]):
            raise InputError(
                "peft draws random numbers whenever this adapter is loaded, so it is another model each time "
                f"({_kind(config)}, init_lora_weights: {getattr(config, 'init_lora_weights', None)!r}; tensor {name})",
                where=where,
                hint=_CONVERT,
            )


def adapter_classes(checkpoint: Checkpoint) -> list[str]:
    """Names of an adapter's classes: from its config.json, otherwise as many as the head that it brings has rows.

    Args:
        checkpoint: the directory of the adapter.

    Raises:
        InputError: it has neither.
    """
    config = checkpoint.read_config()
    if isinstance(config.get("id2label"), dict):
        return [str(name) for name in config["id2label"].values()]
    for file in weights_files(checkpoint):
        if file.suffix == ".safetensors":
            with file.open("rb") as stream:
                entries, _ = read_header(file, stream)
            for name, entry in entries.items():
                leaf = name.removesuffix(".weight").rsplit(".", 1)[-1]
                if "lora_" not in name and name.endswith(".weight") and leaf in ("classifier", "score", "out_proj"):
                    return [f"LABEL_{row}" for row in range(entry.shape[0])]  # transformers' own names
    raise InputError(
        "cannot tell the number of classes: the adapter has neither a config.json with id2label nor a classifier",
        where=str(checkpoint.path),
        hint="Train it with modules_to_save=['classifier'], or put config.json beside it",
    )
