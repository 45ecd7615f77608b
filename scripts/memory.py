"""What a trial takes of memory: measured beside what `validate` says, and what `validate` would say of large models.

    python scripts/memory.py measure --size causal-135m --experts 2
    python scripts/memory.py measure --size base --experts 2 --lora 16 --memory 2GiB
    python scripts/memory.py table

Models have random weights of real shapes.  `measure` runs one merge and one evaluation in this process and compares the
peak of its resident memory, or of what tensors take of a card, less what was there before, with the estimate.  `table`
builds models without memory (on torch's device `meta`) and asks the same function; nothing is run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
import torch
from torch import Tensor, nn

from dfmerge_studies.checkpoints.factored import Factored, Factors
from dfmerge_studies.checkpoints.resident import Resident
from dfmerge_studies.objective.memory import Activations, activations_of, memory_of, place_
from dfmerge_studies.objective.merger import Merger
from dfmerge_studies.objective.problem import Checkpoints, Problem, TaskInputs
from dfmerge_studies.params import TaskVector
from dfmerge_studies.spec import StudySpec
from dfmerge_studies.tasks.encoding import Kind
from scripts.sizes import SIZES, Size, examples

TASKS = {Kind.CLASSIFICATION: "classification"}
# The C library keeps many of the blocks that are freed, unless it is told this.
NO_LEFTOVERS = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
LARGE = {  # Llama's shapes
    "1B": Size(Kind.CAUSAL, 16, 32, 2048, 8192, 32000, key_heads=8),
    "7B": Size(Kind.CAUSAL, 32, 32, 4096, 11008, 32000),
    "13B": Size(Kind.CAUSAL, 40, 40, 5120, 13824, 32000),
}


# Layers, heads, width, inner width, vocabulary.
FITTED = (
    (2, 4, 64, 192, 1000),
    (4, 4, 64, 192, 1000),
    (2, 4, 128, 192, 1000),
    (2, 4, 64, 384, 1000),
    (2, 4, 64, 192, 3000),
    (3, 8, 128, 288, 2000),
    (4, 4, 192, 480, 4000),
)
CHECKED = ((5, 5, 320, 960, 6000), (6, 8, 256, 700, 9000))


@dataclass(frozen=True)
class Shape:
    """What a problem is made of.

    Attributes:
        size: of the models.
        experts: how many, each with a task.
        rank: of LoRA experts on all linear layers but the output; 0 for whole models.
        dtype: of weights.
        device: where weights are: `cpu`, `cuda`, or `meta` for nowhere.
    """

    size: Size
    experts: int
    rank: int
    dtype: torch.dtype
    device: str

    def problem(self, *, inputs: int, tokens: int, **fields: Any) -> Problem:
        """A loaded problem with random weights and inputs.

        Args:
            inputs: of each task, for importance and for evaluation.
            tokens: of an input, on average.
            **fields: of the spec.
        """
        with torch.device("cpu" if self.device == "cuda" else self.device):
            model = self.size.build().eval().requires_grad_(False).to(self.dtype)
        deltas = [self._deltas(model) for _ in range(self.experts)]
        names = [name for name, _ in model.named_parameters() if name in deltas[0]]
        parameters = dict(model.named_parameters())
        base = {name: parameters[name].detach().clone() for name in names}
        model.to(self.device)  # alone: what is loaded is on the host until it is placed
        tasks = [f"task{i}" for i in range(self.experts)]
        vectors = [TaskVector(task, own) for task, own in zip(tasks, deltas, strict=True)]
        found: Any = dict.fromkeys(("tokenizer", "base_digest"))
        digests = dict.fromkeys(tasks, "")
        resident = Resident(
            model=model,
            base=base,
            task_vectors=vectors,
            names=names,
            heads={},
            **found,
            expert_digests=digests,
            other_tokenizers={},
        )
        rows = {
            task: examples(self.size.kind, inputs, tokens, 2, vocabulary=self.size.vocabulary, seed=i)
            for i, task in enumerate(tasks)
        }
        spec = self._spec(tasks, fields)
        kinds = dict.fromkeys(tasks, self.size.kind)
        unknown: Any = None
        return Problem(
            spec,
            Checkpoints(unknown, {}, kinds),
            resident,
            {task: TaskInputs({"validation": own}, own, own) for task, own in rows.items()},
            0,
        )

    def _deltas(self, model: nn.Module) -> Mapping[str, Tensor]:
        if not self.rank:
            return {name: 1e-3 * torch.randn_like(parameter) for name, parameter in model.named_parameters()}
        found: dict[str, Factors | Tensor] = {}
        for path, layer in model.named_modules():
            if isinstance(layer, nn.Linear) and path != "lm_head":
                rows, columns = layer.weight.shape
                left, right = (layer.weight.new_empty(shape) for shape in ((rows, self.rank), (self.rank, columns)))
                found[f"{path}.weight"] = Factors(left.normal_(std=1e-2), right.normal_(std=1e-2), 1.0)
        return Factored(found)

    def _spec(self, tasks: list[str], fields: Mapping[str, Any]) -> StudySpec:
        kind = TASKS.get(self.size.kind, "choice")
        task = {"type": kind, "dataset": {"path": "json"}, "doc_to_text": "input", "doc_to_target": "label"}
        content = {
            "name": "memory",
            "base": "base",
            "experts": {each: each for each in tasks},
            "tasks": dict.fromkeys(tasks, task if kind == "classification" else {**task, "doc_to_choice": "choices"}),
            "dtype": str(self.dtype).removeprefix("torch."),
            "cache": "none",
            **fields,
        }
        return StudySpec.from_fields(content, file=Path("spec.yaml"), workdir=None)


def _run(problem: Problem) -> None:
    Merger(problem, problem.spec.row, None).run(dict.fromkeys(problem.experts, 0.4))


def _without_leftovers() -> None:
    """Start this process anew, unless it was started so, for freed blocks to go back to the system at once."""
    if any(os.environ.get(name) != value for name, value in NO_LEFTOVERS.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **NO_LEFTOVERS})


def _held(device: str) -> int:
    return psutil.Process().memory_info().rss if device == "cpu" else torch.cuda.memory_allocated(device)


def _forget_peak(device: str) -> None:
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
    else:
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: str) -> int:
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Peak of a trial, and the estimate of it, in bytes."""
    dtype = getattr(torch, arguments.dtype)
    small = replace(SIZES[arguments.size], layers=1, width=64, heads=1, inner=64, vocabulary=1000, key_heads=None)
    device = arguments.device
    first = Shape(small, 1, 0, dtype, device).problem(inputs=2, tokens=8)
    place_(first)
    _run(first)  # imports what is imported late
    del first
    before = _held(device)
    shape = Shape(SIZES[arguments.size], arguments.experts, arguments.lora, dtype, device)
    problem = shape.problem(
        inputs=arguments.inputs, tokens=arguments.tokens, memory=arguments.memory, method=arguments.method
    )
    place_(problem)
    _run(problem)  # what is looked up once is looked up
    _forget_peak(device)
    _run(problem)
    peak = _peak(device) - before
    needs = memory_of(problem, activations_of(problem)).device
    return {
        "parameters": sum(p.numel() for p in problem.resident.model.parameters()),
        "changed": sum(problem.sizes.values()),
        "parts": len(problem.parts()),
        "peak": peak,
        "estimate": needs.total,
        "ratio": needs.total / peak,
        "by": asdict(needs),
    }


