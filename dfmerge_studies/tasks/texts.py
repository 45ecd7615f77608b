"""How likely a model finds whole texts, as lm-evaluation-harness counts it: for each byte or word of all of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_LARGEST = 300.0  # nats a word: its exponential is a number, and no model that is of use comes near


@dataclass(frozen=True, slots=True)
class TextSize:
    """What a text that is scored holds, as lm-evaluation-harness counts it.

    Attributes:
        tokens: word pieces, each with a probability.
        bytes: of its UTF-8.
        words: runs of other signs than blanks.
    """

    tokens: int
    bytes: int
    words: int

    @classmethod
    def of(cls, text: str, tokens: int) -> TextSize:
        """The size of a text.

        Args:
            text: as it is scored.
            tokens: its word pieces.
        """
        return cls(tokens, len(text.encode()), len(re.split(r"\s+", text)))


@dataclass(frozen=True)
class Texts:
    """How likely a model finds the texts of one task.

    Attributes:
        losses: per text, one loss: the mean over its word pieces.
        wanted: per text, what it holds.
    """

    losses: Sequence[Sequence[float]]
    wanted: Sequence[TextSize]

    @property
    def given(self) -> Sequence[Sequence[float]]:
        """Per text, the loss."""
        return self.losses

    @property
    def right(self) -> list[bool]:
        """Nothing: a text is not answered."""
        return []


def _nats_per(unit: str, texts: Texts) -> tuple[float, list[float]]:
    """Nats for each byte or word of all texts together, R = Σ_i x_i / Σ_i b_i, and what each text makes of it.

    A ratio of sums is no mean over texts, since they are of different lengths. The latter numbers, R + (x_i - R b_i)
    n / Σ b, have R as their mean, and the spread that its standard error rests on (linearisation: Cochran 1977, chapter
    6).
    """
    nats = [loss[0] * size.tokens for loss, size in zip(texts.losses, texts.wanted, strict=True)]
    units = [float(getattr(size, unit)) for size in texts.wanted]
    ratio, mean = sum(nats) / sum(units), sum(units) / len(units)
    return ratio, [ratio + (x - ratio * b) / mean for x, b in zip(nats, units, strict=True)]


def bits_per_byte(texts: Texts) -> list[float]:
    """Per text a number in bits; their mean is minus log2 of the probability of all texts, over their bytes."""
    return [nats / math.log(2) for nats in _nats_per("bytes", texts)[1]]


def perplexity(unit: str) -> Callable[[Texts], list[float]]:
    """Exp R, and of each text its first-order part: exp R (1 + r_i - R)."""

    def perplexity(texts: Texts) -> list[float]:
        ratio, rows = _nats_per(unit, texts)
        whole = math.exp(min(ratio, _LARGEST))
        return [whole * (1.0 + row - ratio) for row in rows]

    return perplexity
