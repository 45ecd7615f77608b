"""A few inputs of each task through all that a trial does with them, before anything is stored.

What a model's code refuses, or answers otherwise in a batch than alone, is found out here and not in the first trial.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from dfmerge_studies.errors import DFMergeError, InputError, RunError, first_line, out_of_memory
from dfmerge_studies.importance.task_fisher import task_fisher
from dfmerge_studies.methods import Importance, Method
from dfmerge_studies.objective.importances import check_importance, writer_for
from dfmerge_studies.objective.problem import Problem
from dfmerge_studies.objective.slopes import Sample, loss_gradient
from dfmerge_studies.progress import silent
from dfmerge_studies.ranks import SOLO
from dfmerge_studies.tasks.answers import given_answers, judged, wanted_answers, writer_of
from dfmerge_studies.tasks.encoding import Encoded
from dfmerge_studies.tasks.evaluate import choice_losses, row_length
from dfmerge_studies.tasks.generation import Writer, written
from dfmerge_studies.tasks.sampling import torch_generator
from dfmerge_studies.tasks.settings import HarnessTask
from dfmerge_studies.tasks.supervised import check_answer

# Losses of an input alone and in a batch, relative and absolute; a model that sees its neighbours is off by far more.
TOLERANCE = 1e-3
TOLERANCE_16_BIT = 2e-1
REHEARSED_TOKENS = 8  # of a text that a model writes


def rehearse_(problem: Problem, method: Method) -> None:
    """Score two inputs of each task, alone and in one batch, and compute the method's importance from two.

    Done once for what is loaded; leaves some expert's weights in the resident model, as a trial does.

    Raises:
        InputError: the model cannot be scored or differentiated, or its answers depend on what shares a batch.
        RunError: a loss is not finite, or memory ran out.
    """
    estimator = check_importance(problem, method)
    descends = problem.spec.search.descends and method.searches
    kind = " ".join(filter(None, (method.importance.blocks, estimator.value)))
    for task in problem.tasks:
        scored, weighed = (task, "scores"), (task, kind)
        guard, sloped = problem.spec.tasks[task].guard, (task, "slope")
        unweighed = method.importance is Importance.UNIFORM or guard
        needed = {scored} if unweighed else {scored, weighed}
        if descends and not guard:
            needed |= {sloped}
        if needed <= problem.rehearsed:
            continue
        _put_expert_on_(problem, task)
        if scored not in problem.rehearsed:
            _score(problem, task)
        if weighed in needed:
            _weigh(problem, method, task)
        if sloped in needed:
            _descend(problem, task)
        problem.rehearsed |= needed


def _put_expert_on_(problem: Problem, task: str) -> None:
    own = [i for i, expert in enumerate(problem.spec.experts.values()) if expert.task == task]
    if own:
        problem.resident.load_scaled_(own[0], 1.0)
    else:
        problem.resident.load_base_()
    problem.resident.use_head_(task)


def _score(problem: Problem, task: str) -> None:
    model, kind = problem.resident.model, problem.kinds[task]
    examples = sorted(problem.examples(task, "validation"), key=lambda example: row_length(example, kind))
    pair = [examples[0], examples[-1]]
    writer = writer_of(problem.spec.tasks[task], problem.resident.tokenizer)
    if writer is not None:
        _write(problem, task, writer, pair)
        return

    def losses(inputs: Sequence[Encoded]) -> list[list[float]]:
        return choice_losses(model, kind, inputs, pad_id=problem.pad_id, token_budget=problem.token_budget)

    if isinstance(problem.spec.tasks[task], HarnessTask):
        _ask(problem, task, pair)
        if not all(each.choices for each in pair):
            return
    with named(problem, task, "scored"):
        alone = [losses([example])[0] for example in pair]
        together = losses(pair)
    tolerance = _tolerance(model)
    for example, one, other in zip(pair, alone, together, strict=True):
        if not torch.allclose(torch.tensor(one), torch.tensor(other), rtol=tolerance, atol=tolerance):
            raise _sees_neighbours(problem, task, example, other, one)


def _ask(problem: Problem, task: str, pair: Sequence[Encoded]) -> None:
    """Two questions of lm-evaluation-harness, which asks in batches of its own: what it raises is found out here."""
    settings, kind, tokenizer = problem.spec.tasks[task], problem.kinds[task], problem.resident.tokenizer
    with named(problem, task, "scored"):
        given = given_answers(problem.resident.model, settings, kind, pair, tokenizer=tokenizer, pad_id=problem.pad_id)
        with suppress(RunError):  # of two rows a number such as a correlation need not be there
            judged(settings, given, wanted_answers(settings, pair))


def _tolerance(model: nn.Module) -> float:
    wide = torch.finfo(next(model.parameters()).dtype).eps > 1e-4
    return TOLERANCE_16_BIT if wide else TOLERANCE


def _sees_neighbours(
    problem: Problem, task: str, example: Encoded, together: Sequence[float], alone: Sequence[float]
) -> InputError:
    return InputError(
        f"{type(problem.resident.model).__name__} answers row {example.index} otherwise in a batch than alone "
        f"({_numbers(together)} and {_numbers(alone)}), so its scores would depend on what shares a batch",
        where=problem.spec.where(f"tasks.{task}"),
        hint="Use a model that masks padding, which this one does not",
    )


def _write(problem: Problem, task: str, writer: Writer, pair: Sequence[Encoded]) -> None:
    """A few tokens of two inputs, of which the scores of all tokens are compared as far as both ways write the same."""
    model, kind = problem.resident.model, problem.kinds[task]
    few = shortened(writer)

    def steps(inputs: Sequence[Encoded]) -> tuple[list[tuple[int, ...]], list[Tensor]]:
        scores: list[Tensor] = []
        with torch.inference_mode():
            return written(model, kind, inputs, few, problem.pad_id, scores.append), scores

    with named(problem, task, "scored"):
        together, scores = steps(pair)
        alone = [steps([example]) for example in pair]
    for row, (example, ((one,), own)) in enumerate(zip(pair, alone, strict=True)):
        same = sum(1 for _ in takewhile(lambda each: each[0] == each[1], zip(one, together[row], strict=False)))
        for step in range(min(same + 1, len(own), len(scores))):
            mine, other = own[step][0].log_softmax(-1), scores[step][row].log_softmax(-1)
            place = int(mine.argmax())
            if not torch.allclose(mine[place], other[place], rtol=_tolerance(model), atol=_tolerance(model)):
                raise _sees_neighbours(problem, task, example, [float(other[place])], [float(mine[place])])


def shortened(writer: Writer) -> Writer:
    """The same for a few tokens.

    Args:
        writer: how a task's texts are written.
    """
    return replace(writer, max_gen_toks=min(writer.max_gen_toks, REHEARSED_TOKENS))


def _weigh(problem: Problem, method: Method, task: str) -> None:
    inputs = sorted(problem.tasks[task].fisher, key=lambda example: row_length(example, problem.kinds[task]))
    writer = writer_for(problem, task)
    estimator = check_importance(problem, method)
    if writer is not None:
        writer = shortened(writer)
        estimator = estimator.of_texts
    with named(problem, task, "differentiated"):
        for names in problem.parts():
            task_fisher(
                problem.resident.model,
                problem.kinds[task],
                [inputs[0], inputs[len(inputs) // 2]],
                pad_id=problem.pad_id,
                names=names,
                estimator=estimator,
                writer=writer,
                generator=torch_generator(problem.spec.search.seed, "sampled", task),
                row_budget=problem.row_budget,
                compact=True,
                blocks=method.importance.blocks,
            )


def _descend(problem: Problem, task: str) -> None:
    """The loss of all answers must be there to descend on, and its gradient of two."""
    examples = sorted(problem.examples(task, "validation"), key=lambda each: row_length(each, problem.kinds[task]))
    with named(problem, task, "differentiated"):
        for example in examples:
            check_answer(problem.kinds[task], example)
        alone = replace(problem, ranks=SOLO)  # the other ranks wait for a command, and rehearse nothing
        loss_gradient(alone, Sample({task: [0, len(examples) - 1]}, {task: 1.0}), silent)


@contextmanager
def named(problem: Problem, task: str, what: str) -> Iterator[None]:
    """Whatever a model's own code raises says which model it was, and for which task.

    Args:
        problem: what is loaded.
        task: name of the task.
        what: what is done with the model, as a participle.

    Raises:
        InputError: for an error of another kind than ours.
    """
    try:
        yield
    except DFMergeError:
        raise
    except Exception as error:
        lacking = out_of_memory(error)
        if lacking is not None:
            raise lacking from error
        raise InputError(
            f"{type(problem.resident.model).__name__} cannot be {what} with the inputs of this task: "
            f"{first_line(error)}",
            where=problem.spec.where(f"tasks.{task}"),
            hint="Check the model, its tokenizer and max_length, or use another architecture",
        ) from error


def _numbers(losses: Sequence[Any]) -> str:
    return ", ".join(f"{loss:.3g}" for loss in torch.tensor(losses).flatten()[:4].tolist())
