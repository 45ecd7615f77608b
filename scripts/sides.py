"""One iteration of DF-Merge, the plain way and by the package, on the same work.

The plain way is the paper's procedure (arXiv 2504.18992) as one would write it down: a copy of the base per expert, one
forward and one backward pass per input and choice, dictionaries of squared gradients, and every choice a row of its own
in evaluation.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfmerge_studies.checkpoints.in_place import InPlace
from dfmerge_studies.importance.task_fisher import ROW_BUDGET, task_fisher
from dfmerge_studies.merging import merge_into_
from dfmerge_studies.objective.problem import ROOMY
from dfmerge_studies.params import TaskVector
from dfmerge_studies.tasks.batches import device_of
from dfmerge_studies.tasks.encoding import HEADED, Encoded, Kind
from dfmerge_studies.tasks.evaluate import TOKEN_BUDGET, choice_losses
from dfmerge_studies.tasks.replay import allow_replays_
from scripts.sizes import Size, examples

FLOOR = 1e-12  # added to importances on both sides
PHASES = ("write", "fisher", "merge", "evaluate")
PLAIN_BATCH = 16  # rows


def loop(model: nn.Module, kind: Kind, inputs: Sequence[Encoded], names: Sequence[str]) -> dict[str, Tensor]:
    """The definition of the exact estimator: every input and choice by itself."""
    parameters = dict(model.named_parameters())
    wanted = [parameters[name].requires_grad_() for name in names]
    total = {name: torch.zeros_like(parameters[name]) for name in names}
    for example in inputs:
        losses = row_losses(model, kind, example)
        p = torch.softmax(-torch.stack([loss.detach() for loss in losses]), dim=0)
        for c, loss in enumerate(losses):
            gradients = torch.autograd.grad(loss, wanted, retain_graph=kind in HEADED, allow_unused=True)
            for name, gradient in zip(names, gradients, strict=True):
                if gradient is not None:
                    total[name].addcmul_(gradient, gradient, value=float(p[c]) / len(inputs))
    return total


def row_losses(model: nn.Module, kind: Kind, example: Encoded) -> list[Tensor]:
    """Loss of every choice of one input, a forward pass each where the choice is part of it."""
    device = next(model.parameters()).device
    ids = torch.tensor([example.input_ids], device=device)
    if kind in HEADED:
        return list(-torch.log_softmax(model(input_ids=ids).logits[0], dim=-1))
    found = []
    for choice in example.choices:
        target = torch.tensor(choice, device=device)
        if kind is Kind.TEXT_TO_TEXT:
            logits = model(input_ids=ids, labels=target[None]).logits[0]
        else:
            whole = torch.cat([ids, target[None]], dim=1)
            logits = model(input_ids=whole).logits[0, ids.shape[1] - 1 : -1]
        found.append(F.cross_entropy(logits, target))
    return found


def exact_fisher(work: Work, index: int) -> dict[str, Tensor]:
    """The plain way in double precision: what both sides would be without rounding."""
    model, vector = copy.deepcopy(work.base).double(), work.vectors[index]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in vector.deltas:
                parameter += work.coefficients[vector.expert] * vector.deltas[name].double()
    return loop(model, work.kind, work.inputs[index], list(vector.deltas))


@torch.no_grad()
def plain_losses(model: nn.Module, kind: Kind, inputs: Sequence[Encoded]) -> list[list[float]]:
    """Losses of all choices, in the order of the inputs, rows padded in batches of one size."""
    device = next(model.parameters()).device
    rows = [(i, choice) for i, example in enumerate(inputs) for choice in (example.choices or ((),))]
    found: list[list[float]] = [[] for _ in inputs]
    for start in range(0, len(rows), PLAIN_BATCH):
        batch = rows[start : start + PLAIN_BATCH]
        texts = [inputs[i].input_ids + (choice if kind is Kind.CAUSAL else ()) for i, choice in batch]
        ids = torch.zeros(len(batch), max(map(len, texts)), dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full((len(batch), max(len(c) for _, c in batch) or 1), -100)
        for row, (text, (_, choice)) in enumerate(zip(texts, batch, strict=True)):
            ids[row, : len(text)], mask[row, : len(text)] = torch.tensor(text), 1
            if choice:
                labels[row, : len(choice)] = torch.tensor(choice)
        given = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        if kind in HEADED:
            for (i, _), losses in zip(batch, -torch.log_softmax(model(**given).logits, dim=-1), strict=True):
                found[i] = losses.tolist()
            continue
        if kind is Kind.TEXT_TO_TEXT:
            logits = list(model(**given, labels=labels.to(device)).logits)
        else:
            starts = [len(inputs[i].input_ids) - 1 for i, _ in batch]
            logits = [row[begin:] for row, begin in zip(model(**given).logits, starts, strict=True)]
        for (i, choice), row in zip(batch, logits, strict=True):
            found[i].append(float(F.cross_entropy(row[: len(choice)], torch.tensor(choice, device=device))))
    return found


@dataclass(frozen=True)
class Work:
    """What both sides are given: a base, experts with an input set and validation rows each, a coefficient each.

    `resident` is the model that ours writes into in every iteration, as in a study: what it is asked once stays known.
    """

    kind: Kind
    base: nn.Module
    resident: nn.Module
    vectors: tuple[TaskVector, ...]
    inputs: tuple[list[Encoded], ...]
    rows: tuple[list[Encoded], ...]
    coefficients: Mapping[str, float]

    @classmethod
    def of(cls, size: Size, options: argparse.Namespace) -> Work:
        """Random work of the size that the options ask for."""
        torch.manual_seed(options.seed)
        base = size.build().eval().requires_grad_(False)
        parameters = {name: p for name, p in base.named_parameters() if "position_embeddings" not in name}
        names = [f"expert{i}" for i in range(options.experts)]
        draw = torch.Generator().manual_seed(options.seed)

        def deltas() -> dict[str, Tensor]:
            return {
                n: 0.1 * p.std() * torch.randn(p.shape, generator=draw) if p.numel() > 1 else 0 * p
                for n, p in parameters.items()
            }

        def texts(count: int, seed: int) -> list[Encoded]:
            choices = options.choices if size.kind not in HEADED else 4
            return examples(size.kind, count, options.tokens, choices, vocabulary=size.vocabulary, seed=seed)

        return cls(
            size.kind,
            base,
            copy.deepcopy(base),
            tuple(TaskVector(name, deltas()) for name in names),
            tuple(texts(options.inputs, 2 * i) for i in range(options.experts)),
            tuple(texts(options.rows, 2 * i + 1) for i in range(options.experts)),
            {name: 0.3 + 0.4 * i / max(1, options.experts - 1) for i, name in enumerate(names)},
        )

    def to(self, device: torch.device) -> Work:
        """The same on a device."""
        vectors = tuple(TaskVector(v.expert, {n: d.to(device) for n, d in v.deltas.items()}) for v in self.vectors)
        models = self.base.to(device), self.resident.to(device)
        return Work(self.kind, *models, vectors, self.inputs, self.rows, self.coefficients)


@dataclass
class Found:
    """What a side computed, and what each phase took; `merged` of ours is the resident model's, until it is written."""

    fishers: list[dict[str, Tensor]]
    merged: dict[str, Tensor]
    losses: list[list[list[float]]]
    seconds: dict[str, float]
    peak_bytes: int = 0