@dataclass(frozen=True)
class Growth:
    """Activations of a chunk of importance as they grow with the widths of a causal model, fitted to narrow ones.

    A batch of evaluation takes less than that at the same budget, so it is left out.

    Attributes:
        weights: bytes by feature.
        error: the largest relative error on models that were not fitted to.
    """

    weights: Tensor
    error: float

    @classmethod
    def of(cls, dtype: torch.dtype, **budgets: int) -> Growth:
        """Measure and fit, with experts that are whole models; LoRA experts, which leave embeddings alone, take less.

        Args:
            dtype: of weights.
            **budgets: inputs and tokens of a task, `token_budget` and `row_budget`.
        """
        sizes = [Size(Kind.CAUSAL, *shape) for shape in (*FITTED, *CHECKED)]
        rows = torch.stack([_features(size) for size in sizes])
        found = [_activations(size, dtype, budgets).importance for size in sizes]
        wanted, scale = torch.tensor(found, dtype=torch.float64), rows.abs().amax(0)
        known = len(FITTED)
        ratios = rows[:known] / scale / wanted[:known, None]
        weights = torch.linalg.lstsq(ratios, torch.ones(known, 1).double()).solution[:, 0] / scale
        return cls(weights, float((rows @ weights / wanted - 1)[known:].abs().max()))

    def at(self, size: Size) -> Activations:
        """Of a model that is not run."""
        return Activations(importance=int(_features(size) @ self.weights))


def _activations(size: Size, dtype: torch.dtype, budgets: Mapping[str, int]) -> Activations:
    inputs, tokens, rows, evaluated = (budgets[k] for k in ("inputs", "tokens", "row_budget", "token_budget"))
    problem = Shape(size, 1, 0, dtype, "cpu").problem(
        inputs=inputs, tokens=tokens, token_budget=evaluated, importance={"row_budget": rows}
    )
    return activations_of(problem)


def _features(size: Size) -> Tensor:
    """What activations are a sum of: widths and heads by layers, one layer's widths, a buffer of the largest matrix."""
    buffer = max(size.inner, size.vocabulary) * size.width
    by_layer = (size.layers * size.width, size.layers * size.inner, size.layers * size.heads)
    return torch.tensor((*by_layer, size.width, size.inner, buffer), dtype=torch.float64)


