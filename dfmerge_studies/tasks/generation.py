"""Texts that a model writes: greedily, with transformers' own `generate` and its cache of keys and values.

    prompt      tokens of one input; B of them in a batch, padded on the left for a decoder, on the right for an encoder
    written     tokens that the model appends to a prompt, or begins a target with: the likeliest one at each step, to
                the end of a sequence, to the first text of `until` or to `max_gen_toks`, whichever comes first

Positions of a decoder are counted from the first token of a prompt that is no padding, by the attention mask.  So a
text does not depend on what shares its batch, but for rounding where two tokens are equally likely.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dfmerge_studies.checkpoints.load import quiet_transformers
from dfmerge_studies.errors import InputError, RunError
from dfmerge_studies.params import evaluating
from dfmerge_studies.ranks import SOLO, Ranks
from dfmerge_studies.tasks.batches import device_of, pad, pad_mask
from dfmerge_studies.tasks.encoding import Encoded, Kind
from dfmerge_studies.tasks.evaluate import TOKEN_BUDGET, length_batches, pass_in_tokens, shared_out

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Writer:
    """How a model writes the texts of a task.

    Attributes:
        tokenizer: turns tokens into text.
        max_gen_toks: tokens that are written at most.
        until: texts that end a text; they do not belong to it.
    """

    tokenizer: PreTrainedTokenizerBase
    max_gen_toks: int
    until: tuple[str, ...] = ()

    def cost(self, example: Encoded, kind: Kind) -> int:
        """Tokens that an input puts into a batch: its prompt, and all that may be written."""
        return len(example.input_ids) + self.max_gen_toks

    def text(self, tokens: Sequence[int]) -> str:
        """What was written, without special tokens and what follows the first text that ends it."""
        text = str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))
        for end in self.until:
            text = text.split(end)[0]
        return text

    @cached_property
    def reach(self) -> int:
        """Tokens from the last one back in which an end that has just been completed must lie: one per byte of it."""
        return max((len(end.encode()) for end in self.until), default=0) + 1

    def ended(self, tokens: Sequence[int]) -> bool:
        """Whether the last token completes an end."""
        if not self.until:
            return False
        tail = str(self.tokenizer.decode(list(tokens)[-self.reach :]))
        return any(end in tail for end in self.until)


def write_texts(
    model: nn.Module,
    kind: Kind,
    examples: Sequence[Encoded],
    writer: Writer,
    *,
    pad_id: int,
    token_budget: int = TOKEN_BUDGET,
    progress: Callable[[int], None] | None = None,
    ranks: Ranks = SOLO,
) -> list[str]:
    """What the model writes for every input, in the order of `examples`.

    Args:
        model: a language model, put into evaluation mode for the time of the call.
        kind: how it answers.
        examples: tokenised inputs.
        writer: where its texts end.
        pad_id: token id to pad with.
        token_budget: tokens of one batch, prompts and what may be written, the bound on memory.
        progress: called with the number of inputs done since the last call.
        ranks: processes that share the inputs; every one of them gets all texts.

    Raises:
        InputError: the model is of a class that cannot generate.
        RunError: a logit is not a number; the message names the row.
    """

    def compute(share: Sequence[int]) -> list[str]:
        mine = [examples[i] for i in share]
        tokens = write_tokens(
            model, kind, mine, writer, pad_id=pad_id, token_budget=token_budget, progress=progress, ranks=ranks
        )
        return [writer.text(each) for each in tokens]

    return shared_out(ranks, [writer.cost(example, kind) for example in examples], compute)


def write_tokens(
    model: nn.Module,
    kind: Kind,
    examples: Sequence[Encoded],
    writer: Writer,
    *,
    pad_id: int,
    token_budget: int = TOKEN_BUDGET,
    progress: Callable[[int], None] | None = None,
    ranks: Ranks = SOLO,
) -> list[tuple[int, ...]]:
    """The tokens that this process's model writes for every input, their end included; at least one each.

    Args and errors as of `write_texts`; `ranks` is only looked at between batches.
    """
    found: list[tuple[int, ...]] = [()] * len(examples)
    prompts = [replace(example, choices=()) for example in examples]
    with evaluating(model), torch.inference_mode():
        padding = pass_in_tokens(model) * writer.max_gen_toks  # a batch more is a pass more for every token
        for batch in length_batches(prompts, kind, token_budget, writer.cost, padding=padding):
            ranks.check()
            for i, tokens in zip(batch, written(model, kind, [prompts[i] for i in batch], writer, pad_id), strict=True):
                found[i] = tokens
            if progress is not None:
                progress(len(batch))
    return found


def written(
    model: nn.Module,
    kind: Kind,
    batch: Sequence[Encoded],
    writer: Writer,
    pad_id: int,
    step: Callable[[Tensor], None] | None = None,
) -> list[tuple[int, ...]]:
    """The tokens written for one batch, up to and with the first end.

    Args:
        model: a language model in evaluation mode.
        kind: how it answers.
        batch: B inputs.
        writer: where texts end.
        pad_id: token id to pad with.
        step: told of the scores (B, vocabulary) of every step.

    Raises:
        InputError: the model is of a class that cannot generate.
        RunError: a logit is not a number; the message names the row.
    """
    model_: Any = model  # nn.Module's attributes are typed Tensor | Module
    if not (hasattr(model, "generate") and model_.can_generate()):
        hint = "Use a class with a language modelling head, or tasks of type: choice"
        raise InputError(f"{type(model).__name__} cannot generate texts", hint=hint)
    device, prompts = device_of(model), [example.input_ids for example in batch]
    ids, mask = pad(prompts, pad_id, device), pad_mask(prompts, device)
    if kind is Kind.CAUSAL:
        ids, mask = (_moved_right(each, prompts) for each in (ids, mask))
    start = ids.shape[1] if kind is Kind.CAUSAL else 1  # a target's first token is given, not written
    settings = _greedy(model_, writer, pad_id)
    stop = _Stop(writer, start, len(batch))
    with quiet_transformers():
        output: Tensor = model_.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=settings,
            stopping_criteria=[stop],
            logits_processor=[_Watch(batch, step)],
        )
    ends = settings.eos_token_id or []
    found = []
    for row, stopped in zip(output[:, start:].tolist(), stop.lengths, strict=True):
        length = next((i for i, token in enumerate(row, 1) if token in ends), len(row))
        found.append(tuple(row[: min(length, stopped or length)]))
    return found


def _moved_right(padded: Tensor, rows: Sequence[Sequence[int]]) -> Tensor:
    """What was padded on the right, padded on the left."""
    return torch.stack([line.roll(len(line) - len(row)) for line, row in zip(padded, rows, strict=True)])


def _greedy(model: Any, writer: Writer, pad_id: int) -> GenerationConfig:
    """The likeliest token at each step; what else the model's own generation_config.json says counts."""
    from transformers import GenerationConfig

    own = model.generation_config.eos_token_id
    ends = {*(own if isinstance(own, list) else [own]), writer.tokenizer.eos_token_id} - {None}
    return GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        max_new_tokens=writer.max_gen_toks,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad_id,
        use_cache=True,
        return_dict_in_generate=False,
    )


