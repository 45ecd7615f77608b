"""Diagonal Fisher information of a spec's task at a model's present weights; `fisher` is the core.

    x        one of the N inputs;  c  one of its choices, or a class
    l(x, c)  loss of the choice, p(c|x) its probability (see `tasks.scoring`); p is a constant for the gradients
    F        {parameter: shape of the parameter}, >= 0

    exact       F = 1/N  sum over x and c of p(c|x) (grad l(x, c))^2
    sampled     F = 1/N  sum over x of (grad l(x, c))^2,  c drawn from p(.|x)
    empirical   F = 1/N  sum over x of (grad l(x, c))^2,  c the label
    mask-nodes  as sampled, but of masks on heads and neurons, spread over the parameters (see `nodes`)

For heads, the sum over answers is a quadratic form in the gradients of what the head gives: `directions`.

Texts that a model writes have no finite set of choices.  There y is the greedy text of x under the present weights, T
its tokens, and l(x, z) the mean over them of -log p(z[t]|x, y[<t]):

    sampled     F = 1/N  sum over x of (grad l(x, z))^2,  z[t] drawn from p(.|x, y[<t]) for every t
    empirical   F = 1/N  sum over x of (grad l(x, y))^2,  y the (first) target, z = y
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dfmerge_studies.errors import InputError
from dfmerge_studies.importance.capture import Capture
from dfmerge_studies.importance.factors import FactorCapture, block_names
from dfmerge_studies.importance.fisher import each_batch
from dfmerge_studies.importance.layers import Unseparable
from dfmerge_studies.importance.nodes import NodeCapture, spread
from dfmerge_studies.importance.passes import PASSES, Job
from dfmerge_studies.importance.rows import sum_by_rows
from dfmerge_studies.importance.ways import can_batch
from dfmerge_studies.methods import Blocks, Estimator
from dfmerge_studies.params import float_parameters
from dfmerge_studies.ranks import SOLO, Ranks
from dfmerge_studies.tasks.batches import device_of
from dfmerge_studies.tasks.encoding import HEADED, Encoded, Kind
from dfmerge_studies.tasks.evaluate import length_batches, pass_in_tokens
from dfmerge_studies.tasks.generation import Writer, write_tokens

ROW_BUDGET = 8192
CHUNK_PASSES = 4  # what a chunk costs beside its tokens, in passes of evaluation; measured on T5-small


@dataclass(frozen=True, slots=True)
class FisherResult:
    """A diagonal Fisher, without a floor.

    Attributes:
        values: {parameter name: tensor of its shape, >= 0}: means over the inputs, or sums where so documented; or
            {mask: (units,)} where so documented.
        samples: inputs used.
    """

    values: dict[str, Tensor]
    samples: int


def task_fisher(
    model: nn.Module,
    kind: Kind,
    examples: Sequence[Encoded],
    *,
    pad_id: int,
    names: Collection[str] | None = None,
    estimator: str = Estimator.EXACT,
    generator: torch.Generator | None = None,
    row_budget: int = ROW_BUDGET,
    compact: bool = False,
    writer: Writer | None = None,
    blocks: Blocks | None = None,
    progress: Callable[[int], None] | None = None,
    ranks: Ranks = SOLO,
) -> FisherResult:
    """Diagonal Fisher information of a task, the mean over its inputs.

    Args:
        model: the model; left as it is found.
        kind: how the model answers.
        examples: the N inputs; labels are used by `empirical` only.
        pad_id: token id to pad inputs with.
        names: parameters wanted, as `named_parameters()` gives them (tied ones once); all of floating point for `None`.
        estimator: `exact`, `sampled`, `empirical` or `mask-nodes`.
        generator: on the CPU, source of what is drawn: one number per input in order, or one per token of its text.
        row_budget: rows times tokens whose activations are alive at once, the bound on memory.
        compact: for `mask-nodes`, values by mask, which `whole` turns into those of parameters.
        writer: where texts end, for inputs whose answer is one; `exact` has no meaning for them.
        blocks: what linear layers have instead of a diagonal, as `factors` has it: `gram` or `kfac`.
        progress: called with the number of inputs done since the last call.
        ranks: processes that share the inputs; the values are right on the leader, and of no use on the others.

    Raises:
        InputError: no inputs, a missing label, an unknown estimator or name, or a module that cannot be handled.
        RunError: a loss is not finite.
    """
    if estimator not in set(Estimator):
        raise InputError(f"unknown estimator {estimator!r}", hint=f"Use one of {', '.join(Estimator)}")
    if not examples:
        raise InputError("there are no inputs to compute the Fisher information from", hint="Check samples and limit")
    if names is None:
        names = float_parameters(model)
    if writer is not None and estimator == Estimator.EXACT:
        hint = "Use sampled, empirical or mask-nodes"
        raise InputError("exact takes a mean over choices, of which generated texts have no finite set", hint=hint)
    drawn = Estimator(estimator).draws
    tokens = None if writer is None else writer.max_gen_toks
    draws = sampling_draws(len(examples), generator, tokens) if drawn else torch.zeros(len(examples))
    job = Job(model, kind, examples, pad_id, Estimator(estimator), draws, writer, blocks)
    cost = writer.cost if writer is not None and job.along else rows_times_tokens
    share = ranks.shares([cost(example, kind) for example in examples])[ranks.rank]
    values: dict[str, Tensor] = {}

    def compute() -> int:
        values.update(share_of_sum(job, share, names, row_budget=row_budget, progress=progress, ranks=ranks))
        return len(share)

    samples = sum(ranks.agreed(compute))
    ranks.sum_on_leader_(values[name] for name in sorted(values))
    for total in values.values():
        total.div_(samples)
    return FisherResult(values if compact else whole(model, values, estimator=estimator, names=names), samples)


def share_of_sum(
    job: Job,
    share: Sequence[int],
    names: Collection[str],
    *,
    row_budget: int = ROW_BUDGET,
    progress: Callable[[int], None] | None = None,
    ranks: Ranks = SOLO,
) -> dict[str, Tensor]:
    """The sum over some of a task's inputs; those of all shares add up to N times the mean.

    Args:
        job: the task.
        share: positions of the inputs; with none, the sums are zero.
        names: parameters wanted.
        row_budget: rows times tokens whose activations are alive at once.
        progress: called with the number of inputs done since the last call.
        ranks: whose held signals are looked at between chunks; nothing is added up over them here.

    Returns:
        By parameter, or by mask for `mask-nodes`.
    """
    mine = replace(job, examples=[job.examples[i] for i in share], draws=job.draws[list(share)])
    if not names or not share:
        return _capture(mine, names).sums

    def advance(inputs: int) -> None:
        ranks.check()
        if progress is not None:
            progress(inputs)

    def batched(job: Job, done: Callable[[int], None] | None = None) -> dict[str, Tensor]:
        return _batched_sum(job, names, row_budget, done)

    ranks.check()
    mine = _along_texts(mine, row_budget, ranks)
    if job.estimator is Estimator.MASK_NODES:
        return batched(mine, advance)
    if mine.blocks is not None:
        wanted = list(block_names(mine.model, names)) if mine.blocks == "gram" else names
        if not can_batch(replace(mine, blocks=None), wanted, batched):
            raise InputError(
                f"the importance of {type(mine.model).__name__} in blocks cannot be computed in batches",
                hint="Use a method with a diagonal importance, such as df-merge",
            )
        return batched(mine, advance)
    if can_batch(mine, names, batched):
        try:
            return batched(mine, advance)
        except Unseparable:
            # In another shape of batch than those that were tried.  It is not kept in mind: a resumed run, which has
            # not seen this, must compute the other importances the way that an uncut one does.
            pass
    return sum_by_rows(mine, names, done=advance)


def _along_texts(job: Job, row_budget: int, ranks: Ranks) -> Job:
    """The same with what the model writes as each input's only choice, where labels are drawn along that."""
    if job.writer is None or not job.along:
        return job
    texts = write_tokens(
        job.model, job.kind, job.examples, job.writer, pad_id=job.pad_id, token_budget=row_budget, ranks=ranks
    )
    written = [replace(each, choices=(text,), label=0) for each, text in zip(job.examples, texts, strict=True)]
    return replace(job, examples=written)


