"""Load whole checkpoints strictly, safetensors first, pickles only as plain weights (adapters: `adapters`)."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from logging import ERROR
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dfmerge_studies.boundary import read_json, reading
from dfmerge_studies.checkpoints.digest import Contents
from dfmerge_studies.checkpoints.files import check_files
from dfmerge_studies.checkpoints.reference import Checkpoint
from dfmerge_studies.checkpoints.vocabulary import PROBE
from dfmerge_studies.errors import DFMergeError, InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


_TOKENIZER_JSON = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)


class ModelClass(StrEnum):
    """Which of transformers' auto classes reads a checkpoint."""

    SEQ2SEQ = "AutoModelForSeq2SeqLM"
    CAUSAL = "AutoModelForCausalLM"
    CLASSIFICATION = "AutoModelForSequenceClassification"
    TOKENS = "AutoModelForTokenClassification"

    @property
    def has_head(self) -> bool:
        """Whether it reads an encoder with a head on it, which is a task's own."""
        return self in (ModelClass.CLASSIFICATION, ModelClass.TOKENS)


@dataclass(frozen=True)
class Loaded:
    """A model in memory.

    Attributes:
        model: the model, in evaluation mode; its weights are in memory of their own, no file backs them.
        missing: parameters that the files did not hold: of a classifier that may lack its head, the head, drawn at
            random; otherwise only what no answer depends on, all zero.
        unexpected: tensors of the files that the model has no place for (what pretraining alone needed, say).
    """

    model: PreTrainedModel
    missing: frozenset[str]
    unexpected: frozenset[str]


def load_model(
    checkpoint: Checkpoint,
    model_class: ModelClass,
    *,
    dtype: torch.dtype,
    classes: Sequence[str] = (),
    headless: bool = False,
    contents: Contents | None = None,
) -> Loaded:
    """Load a whole model; what its files lack is refused, if answers depend on it.

    Args:
        checkpoint: the directory of a whole model.
        model_class: the auto class that reads it.
        dtype: of the weights in memory.
        classes: names of the classes of a head that is to be drawn anew where the checkpoint's has another size; by
            default the checkpoint's own.
        headless: whether a classifier may lack its head, and what stands between it and the encoder's hidden states.
        contents: what files held when they were read before; is told what they hold now.

    Raises:
        InputError: files that are truncated, not weights, of another architecture, or lack tensors.
        RunError: a file changed while it was being read.
    """
    # They import torch.
    from dfmerge_studies.checkpoints.missing import check_answers, check_body
    from dfmerge_studies.checkpoints.weights import read_weights

    check_files(checkpoint)
    contents = contents or Contents()
    contents.open(checkpoint)
    names = dict(enumerate(classes))
    labels = {"id2label": names, "label2id": {name: index for index, name in names.items()}} if names else {}
    with quiet_transformers():
        tensors = read_weights(checkpoint, contents, dtype=dtype)
        model, info = _model_of(checkpoint, model_class, tensors, dtype=dtype, **labels)
    contents.open(checkpoint)
    where, hint = str(checkpoint.path), "Copy the checkpoint again, or name the right one"
    resized = _resized(model, info["mismatched_keys"], where, allowed=bool(classes))
    missing = frozenset(info["missing_keys"]) | resized
    if headless and model_class.has_head:
        check_body(model, missing, where=where, owner="the weights", hint=hint)
    else:
        check_answers(model, missing, where=where, owner="the weights", hint=hint)
    return Loaded(model, missing, frozenset(info["unexpected_keys"]))


def _resized(
    model: PreTrainedModel, mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]], where: str, *, allowed: bool
) -> frozenset[str]:
    """Parameters of a head that has another number of classes in the files; other misfits are refused."""
    names = set()
    for name, found, expected in sorted(mismatched):
        if not allowed or name.startswith(f"{model.base_model_prefix}."):
            _misfit(name, found, expected, where)
        names.add(name)
    return frozenset(names)


def _model_of(
    checkpoint: Checkpoint, model_class: ModelClass, tensors: dict[str, Tensor], *, dtype: torch.dtype, **labels: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """What the auto class's `from_pretrained` makes of a directory, with tensors that have been read from it."""
    import torch
    import transformers

    trust, where = checkpoint.trust_remote_code, str(checkpoint.path)
    file, hint = str(checkpoint.path / "config.json"), "Copy the configuration that belongs to these weights"
    with loading(file, "not the configuration of a model", hint):
        config = transformers.AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=trust, **labels)
    auto = getattr(transformers, model_class.value)
    # On "meta", this names the class (of the checkpoint's own code, perhaps) and allocates nothing.
    with loading(file, f"no model can be built from it as {model_class.value}", hint), torch.device("meta"):
        shell = auto.from_config(config, trust_remote_code=trust)
    _check_shapes(tensors, shell, where, model_class)
    generation = _generation_config(checkpoint) if shell.can_generate() else None
    hint = "Check that the checkpoint is complete and of the kind that the tasks need"
    with loading(where, f"cannot be loaded as {model_class.value}", hint):
        model, info = type(shell).from_pretrained(
            None,
            config=shell.config,
            state_dict=tensors,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused by name, or drawn anew where that is wanted
            generation_config=generation,
        )
    model.config.name_or_path = model.name_or_path = where
    return model, info


