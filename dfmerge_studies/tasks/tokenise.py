"""Tokenise rows once, the way each kind of model answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from dfmerge_studies.errors import InputError
from dfmerge_studies.tasks.data import Row
from dfmerge_studies.tasks.encoding import Encoded, Kind
from dfmerge_studies.tasks.frames import Frame, delimiter_of, encoder_input, is_long
from dfmerge_studies.tasks.prompts import check_template, prompt_text, turns_of
from dfmerge_studies.tasks.settings import ChoiceTask, GenerateTask, OwnTask, PromptedTask, TextTask
from dfmerge_studies.tasks.tokenise_texts import encode_prompt, encode_question, encode_target, encode_text
from dfmerge_studies.tasks.words import encode_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Model types whose positions are counted from pad_token_id + 1, out of max_position_embeddings.
_AFTER_PADDING = (
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "roberta-prelayernorm",
    "camembert",
    "data2vec-text",
    "ibert",
    "longformer",
    "luke",
    "mpnet",
    "esm",
    "xmod",
    "layoutlmv3",
)
_NO_LIMIT = 1_000_000  # tokenizers that know no limit say 1e30


def prompted(
    rows: Sequence[Row],
    task: OwnTask,
    tokenizer: PreTrainedTokenizerBase,
    *,
    where: str,
) -> list[Row]:
    """Rows whose text is their whole prompt: instruction, examples and chat template with it.

    Args:
        rows: the examples.
        task: settings of the task.
        tokenizer: the base's, whose chat template is applied.
        where: file and task, for messages.

    Raises:
        InputError: the tokenizer has no such chat template, or the template takes no such chat.
    """
    if not isinstance(task, PromptedTask):
        return list(rows)
    check_template(task, tokenizer, where)
    found = []
    for row in rows:
        turns = turns_of(task, row.text, description=row.description, prefix=row.prefix, examples=row.examples)
        found.append(replace(row, text=prompt_text(turns, task, tokenizer, where)) if turns else row)
    return found


def encode_rows(
    rows: Sequence[Row],
    task: OwnTask,
    kind: Kind,
    tokenizer: PreTrainedTokenizerBase,
    *,
    longest: int | None,
    where: str,
) -> list[Encoded]:
    """Tokenise rows for a kind of model.

    Text-to-text: the input and every choice end with the tokenizer's own special tokens (end of sequence); choices are
    never cut, or two of them could become the same.  Causal, as lm-evaluation-harness does: prompt + delimiter + choice
    is tokenised whole, without special tokens behind it, and split where the prompt ends, or before it where a token
    spans the join; a prompt that is too long loses its beginning, but for the token that begins every sequence. Special
    tokens that a chat template writes and the tokenizer puts around every text stand there once.
    Of a text to be generated the first target's tokens stand for a choice, the end of sequence included, `max_gen_toks`
    of them at most; a causal prompt keeps the blanks at its end, and leaves room for so many tokens behind it.
    Heads: the text, or the pair, or its words (see `words`).  Texts that are scored are tokenised whole, behind what
    stands before them or else the token that begins a sequence; one that is too long loses its end.

    Args:
        rows: the examples, with their whole prompts (see `prompted`).
        task: settings of the task.
        kind: how the model answers.
        tokenizer: the base's tokenizer.
        longest: tokens that the model takes (see `longest_input`), None where there is no limit.
        where: file and task, for messages.

    Raises:
        InputError: `max_length` is more than the model takes, or is unset and a text is longer; two choices of a row
            are the same tokens, or a choice adds none.
    """
    limit = _limit(task.max_length, _room(task, kind, longest, where), where)
    if isinstance(task, GenerateTask):
        frame = Frame.of(tokenizer, (row.text for row in rows))
        encode = encode_prompt if kind is Kind.CAUSAL else encode_question
        encoded = [encode(row, task, tokenizer, frame, limit) for row in rows]
    elif isinstance(task, TextTask) and kind is Kind.CAUSAL:
        frame = Frame.of(tokenizer, (row.choices[0] for row in rows))
        encoded = [encode_text(row, task.target_delimiter, tokenizer, frame, limit, where) for row in rows]
    elif isinstance(task, TextTask) and kind is Kind.TEXT_TO_TEXT:
        encoded = [encode_target(row, tokenizer, limit, where) for row in rows]
    elif kind is Kind.CAUSAL:
        assert isinstance(task, ChoiceTask)
        frame = Frame.of(tokenizer, (row.text.rstrip() for row in rows))
        encoded = [_encode_causal(row, delimiter_of(task, row), tokenizer, frame, limit, where) for row in rows]
    elif kind is Kind.TEXT_TO_TEXT:
        assert isinstance(task, ChoiceTask)
        around = Frame.of(tokenizer, (row.text for row in rows)) if is_long(task) else None
        encoded = [_encode_pair_of_texts(row, tokenizer, around, limit, longest, where) for row in rows]
    elif kind is Kind.TOKENS:
        encoded = encode_words(rows, tokenizer, limit, where)
    else:
        encoded = [_encode_for_head(row, tokenizer, limit) for row in rows]
    if task.max_length is None:
        for item in encoded:
            if item.truncated:
                raise InputError(
                    f"the text of row {item.index} is longer than the {limit} tokens that the model takes",
                    where=f"{where}.max_length",
                    hint=f"Set max_length: {limit} to cut such texts, or remove them",
                )
    return encoded


def longest_input(config: Any, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Tokens that a model takes: the rows of its position table and the limit that its tokenizer names."""
    limits = []
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None and not getattr(config, "is_encoder_decoder", False):  # T5 has n_positions, and no such table
        positions = getattr(config, "n_positions", None)
    if isinstance(positions, int) and positions > 0:  # XLNet says -1
        # The tables of OPT and BART, whose positions have an offset too, are longer than this number by it.
        padding = getattr(config, "pad_token_id", None) or 0
        limits.append(positions - (padding + 1 if config.model_type in _AFTER_PADDING else 0))
    if tokenizer.model_max_length < _NO_LIMIT:
        limits.append(tokenizer.model_max_length)
    return min(limits) if limits else None