def _batched_sum(
    job: Job, names: Collection[str], row_budget: int, done: Callable[[int], None] | None
) -> dict[str, Tensor]:
    """The sum through hooks on ordinary passes over chunks of inputs; without `done`, for the first time."""
    capture = _capture(job, names)
    if done is not None:
        capture.trust_()

    def run(chunk: list[int]) -> None:
        PASSES[job.kind](job, capture, chunk)

    # A chunk reads and writes all sums, as often as a choice has tokens.  On an accelerator its backward passes launch
    # thousands of small kernels, and padding is cheap.
    on_cpu = device_of(job.model).type == "cpu"
    padding = CHUNK_PASSES * pass_in_tokens(job.model) if on_cpu else math.inf
    chunks = length_batches(job.examples, job.kind, row_budget, rows_times_tokens, padding=padding)
    each_batch(capture, chunks, run, done=lambda chunk: None if done is None else done(len(chunk)))
    return capture.finish()


def _capture(job: Job, names: Collection[str]) -> Capture:
    if job.blocks is not None:
        return FactorCapture(job.model, names, gram=job.blocks == "gram")
    return (NodeCapture if job.estimator is Estimator.MASK_NODES else Capture)(job.model, names)


def whole(
    model: nn.Module, values: dict[str, Tensor], *, estimator: str, names: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Values by parameter, from those that `share_of_sum` and `task_fisher(compact=True)` give.

    Args:
        model: the model that they are of.
        values: by mask for `mask-nodes`; the other estimators' are whole already and come back as they are.
        estimator: theirs.
        names: parameters wanted; all of floating point for `None`.

    Returns:
        {parameter: tensor of its shape}; for `mask-nodes` views that repeat their values and must not be written in.
    """
    if estimator != Estimator.MASK_NODES:
        return values
    return spread(model, values, float_parameters(model) if names is None else names)


def sampling_draws(inputs: int, generator: torch.Generator | None, tokens: int | None = None) -> Tensor:
    """Uniform numbers for every input in order, so that batching and sharing out do not change what is drawn.

    Args:
        inputs: how many inputs there are.
        generator: on the CPU; advanced by as many draws as there are numbers.
        tokens: how many tokens a text has at most, where tokens are drawn; None for choices.

    Returns:
        (inputs,), or (inputs, tokens).

    Raises:
        InputError: there is no generator.
    """
    if generator is None:
        raise InputError("this estimator draws choices and needs a random generator", hint="Pass one, seeded")
    shape = (inputs,) if tokens is None else (inputs, tokens)
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def rows_times_tokens(example: Encoded, kind: Kind) -> int:
    """What an input takes of a row budget.

    Args:
        example: one input.
        kind: how the model answers.
    """
    if kind in HEADED:
        return len(example.input_ids)
    return len(example.choices) * (len(example.input_ids) + max(map(len, example.choices), default=0))