def _check_shapes(tensors: dict[str, Tensor], shell: PreTrainedModel, where: str, model_class: ModelClass) -> None:
    """Refuse tensors of another shape than the configuration's before memory is taken for what it says.

    The head of a classifier is left to `_resized`.
    """
    expected, prefix = shell.state_dict(), f"{shell.base_model_prefix}."
    for name, tensor in tensors.items():
        for full in (name, f"{prefix}{name}"):
            head = model_class.has_head and not full.startswith(prefix)
            if full in expected and not head and expected[full].shape != tensor.shape:
                _misfit(full, tensor.shape, expected[full].shape, where)


def _misfit(name: str, found: Sequence[int], expected: Sequence[int], where: str) -> NoReturn:
    raise InputError(
        f"tensor {name} has shape {tuple(found)}, but {tuple(expected)} follows from its config.json",
        where=where,
        hint="Copy the configuration that belongs to these weights",
    )


def _generation_config(checkpoint: Checkpoint) -> GenerationConfig:
    """Of a file of its own, or, in older checkpoints, among the model's configuration."""
    from transformers import GenerationConfig
    from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

    own = (checkpoint.path / GENERATION_CONFIG_NAME).is_file()
    name = GENERATION_CONFIG_NAME if own else CONFIG_NAME
    with reading(str(checkpoint.path / name), "not the settings of a generation", "Copy the file again, or remove it"):
        return GenerationConfig.from_pretrained(checkpoint.path, config_file_name=name, _from_model_config=not own)


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint.

    Args:
        checkpoint: the directory that holds it.

    Raises:
        InputError: there is none, or its files are damaged.
    """
    from transformers import AutoTokenizer

    where, hint = str(checkpoint.path), "Save the tokenizer into the model directory with tokenizer.save_pretrained"
    for name in _TOKENIZER_JSON:
        if (checkpoint.path / name).exists():
            read_json(checkpoint.path / name, hint=hint)
    try:
        with loading(where, "the tokenizer cannot be loaded", hint), quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, trust_remote_code=checkpoint.trust_remote_code)
    except InputError:
        _check_tokenizer_json(checkpoint.path / "tokenizer.json", hint)
        raise
    if not isinstance(tokenizer.model_max_length, (int, float)):
        raise InputError(
            f"model_max_length is {tokenizer.model_max_length!r}, expected a number of tokens",
            where=str(checkpoint.path / "tokenizer_config.json"),
            hint="Correct it, or remove it where there is no limit",
        )
    with reading(where, "the tokenizer fails on a text", hint):
        tokenizer(PROBE)
    return tokenizer


def _check_tokenizer_json(file: Path, hint: str) -> None:
    """Name the file where it alone is at fault."""
    from tokenizers import Tokenizer

    if file.exists():
        with reading(str(file), "not a tokenizer", hint):
            Tokenizer.from_file(str(file))


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint brings a tokenizer of its own (adapters often do not).

    Args:
        checkpoint: a model or an adapter.
    """
    names = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "sentencepiece.bpe.model")
    return any((checkpoint.path / name).is_file() for name in names)


@contextmanager
def loading(where: str, what: str, hint: str) -> Iterator[None]:
    """`reading`, for what may come with code of its own: in modules, or in pickles.

    Args:
        where: the checkpoint, or a file of it.
        what: what cannot be done, as a clause.
        hint: what the reader can do.

    Raises:
        InputError: for whatever was raised.
    """
    with reading(where, what, hint):
        try:
            yield
        except Exception as error:
            if isinstance(error, DFMergeError):
                raise
            if "trust_remote_code" in str(error):
                raise InputError(
                    "it brings code of its own, which is not run unless you say so",
                    where=where,
                    hint="Read that code; if you trust it, add --trust-remote-code",
                ) from error
            if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
                raise InputError(
                    "its .bin file holds more than plain weights; it was not unpickled, since that can run any code",
                    where=where,
                    hint="Save it again with save_pretrained, as safetensors",
                ) from error
            raise


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and load reports: we check what was loaded and say it ourselves."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(ERROR)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
