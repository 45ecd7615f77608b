"""Losses of answer choices under a model, one batched forward pass.

    x        one tokenised input (`Encoded`), B of them in a batch, padded on the right to S tokens
    c        one of its choices, or one class; inputs may have different numbers of them, at most C
    row      one pair (x, c), R of them in a batch, choices padded on the right to T tokens
    loss     l(x, c): mean negative log-likelihood of the choice's tokens, or -log softmax(z)[c] of a class
    z        what a head gives for an input: a score per class or label, a number, or a score per word and tag
    p(c|x)   softmax over the choices of -l(x, c)

Evaluation wants all losses of a batch as cheaply as possible (`forward_losses`); the Fisher engine wants the same
losses row by row, with the graph cut between encoder and decoder, so the pieces are public too.

Attention masks are two-dimensional wherever a row is a sequence of its own, so that each model builds the mask that its
attention kernel wants.  Only folded batches need a mask of four dimensions, which must be additive: a boolean one is
added as 0 and 1 by the eager kernels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfmerge_studies.errors import InputError
from dfmerge_studies.tasks.batches import Rows, device_of, pad, pad_mask, rows_of, texts_of
from dfmerge_studies.tasks.encoding import HEADED, Encoded, Kind
from dfmerge_studies.tasks.placing import once
from dfmerge_studies.tasks.tags import IGNORED

# From logits (R, T, vocabulary) and the tokens (R, T) that were read to the labels (R, T) that are scored there.
Relabel = Callable[[Tensor, Tensor], Tensor]


def probabilities(losses: Tensor) -> Tensor:
    """p(c|x), the softmax over the last dimension of minus the losses; infinite losses (absent choices) get 0.

    Args:
        losses: (..., C) losses, C choices or classes.
    """
    return torch.softmax(-losses, dim=-1)


def mean_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood over the targets that are not `IGNORED`.

    Args:
        logits: (..., T, vocabulary).
        targets: (..., T).

    Returns:
        (...,), in float32 at least.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    losses = F.cross_entropy(
        logits.flatten(0, -2).to(wide), targets.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(targets.shape)
    return losses.sum(-1) / (targets != IGNORED).sum(-1)


# --- encoder-decoder -------------------------------------------------------------------------------------------------


def encode(model: nn.Module, batch: Sequence[Encoded], pad_id: int) -> tuple[Tensor, Tensor]:
    """Encoder output (B, S, d) of a text-to-text model, and its mask (B, S)."""
    inputs = texts_of(model, batch, pad_id)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    encoder: Any = model.get_encoder()  # type: ignore[operator]  # nn.Module's attributes are typed Tensor | Module
    hidden: Tensor = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    return hidden.to(mask.device), mask  # a spread encoder ends elsewhere


def decode(model: nn.Module, hidden: Tensor, mask: Tensor, targets: Tensor, relabel: Relabel | None = None) -> Tensor:
    """Losses (R,) of target texts, row by row.

    The decoder needs no mask of its own: padding is on the right, and no token looks to its right.

    Args:
        model: text-to-text model.
        hidden: (R, S, d) encoder output of each row's input.
        mask: (R, S) encoder mask.
        targets: (R, T), `IGNORED` where padded.
        relabel: gives other labels for the same decoder inputs.
    """
    logits = _decoder_logits(model, hidden, mask, _shifted(model, targets))
    return mean_token_loss(logits, targets if relabel is None else relabel(logits.detach(), targets))


def _decoder_logits(model: nn.Module, hidden: Tensor, mask: Tensor, ids: Tensor, own: Tensor | None = None) -> Tensor:
    from transformers.modeling_outputs import BaseModelOutput

    output = model(
        encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
        attention_mask=mask,
        decoder_input_ids=ids,
        decoder_attention_mask=own,
        use_cache=False,
    )
    logits: Tensor = output.logits
    return logits


def _shifted(model: nn.Module, targets: Tensor) -> Tensor:
    """Decoder inputs for the targets: the start token, then all targets but the last."""
    prepare: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if prepare is None:
        return _shifted_by_config(model, targets)
    ids: Tensor = prepare(labels=targets)
    return ids


def _shifted_by_config(model: nn.Module, targets: Tensor) -> Tensor:
    """The same for models that only shift targets inside of their own loss (Blenderbot, M2M100)."""
    config: Any = model.config
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        raise InputError(
            f"{type(model).__name__} cannot make decoder inputs from targets: no decoder_start_token_id",
            hint="Use an encoder-decoder class with a language modelling head, and set it in config.json",
        )
    ids = torch.cat([torch.full_like(targets[:, :1], start), targets[:, :-1]], dim=1)
    blank = getattr(config, "pad_token_id", None)
    return ids.masked_fill(ids == IGNORED, 0 if blank is None else blank)


def _fold(model: nn.Module, hidden: Tensor, mask: Tensor, rows: Rows) -> Tensor:
    """Losses (R,), all choices of an input laid end to end in one decoder sequence.

    The choices do not see each other, and relative positions inside a choice are what they were alone, so for models
    without absolute decoder positions the losses are the same; keys and values of the encoder's output are computed
    once per input instead of once per row.
    """
    inputs, width = hidden.shape[0], rows.targets.shape[1]
    most = rows.most
    place = rows.owner * most + rows.choice
    blank = rows.targets.new_zeros((inputs * most, width))
    ids = blank.index_copy(0, place, _shifted(model, rows.targets)).view(inputs, most * width)
    step = torch.arange(most * width, device=hidden.device)
    seen = (step[:, None] // width == step // width) & (step <= step[:, None])
    own = _additive(seen, model).expand(inputs, 1, -1, -1)
    logits = _decoder_logits(model, hidden, mask, ids, own)
    return mean_token_loss(logits.view(inputs * most, width, -1).index_select(0, place), rows.targets)


def precision_of(model: nn.Module) -> torch.dtype:
    """The precision that the model's products run in: its own, or that of the autocast around this call."""
    device = device_of(model).type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else next(model.parameters()).dtype


