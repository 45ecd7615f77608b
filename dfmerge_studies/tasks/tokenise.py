"""Tokenise rows once, the way each kind of model answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dfmerge_studies.errors import InputError
from dfmerge_studies.tasks.data import Row
from dfmerge_studies.tasks.encoding import Encoded, Kind
from dfmerge_studies.tasks.settings import ChoiceTask, ClassificationTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NO_LIMIT = 1_000_000  # tokenizers that know no limit say 1e30


def encode_rows(
    rows: Sequence[Row],
    task: ChoiceTask | ClassificationTask,
    kind: Kind,
    tokenizer: PreTrainedTokenizerBase,
    *,
    longest: int | None,
    where: str,
) -> list[Encoded]:
    """Tokenise rows for a kind of model.

    Text-to-text: the input and every choice end with the tokenizer's own special tokens (end of sequence); choices are
    never cut, or two of them could become the same.  Causal:
    prompt + delimiter + choice is tokenised whole and split after the prompt; a prompt that is too long loses its
    beginning.  Classification: the text, or the pair.

    Args:
        rows: the examples.
        task: settings of the task.
        kind: how the model answers.
        tokenizer: the base's tokenizer.
        longest: tokens that the model takes (see `longest_input`), None where there is no limit.
        where: file and field, for messages.

    Raises:
        InputError: `max_length` is more than the model takes, or is unset and a text is longer.
    """
    limit = _limit(task.max_length, longest, where)
    if kind is Kind.CAUSAL:
        assert isinstance(task, ChoiceTask)
        encoded = [_encode_causal(row, task.target_delimiter, tokenizer, limit, where) for row in rows]
    elif kind is Kind.TEXT_TO_TEXT:
        encoded = [_encode_pair_of_texts(row, tokenizer, limit, longest, where) for row in rows]
    else:
        encoded = [_encode_classification(row, tokenizer, limit) for row in rows]
    if task.max_length is None:
        for item in encoded:
            if item.truncated:
                raise InputError(
                    f"the text of row {item.index} is longer than the {limit} tokens that the model takes",
                    where=where,
                    mend=f"Set max_length: {limit} to cut such texts, or remove them",
                )
    return encoded


def longest_input(config: Any, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Tokens that a model takes: the rows of its position table and the limit that its tokenizer names.

    Args:
        config: the model's configuration.
        tokenizer: its tokenizer.
    """
    limits = []
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None and not getattr(config, "is_encoder_decoder", False):  # T5 has n_positions, and no such table
        positions = getattr(config, "n_positions", None)
    if isinstance(positions, int):
        # RoBERTa's positions start behind the padding index.
        offset = (config.pad_token_id or 0) + 1 if "roberta" in config.model_type else 0
        limits.append(positions - offset)
    if tokenizer.model_max_length < _NO_LIMIT:
        limits.append(tokenizer.model_max_length)
    return min(limits) if limits else None


def _limit(wanted: int | None, longest: int | None, where: str) -> int | None:
    if wanted is not None and longest is not None and wanted > longest:
        raise InputError(
            f"max_length is {wanted} but the model takes {longest} tokens",
            where=where,
            mend=f"Set max_length to {longest} or less",
        )
    return wanted if wanted is not None else longest


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _encode_pair_of_texts(
    row: Row, tokenizer: PreTrainedTokenizerBase, limit: int | None, longest: int | None, where: str
) -> Encoded:
    whole = _ids(tokenizer, row.text)
    cut = limit is not None and len(whole) > limit
    if cut:
        whole = list(tokenizer(row.text, truncation=True, max_length=limit)["input_ids"])
    choices = tuple(tuple(tokenizer(text_target=choice, verbose=False)["input_ids"]) for choice in row.choices)
    for choice, ids in zip(row.choices, choices, strict=True):
        if longest is not None and len(ids) > longest:
            raise InputError(
                f"row {row.index}: the choice {choice[:60]!r} has {len(ids)} tokens, the model takes {longest}",
                where=where,
                mend="Shorten the choice",
            )
    return Encoded(row.index, tuple(whole), choices, row.label, None, cut)


def _encode_causal(
    row: Row, delimiter: str, tokenizer: PreTrainedTokenizerBase, limit: int | None, where: str
) -> Encoded:
    # Blanks at the end of a prompt belong to the choice's first token, or the split below would cut a token in two.
    prompt, blanks = row.text.rstrip(), row.text[len(row.text.rstrip()) :]
    context = _ids(tokenizer, prompt)
    choices = []
    for choice in row.choices:
        whole = _ids(tokenizer, f"{prompt}{blanks or delimiter}{choice}")
        choices.append(tuple(whole[len(context) :]))
        if not choices[-1]:
            raise InputError(
                f"row {row.index}: the choice {choice!r} adds no token to the prompt", where=where, mend="Change it"
            )
    room = None if limit is None else limit - max(map(len, choices))
    if room is not None and room < 1:
        raise InputError(
            f"row {row.index}: its choices alone fill the {limit} tokens", where=where, mend="Raise max_length"
        )
    cut = room is not None and len(context) > room
    return Encoded(row.index, tuple(context[-room:] if cut and room else context), tuple(choices), row.label, None, cut)


def _encode_classification(row: Row, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> Encoded:
    arguments = (row.text,) if row.pair is None else (row.text, row.pair)
    encoded = tokenizer(*arguments, verbose=False)
    cut = limit is not None and len(encoded["input_ids"]) > limit
    if cut:
        encoded = tokenizer(*arguments, truncation=True, max_length=limit)
    segments = tuple(encoded["token_type_ids"]) if "token_type_ids" in encoded and row.pair is not None else None
    return Encoded(row.index, tuple(encoded["input_ids"]), (), row.label, segments, cut)