class Clock:
    """Processor seconds of phases on a CPU (others may be busy too), seconds of the clock on an accelerator."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(PHASES, 0.0)

    def now(self) -> float:
        """Seconds, when all that was launched is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if self.device.type == "cpu" else time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds what the block takes to a phase."""
        start = self.now()
        yield
        self.seconds[name] += self.now() - start


def plain(work: Work, clock: Clock) -> Found:
    """The paper's procedure."""
    names, fishers = list(work.vectors[0].deltas), []
    for vector, inputs in zip(work.vectors, work.inputs, strict=True):
        with clock.phase("write"), torch.no_grad():
            scaled = copy.deepcopy(work.base)
            for name, parameter in scaled.named_parameters():
                if name in vector.deltas:
                    parameter += work.coefficients[vector.expert] * vector.deltas[name]
        with clock.phase("fisher"):
            fishers.append(loop(scaled, work.kind, inputs, names))
    with clock.phase("merge"), torch.no_grad():
        model = copy.deepcopy(work.base)
        for name, parameter in model.named_parameters():
            if name in fishers[0]:
                weights = [fisher[name] + FLOOR for fisher in fishers]
                steps = [
                    weight * (work.coefficients[vector.expert] * vector.deltas[name])
                    for weight, vector in zip(weights, work.vectors, strict=True)
                ]
                parameter += len(weights) * sum(steps[1:], steps[0]) / sum(weights[1:], weights[0])
    with clock.phase("evaluate"):
        losses = [plain_losses(model, work.kind, rows) for rows in work.rows]
    return Found(fishers, {n: p.detach() for n, p in model.named_parameters()}, losses, clock.seconds)


def ours(work: Work, clock: Clock, *, keep: bool = True) -> Found:
    """The same by the package: one model, written into."""
    names, model = list(work.vectors[0].deltas), work.resident
    parameters = dict(work.base.named_parameters())
    base = {name: parameters[name].detach() for name in names}
    place, fishers = InPlace(model, base, work.vectors, names), []
    device = device_of(model)
    size = 1 if device.type == "cpu" else ROOMY  # as a study on a card with much memory does it
    if device.type == "cuda":
        allow_replays_(model)

    def importance(index: int) -> Mapping[str, Tensor]:
        with clock.phase("write"):
            place.load_scaled_(index, work.coefficients[work.vectors[index].expert])
        with clock.phase("fisher"):
            fisher = task_fisher(
                model, work.kind, work.inputs[index], pad_id=0, names=names, row_budget=size * ROW_BUDGET
            ).values
        if keep:
            fishers.append(fisher)
        return fisher

    before = clock.now()
    merge_into_(model, base, work.vectors, work.coefficients, importance, floor=FLOOR)
    clock.seconds["merge"] += clock.now() - before - clock.seconds["write"] - clock.seconds["fisher"]
    with clock.phase("evaluate"):
        losses = [
            choice_losses(model, work.kind, rows, pad_id=0, token_budget=size * TOKEN_BUDGET) for rows in work.rows
        ]
    return Found(fishers, {n: p.detach() for n, p in model.named_parameters()}, losses, clock.seconds)