def _additive(seen: Tensor, model: nn.Module) -> Tensor:
    """Boolean mask as the one that is added to attention scores, in the precision the kernels will run in."""
    dtype = precision_of(model)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


# --- decoder only ----------------------------------------------------------------------------------------------------


def continuation_losses(
    model: nn.Module, batch: Sequence[Encoded], rows: Rows, pad_id: int, relabel: Relabel | None = None
) -> Tensor:
    """Losses (R,) of continuations: one sequence per row, prompt and then choice, scored on the choice's tokens.

    Args:
        model: a language model.
        batch: B inputs.
        rows: their choices.
        pad_id: token id to pad with.
        relabel: gives other labels at the places of the choices' tokens.

    Raises:
        InputError: a prompt has no tokens.
    """
    ids, mask, prompts = _sequences(model, batch, pad_id)
    steps = torch.arange(rows.targets.shape[1], device=ids.device)
    # The clamp touches only padded targets.
    at = (prompts[rows.owner][:, None] - 1 + steps).clamp_max(ids.shape[1] - 1)
    logits = _logits_at(model, at, input_ids=ids, attention_mask=mask)
    return mean_token_loss(logits, rows.targets if relabel is None else relabel(logits.detach(), rows.targets))


@once
def _sequences(model: nn.Module, batch: Sequence[Encoded], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every prompt with every choice: token ids and mask, (R, S + T - 1) each; tokens of every prompt, (B,)."""
    device = device_of(model)
    sequences = [(*example.input_ids, *tokens[:-1]) for example in batch for tokens in example.choices]
    return pad(sequences, pad_id, device), pad_mask(sequences, device), _prompt_lengths(batch, device)


def _prompt_lengths(batch: Sequence[Encoded], device: torch.device) -> Tensor:
    for example in batch:
        if not example.input_ids:
            raise InputError("the prompt has no tokens", where=f"row {example.index}", hint="Check doc_to_text")
    return torch.tensor([len(example.input_ids) for example in batch], device=device)


def _logits_at(model: nn.Module, positions: Tensor, **inputs: Tensor) -> Tensor:
    """Logits (n, k, vocabulary) at positions (n, k), the only ones that the output head is run on."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]  # nn.Module's attributes are typed narrowly

    def gathered(states: Tensor) -> Tensor:
        return states.gather(1, positions.to(states.device)[..., None].expand(-1, -1, states.shape[-1]))

    if head is None:
        return gathered(model(**inputs, use_cache=False).logits)
    handle = head.register_forward_pre_hook(lambda _module, args: (gathered(args[0]), *args[1:]))
    try:
        logits: Tensor = model(**inputs, use_cache=False).logits
    finally:
        handle.remove()
    return logits


def _fold_continuations(model: nn.Module, batch: Sequence[Encoded], rows: Rows, pad_id: int) -> Tensor:
    """Losses (R,) with one sequence per input: the prompt once, then all choices, which do not see each other."""
    most, width = rows.most, rows.targets.shape[1]
    ids, segment_of, positions, at = _end_to_end(model, batch, pad_id)
    step = torch.arange(segment_of.shape[1], device=ids.device)
    same = (segment_of[:, :, None] == segment_of[:, None, :]) | (segment_of[:, None, :] == 0)
    place = rows.owner * most + rows.choice
    at = at.new_zeros((len(batch) * most, width)).index_copy(0, place, at).view(len(batch), most * width)
    logits = _logits_at(
        model,
        at,
        input_ids=ids,
        attention_mask=_additive((same & (step <= step[:, None]))[:, None], model),
        position_ids=positions,
    )
    return mean_token_loss(logits.reshape(len(batch) * most, width, -1).index_select(0, place), rows.targets)


@once
def _end_to_end(model: nn.Module, batch: Sequence[Encoded], pad_id: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prompts with all their choices behind them.

    Returns:
        Token ids, segments (0: the prompt, k: choice k - 1) and positions, (B, S) each; where each choice's tokens are
        scored, (R, T).
    """
    device = device_of(model)
    ids, segments, positions, wanted = [], [], [], []
    for example in batch:
        line, segment, position = (
            list(example.input_ids),
            [0] * len(example.input_ids),
            [*range(len(example.input_ids))],
        )
        prompt = len(line)
        for k, tokens in enumerate(example.choices, start=1):
            # A choice's first token is scored by the prompt's last one, the others by the choice's tokens before them.
            wanted.append([prompt - 1, *range(len(line), len(line) + len(tokens) - 1)])
            line += tokens[:-1]
            segment += [k] * (len(tokens) - 1)
            position += range(prompt, prompt + len(tokens) - 1)
        ids.append(line)
        segments.append(segment)
        positions.append(position)
    return pad(ids, pad_id, device), pad(segments, -1, device), pad(positions, 0, device), pad(wanted, 0, device)


# --- heads ------------------------------------------------------------------------------------------------------------


@once
def _words(model: nn.Module, batch: Sequence[Encoded], pad_id: int) -> Tensor:
    """Where the words of every input are, (B, W)."""
    return pad([example.words for example in batch], 0, device_of(model))


def head_outputs(model: nn.Module, kind: Kind, batch: Sequence[Encoded], pad_id: int) -> Tensor:
    """What a head gives, in float32 at least.

    Returns:
        (B, K) scores of classes or labels; (B, 1) numbers of a regression; (B, W, K) scores of the tags of the words, W
        the most that an input has, of no meaning where one has fewer.
    """
    logits: Tensor = model(**texts_of(model, batch, pad_id)).logits
    if kind is Kind.TOKENS:
        places = _words(model, batch, pad_id)
        logits = logits.gather(1, places[..., None].expand(-1, -1, logits.shape[-1]))
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


# --- all kinds -------------------------------------------------------------------------------------------------------


def can_fold(model: nn.Module, kind: Kind) -> bool:
    """Whether folded batches may be tried; whether they are right is for a comparison to say (see `evaluate`)."""
    if kind is Kind.CAUSAL:
        return "position_ids" in inspect.signature(model.forward).parameters
    return kind is Kind.TEXT_TO_TEXT


def forward_losses(
    model: nn.Module,
    kind: Kind,
    batch: Sequence[Encoded],
    *,
    pad_id: int,
    folded: bool = False,
) -> Tensor:
    """Losses of all choices of a batch; of heads that pick no class what they give.

    Args:
        model: model in evaluation mode.
        kind: how the model answers.
        batch: B inputs, with any numbers and lengths of choices.
        pad_id: token id to pad inputs with.
        folded: lay the choices of an input in one sequence; right for most models, and cheaper.

    Returns:
        (B, C) losses in float32 at least, infinite where an input has fewer than C choices; (B, 1) numbers of a
        regression; (B, K) scores of labels; (B, W, K) losses of the tags of the words.
    """
    if kind in HEADED:
        z = head_outputs(model, kind, batch, pad_id)
        return z if kind in (Kind.REGRESSION, Kind.MULTI_LABEL) else -torch.log_softmax(z, dim=-1)
    rows = rows_of(model, batch, pad_id)
    if kind is Kind.CAUSAL:
        way = _fold_continuations if folded else continuation_losses
        return rows.grid(way(model, batch, rows, pad_id), len(batch))
    hidden, mask = encode(model, batch, pad_id)
    if folded:
        return rows.grid(_fold(model, hidden, mask, rows), len(batch))
    losses = decode(model, hidden[rows.owner], mask[rows.owner], rows.targets)
    return rows.grid(losses, len(batch))
