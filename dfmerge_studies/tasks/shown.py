"""One input of a task as the model reads it: the whole prompt with its special tokens, the answers, what is scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dfmerge_studies.tasks.answers import wanted_answers, writer_along
from dfmerge_studies.tasks.encoding import Encoded, Kind
from dfmerge_studies.tasks.settings import (
    AnyTask,
    ChoiceTask,
    ClassificationTask,
    GenerateTask,
    HarnessTask,
    MultiLabelTask,
    RegressionTask,
    TextTask,
    TokenTask,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# How metrics of choices take a choice, where it is not by the mean over its tokens.
_SUMS = {
    "acc": "the sum of their log-likelihoods",
    "acc_norm": "the sum of their log-likelihoods, divided by the characters of its text,",
    "acc_bytes": "the sum of their log-likelihoods, divided by the bytes of its text,",
}


@dataclass(frozen=True)
class ShownAnswer:
    """A choice, a class, or a text whose tokens are scored.

    Attributes:
        text: what it says.
        tokens: its tokens as the vocabulary has them, those that are scored; of a class none.
        right: whether the data says that it is the right one.
    """

    text: str
    tokens: list[str]
    right: bool


@dataclass(frozen=True)
class Shown:
    """One input of a task.

    Attributes:
        task: name of the task.
        type: of the task.
        row: of the validation split.
        prompt: what the model reads before an answer, special tokens included.
        tokens: the same as tokens.
        truncated: whether it was cut.
        answers: what there is to choose from or to score.
        wanted: what the data says is right, where it is none of `answers`.
        scored: what the score is made of, in words.
    """

    task: str
    type: str
    row: int
    prompt: str
    tokens: list[str]
    truncated: bool
    answers: list[ShownAnswer]
    wanted: str | None
    scored: str


def shown_input(
    name: str,
    task: AnyTask,
    kind: Kind,
    example: Encoded,
    tokenizer: PreTrainedTokenizerBase,
    classes: Sequence[str] = (),
) -> Shown:
    """One tokenised input in words.

    Args:
        name: of the task.
        task: its settings.
        kind: how the model answers.
        example: the input.
        tokenizer: the base's.
        classes: names of the head's classes, where there is a head.
    """

    def pieces(ids: Sequence[int]) -> list[str]:
        return list(map(str, tokenizer.convert_ids_to_tokens(list(ids))))

    def text(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    answers = [
        ShownAnswer(text(ids), pieces(ids), index == example.label) for index, ids in enumerate(example.choices)
    ] or _classes(task, example, classes)
    written = writer_along(task, tokenizer, [example]) is not None
    target = answers[0].text if written and answers and isinstance(task, HarnessTask) else None
    if written:  # there is nothing to choose from
        answers = []
    return Shown(
        task=name,
        type=task.type,
        row=example.index,
        prompt=text(example.input_ids),
        tokens=pieces(example.input_ids),
        truncated=example.truncated,
        answers=answers,
        wanted=target if any(each.right for each in answers) or target else _wanted(task, example, answers, pieces),
        scored=_scored(task, kind),
    )


def _classes(task: AnyTask, example: Encoded, classes: Sequence[str]) -> list[ShownAnswer]:
    """What a head has to choose from."""
    if isinstance(task, RegressionTask):
        return []
    label = example.label
    has = label if isinstance(task, MultiLabelTask) and isinstance(label, tuple) else None
    return [
        ShownAnswer(each, [], bool(has[index]) if has is not None else index == label)
        for index, each in enumerate(classes)
    ]


def _wanted(
    task: AnyTask, example: Encoded, answers: Sequence[ShownAnswer], pieces: Callable[[Sequence[int]], list[str]]
) -> str | None:
    if example.label is None and not isinstance(task, (TextTask, GenerateTask)):
        return None
    if isinstance(task, (ChoiceTask, ClassificationTask)):
        return f"class {example.label}"
    if isinstance(task, GenerateTask):
        return " or ".join(map(repr, example.targets)) or None
    if isinstance(task, HarnessTask):
        return None
    if isinstance(task, TokenTask) and isinstance(example.label, tuple):
        firsts = pieces([example.input_ids[place] for place in example.words])
        tags = [answers[tag].text if 0 <= tag < len(answers) else str(tag) for tag in example.label]
        return "  ".join(f"{first} {tag}" for first, tag in zip(firsts, tags, strict=True))
    if isinstance(task, MultiLabelTask) and answers:
        return "none of them"  # those that are right are marked
    (wanted,) = wanted_answers(task, [example])
    return _words(wanted)


def _words(wanted: Any) -> str:
    return wanted if isinstance(wanted, str) else repr(wanted)


def _scored(task: AnyTask, kind: Kind) -> str:
    """What the score is made of."""
    if isinstance(task, ChoiceTask):
        end = ", end of sequence included" if kind is Kind.TEXT_TO_TEXT else ""
        how = _SUMS.get(task.metric, "their mean log-likelihood")
        return f"the tokens of each choice{end}, by {how} after the prompt; the highest is taken"
    if isinstance(task, HarnessTask):
        return f"{task.metric} of {task.lm_eval}, as lm-evaluation-harness has it"
    if isinstance(task, TextTask):
        return "each token of the text, by its log-likelihood after all tokens before it"
    if isinstance(task, GenerateTask):
        most, ends = task.generation_kwargs.max_gen_toks, ", ".join(map(repr, task.generation_kwargs.ends))
        steps = ", ".join(step.function for step in task.filter_list[0].filter) or "nothing"
        return (
            f"what the model writes behind the prompt: the likeliest token at each step, {most} at "
            f"most, to the end of the sequence{f' or before {ends}' if ends else ''}; after {steps}, by {task.metric}"
        )
    if isinstance(task, TokenTask):
        return "what the head makes of the first token of each word"
    return "what the head makes of the whole text"
