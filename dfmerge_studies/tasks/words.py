"""Tokens of texts whose words get tags: each word's first token stands for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dfmerge_studies.errors import InputError
from dfmerge_studies.tasks.data import Row
from dfmerge_studies.tasks.encoding import Encoded
from dfmerge_studies.tasks.tags import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_words(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, limit: int | None, where: str
) -> list[Encoded]:
    """Tokenise rows of words.

    A word that is cut off, or that the tokenizer makes nothing of, is left out with its tag.

    Args:
        rows: the examples.
        tokenizer: of the base.
        limit: tokens of an input.
        where: file and task, for messages.

    Raises:
        InputError: the tokenizer does not say which token is of which word, or no word with a tag is left of a row.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"{type(tokenizer).__name__} does not say which token is of which word",
            where=where,
            hint="Save a fast tokenizer (tokenizer.json) into the base's directory",
        )
    blank = " " if _needs_blanks(tokenizer) else ""
    return [_encoded(row, [blank + word for word in row.words], tokenizer, limit, where) for row in rows]


def _needs_blanks(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether words alone are other tokens than inside a text: of byte-level tokenizers without `add_prefix_space`."""
    alone, inside = (
        tokenizer(text, is_split_into_words=split, add_special_tokens=False)["input_ids"]
        for text, split in ((["a", "a"], True), ("a a", False))
    )
    return list(alone)[-1:] != list(inside)[-1:]


def _encoded(row: Row, words: list[str], tokenizer: PreTrainedTokenizerBase, limit: int | None, where: str) -> Encoded:
    encoded = tokenizer(words, is_split_into_words=True, verbose=False)
    cut = limit is not None and len(encoded["input_ids"]) > limit
    if cut:
        encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=limit)
    first: dict[int, int] = {}
    for place, word in enumerate(encoded.word_ids()):
        if word is not None:
            first.setdefault(word, place)
    tags = None if row.label is None else tuple(row.label[word] for word in first)
    if not first or (tags is not None and all(tag == IGNORED for tag in tags)):
        raise InputError(
            f"row {row.index}: no word {'with a tag ' if first else ''}is left within {limit} tokens",
            where=f"{where}.doc_to_text",
            hint="Remove the row, or raise max_length",
        )
    return Encoded(row.index, tuple(encoded["input_ids"]), (), tags, None, cut, words=tuple(first.values()))
