"""Do a base and an expert read texts alike?  What no text shows (padding, sides, unused tokens) does not count."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

from dfmerge_studies.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PROBE = "The Quick, brown fox's 3.14 naïve jumps!\n Ünïcode  spaces"
MEND = (
    "Use tokenizer: union where the expert has added tokens; otherwise base and experts must share one tokenizer: "
    "train the expert again with the base's"
)
_UNSEEN = ("added_tokens", "padding", "truncation", "version")  # of a serialised tokenizer; added tokens: see below


def reads_alike(
    base: PreTrainedTokenizerBase, expert: PreTrainedTokenizerBase, *, base_file: str, expert_file: str
) -> bool:
    """Refuse an expert that plainly reads text otherwise than the base does; a chat template of its own is noted.

    Args:
        base: the base's tokenizer.
        expert: the expert's; padding, truncation and lengths are set to the base's.
        base_file: where the base was read from, for the message.
        expert_file: where the expert was read from, for the message.

    Returns:
        True where no text can be read otherwise; False where that depends on the text, as with tokens that one of the
        two has more.

    Raises:
        InputError: naming what differs: a token of the vocabulary, or the splitting of a probe text.
    """
    _note_chat_template(base, expert, base_file, expert_file)
    expert.padding_side, expert.truncation_side = base.padding_side, base.truncation_side
    expert.model_max_length = base.model_max_length
    ours, theirs = expert.get_vocab(), base.get_vocab()
    odd = _odd_token(ours, theirs, {*expert.get_added_vocab(), *base.get_added_vocab()})
    if odd is not None:
        raise InputError(
            f"another tokenizer than the base {base_file}: {len(ours)} and {len(theirs)} tokens, "
            f"{odd!r} for one is not in both or has another id",
            where=expert_file,
            hint=MEND,
        )
    if list(expert(PROBE)["input_ids"]) != list(base(PROBE)["input_ids"]):
        raise InputError(
            f"splits text otherwise than the tokenizer of the base {base_file}", where=expert_file, hint=MEND
        )
    workings = _workings(base)
    return workings is not None and ours == theirs and _workings(expert) == workings


def _odd_token(ours: dict[str, int], theirs: dict[str, int], added: set[str]) -> str | None:
    """A token that has another id on the other side, or is part of one vocabulary alone; the one of the lowest id."""
    different = {*ours.items()} ^ {*theirs.items()}
    both = ours.keys() & theirs.keys()
    odd = [(number, token) for token, number in different if token in both or token not in added]
    return min(odd)[1] if odd else None


def _workings(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """All that decides how a text is read; None where the tokenizer cannot say it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    whole: dict[str, Any] = json.loads(backend.to_str())
    tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    tokens.pop("pad_token", None)
    added = {token["content"]: token for token in whole.get("added_tokens", [])}
    return {
        **{name: value for name, value in whole.items() if name not in _UNSEEN},
        "added": {name: {**token, "special": None} for name, token in added.items()},
        "tokens": tokens,
    }


def _note_chat_template(
    base: PreTrainedTokenizerBase, expert: PreTrainedTokenizerBase, base_file: str, expert_file: str
) -> None:
    own = getattr(expert, "chat_template", None)
    if own and own != getattr(base, "chat_template", None):
        logger.warning(
            "%s: its chat template is not that of the base %s, which is what apply_chat_template of a task applies",
            expert_file,
            base_file,
        )