def rows_of_table(experts: int, cards: list[int], budgets: Mapping[str, int]) -> list[dict[str, Any]]:
    """What large models would take, in bytes, and the parts in which they fit on cards.

    Args:
        experts: how many.
        cards: bytes of each, of which a tenth is left.
        budgets: as for `Growth.of`.
    """
    found = []
    growths = {dtype: Growth.of(dtype, **budgets) for dtype in (torch.float32, torch.bfloat16)}
    for rank in (0, 16):
        for dtype, growth in growths.items():
            for name, size in LARGE.items():
                problem = Shape(size, experts, rank, dtype, "meta").problem(inputs=1, tokens=8)
                activations = growth.at(size)
                whole = memory_of(problem, activations).device
                problem.resident.keep_on_(host=True)
                problem.part_entries = least = max(problem.sizes.values())
                placed = memory_of(problem, activations)
                fixed = placed.device.total - placed.device.sums - placed.device.importance
                parts = []
                for card in cards:
                    room = int(0.9 * card) - fixed
                    if whole.total <= 0.9 * card:
                        parts.append(0)
                    else:
                        problem.part_entries = max(1, room // 12)
                        parts.append(len(problem.parts()) if room >= 12 * least else None)
                found.append(
                    {
                        "model": name,
                        "rank": rank,
                        "dtype": problem.spec.dtype,
                        "error": growth.error,
                        "parameters": sum(p.numel() for p in problem.resident.model.parameters()),
                        "whole": asdict(whole),
                        "total": whole.total,
                        "least": placed.device.total,
                        "host": placed.host.total,
                        "parts": parts,
                    }
                )
    return found


def print_table(rows: list[dict[str, Any]], cards: list[int]) -> None:
    """The same as a table in Markdown, in GB."""
    names = ["model", "base + task vectors", "sums + importance", "activations", "all", "in parts", "then on the host"]
    head = ["", "experts", "dtype", *names, *(f"{card / 2**30:.0f} GiB" for card in cards)]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        by = row["whole"]
        sizes = (
            by["model"],
            by["base"] + by["vectors"],
            by["sums"] + by["importance"],
            by["activations"],
            row["total"],
            row["least"],
            row["host"],
        )
        words = {None: "no", 0: "yes", 1: "from the host"}
        fits = [words.get(n, f"{n} parts") for n in row["parts"]]
        kind = f"LoRA {row['rank']}" if row["rank"] else "whole"
        print(f"| {' | '.join([row['model'], kind, row['dtype'], *(f'{s / 1e9:.1f}' for s in sizes), *fits])} |")


def main() -> None:
    """Measure, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("measure", help="run a trial of random models and compare")
    measure.add_argument("--size", choices=list(SIZES), default="causal-135m")
    measure.add_argument("--method", default="df-merge")
    measure.add_argument("--lora", type=int, default=0, metavar="RANK", help="adapters of all linear layers")
    measure.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    measure.add_argument("--memory", default="auto")
    measure.add_argument("--device", default="cpu", help="cpu or cuda")
    measure.add_argument("--threads", type=int, default=1)
    table = commands.add_parser("table", help="what 1B, 7B and 13B would take, by the estimate")
    table.add_argument("--cards", type=int, nargs="+", default=[24, 48, 80], metavar="GIB")
    table.add_argument("--row-budget", type=int, default=2048)
    table.add_argument("--token-budget", type=int, default=2048)
    for each, experts, inputs in ((measure, 2, 4), (table, 3, 30)):
        each.add_argument("--experts", type=int, default=experts)
        each.add_argument("--inputs", type=int, default=inputs, help="of each task")
        each.add_argument("--tokens", type=int, default=60, help="of an input, on average")
        each.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.command == "measure":
        _without_leftovers()
        torch.set_num_threads(arguments.threads)
        found: Any = measured(arguments)
        text = ", ".join(f"{what} {size / 1e9:.3f}" for what, size in found["by"].items() if size)
        said = (
            f"{found['parameters'] / 1e6:.0f}M parameters, {found['changed'] / 1e6:.0f}M changed, "
            f"{found['parts']} part(s): measured {found['peak'] / 1e9:.3f} GB, "
            f"estimated {found['estimate'] / 1e9:.3f} GB ({100 * (found['ratio'] - 1):+.1f} %): {text}"
        )
        print(json.dumps(found) if arguments.json else said)
        return
    budgets = {name: getattr(arguments, name) for name in ("inputs", "tokens", "row_budget", "token_budget")}
    cards = [2**30 * card for card in arguments.cards]
    found = rows_of_table(arguments.experts, cards, budgets)
    if arguments.json:
        print(json.dumps(found))
    else:
        print_table(found, cards)
        worst = max(row["error"] for row in found)
        print(f"\nActivations of two models that they were not fitted to: off by {100 * worst:.0f} %.")


if __name__ == "__main__":
    main()
