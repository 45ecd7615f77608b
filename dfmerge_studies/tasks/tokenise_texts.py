"""Tokenise rows whose answer is a text of its own: one that is scored whole, or one that the model writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING

from dfmerge_studies.errors import InputError
from dfmerge_studies.tasks.data import Row
from dfmerge_studies.tasks.encoding import Encoded
from dfmerge_studies.tasks.frames import Frame, delimiter_of, encoder_input, is_long, text_ids
from dfmerge_studies.tasks.settings import GenerateTask
from dfmerge_studies.tasks.texts import TextSize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_text(
    row: Row, delimiter: str, tokenizer: PreTrainedTokenizerBase, frame: Frame, limit: int | None, where: str
) -> Encoded:
    """A text behind its prompt; without one behind the token that begins a sequence, as lm-evaluation-harness does."""
    prompt, (text,) = row.text.rstrip(), row.choices
    if prompt:
        between = row.text[len(prompt) :] or delimiter
        context, whole = frame.tokens(tokenizer, prompt), frame.tokens(tokenizer, f"{prompt}{between}{text}")
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(context, whole, strict=False)))
    else:
        whole = frame.tokens(tokenizer, text)
        shared = frame.kept(whole)
    begin = frame.bos_id if frame.bos_id is not None else tokenizer.eos_token_id
    before, tokens = whole[:shared], whole[shared:]
    if not before:  # without any such token the first word piece has no probability
        before, tokens = ([begin], tokens) if isinstance(begin, int) else (tokens[:1], tokens[1:])
    room = None if limit is None else limit - len(before)
    if room is not None and room <= 0:
        raise InputError(
            f"row {row.index}: what stands before the text fills the {limit} tokens",
            where=f"{where}.max_length",
            hint="Raise max_length, or shorten doc_to_text",
        )
    return _scored_text(row, before, tokens, room, tokenizer, where)


def encode_target(row: Row, tokenizer: PreTrainedTokenizerBase, limit: int | None, where: str) -> Encoded:
    """A text as the target of an encoder-decoder model, whose input is what stands before it, or nothing."""
    before = text_ids(tokenizer, row.text)
    cut = limit is not None and len(before) > limit
    if cut:
        before = list(tokenizer(row.text, truncation=True, max_length=limit)["input_ids"])
    if not before:
        raise InputError(
            f"row {row.index}: nothing stands before the text, and the tokenizer ends no text with a token of its own",
            where=f"{where}.doc_to_text",
            hint="Give a text that the encoder reads",
        )
    tokens = list(tokenizer(text_target=row.choices[0], verbose=False)["input_ids"])
    found = _scored_text(row, before, tokens, limit, tokenizer, where)
    return replace(found, truncated=found.truncated or cut)


def _scored_text(
    row: Row,
    before: Sequence[int],
    tokens: Sequence[int],
    room: int | None,
    tokenizer: PreTrainedTokenizerBase,
    where: str,
) -> Encoded:
    """The first tokens of a text, as many as there is room for, with the size of what is left of it."""
    (text,), cut = row.choices, room is not None and len(tokens) > room
    if cut:
        tokens = tokens[:room]
        text = str(tokenizer.decode(list(tokens), skip_special_tokens=True))
    if not tokens or not text.strip():
        raise InputError(
            f"row {row.index}: the text {row.choices[0][:60]!r} has no token to score",
            where=f"{where}.doc_to_target",
            hint="Leave the row out, or raise max_length",
        )
    size = TextSize.of(text, len(tokens))
    return Encoded(row.index, tuple(before), (tuple(tokens),), 0, None, cut, size)


def encode_question(
    row: Row, task: GenerateTask, tokenizer: PreTrainedTokenizerBase, frame: Frame, limit: int | None
) -> Encoded:
    """What an encoder reads, and the tokens of the first target for its decoder."""
    whole, cut = encoder_input(row, tokenizer, frame if is_long(task) else None, limit)
    targets = [list(tokenizer(text_target=text, verbose=False)["input_ids"]) for text in row.targets[:1]]
    return _to_write(row, task, whole, targets, cut)


def encode_prompt(
    row: Row, task: GenerateTask, tokenizer: PreTrainedTokenizerBase, frame: Frame, limit: int | None
) -> Encoded:
    """A prompt, and the tokens of the first target behind it, the end of the sequence among them where there is one."""
    prompt, end = frame.tokens(tokenizer, row.text), tokenizer.eos_token_id
    targets = []
    for text in row.targets[:1]:
        between = "" if row.text[-1:].isspace() else delimiter_of(task, row)
        whole = frame.tokens(tokenizer, f"{row.text}{between}{text}")
        joined = whole[: len(prompt)] == prompt  # otherwise a token spans the join
        tokens = whole[len(prompt) :] if joined else text_ids(tokenizer, text, special=False)
        targets.append([*tokens, end] if isinstance(end, int) else tokens)
    cut = limit is not None and len(prompt) > limit
    if limit is not None and cut:
        kept = min(frame.kept(prompt), limit - 1)
        prompt = [*prompt[:kept], *prompt[len(prompt) - (limit - kept) :]]
    return _to_write(row, task, prompt, targets, cut)


def _to_write(
    row: Row, task: GenerateTask, prompt: Sequence[int], targets: Sequence[Sequence[int]], cut: bool
) -> Encoded:
    most = task.generation_kwargs.max_gen_toks
    choices = tuple(tuple(target[:most]) for target in targets if target)
    return Encoded(
        row.index, tuple(prompt), choices, 0 if choices else None, None, cut, choice_texts=(), targets=row.targets
    )
