"""Written that a model writes, beside those that are accepted: what the metrics of `generate` tasks judge.

    given[i]    the text that a model wrote for input i, after the task's filters
    wanted[i]   the texts that are accepted for it; a score of several is the best of theirs

Sources: `exact_match` of lm-evaluation-harness; token F1 of SQuAD (Rajpurkar et al. 2016, arXiv:1606.05250), with the
rule of SQuAD 2.0 for empty texts; ROUGE (Lin 2004) of the library rouge-score, without a stemmer.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

NUMBER = re.compile(
    r"(?:(?<![\w)\].,])[-+\u2212])?"  # a sign, where it is none between two things
    r"(?:\d{1,3}(?:,\d{3})+(?!\d|,\d)|\d+)?"
    r"(?:(?<=\d)\.\d+|(?<![\w.])\.\d+)?"
    r"(?:(?<=\d)[eE][-+]?\d+)?"
)
# Metrics by name, and what they are to rouge-score; people mean ROUGE-L by ROUGE.
ROUGE = (("rouge", "rougeL"), ("rouge1", "rouge1"), ("rouge2", "rouge2"), ("rougeL", "rougeL"), ("rougeLsum",) * 2)
CLOSE = 1e-6  # relative difference of two numbers that are the same
_CURRENCY = re.compile(r"(?<=[-+\u2212])[$\u20ac\u00a3](?=[\d.])")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_DIGITS = str.maketrans("", "", string.digits)


@dataclass(frozen=True)
class Written:
    """What a model writes for the inputs of one task.

    Attributes:
        given: per input, its text.
        wanted: per input, the accepted texts, at least one.
    """

    given: Sequence[str]
    wanted: Sequence[Sequence[str]]

    @property
    def right(self) -> list[bool]:
        """Per input, whether the text is one of the accepted ones."""
        return [text in accepted for text, accepted in zip(self.given, self.wanted, strict=True)]


@dataclass(frozen=True)
class Ignored:
    """What `exact_match` passes over in both texts, in this order; the names are lm-evaluation-harness's.

    Attributes:
        regexes: what they match.
        case: capital letters.
        punctuation: the ASCII signs of it.
        numbers: digits.
    """

    regexes: tuple[str, ...] = ()
    case: bool = False
    punctuation: bool = False
    numbers: bool = False

    def __call__(self, text: str) -> str:
        """The text without it."""
        for pattern in self.regexes:
            text = re.sub(pattern, "", text)
        text = text.lower() if self.case else text
        text = text.translate(_PUNCTUATION) if self.punctuation else text
        return text.translate(_DIGITS) if self.numbers else text


def numbers_in(text: str) -> list[str]:
    """The numbers in a text as Python reads them: without commas between thousands, with a plain minus."""
    plain = _CURRENCY.sub("", text)
    found = (match[0].replace(",", "").replace("\u2212", "-") for match in NUMBER.finditer(plain))
    return [number for number in found if any(sign.isdigit() for sign in number)]


def no_number(text: str) -> str | None:
    """Why a text cannot be a number to compare with, None where it can."""
    count = len(numbers_in(text))
    return None if count == 1 else f"it has {count or 'no'} number{'s' * (count > 1)}, and numeric needs one"


def same_number(text: str, accepted: str) -> float:
    """1 where the first number of a text is that of another one, 0 otherwise."""
    ours, theirs = numbers_in(text), numbers_in(accepted)
    if not ours or not theirs:
        return 0.0
    return float(math.isclose(float(ours[0]), float(theirs[0]), rel_tol=CLOSE, abs_tol=1e-12))


def squad_tokens(text: str) -> list[str]:
    """Words of a text in small letters, without punctuation and English articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def token_f1(text: str, accepted: str) -> float:
    """F1 of the words of a text, each counted as often as it occurs; of an empty text, whether both are."""
    ours, theirs = squad_tokens(text), squad_tokens(accepted)
    if not ours or not theirs:
        return float(ours == theirs)
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs))


def rouge(kind: str) -> Callable[[Written], list[float]]:
    """F-measure of a kind of ROUGE per input.

    Args:
        kind: `rouge1`, `rouge2`, `rougeL` or `rougeLsum`.
    """

    def scores(texts: Written) -> list[float]:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([kind], use_stemmer=False)
        return _best(texts, lambda text, accepted: float(scorer.score(accepted, text)[kind].fmeasure))

    return scores


def best_of(score: Callable[[str, str], float]) -> Callable[[Written], list[float]]:
    """Per input, the best score over the accepted texts.

    Args:
        score: of a text and an accepted one.
    """
    return lambda texts: _best(texts, score)


def _best(texts: Written, score: Callable[[str, str], float]) -> list[float]:
    return [
        max(score(text, each) for each in accepted) for text, accepted in zip(texts.given, texts.wanted, strict=True)
    ]


def nothing_for_rouge(wanted: Sequence[Sequence[str]]) -> str | None:
    """Why every model would score 0, if so: rouge-score sees ASCII letters and digits alone."""
    seen = re.compile("[a-z0-9]", re.IGNORECASE)
    if any(seen.search(text) for accepted in wanted for text in accepted):
        return None
    return "rouge-score sees the letters a to z and digits alone, and no target has one"
