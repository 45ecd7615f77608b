"""What a tokenizer puts around a text, and what is kept of it where a text is cut or goes on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfmerge_studies.tasks.data import Row
from dfmerge_studies.tasks.settings import PromptedTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> list[int]:
    """Tokens of a text, special ones around it if that is wanted, however long it is."""
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


@dataclass(frozen=True)
class Frame:
    """The special tokens that a tokenizer puts around every text.

    Attributes:
        before: their number before the text.
        after: their number behind it: an end of sequence, a separator.
        bos_id: the token that begins a sequence, if there is one.
    """

    before: int
    after: int
    bos_id: int | None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Frame:
        """Those of a tokenizer, found by the first of some texts that it keeps whole between them.

        Args:
            tokenizer: turns texts into tokens.
            texts: any that are not empty to it.
        """
        bos = tokenizer.bos_token_id
        bos_id = bos if isinstance(bos, int) else None
        for text in texts:
            whole, bare = text_ids(tokenizer, text), text_ids(tokenizer, text, special=False)
            for before in range(len(whole) - len(bare) + 1):
                if bare and whole[before : before + len(bare)] == bare:
                    return cls(before, len(whole) - len(bare) - before, bos_id)
        return cls(0, 0, bos_id)

    def tokens(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        """A text that may go on: nothing special behind it, and one beginning if it brings its own."""
        ids = text_ids(tokenizer, text)
        return self._begun_once(ids[: len(ids) - self.after])

    def whole(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        """A text with the special tokens around it, each once if it brings its own."""
        ids = self._begun_once(text_ids(tokenizer, text))
        ended = self.after and ids[-2 * self.after : -self.after] == ids[-self.after :]
        return ids[: -self.after] if ended else ids

    def _begun_once(self, ids: list[int]) -> list[int]:
        if self.before and ids[self.before : 2 * self.before] == ids[: self.before]:
            return ids[self.before :]
        begun = self.before and self.bos_id is not None and ids[self.before - 1 : self.before + 1] == [self.bos_id] * 2
        return ids[: self.before - 1] + ids[self.before :] if begun else ids

    def kept(self, ids: Sequence[int]) -> int:
        """How many of the first tokens are no text and stay when a prompt is cut."""
        return self.before or int(self.bos_id is not None and list(ids[:1]) == [self.bos_id])


def encoder_input(
    row: Row, tokenizer: PreTrainedTokenizerBase, frame: Frame | None, limit: int | None
) -> tuple[list[int], bool]:
    """Tokens that an encoder reads, and whether they were cut: with a frame at the beginning, otherwise at the end."""
    whole = text_ids(tokenizer, row.text) if frame is None else frame.whole(tokenizer, row.text)
    if limit is None or len(whole) <= limit:
        return whole, False
    if frame is None:
        return list(tokenizer(row.text, truncation=True, max_length=limit)["input_ids"]), True
    return [*whole[: frame.before], *whole[len(whole) - limit + frame.before :]], True


def is_long(task: PromptedTask) -> bool:
    """Whether an input stands at the end of its prompt, which must keep it where it is cut."""
    return task.chat or bool(task.num_fewshot)


def delimiter_of(task: PromptedTask, row: Row) -> str:
    """What stands between prompt and answer: in a chat nothing, unless the answer has begun there."""
    begun = row.prefix and not row.prefix[-1].isspace()
    return task.target_delimiter if begun or not task.chat else ""
