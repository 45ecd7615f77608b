"""Losses for a whole data set, in batches of similar length.

    losses[i][c]   l(x_i, c), as in `scoring`

Batches hold inputs of similar length, as many as a budget of tokens allows, the longest first: memory runs out at once
or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dfmerge_studies.errors import InputError, RunError, out_of_memory
from dfmerge_studies.params import evaluating
from dfmerge_studies.ranks import SOLO, GroupError, Ranks
from dfmerge_studies.tasks.batches import device_of
from dfmerge_studies.tasks.encoding import Encoded, Kind
from dfmerge_studies.tasks.folding import folding_is_right
from dfmerge_studies.tasks.replay import forget_replays_, replayed, state_of
from dfmerge_studies.tasks.scoring import forward_losses

T = TypeVar("T")
TOKEN_BUDGET = 16384
SCORED = 4  # tokens that a token of a text stands for in a batch, whose vocabulary takes more memory than its layers
# In how many tokens a processor reads a model's weights once; weights times tokens that one of its threads multiplies,
# and an accelerator, while the host starts a pass; what a token takes beside products, as weights. However many threads
# there are, batches are the same, or a study that goes on with other workers would round otherwise.
READING, THREAD_PASS, CARD_PASS, TOKEN = 16, 8e8, 1e11, 5e5


def row_length(example: Encoded, kind: Kind) -> int:
    """Tokens of an input's longest row.

    Args:
        example: one input.
        kind: how the model answers; only a causal model's row holds the choice too.
    """
    longest = max(map(len, example.choices), default=0)
    return len(example.input_ids) + (longest if kind is Kind.CAUSAL else 0)


def token_cost(example: Encoded, kind: Kind) -> int:
    """Tokens that an input puts into a batch: its text, and with choices its decoder rows or its repeated prompts."""
    if example.text is not None:  # every token has probabilities of the whole vocabulary, in several copies
        return len(example.input_ids) + SCORED * example.text.tokens
    choices = sum(map(len, example.choices))
    if kind is Kind.CAUSAL:
        return len(example.input_ids) * len(example.choices) + choices
    return len(example.input_ids) + choices


def pass_in_tokens(model: nn.Module) -> float:
    """Tokens whose computation takes as long as starting a forward pass does, and reading the weights for it.

    Args:
        model: the model.
    """
    weights = sum(p.numel() for p in model.parameters()) + TOKEN
    if device_of(model).type != "cpu":
        return CARD_PASS / weights
    return READING + THREAD_PASS / weights


def length_batches(
    examples: Sequence[Encoded],
    kind: Kind,
    token_budget: int,
    cost: Callable[[Encoded, Kind], int] = token_cost,
    *,
    padding: float = math.inf,
) -> list[list[int]]:
    """Positions of the examples, longest first, cut where the dearest input times the count exceeds the budget.

    Padding is computed like tokens, so a batch is also cut before its padding costs more than another batch.

    Args:
        examples: inputs in any order.
        kind: how the model answers.
        token_budget: tokens of one batch; an input that exceeds it alone gets a batch of its own.
        cost: tokens that one input puts into a batch.
        padding: the most tokens of padding that a batch has.
    """
    lengths = [row_length(example, kind) for example in examples]
    batches: list[list[int]] = []
    dearest, padded = 0, 0
    for i in sorted(range(len(examples)), key=lambda i: (-lengths[i], i)):
        price = cost(examples[i], kind)
        dearest = max(dearest, price)
        padded += lengths[batches[-1][0]] - lengths[i] if batches else 0
        if not batches or padded > padding or dearest * (len(batches[-1]) + 1) > token_budget:
            batches.append([])
            dearest, padded = price, 0
        batches[-1].append(i)
    return batches


def choice_losses(
    model: nn.Module,
    kind: Kind,
    examples: Sequence[Encoded],
    *,
    pad_id: int,
    token_budget: int = TOKEN_BUDGET,
    progress: Callable[[int], None] | None = None,
    ranks: Ranks = SOLO,
) -> list[list[Any]]:
    """Losses of all choices of all inputs, or what heads give that pick none, in the order of `examples`.

    Args:
        model: the model, put into evaluation mode for the time of the call.
        kind: how the model answers.
        examples: tokenised inputs.
        pad_id: token id to pad inputs with.
        token_budget: tokens of one batch, the bound on memory.
        progress: called with the number of inputs done since the last call.
        ranks: processes that share the inputs; every one of them gets all losses.

    Returns:
        One list per input, as `forward_losses` has it: a loss per choice or class, one number, a score per label, or
            for each word a list of losses.

    Raises:
        RunError: a loss is not finite; the message names the row.
    """

    def compute(share: Sequence[int]) -> list[list[Any]]:
        return _own_losses(model, kind, examples, share, pad_id, token_budget, progress, ranks)

    return shared_out(ranks, [token_cost(example, kind) for example in examples], compute)


def shared_out(ranks: Ranks, costs: Sequence[int], compute: Callable[[Sequence[int]], Sequence[T]]) -> list[T]:
    """Something for every input, each computed by one of the ranks.

    Args:
        ranks: processes that share the inputs; every one of them gets all results.
        costs: what each input costs.
        compute: from the positions of a rank's inputs to their results.

    Raises:
        GroupError: the ranks do not have the same inputs.
    """
    shares = ranks.shares(costs)
    found: dict[int, T] = {}
    for share, part in zip(shares, ranks.agreed(lambda: compute(shares[ranks.rank])), strict=True):
        if len(share) != len(part):
            raise GroupError("the processes do not have the same number of inputs", hint="Give all the same data")
        found.update(zip(share, part, strict=True))
    return [found[i] for i in range(len(costs))]


def _own_losses(
    model: nn.Module,
    kind: Kind,
    examples: Sequence[Encoded],
    share: Sequence[int],
    pad_id: int,
    token_budget: int,
    progress: Callable[[int], None] | None,
    ranks: Ranks,
) -> list[list[Any]]:
    """Losses of this rank's share, in its order."""
    mine = [examples[i] for i in share]
    results: list[list[Any]] = [[] for _ in mine]
    with evaluating(model), torch.inference_mode():
        folded = folding_is_right(model, kind, examples, pad_id)  # of all: ranks must do the same
        compute = partial(forward_losses, model, kind, pad_id=pad_id, folded=folded)
        state = state_of(model)
        score = partial(replayed, model, state and (state, kind, pad_id, folded), compute=compute)
        batches = length_batches(mine, kind, token_budget, padding=pass_in_tokens(model))
        tables: list[Tensor] = []  # on the device: to read one is to wait for it
        for batch in batches:
            ranks.check()
            tables += _halved(model, [mine[i] for i in batch], score)
            if progress is not None:
                progress(len(batch))
        rows = [losses for table in _read(tables) for losses in table]
        for i, losses in zip(chain(*batches), rows, strict=True):
            results[i] = _checked(mine[i], losses)
    return results


