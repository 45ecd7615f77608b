"""Whether the choices of an input may be laid in one sequence: what a model is asked, and what it has answered.

They may unless the model has absolute decoder positions, a sliding window or the like.  Rather than a list of
architectures, inputs decide on which such differences are largest: the longest one, and the one with the most tokens in
its choices.  A model that cannot take a folded batch at all is not given any.

The answer lies in the model's code, not in its weights, so it is asked in the precision of the weights, even where
products are computed in fewer bits, and kept: for these inputs, and where folding is right for all that are no longer,
where it is wrong for all that are no shorter.  In weights of 16 bits rounding comes near to the tolerance, so that the
answer may hang on the weights: there it is kept only from `settle_folding`, at weights that each process of a study has
(a resumed study must answer as an uncut one does), and otherwise asked each time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dfmerge_studies.errors import out_of_memory
from dfmerge_studies.params import evaluating
from dfmerge_studies.tasks.batches import device_of
from dfmerge_studies.tasks.encoding import Encoded, Kind
from dfmerge_studies.tasks.scoring import can_fold, forward_losses, precision_of

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # relative; in 16 bits, rounding alone is of this size:
TOLERANCE_16_BIT = 5e-2


@dataclass(frozen=True)
class _Answer:
    """What a model has answered.

    Attributes:
        precisions: that products are computed in, and of the weights.
        lengths: of the inputs that it was asked about, each by one of `_LENGTHS`.
        right: whether they may be folded.
    """

    precisions: tuple[torch.dtype, torch.dtype]
    lengths: tuple[int, ...]
    right: bool

    def holds_for(self, precisions: tuple[torch.dtype, torch.dtype], lengths: tuple[int, ...]) -> bool:
        pairs = list(zip(self.lengths, lengths, strict=True))
        covered = all(own >= other for own, other in pairs) if self.right else all(own <= other for own, other in pairs)
        return covered and precisions == self.precisions


_LENGTHS: tuple[Callable[[Encoded], int], ...] = (
    lambda example: len(example.input_ids) + max(map(len, example.choices)),
    lambda example: sum(map(len, example.choices)),
)
_ANSWERS: WeakKeyDictionary[nn.Module, list[_Answer]] = WeakKeyDictionary()


def folding_is_right(model: nn.Module, kind: Kind, examples: Sequence[Encoded], pad_id: int) -> bool:
    """Whether a model gives the same losses for choices in one sequence as for rows of their own.

    Args:
        model: in evaluation mode, in inference mode.
        kind: how it answers.
        examples: what is to be scored.
        pad_id: token id to pad inputs with.
    """
    return _asked(model, kind, examples, pad_id, keep=next(model.parameters()).dtype in TOLERANCE)


def settle_folding(model: nn.Module, kind: Kind, examples: Sequence[Encoded], pad_id: int) -> None:
    """Ask a model whose weights have 16 bits at the weights that it has now, and keep the answer.

    Args:
        model: with weights that every process of a study gives it before its first trial.
        kind: how it answers.
        examples: what trials will score.
        pad_id: token id to pad inputs with.
    """
    if next(model.parameters()).dtype in TOLERANCE:
        return
    with evaluating(model), torch.inference_mode():
        try:
            _asked(model, kind, examples, pad_id, keep=True)
        except Exception:  # what the model cannot take at all, scoring says by the name of its task
            return


def _asked(model: nn.Module, kind: Kind, examples: Sequence[Encoded], pad_id: int, *, keep: bool) -> bool:
    several = [example for example in examples if len(example.choices) > 1]
    if not several or not can_fold(model, kind):
        return False
    probes = [max(several, key=length) for length in _LENGTHS]
    lengths = tuple(length(probe) for length, probe in zip(_LENGTHS, probes, strict=True))
    precisions = precision_of(model), next(model.parameters()).dtype
    known = _ANSWERS.setdefault(model, [])
    for answer in known:
        if answer.holds_for(precisions, lengths):
            return answer.right
    right, sure = _ask(model, kind, list({id(probe): probe for probe in probes}.values()), pad_id, precisions)
    if keep and sure:
        known.append(_Answer(precisions, lengths, right))
    return right


def _ask(
    model: nn.Module, kind: Kind, probes: Sequence[Encoded], pad_id: int, precisions: tuple[torch.dtype, torch.dtype]
) -> tuple[bool, bool]:
    """Whether folding is right, and whether that can be kept: weights that overflow say nothing."""
    computed, stored = precisions
    tolerance = TOLERANCE.get(stored, TOLERANCE_16_BIT)
    with torch.autocast(device_of(model).type, enabled=False):
        plain = [forward_losses(model, kind, [probe], pad_id=pad_id) for probe in probes]
        right = all(
            _agree(losses, _folded(model, kind, probe, pad_id), tolerance)
            for probe, losses in zip(probes, plain, strict=True)
        )
    if right and computed != stored:  # the way is right; it must be one that the kernels of this precision can go
        right = all(_is_finite(_folded(model, kind, probe, pad_id)) for probe in probes)
    return right, all(map(_is_finite, plain))


def _folded(model: nn.Module, kind: Kind, probe: Encoded, pad_id: int) -> Tensor | None:
    """Losses of an input's choices in one sequence; None where the model cannot take it."""
    try:
        return forward_losses(model, kind, [probe], pad_id=pad_id, folded=True)
    except Exception as error:
        if out_of_memory(error) is not None:
            raise
        return None


def _agree(plain: Tensor, folded: Tensor | None, tolerance: float) -> bool:
    return folded is not None and bool(torch.allclose(plain, folded, rtol=tolerance, atol=tolerance))


def _is_finite(losses: Tensor | None) -> bool:
    return losses is not None and bool(losses.isfinite().all())
