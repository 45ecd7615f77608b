"""A batch of tokenised inputs as tensors: padded texts, their masks, and the rows of inputs and choices.

B     inputs of a batch, padded on the right to S tokens
row   one pair of an input and one of its choices, R of them in a batch, choices padded on the right to T tokens
C     the most choices of an input
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dfmerge_studies.errors import InputError
from dfmerge_studies.tasks.encoding import Encoded
from dfmerge_studies.tasks.placing import once
from dfmerge_studies.tasks.tags import IGNORED


@dataclass(frozen=True, slots=True)
class Rows:
    """The (input, choice) pairs of a batch, in input order, choices of an input side by side.

    Attributes:
        owner: (R,) position in the batch of each row's input.
        choice: (R,) index of each row's choice among those of its input.
        targets: (R, T) token ids of the choices, `IGNORED` where padded.
        most: the largest number of choices of an input, C; known here, since to ask a device for it is to wait for it.
    """

    owner: Tensor
    choice: Tensor
    targets: Tensor
    most: int

    def grid(self, losses: Tensor, inputs: int) -> Tensor:
        """Row losses (R,) laid out as (inputs, C), infinite where an input has no such choice.

        Args:
            losses: (R,) one loss per row.
            inputs: inputs in the batch.
        """
        table = losses.new_full((inputs, self.most), torch.inf)
        return table.index_put((self.owner, self.choice), losses)


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter, where batches must be put.

    Args:
        model: a model with at least one parameter.
    """
    return next(model.parameters()).device


def pad(sequences: Sequence[Sequence[int]], value: int, device: torch.device) -> Tensor:
    """Token sequences as one (n, longest) tensor of int64, padded on the right with `value`.

    Args:
        sequences: n sequences of token ids.
        value: id to pad with.
        device: where the tensor is put.
    """
    rows = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    return pad_sequence(rows, batch_first=True, padding_value=value).to(device)


def pad_mask(sequences: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """(n, longest) int64 mask of `pad`: 1 for tokens, 0 for padding.

    Args:
        sequences: n sequences of token ids.
        device: where the mask is put.
    """
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return (torch.arange(int(lengths.max())) < lengths[:, None]).long().to(device)


def make_rows(batch: Sequence[Encoded], device: torch.device) -> Rows:
    """Every (input, choice) pair of a batch.

    Args:
        batch: B inputs.
        device: where the tensors are put.

    Raises:
        InputError: an input without choices, or a choice without tokens.
    """
    for example in batch:
        if not example.choices or not all(example.choices):
            raise InputError(
                "an input has no choices, or a choice has no tokens",
                where=f"row {example.index}",
                hint="Check doc_to_choice for this row",
            )
    owner = [i for i, example in enumerate(batch) for _ in example.choices]
    choice = [c for example in batch for c in range(len(example.choices))]
    targets = pad([tokens for example in batch for tokens in example.choices], IGNORED, device)
    most = max(len(example.choices) for example in batch)
    return Rows(torch.tensor(owner, device=device), torch.tensor(choice, device=device), targets, most)


@once
def rows_of(model: nn.Module, batch: Sequence[Encoded], pad_id: int) -> Rows:
    """`make_rows` on the model's device, once for all trials."""
    return make_rows(batch, device_of(model))


@once
def texts_of(model: nn.Module, batch: Sequence[Encoded], pad_id: int) -> dict[str, Tensor]:
    """What an encoder is given: texts, their mask, and segments where the tokenizer makes some."""
    device, texts = device_of(model), [example.input_ids for example in batch]
    inputs = {"input_ids": pad(texts, pad_id, device), "attention_mask": pad_mask(texts, device)}
    if any(example.token_type_ids is not None for example in batch):
        types = [example.token_type_ids or (0,) * len(example.input_ids) for example in batch]
        inputs["token_type_ids"] = pad(types, 0, device)
    return inputs