def _halved(model: nn.Module, batch: Sequence[Encoded], score: Callable[[Sequence[Encoded]], Tensor]) -> list[Tensor]:
    """Tables of a batch, or of its halves where it does not fit into memory; an input that does not is an error."""
    try:
        return [score(batch)]
    except (MemoryError, RuntimeError) as error:
        if len(batch) == 1 or out_of_memory(error) is None:
            raise
    # Only here, when the error is gone, is what its frames held free.
    forget_replays_(model)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = (len(batch) + 1) // 2
    return _halved(model, batch[:half], score) + _halved(model, batch[half:], score)


def _read(tables: Sequence[Tensor]) -> list[list[list[float]]]:
    """The values of tables of several sizes, by one wait for the device."""
    if not tables:
        return []
    values = torch.split(torch.cat([table.flatten() for table in tables]).cpu(), [table.numel() for table in tables])
    return [part.view(table.shape).tolist() for part, table in zip(values, tables, strict=True)]


def _checked(example: Encoded, losses: list[Any]) -> list[Any]:
    """What is given for the choices or the words that the input has, all finite."""
    present = losses[: len(example.words or example.choices)] if example.words or example.choices else losses
    flat = [loss for word in present for loss in word] if example.words else present
    if not all(map(math.isfinite, flat)):
        raise RunError(
            f"the model's loss is not finite: {flat[:8]}",
            where=f"row {example.index}",
            hint="The weights, or the precision they are run in, overflow; try float32, or smaller coefficients",
        )
    return present


def labels_of(examples: Sequence[Encoded]) -> list[Any]:
    """Every input's label: the index of its right choice or class, or its right number.

    Raises:
        InputError: an input has no label.
    """
    for example in examples:
        if example.label is None:
            raise InputError("the row has no label", where=f"row {example.index}", hint="Give doc_to_target")
    return [example.label for example in examples if example.label is not None]
