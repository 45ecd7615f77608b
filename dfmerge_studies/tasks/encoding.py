"""One tokenised input, the currency between data, scoring and importance."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from dfmerge_studies.tasks.texts import TextSize


class Kind(StrEnum):
    """How a model answers, decided by the task type and the architecture."""

    TEXT_TO_TEXT = "text-to-text"  # encoder-decoder, choices are target texts
    CAUSAL = "causal"  # decoder only, choices are continuations of the prompt
    CLASSIFICATION = "classification"  # encoder with a head per task that picks one of several classes
    REGRESSION = "regression"  # encoder with a head per task that gives a number
    MULTI_LABEL = "multi-label-classification"  # encoder with a head per task that says yes or no to each label
    TOKENS = "token-classification"  # encoder with a head per task that picks a tag for each word


# With a head per task; their values are types of tasks.
HEADED = frozenset({Kind.CLASSIFICATION, Kind.REGRESSION, Kind.MULTI_LABEL, Kind.TOKENS})


@dataclass(frozen=True, slots=True)
class Encoded:
    """One tokenised input with its choices.

    Attributes:
        index: row of the split that it came from.
        input_ids: token ids of the encoder input, of the prompt, or of the whole text, by kind.
        choices: token ids of every choice, special tokens of the target included; empty for heads.
        label: index of the right choice or class, or the right number; of labels a 0 or 1 for each; of words the tag of
            each, `tags.IGNORED` where one has none; `None` where the data has no labels.
        token_type_ids: segment ids beside `input_ids` for models that use them (text pairs), otherwise `None`.
        truncated: whether the text was cut to fit.
        text: of a text that is scored, what it holds; it is the only choice then.
        choice_texts: of every choice, what it says.
        targets: of a text to be generated, the accepted ones; the tokens of the first are its only choice.
        question: of a task of lm-evaluation-harness, what it asks (`harness.Question`).
        words: of an input whose words get tags, the place among `input_ids` of each word's first token.
    """

    index: int
    input_ids: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...] = ()
    label: int | float | tuple[int, ...] | None = None
    token_type_ids: tuple[int, ...] | None = None
    truncated: bool = False
    text: TextSize | None = None
    choice_texts: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    question: Any = None
    words: tuple[int, ...] = ()