def _room(task: OwnTask, kind: Kind, longest: int | None, where: str) -> int | None:
    """Tokens that a model takes as an input of a task: a decoder needs room for what it writes."""
    if longest is None or kind is not Kind.CAUSAL or not isinstance(task, GenerateTask):
        return longest
    written = task.generation_kwargs.max_gen_toks
    if written >= longest:
        raise InputError(
            f"max_gen_toks is {written}, but the model takes {longest} tokens together with the prompt",
            where=f"{where}.generation_kwargs",
            hint="Set max_gen_toks to what the longest answer needs",
        )
    return longest - written


def _limit(wanted: int | None, longest: int | None, where: str) -> int | None:
    if wanted is not None and longest is not None and wanted > longest:
        raise InputError(
            f"max_length is {wanted} but the model takes {longest} tokens",
            where=f"{where}.max_length",
            hint=f"Set max_length to {longest} or less",
        )
    return wanted if wanted is not None else longest


def _encode_pair_of_texts(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    frame: Frame | None,
    limit: int | None,
    longest: int | None,
    where: str,
) -> Encoded:
    """One input of a text-to-text model; with a frame it is cut at its beginning, otherwise at its end."""
    whole, cut = encoder_input(row, tokenizer, frame, limit)
    nothing, *choices = (
        tuple(tokenizer(text_target=choice, verbose=False)["input_ids"]) for choice in ("", *row.choices)
    )
    for choice, ids in zip(row.choices, choices, strict=True):
        if ids == nothing:
            raise InputError(
                f"row {row.index}: the choice {choice!r} has no token", where=f"{where}.doc_to_choice", hint="Change it"
            )
        if longest is not None and len(ids) > longest:
            raise InputError(
                f"row {row.index}: the choice {choice[:60]!r} has {len(ids)} tokens, the model takes {longest}",
                where=f"{where}.doc_to_choice",
                hint="Shorten the choice",
            )
    _check_different(row, choices, where)
    return Encoded(row.index, tuple(whole), tuple(choices), row.label, None, cut, choice_texts=row.choices)


def _encode_causal(
    row: Row, delimiter: str, tokenizer: PreTrainedTokenizerBase, frame: Frame, limit: int | None, where: str
) -> Encoded:
    # Blanks at the end of a prompt belong to the choice's first token.
    prompt, blanks = row.text.rstrip(), row.text[len(row.text.rstrip()) :]
    context = frame.tokens(tokenizer, prompt)
    wholes = [frame.tokens(tokenizer, f"{prompt}{blanks or delimiter}{choice}") for choice in row.choices]
    for choice, whole in zip(row.choices, wholes, strict=True):
        if whole == context:
            raise InputError(
                f"row {row.index}: the choice {choice!r} adds no token to the prompt",
                where=f"{where}.doc_to_choice",
                hint="Change it",
            )
    # A token may span the join, in writing without blanks above all: then it belongs to the choices, not to the prompt.
    columns = zip(context, *wholes, strict=False)
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    if shared == 0:
        what = "and a choice are one token: nothing is left before the choices" if context else "has no tokens"
        raise InputError(
            f"row {row.index}: the prompt {prompt[:60]!r} {what}",
            where=f"{where}.doc_to_text",
            hint="Give the prompt more text",
        )
    context, choices = context[:shared], [tuple(whole[shared:]) for whole in wholes]
    _check_different(row, choices, where)
    if limit is None or len(context) + max(map(len, choices)) <= limit:
        return Encoded(row.index, tuple(context), tuple(choices), row.label, choice_texts=row.choices)
    kept, room = frame.kept(context), limit - max(map(len, choices))
    if room <= kept:
        raise InputError(
            f"row {row.index}: its choices alone fill the {limit} tokens",
            where=f"{where}.max_length",
            hint="Raise max_length",
        )
    cut = (*context[:kept], *context[len(context) - (room - kept) :])
    return Encoded(row.index, cut, tuple(choices), row.label, None, True, choice_texts=row.choices)


def _check_different(row: Row, choices: Sequence[tuple[int, ...]], where: str) -> None:
    """Refuse choices that are the same to the model; they would have the same loss, and the first would always win."""
    texts: dict[tuple[int, ...], str] = {}
    for text, ids in zip(row.choices, choices, strict=True):
        if ids in texts:
            raise InputError(
                f"row {row.index}: the choices {texts[ids]!r} and {text!r} are the same tokens to the base's tokenizer",
                where=f"{where}.doc_to_choice",
                hint="Let them differ in what it keeps; it may drop case, accents, blanks or unknown characters",
            )
        texts[ids] = text


def _encode_for_head(row: Row, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> Encoded:
    arguments = (row.text,) if row.pair is None else (row.text, row.pair)
    encoded = tokenizer(*arguments, verbose=False)
    cut = limit is not None and len(encoded["input_ids"]) > limit
    if cut:
        encoded = tokenizer(*arguments, truncation=True, max_length=limit)
    segments = tuple(encoded["token_type_ids"]) if "token_type_ids" in encoded and row.pair is not None else None
    return Encoded(row.index, tuple(encoded["input_ids"]), (), row.label, segments, cut)
