"""Load whole checkpoints strictly, safetensors first, pickles only as plain weights (adapters: `adapters`)."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from logging import ERROR
from typing import TYPE_CHECKING, Any

from dfmerge_studies.checkpoints.digest import Contents
from dfmerge_studies.checkpoints.files import check_files
from dfmerge_studies.checkpoints.reference import Checkpoint
from dfmerge_studies.errors import InputError, first_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


LOADING_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError, ImportError)


class ModelClass(StrEnum):
    """Which of transformers' auto classes reads a checkpoint."""

    SEQ2SEQ = "AutoModelForSeq2SeqLM"
    CAUSAL = "AutoModelForCausalLM"
    CLASSIFICATION = "AutoModelForSequenceClassification"


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
    try:
        with quiet_transformers():
            tensors = read_weights(checkpoint, contents, dtype=dtype)
            model, info = _model_of(checkpoint, model_class, tensors, dtype=dtype, **labels)
    except LOADING_ERRORS as error:
        what = f"cannot be loaded as {model_class.value}"
        mend = "Check that the checkpoint is complete and of the kind that the tasks need"
        raise refused(error, str(checkpoint.path), what, mend) from error
    contents.open(checkpoint)
    where, mend = str(checkpoint.path), "Copy the checkpoint again, or name the right one"
    resized = _resized(model, info["mismatched_keys"], where, allowed=bool(classes))
    missing = frozenset(info["missing_keys"]) | resized
    if headless and model_class is ModelClass.CLASSIFICATION:
        check_body(model, missing, where=where, owner="the weights", mend=mend)
    else:
        check_answers(model, missing, where=where, owner="the weights", mend=mend)
    return Loaded(model, missing, frozenset(info["unexpected_keys"]))


def _resized(
    model: PreTrainedModel, mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]], where: str, *, allowed: bool
) -> frozenset[str]:
    """Parameters of a head that has another number of classes in the files; other misfits are refused."""
    names = set()
    for name, found, expected in sorted(mismatched):
        if not allowed or name.startswith(f"{model.base_model_prefix}."):
            raise InputError(
                f"tensor {name} has shape {tuple(found)}, but {tuple(expected)} follows from its config.json",
                where=where,
                mend="Copy the configuration that belongs to these weights",
            )
        names.add(name)
    return frozenset(names)


def _model_of(
    checkpoint: Checkpoint, model_class: ModelClass, tensors: dict[str, Tensor], *, dtype: torch.dtype, **labels: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """What the auto class's `from_pretrained` makes of a directory, with tensors that have been read from it."""
    import torch
    import transformers

    trust = checkpoint.trust_remote_code
    config = transformers.AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=trust, **labels)
    auto = getattr(transformers, model_class.value)
    with torch.device("meta"):  # names the class (of the checkpoint's own code, perhaps) and allocates nothing
        shell = auto.from_config(config, trust_remote_code=trust)
    model, info = type(shell).from_pretrained(
        None,
        config=shell.config,
        state_dict=tensors,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are refused by name, or drawn anew where that is wanted
        generation_config=_generation_config(checkpoint) if shell.can_generate() else None,
    )
    model.config.name_or_path = model.name_or_path = str(checkpoint.path)
    return model, info


def _generation_config(checkpoint: Checkpoint) -> GenerationConfig:
    """Of a file of its own, or, in older checkpoints, among the model's configuration."""
    from transformers import GenerationConfig
    from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

    own = (checkpoint.path / GENERATION_CONFIG_NAME).is_file()
    return GenerationConfig.from_pretrained(
        checkpoint.path, config_file_name=GENERATION_CONFIG_NAME if own else CONFIG_NAME, _from_model_config=not own
    )


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint.

    Args:
        checkpoint: the directory that holds it.

    Raises:
        InputError: there is none, or its files are damaged.
    """
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, trust_remote_code=checkpoint.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, ImportError, json.JSONDecodeError) as error:
        mend = "Save the tokenizer into the model directory with tokenizer.save_pretrained"
        raise refused(error, str(checkpoint.path), "the tokenizer cannot be loaded", mend) from error
    return tokenizer


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint brings a tokenizer of its own (adapters often do not).

    Args:
        checkpoint: a model or an adapter.
    """
    names = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "sentencepiece.bpe.model")
    return any((checkpoint.path / name).is_file() for name in names)


def check_same_tokenizer(
    base: PreTrainedTokenizerBase, expert: PreTrainedTokenizerBase, *, base_file: str, expert_file: str
) -> None:
    """Refuse an expert that reads text otherwise than the base does.

    Args:
        base: the base's tokenizer.
        expert: the expert's tokenizer.
        base_file: where the base was read from, for the message.
        expert_file: where the expert was read from, for the message.

    Raises:
        InputError: naming what differs: a special token, the vocabulary, or the splitting of a probe text.
    """
    mend = "Base and experts must share one tokenizer; train the expert again with the base's"
    ours, theirs = _special_tokens(expert), _special_tokens(base)
    for name in sorted({*ours, *theirs}):
        if ours.get(name) != theirs.get(name):
            raise InputError(
                f"special token {name} is {ours.get(name)!r} but {theirs.get(name)!r} in the base {base_file}",
                where=expert_file,
                mend=mend,
            )
    vocabulary, reference = expert.get_vocab(), base.get_vocab()
    if vocabulary != reference:
        odd = sorted({*vocabulary.items()} ^ {*reference.items()}, key=lambda item: (item[1], item[0]))[0][0]
        raise InputError(
            f"another tokenizer than the base {base_file}: {len(vocabulary)} and {len(reference)} tokens, "
            f"{odd!r} for one is not in both or has another id",
            where=expert_file,
            mend=mend,
        )
    probe = "The Quick, brown fox's 3.14 naïve jumps!\n Ünïcode  spaces"
    if list(expert(probe)["input_ids"]) != list(base(probe)["input_ids"]):
        raise InputError(
            f"splits text otherwise than the tokenizer of the base {base_file}", where=expert_file, mend=mend
        )


def refused(error: Exception, where: str, what: str, mend: str) -> InputError:
    """What a failed load means.

    Args:
        error: what transformers, peft or torch raised.
        where: the checkpoint.
        what: what failed, as a clause.
        mend: what the reader can do.
    """
    if "trust_remote_code" in str(error):
        return InputError(
            "it brings code of its own, which is not run unless you say so",
            where=where,
            mend="Read that code; if you trust it, add --trust-remote-code",
        )
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
        return InputError(
            "its .bin file holds more than plain weights; it was not unpickled, since that can run any code",
            where=where,
            mend="Save the model again with save_pretrained, as safetensors",
        )
    return InputError(f"{what}: {first_line(error)}", where=where, mend=mend)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    return {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}


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
