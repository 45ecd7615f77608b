"""Exact diagonal Fisher information of any model under any loss, from batched passes.

    r        row: one term of the sum, with a loss of its own; R of them in a batch
    l[r]     loss of a row, (R,); or C losses of a row that share its forward pass, (R, C)
    w[r]     weight of a loss, >= 0, a constant for the gradients; shape of l
    F        {parameter: shape of the parameter}, >= 0

    F = sum over r of w[r] (grad l[r])^2  /  sum over r of w[r]          elementwise

Squares are taken per row, never of a batch's sum, which would add cross terms.  Weights go into the direction of the
backward pass, sqrt(w) l, so that nothing is weighted afterwards.

With every choice c of an input x as a row, l = -log p(c|x) and w = p(c|x), this is the Fisher information; with the
labels as the only rows it is the empirical one.  `task_fisher` computes both for the tasks of a spec.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dfmerge_studies.errors import InputError, RunError
from dfmerge_studies.importance.capture import Capture

Batch = TypeVar("Batch")
Weights = Callable[[Tensor, Any], Tensor] | Sequence[float] | Tensor


def diagonal_fisher(
    model: nn.Module,
    forward: Callable[[Any, Batch], Tensor],
    inputs: Iterable[Batch],
    weights: Weights | None = None,
    *,
    names: Collection[str] | None = None,
    rows: Callable[[Batch], int] | None = None,
) -> dict[str, Tensor]:
    """Weighted mean, over all rows, of the squared gradient of each row's loss.

    The empirical Fisher of a linear model under half the squared error; the gradients are (1, 2) and (6, 0):

    >>> import torch
    >>> from dfmerge_studies import diagonal_fisher
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.0]]))
    >>> def forward(model, batch):
    ...     x, y = batch
    ...     return 0.5 * (model(x)[:, 0] - y) ** 2
    >>> x, y = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([0.0, 1.0])
    >>> diagonal_fisher(model, forward, [(x, y)])
    {'weight': tensor([[18.5000,  2.0000]])}

    The exact Fisher of a classifier: the losses of all classes, each weighed by its probability:

    >>> classifier = torch.nn.Linear(2, 3)
    >>> exact = diagonal_fisher(
    ...     classifier,
    ...     lambda model, batch: -model(batch).log_softmax(dim=-1),
    ...     x.split(1),  # two batches of one row
    ...     lambda losses, batch: (-losses).exp(),
    ... )
    >>> p = classifier(x).softmax(dim=-1)
    >>> torch.allclose(exact["bias"], (p * (1 - p)).mean(dim=0))
    True

    Layers that transformers and torch have formulas for cost one pass for all rows; others are run again row by row,
    which is exact too, and slower.  What cannot be exact is refused by name: a module that mixes rows, or a parameter
    that is used outside its module.

    Args:
        model: any model; it is in evaluation mode while this runs, and left as it is found.
        forward: from the model and a batch to one loss per row, (R,), or to C losses per row, (R, C).  A row's losses
            must depend on that row alone, and the first dimension of what passes through the model must be the rows.
        inputs: batches, as a `DataLoader` gives them; what they are is for `forward` to know.  The graph of a whole
            batch is in memory at once.
        weights: a function from the losses, detached, and the batch to their weights, in the shape of the losses; or
            one number per loss, in their order over all batches; `None` weighs all alike.
        names: parameters wanted, as `named_parameters()` gives them (tied ones once); `None` for those that require a
            gradient.
        rows: how many rows `forward` makes of a batch.  Without it a pass without gradients finds that out.

    Returns:
        {parameter: tensor of its shape}, in float32 at least.

    Raises:
        InputError: there are no inputs, losses or weights have another shape or no gradient, a name is unknown, or a
            module cannot be handled.
        RunError: a loss is not finite.
    """
    if names is None:
        names = [name for name, p in model.named_parameters() if p.requires_grad and p.is_floating_point()]
        if not names:
            raise InputError("no parameter of the model requires a gradient", hint="Give names=[...]")
    capture, weigh = Capture(model, names), _Weigher(weights)

    def run(batch: Batch) -> None:
        number = rows(batch) if rows is not None else len(_checked(forward(model, batch)))
        losses = add_rows_(capture, number, lambda: _checked(forward(model, batch)), lambda each: weigh(each, batch))
        if len(losses) != number:
            raise InputError(f"forward gave {len(losses)} losses for a batch of {number} rows")
        if capture.visited and not losses.requires_grad:
            raise InputError(
                "the losses carry no gradient", where="forward", hint="Leave out torch.no_grad(), detach() and item()"
            )

    each_batch(capture, inputs, run)
    weigh.check_end()
    return {name: total.div_(weigh.total) for name, total in capture.finish().items()}


def each_batch(
    capture: Capture,
    batches: Iterable[Batch],
    run: Callable[[Batch], None],
    *,
    done: Callable[[Batch], None] = lambda batch: None,
) -> None:
    """The loop over data.

    Args:
        capture: keeps the sums, which `finish` gives.
        batches: of any kind; the graphs of one are in memory together.
        run: makes the forward and backward passes of a batch through `capture`.
        done: told of each batch.
    """
    with capture.attached(), torch.no_grad():
        for batch in batches:
            run(batch)
            capture.end_chunk()
            done(batch)


def add_rows_(
    capture: Capture, rows: int, forward: Callable[[], Tensor], directions: Callable[[Tensor], Iterable[Tensor]]
) -> Tensor:
    """One batch: a forward pass, and a backward pass per direction, whose squares are added to the capture's sums.

    Args:
        capture: in use.
        rows: in the batch, R.
        forward: gives what is differentiated, (R, ...).
        directions: from that, detached, to tensors of its shape.

    Returns:
        What `forward` gave.
    """
    with capture.stage(rows) as stage:
        output = forward()
    found = iter(directions(output.detach()))
    direction, k = next(found, None), 0
    while direction is not None:
        following = next(found, None)  # the graph is kept as long as there is one
        capture.backward(stage, output, direction, range(k * rows, (k + 1) * rows), keep=following is not None)
        direction, k = following, k + 1
    return output


class _Weigher:
    """From the losses of a batch to the directions of its backward passes; keeps the sum of all weights."""

    def __init__(self, weights: Weights | None) -> None:
        self._given = weights
        self._used = 0
        self.total = 0.0

    def __call__(self, losses: Tensor, batch: Any) -> list[Tensor]:
        finite = losses.isfinite().reshape(len(losses), -1).all(1)
        if not bool(finite.all()):
            raise RunError(
                "a loss is not finite",
                where=f"row {int((~finite).long().argmax())} of a batch",
                hint="The weights, or the precision they are run in, overflow",
            )
        weights = self._of(losses, batch)
        self.total += float(weights.double().sum())
        root = weights.sqrt()
        if losses.dim() == 1:
            return [root]
        columns = torch.eye(losses.shape[1], dtype=losses.dtype, device=losses.device)
        return [root * column for column in columns]

    def _of(self, losses: Tensor, batch: Any) -> Tensor:
        if self._given is None:
            return torch.ones_like(losses)
        if callable(self._given):
            found = self._given(losses, batch)
        else:
            found = torch.as_tensor(self._given).flatten()[self._used : self._used + losses.numel()]
            self._used += losses.numel()
            found = found.view(losses.shape) if len(found) == losses.numel() else found
        weights = torch.as_tensor(found).detach().to(losses)
        if weights.shape != losses.shape:
            raise InputError(
                f"weights of shape {tuple(weights.shape)} for losses of shape {tuple(losses.shape)}",
                where="weights",
                hint="Give one weight per loss",
            )
        if not bool((weights.isfinite() & (weights >= 0)).all()):
            raise InputError("a weight is negative or not finite", where="weights")
        return weights

    def check_end(self) -> None:
        """Refuse weights that are left over, or that were none at all."""
        if self._given is not None and not callable(self._given) and self._used != torch.as_tensor(self._given).numel():
            raise InputError(
                f"{torch.as_tensor(self._given).numel()} weights for {self._used} losses",
                where="weights",
                hint="Give one weight per loss",
            )
        if self.total <= 0:
            raise InputError(
                "there are no rows to compute the Fisher information from, or all of their weights are 0",
                where="inputs",
                hint="Check that the batches are not used up: a generator gives them only once",
            )


def _checked(losses: Any) -> Tensor:
    """What `forward` gave, if it can be losses of rows."""
    if not isinstance(losses, Tensor) or losses.dim() not in (1, 2) or not losses.is_floating_point():
        found = f"a tensor of shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise InputError(
            f"forward gave {found}, not one loss per row",
            where="forward",
            hint='Return a tensor of shape (rows,), from a loss with reduction="none": a mean has lost its rows',
        )
    return losses
