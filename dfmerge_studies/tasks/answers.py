"""From a model and the inputs of a task to what a metric judges; what is particular to a type of task stands here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from dfmerge_studies.errors import InputError
from dfmerge_studies.ranks import SOLO, Ranks
from dfmerge_studies.tasks.choices import Answers, predict
from dfmerge_studies.tasks.encoding import Encoded, Kind
from dfmerge_studies.tasks.evaluate import TOKEN_BUDGET, choice_losses, labels_of
from dfmerge_studies.tasks.generation import Writer, write_texts
from dfmerge_studies.tasks.harness import judge
from dfmerge_studies.tasks.harness_model import answer_questions, writer_of_questions
from dfmerge_studies.tasks.label_sets import LabelSets, taken_sets
from dfmerge_studies.tasks.metrics import Judged
from dfmerge_studies.tasks.numbers import Numbers
from dfmerge_studies.tasks.settings import (
    GenerateTask,
    HarnessTask,
    MultiLabelTask,
    RegressionTask,
    TaskSettings,
    TextTask,
    TokenTask,
    metric_of,
)
from dfmerge_studies.tasks.tags import Tags, taken_tags
from dfmerge_studies.tasks.texts import Texts
from dfmerge_studies.tasks.written import Written

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def given_answers(
    model: nn.Module,
    task: TaskSettings,
    kind: Kind,
    examples: Sequence[Encoded],
    *,
    tokenizer: PreTrainedTokenizerBase,
    pad_id: int,
    token_budget: int = TOKEN_BUDGET,
    progress: Callable[[int], None] | None = None,
    ranks: Ranks = SOLO,
) -> Sequence[Any]:
    """What a model gives for every input, in the order of `examples`: as `forward_losses` has it, or a text.

    Of a task of lm-evaluation-harness, what that asks for.

    Args:
        model: the model, put into evaluation mode for the time of the call.
        task: settings of the task.
        kind: how the model answers.
        examples: tokenised inputs.
        tokenizer: turns tokens into text.
        pad_id: token id to pad inputs with.
        token_budget: tokens of one batch, the bound on memory.
        progress: called with the number of inputs done since the last call.
        ranks: processes that share the inputs; every one of them gets everything.

    Raises:
        InputError: the model cannot generate texts, and the task asks for them.
        RunError: a loss is not finite; the message names the row.
    """
    if isinstance(task, HarnessTask):
        return answer_questions(
            model, kind, examples, tokenizer, token_budget=token_budget, progress=progress, ranks=ranks
        )
    writer = writer_of(task, tokenizer)
    if writer is not None:
        return write_texts(
            model, kind, examples, writer, pad_id=pad_id, token_budget=token_budget, progress=progress, ranks=ranks
        )
    found = choice_losses(
        model, kind, examples, pad_id=pad_id, token_budget=token_budget, progress=progress, ranks=ranks
    )
    if isinstance(task, RegressionTask):
        return [number for (number,) in found]
    size = metric_of(task).size
    return (
        found
        if size is None
        else [_summed(example, losses, size) for example, losses in zip(examples, found, strict=True)]
    )


def _summed(example: Encoded, losses: Sequence[float], size: Callable[[str], float]) -> list[float]:
    """Losses of choices as sums over their tokens, divided by a size of their texts."""
    choices = zip(losses, example.choices, example.choice_texts, strict=True)
    return [loss * len(ids) / size(text) for loss, ids, text in choices]


def writer_of(task: TaskSettings, tokenizer: PreTrainedTokenizerBase) -> Writer | None:
    """How a model writes the answers of a task; None where it writes none.

    Args:
        task: settings of the task.
        tokenizer: turns tokens into text.
    """
    if not isinstance(task, GenerateTask):
        return None
    return Writer(tokenizer, task.generation_kwargs.max_gen_toks, task.generation_kwargs.ends)


def writer_along(task: TaskSettings, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Encoded]) -> Writer | None:
    """How a model writes the texts that importance is drawn along; None where it chooses, or scores texts of the data.

    Args:
        task: settings of the task.
        tokenizer: turns tokens into text.
        examples: inputs of the task; of lm-evaluation-harness they say where its answers end.
    """
    if isinstance(task, HarnessTask):
        return writer_of_questions(examples, tokenizer)
    return writer_of(task, tokenizer)


def taken_answers(task: TaskSettings, given: Sequence[Any]) -> list[Any]:
    """What a model answers, for others to agree with: per input, in the form of the labels.

    Args:
        task: settings of the task.
        given: of `given_answers`.
    """
    if isinstance(task, GenerateTask):
        return [(task.filtered(text),) for text in given]
    if isinstance(task, RegressionTask):
        return list(given)
    if isinstance(task, MultiLabelTask):
        return list(taken_sets(given))
    return list(taken_tags(given)) if isinstance(task, TokenTask) else predict(given)


def wanted_answers(task: TaskSettings, examples: Sequence[Encoded]) -> list[Any]:
    """What the data says is right, per input: its label, or accepted texts; of a text what it holds.

    Args:
        task: settings of the task.
        examples: tokenised inputs.

    Raises:
        InputError: an input has no label.
    """
    if isinstance(task, HarnessTask):
        return [example.question for example in examples]
    if isinstance(task, TextTask):
        return [example.text for example in examples]
    if isinstance(task, GenerateTask):
        return [_targets(example) for example in examples]
    return labels_of(examples)


def _targets(example: Encoded) -> tuple[str, ...]:
    if not example.targets:
        raise InputError("the row has no target", where=f"row {example.index}", hint="Give doc_to_target")
    return example.targets


def judged(
    task: TaskSettings,
    given: Sequence[Any],
    wanted: Sequence[Any],
    positive: int | None = None,
    names: Sequence[str] = (),
) -> Judged:
    """What the task's metric judges.

    Args:
        task: settings of the task.
        given: of `given_answers`.
        wanted: of `wanted_answers`, or of another model's `taken_answers`.
        positive: the class that counts, where the metric has one.
        names: of the classes, where the metric reads them.
    """
    if isinstance(task, HarnessTask):
        return judge(task, given, wanted)
    if isinstance(task, TextTask):
        return Texts(given, wanted)
    if isinstance(task, RegressionTask):
        return Numbers(given, wanted)
    if isinstance(task, GenerateTask):
        plain = task.ignored
        texts = [plain(task.filtered(text)) for text in given]
        return Written(texts, [[plain(each) for each in accepted] for accepted in wanted])
    if isinstance(task, MultiLabelTask):
        return LabelSets(given, wanted)
    if isinstance(task, TokenTask):
        return Tags(given, wanted, names)
    return Answers(given, wanted, positive)
