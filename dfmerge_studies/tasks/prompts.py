"""What a language model reads before its answer: instruction, examples, input, and the chat template around them.

Order, delimiters and turns are those of lm-evaluation-harness (`lm_eval.api.task`, version 0.4), so that a task whose
fields have the same values there has the same prompts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Literal

from dfmerge_studies.errors import InputError, did_you_mean, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dfmerge_studies.tasks.settings import PromptedTask

TODAY = datetime(
    2024, 7, 26
)  # for templates that write the date: a prompt must be the same tomorrow, or no study resumes
_NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Turn:
    """A part of a prompt.

    Attributes:
        role: who says it in a chat.
        text: what is said.
        delimiter: stands behind it where it is followed by more in one text.
    """

    role: Role
    text: str
    delimiter: str = ""


@dataclass(frozen=True, slots=True)
class Example:
    """A few-shot example.

    Attributes:
        text: its input.
        answer: the right answer.
        prefix: how its answer begins.
    """

    text: str
    answer: str
    prefix: str = ""


def turns_of(
    task: PromptedTask, text: str, *, description: str = "", prefix: str = "", examples: Sequence[Example] = ()
) -> tuple[Turn, ...]:
    """The parts of a prompt; none where it is the input alone.

    Args:
        task: its settings.
        text: the input that is asked about.
        description: of the task, for this input.
        prefix: how the answer begins.
        examples: before the input, in their order.
    """
    system = _joined(task.system_instruction or "", description, task.fewshot_delimiter)
    if not (system or prefix or examples or task.chat):
        return ()
    turns = [Turn("system", system)] if system else []
    for each in examples:
        turns.append(Turn("user", each.text, _before_answer(task, each.text, each.prefix, answered=True)))
        turns.append(Turn("assistant", _joined(each.prefix, each.answer, " "), task.fewshot_delimiter))
    turns.append(Turn("user", text, _before_answer(task, text, prefix, answered=False)))
    if prefix:
        turns.append(Turn("assistant", prefix))
    return tuple(turns)


def _joined(first: str, second: str, delimiter: str) -> str:
    """Two texts, either of which may be empty, with a delimiter where neither has white space at the join."""
    if not first or not second or first[-1].isspace() or second[0].isspace():
        return first + second
    return first + delimiter + second


def _before_answer(task: PromptedTask, text: str, prefix: str, *, answered: bool) -> str:
    """What follows an input: before the prefix of an answer, or before an answer that stands there."""
    if prefix:
        return task.target_delimiter if text and not (text[-1].isspace() or prefix[0].isspace()) else ""
    return task.target_delimiter if answered else ""


def prompt_text(turns: Sequence[Turn], task: PromptedTask, tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    """A prompt as one text, special tokens of a chat written out.

    Args:
        turns: from `turns_of`, at least one.
        task: its settings.
        tokenizer: whose chat template is applied.
        where: file and task, for messages.

    Raises:
        InputError: the tokenizer has no such template, or the template takes no such chat.
    """
    if not task.chat:
        return "".join(turn.text + turn.delimiter for turn in turns)
    multiturn = task.fewshot_as_multiturn is not False
    messages = [{"role": turn.role, "content": turn.text} for turn in (turns if multiturn else _in_one(turns))]
    goes_on = turns[-1].role == "assistant"
    name = task.apply_chat_template if isinstance(task.apply_chat_template, str) else None
    try:
        text = str(
            tokenizer.apply_chat_template(
                messages,
                chat_template=_dated(tokenizer.get_chat_template(name)),
                tokenize=False,
                add_generation_prompt=not goes_on,
                continue_final_message=goes_on,
                **task.chat_template_args,
            )
        )
    except Exception as error:  # a template is a program of its own, and raises what it likes
        raise _unfit(f"does not take this prompt: {first_line(error)}", messages, where) from error
    lost = next(
        (each for each in messages if each["role"] != "assistant" and each["content"].strip() not in text), None
    )
    if lost is not None:
        raise _unfit(f"leaves out what the {lost['role']} says: {lost['content'][:60]!r}", messages, where)
    return text


def _unfit(what: str, messages: Sequence[Mapping[str, str]], where: str) -> InputError:
    return InputError(
        f"the chat template of the tokenizer {what}",
        where=f"{where}.apply_chat_template",
        hint=(
            "Write the instruction into doc_to_text instead: many templates know no system message"
            if messages[0]["role"] == "system"
            else "Correct the template, or leave apply_chat_template out"
        ),
    )


def _dated(template: str) -> str:
    """A template that writes the same date every day, or the prompts and so the study would be others tomorrow."""
    return _NOW.sub(lambda call: repr(TODAY.strftime(call[2])), template)


def _in_one(turns: Sequence[Turn]) -> list[Turn]:
    """The chat with all examples in the one message of the user; a system message and a begun answer stay apart."""
    first = [turn for turn in turns[:1] if turn.role == "system"]
    last = [turn for turn in turns[-1:] if turn.role == "assistant"]
    middle = [*turns[len(first) : len(turns) - len(last)]]
    middle[-1] = replace(middle[-1], delimiter="")
    return [*first, Turn("user", "".join(turn.text + turn.delimiter for turn in middle)), *last]


def check_template(task: PromptedTask, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse a chat template that the tokenizer does not have.

    Args:
        task: its settings.
        tokenizer: the base's.
        where: file and task, for messages.

    Raises:
        InputError: naming the templates that there are.
    """
    if not task.chat:
        return
    found, field = tokenizer.chat_template, f"{where}.apply_chat_template"
    if not found:
        raise InputError(
            "the tokenizer has no chat template",
            where=field,
            hint="Put the chat_template.jinja that the experts were trained with into the base's directory, "
            "or leave apply_chat_template out",
        )
    wanted = task.apply_chat_template
    names = sorted(found) if isinstance(found, dict) else []
    if isinstance(wanted, str) and wanted not in names:
        there = f"its templates are {', '.join(names)}" if names else "it has one template, without a name"
        raise InputError(
            f"the tokenizer has no chat template {wanted!r}; {there}",
            where=field,
            hint=did_you_mean(wanted, names) or ("Use one of them" if names else "Write true"),
        )
    if wanted is True and names and "default" not in names:
        raise InputError(
            f"the tokenizer has several chat templates ({', '.join(names)}) and none is the default",
            where=field,
            hint="Name one of them",
        )
