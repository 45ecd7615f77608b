"""Measure the batched Fisher engine against a loop over single rows, and compare what they compute, in one run.

    python scripts/benchmark_fisher.py                    a small T5 and a MiniLM-sized BERT, on the CPU
    python scripts/benchmark_fisher.py --device cuda      the same on an accelerator

The loop is the plain way: batch size 1, one backward pass per input and choice, the forward pass shared by the choices
of an input where that is free (classification).  Models are random, which changes no time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration

from dfmerge_studies.importance.task_fisher import task_fisher
from dfmerge_studies.tasks.encoding import Encoded, Kind


def bert() -> nn.Module:
    """An encoder of MiniLM's size (6 layers of 384) with 4 classes, and the vocabulary of BERT."""
    return BertForSequenceClassification(
        BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12, num_labels=4)
    )


def t5() -> nn.Module:
    """A tied T5 of about 8 million parameters."""
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=8000,
            d_model=256,
            d_kv=32,
            d_ff=1024,
            num_layers=3,
            num_heads=8,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
    )


def examples(kind: Kind, inputs: int, tokens: int, choices: int) -> list[Encoded]:
    """Random inputs of half to one and a half times `tokens` tokens, choices of 2 to 4 tokens."""
    draw = torch.Generator().manual_seed(0)

    def text(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, 7000, (length,), generator=draw).tolist())

    made = []
    for i in range(inputs):
        length = tokens // 2 + int(torch.randint(0, tokens + 1, (), generator=draw))
        options = tuple(text(2 + c % 3) for c in range(choices)) if kind is not Kind.CLASSIFICATION else ()
        made.append(Encoded(i, text(length), options, 0))
    return made


def loop(model: nn.Module, kind: Kind, inputs: list[Encoded], names: list[str]) -> dict[str, Tensor]:
    """The definition of the exact estimator, one row at a time."""
    parameters = dict(model.named_parameters())
    wanted = [parameters[name] for name in names]
    total = {name: torch.zeros_like(parameters[name]) for name in names}
    device = wanted[0].device
    for example in inputs:
        ids = torch.tensor([example.input_ids], device=device)
        if kind is Kind.CLASSIFICATION:
            losses = list(-torch.log_softmax(model(input_ids=ids).logits[0], dim=-1))
        else:
            targets = [torch.tensor(choice, device=device) for choice in example.choices]
            losses = [F.cross_entropy(model(input_ids=ids, labels=t[None]).logits[0], t) for t in targets]
        p = torch.softmax(-torch.stack([loss.detach() for loss in losses]), dim=0)
        for c, loss in enumerate(losses):
            gradients = torch.autograd.grad(loss, wanted, retain_graph=kind is Kind.CLASSIFICATION)
            for name, gradient in zip(names, gradients, strict=True):
                total[name].addcmul_(gradient, gradient, value=float(p[c]) / len(inputs))
    return total


def timed(
    run: Callable[[], dict[str, Tensor]], device: torch.device, repeats: int
) -> tuple[dict[str, Tensor], float, float]:
    """The result, and the best of several times: seconds of the clock, and of the processor (for busy machines)."""
    best, work = float("inf"), float("inf")
    result: dict[str, Tensor] = {}
    for _ in range(repeats):
        start, used = time.perf_counter(), time.process_time()
        result = run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best, work = min(best, time.perf_counter() - start), min(work, time.process_time() - used)
    return result, best, work


def measure(label: str, options: argparse.Namespace) -> dict[str, Any]:
    """Both ways on one model: seconds, their ratio, and the relative L2 distance of the results."""
    kind, build = {"bert": (Kind.CLASSIFICATION, bert), "t5": (Kind.TEXT_TO_TEXT, t5)}[label]
    device = torch.device(options.device)
    model = build().to(device).eval()
    inputs = examples(kind, options.inputs, options.tokens, options.choices)
    names = [name for name, _ in model.named_parameters() if options.embeddings or "embeddings" not in name]

    def engine() -> dict[str, Tensor]:
        return task_fisher(model, kind, inputs, pad_id=0, names=names, row_budget=options.row_budget).values

    engine()
    fast, fast_seconds, fast_work = timed(engine, device, options.repeats)
    slow, slow_seconds, slow_work = timed(lambda: loop(model, kind, inputs, names), device, options.repeats)
    error = sum(float((fast[n] - slow[n]).double().square().sum()) for n in names) ** 0.5
    size = sum(float(slow[n].double().square().sum()) for n in names) ** 0.5
    return {
        "model": label,
        "parameters": sum(slow[n].numel() for n in names),
        "inputs": options.inputs,
        "choices": options.choices,
        "engine_seconds": round(fast_seconds, 3),
        "loop_seconds": round(slow_seconds, 3),
        "ratio": round(slow_seconds / fast_seconds, 2),
        "engine_cpu_seconds": round(fast_work, 3),
        "loop_cpu_seconds": round(slow_work, 3),
        "cpu_ratio": round(slow_work / fast_work, 2),
        "relative_l2": error / size,
    }


def main() -> None:
    """Parse the command line and print one JSON line per model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["bert", "t5"], default=["bert", "t5"])
    parser.add_argument("--inputs", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--choices", type=int, default=4, help="choices per input (T5)")
    parser.add_argument("--row-budget", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-embeddings", dest="embeddings", action="store_false", help="BERT without its embeddings")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    for label in options.models:
        print(json.dumps(measure(label, options)), flush=True)


if __name__ == "__main__":
    main()