class _Stop:
    """A stopping criterion of transformers: a row is done when its last token completes one of the ends.

    Args:
        writer: knows the ends.
        start: tokens before the first one that is written.
        rows: in the batch.

    Attributes:
        lengths: tokens of each row when it was done; 0 where it is not.
    """

    def __init__(self, writer: Writer, start: int, rows: int) -> None:
        self._writer, self._start = writer, start
        self.lengths = [0] * rows

    def __call__(self, ids: Tensor, scores: object, **_: object) -> Tensor:
        if self._writer.until:
            length = ids.shape[1] - self._start
            for row, tail in enumerate(ids[:, max(self._start, ids.shape[1] - self._writer.reach) :].tolist()):
                if not self.lengths[row] and self._writer.ended(tail):
                    self.lengths[row] = length
        return torch.tensor([length > 0 for length in self.lengths], device=ids.device)


class _Watch:
    """A processor of logits that changes none: it refuses those that are no numbers, of which `argmax` takes any.

    Args:
        batch: the inputs, for messages.
        step: told of the scores of every step.
    """

    def __init__(self, batch: Sequence[Encoded], step: Callable[[Tensor], None] | None) -> None:
        self._batch, self._step = batch, step

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        odd = scores.isnan().any(1)
        if bool(odd.any()):
            raise RunError(
                "a logit of the model is not a number",
                where=f"row {self._batch[int(odd.long().argmax())].index}",
                hint="The weights, or the precision they are run in, overflow; try float32, or smaller coefficients",
            )
        if self._step is not None:
            self._step(scores)
        return scores
