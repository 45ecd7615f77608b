"""What lm-evaluation-harness asks of a model that is in memory, and what the model answers.

The importance of parameters needs token sequences.  Of a question with choices they are those that the harness scores.
Of any other they are one sequence: the target behind its prompt, or the first window of a text.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dfmerge_studies.errors import InputError, RunError
from dfmerge_studies.ranks import SOLO, Ranks
from dfmerge_studies.tasks.data import Row
from dfmerge_studies.tasks.encoding import Encoded, Kind
from dfmerge_studies.tasks.generation import Writer
from dfmerge_studies.tasks.harness import CHOICES, TEXT, WRITTEN, Question, calling_harness
from dfmerge_studies.tasks.settings import HarnessTask
from dfmerge_studies.tasks.texts import TextSize

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def encode_questions(
    rows: Sequence[Row], kind: Kind, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: Any = None
) -> list[Encoded]:
    """The requests of all documents of a split, and the tokens that importance is estimated on.

    Args:
        rows: all of the split, in order, since one generator draws the examples of all.
        kind: how the model answers.
        model: whose limits count.
        tokenizer: its tokenizer.
        template: the tokenizer whose chat template is applied; this one by default.

    Raises:
        InputError: the harness cannot ask one of them.
    """
    loaded = rows[0].question.loaded
    settings, task = loaded.settings, loaded.task
    with calling_harness(loaded.where, "the prompts cannot be made"):
        lm = _language_model(model, tokenizer, kind, settings)
        chat = _language_model(model, template, kind, settings) if template is not None else lm
        if settings.apply_chat_template is not False:
            _check_template(settings, chat.tokenizer, loaded.where)
        _check_examples(task, loaded.where)
        task.set_fewshot_seed(seed=settings.fewshot_random_seed)
        return [_encoded(_with_requests(row.question, chat), lm) for row in rows]


def _check_examples(task: Any, where: str) -> None:
    number = task.get_config("num_fewshot") or 0
    found = len(list(task.fewshot_docs() or ())) if number else 0
    if number > found:
        raise InputError(
            f"{number} examples, but the task has {found} documents to take them from",
            where=f"{where}.num_fewshot",
            hint="Ask for fewer",
        )


def _check_template(settings: HarnessTask, tokenizer: Any, where: str) -> None:
    name = settings.apply_chat_template
    if not tokenizer.chat_template or (isinstance(name, str) and name not in tokenizer.chat_template):
        raise InputError(
            "the tokenizer has no chat template" + (f" {name!r}" if isinstance(name, str) else ""),
            where=f"{where}.apply_chat_template",
            hint="Put the chat_template.jinja that the experts were trained with into the base's directory, "
            "or leave apply_chat_template out",
        )


def _with_requests(question: Question, lm: Any) -> Question:
    """A question with its requests; advances the draw of examples."""
    task, settings, document = question.loaded.task, question.loaded.settings, question.document
    chat = settings.apply_chat_template is not False
    context = task.fewshot_context(
        document,
        num_fewshot=task.get_config("num_fewshot") or 0,
        system_instruction=settings.system_instruction,
        apply_chat_template=chat,
        fewshot_as_multiturn=settings.fewshot_as_multiturn if settings.fewshot_as_multiturn is not None else chat,
        chat_template=lm.apply_chat_template if chat else None,
        gen_prefix=task.doc_to_prefix(document),
    )
    found = task.construct_requests(
        doc=document,
        ctx=context,
        metadata=question.about,
        apply_chat_template=chat,
        chat_template=lm.apply_chat_template if chat else None,
    )
    instances = found if isinstance(found, list) else [found]
    return replace(question, requests=tuple((each.request_type, each.args) for each in instances))


def _encoded(question: Question, lm: Any) -> Encoded:
    """The tokens of a question that importance is estimated on."""
    task, document = question.loaded.task, question.document
    arguments = [args for _, args in question.requests]
    label: int | None = 0
    if task.OUTPUT_TYPE == CHOICES:
        arguments = arguments[: len(task.doc_to_choice(document))]  # behind them: choices without their prompt
        several = getattr(task, "multiple_input", 0)  # one choice behind several prompts
        label = _right_choice(task, document, several=bool(several))
        if several:
            arguments, label = [arguments[label or 0]], 0
    elif task.OUTPUT_TYPE == TEXT:
        tokens = lm.tok_encode(arguments[0][0])[: lm.max_length]
        size = TextSize.of(arguments[0][0], len(tokens))
        return Encoded(question.index, (lm.prefix_token_id,), (tuple(tokens),), 0, text=size, question=question)
    elif task.OUTPUT_TYPE == WRITTEN:
        return _encoded_writing(question, lm)
    elif len(arguments) > 1:
        label = None  # of a task written in Python, which alone knows
    pairs = [_pair(lm, context, answer) for context, answer, *_ in arguments]
    if any(not answer for _, answer in pairs):
        raise InputError(
            f"row {question.index}: an answer has no token", where=question.loaded.where, hint="Use another task"
        )
    longest = max(len(answer) for _, answer in pairs)
    room = None if lm.max_length is None else max(1, lm.max_length - longest)
    prompt = pairs[0][0]
    cut = room is not None and lm.backend == "causal" and len(prompt) > room
    kept = prompt[len(prompt) - room :] if cut and room is not None else prompt
    choices = tuple(tuple(answer) for _, answer in pairs)
    return Encoded(question.index, tuple(kept), choices, label, None, cut, question=question)


def _encoded_writing(question: Question, lm: Any) -> Encoded:
    """A prompt, and as its only choice the beginning of the target that a model could write; none without a target."""
    task, (context, options) = question.loaded.task, question.requests[0][1]
    chat = question.loaded.settings.apply_chat_template is not False
    target, most = _target(task, question.document), _most_tokens(options)
    between = "" if chat else task.get_config("target_delimiter") or ""
    prompt, answer = _written_behind(lm, context, between, target) if target else (list(lm.tok_encode(context)), [])
    room = max(1, lm.max_length - most) if lm.backend == "causal" else lm.max_length
    kept = prompt[max(0, len(prompt) - room) :]
    end = lm.tokenizer.eos_token_id  # as of our own tasks of type generate: what is written ends there
    choices = (tuple([*answer, *([end] if isinstance(end, int) else [])][:most]),) if answer else ()
    return Encoded(question.index, tuple(kept), choices, 0, None, len(kept) < len(prompt), question=question)


def _written_behind(lm: Any, context: str, between: str, target: str) -> tuple[list[int], list[int]]:
    """Tokens of a prompt and of a text that is written behind it.

    What is written follows the whole prompt, while what is scored takes the blanks at its end along.
    """
    if not context[-1:].isspace():
        return _pair(lm, context, f"{between}{target}")
    prompt = list(lm.tok_encode(context))
    whole = list(lm.tok_encode(f"{context}{target}")) if lm.backend == "causal" else []
    joined = whole[: len(prompt)] == prompt  # otherwise a token spans the join, or the two are apart
    return prompt, whole[len(prompt) :] if joined else list(lm.tok_encode(target, add_special_tokens=False))


def _most_tokens(options: Mapping[str, Any]) -> int:
    """Tokens that an answer has at most, under each name that the harness knows for that."""
    known = (options.get(name) for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"))
    return int(next((number for number in known if number), 256))


def writer_of_questions(examples: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase) -> Writer | None:
    """How a model writes the answers to questions of the harness; None where it writes none.

    Args:
        examples: of `encode_questions`, of one task.
        tokenizer: turns tokens into text.
    """
    question = examples[0].question if examples else None
    if question is None or question.loaded.task.OUTPUT_TYPE != WRITTEN:
        return None
    options = question.requests[0][1][1]
    until = options.get("until") or ()
    return Writer(tokenizer, _most_tokens(options), (until,) if isinstance(until, str) else tuple(until))


def _right_choice(task: Any, document: Any, *, several: bool) -> int | None:
    """Index of the right choice; of several right ones the first."""
    right = task.doc_to_text(document) if several else task.doc_to_target(document)
    if isinstance(right, (list, tuple)):
        right = right[0] if right else None
    if isinstance(right, str):
        choices = task.doc_to_choice(document)
        right = choices.index(right) if right in choices else None
    return int(right) if right is not None and int(right) >= 0 else None


def _target(task: Any, document: Any) -> str:
    """The text that a model should write; of several the first, and nothing where the task has none as text."""
    target = task.doc_to_target(document)
    if task.get_config("doc_to_choice") is not None and isinstance(target, int):
        target = task.doc_to_choice(document)[target]
    if isinstance(target, (list, tuple)):
        target = target[0] if target else ""
    return target if isinstance(target, str) else str(target) if isinstance(target, (int, float)) else ""


def _pair(lm: Any, context: str, answer: str) -> tuple[list[int], list[int]]:
    """Tokens of a prompt and of what is scored behind it, as `TemplateLM.loglikelihood` makes them."""
    if context:
        prompt, scored = lm._encode_pair(context, answer)
        return list(prompt), list(scored)
    scored = list(lm.tok_encode(answer, add_special_tokens=False))
    begin = lm.prefix_token_id
    return (scored[:1], scored[1:]) if scored and scored[0] == begin else ([begin], scored)


# --- the answers -----------------------------------------------------------------------------------------------------


def answer_questions(
    model: Any,
    kind: Kind,
    examples: Sequence[Encoded],
    tokenizer: PreTrainedTokenizerBase,
    *,
    token_budget: int,
    progress: Callable[[int], None] | None = None,
    ranks: Ranks = SOLO,
) -> list[list[list[Any]]]:
    """What a model answers to every request of every question, in the order of `examples`.

    Args:
        model: the model, which stays in evaluation mode.
        kind: how it answers.
        examples: of `encode_questions`.
        tokenizer: the model's.
        token_budget: tokens of one batch, the bound on memory.
        progress: called with the number of questions done since the last call.
        ranks: processes that share the questions; every one of them gets all answers.

    Returns:
        By question and request, the answers to its repetitions: a log-likelihood and whether the answer is the greedy
        one, a log-likelihood of a text, or a text.

    Raises:
        InputError: the harness cannot ask the model.
        RunError: a log-likelihood is not finite; the message names the row.
    """

    def compute(share: Sequence[int]) -> list[list[list[Any]]]:
        mine = [examples[i] for i in share]
        found = _answers(model, kind, mine, tokenizer, token_budget)
        if progress is not None:
            progress(len(mine))
        return found

    shares = ranks.shares([_cost(example) for example in examples])
    found = ranks.agreed(lambda: compute(shares[ranks.rank]))
    results: list[list[list[Any]]] = [[] for _ in examples]
    for share, part in zip(shares, found, strict=True):
        for i, answers in zip(share, part, strict=True):
            results[i] = answers
    return results


def _cost(example: Encoded) -> int:
    return len(example.input_ids) + max(map(len, example.choices), default=0)


def _answers(
    model: Any, kind: Kind, examples: Sequence[Encoded], tokenizer: Any, token_budget: int
) -> list[list[list[Any]]]:
    if not examples:
        return []
    loaded = examples[0].question.loaded
    results: list[list[list[Any]]] = []
    by_type: dict[str, list[tuple[Any, list[Any]]]] = {}
    longest = 1
    for example in examples:
        instances = example.question.instances()
        results.append([[] for _ in instances])
        for instance, answers in zip(instances, results[-1], strict=True):
            by_type.setdefault(instance.request_type, []).extend([(instance, answers)] * instance.repeats)
            written = _most_tokens(instance.args[1]) if instance.request_type == WRITTEN else 0
            longest = max(longest, _cost(example) + written)
    with calling_harness(loaded.where, "the model cannot be asked"):
        size = max(1, token_budget // longest)
        lm = _language_model(model, tokenizer, kind, loaded.settings, batch_size=size)
        for request, asked in by_type.items():
            found = getattr(lm, request)([instance for instance, _ in asked], disable_tqdm=True)
            for (instance, answers), answer in zip(asked, found, strict=True):
                _check_finite(answer, instance.doc_id)
                answers.append(answer)
    return results


def _check_finite(answer: Any, row: int) -> None:
    number = answer[0] if isinstance(answer, tuple) else answer
    if isinstance(number, float) and not math.isfinite(number):
        raise RunError(
            f"the model's log-likelihood is not finite: {number}",
            where=f"row {row}",
            hint="The weights, or the precision they are run in, overflow; try float32, or smaller coefficients",
        )


def _language_model(model: Any, tokenizer: Any, kind: Kind, settings: HarnessTask, *, batch_size: int = 1) -> Any:
    """The harness's own language model, `lm_eval --model hf`, around one that is in memory."""
    from lm_eval.models.huggingface import HFLM

    class Resident(HFLM):  # type: ignore[misc]  # untyped
        """The same without bars of its own."""

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None) -> Any:
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    return Resident(
        pretrained=model,
        backend="causal" if kind is Kind.CAUSAL else "seq2seq",
        tokenizer=copy.deepcopy(tokenizer),  # it may be given a token for padding
        batch_size=batch_size,
        chat_template_args=settings.chat_template_args,
    )
