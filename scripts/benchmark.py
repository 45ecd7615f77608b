"""One iteration of DF-Merge, the plain way and ours, on the same models, inputs and coefficients, in one run.

    python scripts/benchmark.py                                  a tiny T5 on the CPU
    python scripts/benchmark.py --size small --threads 1         60M parameters
    python scripts/benchmark.py --size base --device cuda        on an accelerator
    python scripts/benchmark.py --size base --count              without one: launches, waits, bytes, products

`sides.py` has both.  Models are random and have the shapes of real ones; nothing is downloaded.  The choices must be
the same but for near-ties, the Fishers and the merged weights equal to `AGREE`; where rounding switches a unit,
both Fishers are compared with one in double precision.  Otherwise the exit code is 1.

With `--count` a narrow model with the real number of layers and heads runs on tensors that say they are elsewhere
(`counting.py`), and its counts are scaled to the real widths.  `projected` is the longer of what the host takes to
launch and what the card takes to compute in float32, and its waits; `floor` is the card's own time in bfloat16.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # beside this script, its neighbours

from dfmerge_studies.importance.task_fisher import task_fisher
from dfmerge_studies.params import TaskVector
from dfmerge_studies.tasks.encoding import Encoded
from scripts.counting import Counts, Widths, counting, elsewhere, move_
from scripts.sides import PHASES, Clock, Found, Work, exact_fisher, ours, plain
from scripts.sizes import SIZES

AGREE = {"fisher": 1e-4, "merged": 1e-4, "losses": 1e-4}  # relative L2 distance; float32 sums in another order
KINK = 1e-3  # what one rectified unit that rounding switches may change of a Fisher
_MEMORY = Path("/proc/self/status")


@dataclass(frozen=True)
class Card:
    """What a card does in a second (data sheets, less a third), and what an operator and a wait take of the host."""

    float32: float = 47e12  # products without tensor cores
    bfloat16: float = 600e12
    memory: float = 2.7e12  # bytes
    launch: float = 10e-6  # seconds
    wait: float = 15e-6

    def projected(self, counts: Counts) -> float:
        """Seconds that the counts would take."""
        card = max(counts.bytes / self.memory, counts.flops / self.float32)
        return max(counts.launches * self.launch, card) + counts.waits * self.wait

    def floor(self, flops: float, least_bytes: float) -> float:
        """Seconds if nothing but the products and the least traffic of memory were left."""
        return max(flops / self.bfloat16, least_bytes / self.memory)


CARDS = {"h100": Card(), "a100": Card(float32=19e12, bfloat16=250e12, memory=1.7e12)}


def measured(side: Callable[[Work, Clock], Found], work: Work, device: torch.device, repeats: int) -> Found:
    """The best time of each phase over some repeats, and the most memory that the side took beside what there was."""
    best: Found | None = None
    for _ in range(repeats):
        start = _mark_memory(device)
        found = side(work, Clock(device))
        found.peak_bytes = _peak(device) - start
        if best is not None:
            found.seconds = {name: min(found.seconds[name], best.seconds[name]) for name in PHASES}
        best = found
    assert best is not None
    return best


def _mark_memory(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if _MEMORY.exists():
        Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the peak
    return _memory("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _memory("VmHWM")


def _memory(field: str) -> int:
    if not _MEMORY.exists():
        return 0
    line = next(line for line in _MEMORY.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Relative L2 distance of b from a."""
    apart = math.fsum(float((a[n] - b[n]).double().square().sum()) for n in a)
    return float((apart / math.fsum(float(a[n].double().square().sum()) for n in a)) ** 0.5)


def compared(work: Work, left: Found, right: Found) -> dict[str, Any]:
    """How far both sides are apart, and whether that is rounding."""
    flat = [[value for task in each.losses for row in task for value in row] for each in (left, right)]
    a, b = (torch.tensor(values, dtype=torch.float64) for values in flat)
    apart = [distance(*each) for each in zip(left.fishers, right.fishers, strict=True)]
    agreement = {
        "fisher": max(apart),
        "merged": distance(left.merged, right.merged),
        "losses": float((a - b).norm() / a.norm()),
    }
    scores = [[_score(rows, task) for rows, task in zip(each.losses, work.rows, strict=True)] for each in (left, right)]
    decided = [
        (x, y)
        for x, y in zip(chain(*left.losses), chain(*right.losses), strict=True)
        if sorted(x)[1] - sorted(x)[0] > 1e-3
    ]
    same = all(x.index(min(x)) == y.index(min(y)) for x, y in decided)
    alike = max(apart) <= AGREE["fisher"]
    if not alike:  # a rectified unit near 0 is on or off by rounding: more digits say who is right
        worst = apart.index(max(apart))
        exact = exact_fisher(work, worst)
        plain_off, ours_off = (distance(exact, each.fishers[worst]) for each in (left, right))
        agreement |= {"fisher, plain to exact": plain_off, "fisher, ours to exact": ours_off}
        alike = ours_off <= max(KINK, plain_off)
    alike &= all(agreement[name] <= AGREE[name] for name in ("merged", "losses"))
    return {
        "distance": agreement,
        "scores": {"plain": scores[0], "ours": scores[1]},
        "agree": same and alike,
    }


def _score(losses: Sequence[Sequence[float]], rows: Sequence[Encoded]) -> float:
    right = [list(each).index(min(each)) == row.label for each, row in zip(losses, rows, strict=True)]
    return 100 * sum(right) / len(right)


def measure(size: str, options: argparse.Namespace) -> dict[str, Any]:
    """Both sides on one size."""
    device = torch.device(options.device)
    work = Work.of(SIZES[size], options).to(device)
    ours(work, Clock(device))  # what is decided and compiled once
    fast, slow = (measured(side, work, device, options.repeats) for side in (ours, plain))
    total = {name: sum(each.seconds.values()) for name, each in (("ours", fast), ("plain", slow))}
    return {
        "size": size,
        "parameters": sum(p.numel() for p in work.base.parameters()),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "seconds": {"ours": _rounded(fast.seconds), "plain": _rounded(slow.seconds)},
        "total": _rounded(total),
        "ratio": _rounded(
            {p: slow.seconds[p] / max(fast.seconds[p], 1e-9) for p in PHASES}
            | {"total": total["plain"] / total["ours"]}
        ),
        "share": _rounded({p: fast.seconds[p] / total["ours"] for p in PHASES}),
        "peak_bytes": {"ours": fast.peak_bytes, "plain": slow.peak_bytes},
        **compared(work, slow, fast),
    }


def count(size: str, options: argparse.Namespace) -> dict[str, Any]:
    """What an iteration of ours would launch, wait for, move and compute on a card, by phase."""
    real, card = SIZES[size], CARDS[options.card]
    small, widths = real.narrow()
    work = Work.of(small, options)
    numbers = dict.fromkeys(PHASES, 0)
    for p in work.vectors[0].deltas.values():
        numbers["write"] += math.prod(widths.shape(p.shape))
    found = counted(work, widths)
    size_of, experts = 4 * numbers["write"], len(work.vectors)
    least = {"write": 3 * experts * size_of, "merge": (2 * experts + 2) * size_of, "fisher": 0, "evaluate": 0}
    phases = {
        name: {
            **{key: value for key, value in asdict(each).items() if key != "where"},
            "projected_seconds": round(card.projected(each), 4),
            "floor_seconds": round(card.floor(each.flops, least[name]), 4),
        }
        for name, each in found.items()
    }
    sums = {key: round(sum(each[key] for each in phases.values()), 4) for key in phases["merge"]}
    return {"size": size, "card": options.card, "parameters": numbers["write"], "phases": phases, "total": sums}


class _CountingClock(Clock):
    """Phases of counts instead of seconds."""

    def __init__(self, counts: Counts) -> None:
        super().__init__(torch.device("cpu"))
        self.counts, self.found = counts, {name: Counts() for name in PHASES}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before = copy.copy(self.counts)
        before.where = self.counts.where.copy()
        yield
        _add(self.found[name], self.counts, before)


def _add(total: Counts, after: Counts, before: Counts) -> None:
    for key in ("launches", "waits", "bytes", "flops"):
        setattr(total, key, getattr(total, key) + getattr(after, key) - getattr(before, key))
    total.where.update(after.where - before.where)


def counted(work: Work, widths: Widths) -> dict[str, Counts]:
    """Counts of one iteration of ours by phase, the second one: what is decided and put on the device once is there."""
    names = list(work.vectors[0].deltas)
    task_fisher(work.resident, work.kind, work.inputs[0][:2], pad_id=0, names=names)  # decides how, on the CPU
    models = move_(work.base), move_(work.resident)
    vectors = tuple(TaskVector(v.expert, elsewhere(v.deltas)) for v in work.vectors)
    there = Work(work.kind, *models, vectors, work.inputs, work.rows, work.coefficients)
    with counting(widths):
        ours(there, Clock(torch.device("cpu")), keep=False)
    with counting(widths) as counts:
        clock = _CountingClock(counts)
        start = copy.copy(counts)
        ours(there, clock, keep=False)
    rest = Counts()
    _add(rest, counts, start)
    for each in clock.found.values():
        for key in ("launches", "waits", "bytes", "flops"):
            setattr(rest, key, getattr(rest, key) - getattr(each, key))
    clock.found["merge"] = rest  # all that is between the other phases
    return clock.found


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


def shared_options(doc: str | None) -> argparse.ArgumentParser:
    """The options that the benchmarks have in common."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=12, help="of an expert's importance")
    parser.add_argument("--tokens", type=int, default=100, help="of an input, from half of it to one and a half times")
    parser.add_argument(
        "--choices", type=int, default=3, help="of an input, where it has any; a classifier has 4 classes"
    )
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    return parser


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


def _show(found: Mapping[str, Any]) -> None:
    if "phases" in found:
        print(
            f"{found['size']}: {found['parameters'] / 1e6:.0f}M parameters, one iteration on {found['card']}, counted"
        )
        print(f"{'':10}{'launches':>10}{'waits':>8}{'GB':>9}{'TFLOP':>9}{'projected s':>13}{'floor s':>9}")
        for name, each in [*found["phases"].items(), ("total", found["total"])]:
            print(
                f"{name:10}{each['launches']:10.0f}{each['waits']:8.0f}"
                f"{each['bytes'] / 1e9:9.1f}{each['flops'] / 1e12:9.2f}"
                f"{each['projected_seconds']:13.3f}{each['floor_seconds']:9.3f}"
            )
        return
    print(
        f"{found['size']}: {found['parameters'] / 1e6:.1f}M parameters, {found['device']}, {found['threads']} threads"
    )
    print(f"{'':10}{'plain s':>10}{'ours s':>10}{'ratio':>8}{'share':>8}")
    for name in PHASES:
        plain_s, ours_s = found["seconds"]["plain"][name], found["seconds"]["ours"][name]
        print(f"{name:10}{plain_s:10.3f}{ours_s:10.3f}{found['ratio'][name]:8.2f}{found['share'][name]:8.0%}")
    print(f"{'total':10}{found['total']['plain']:10.3f}{found['total']['ours']:10.3f}{found['ratio']['total']:8.2f}")
    peak = {side: f"{size / 1e6:.0f} MB" for side, size in found["peak_bytes"].items()}
    print(f"peak memory beside the models: plain {peak['plain']}, ours {peak['ours']}")
    apart = ", ".join(f"{name} {value:.1e}" for name, value in found["distance"].items())
    verdict = "same results" if found["agree"] else "THE RESULTS DIFFER"
    print(f"{verdict}: relative distance of {apart}; scores {found['scores']['ours']}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure or count what the arguments ask for."""
    parser = shared_options(__doc__)
    parser.add_argument("--size", nargs="+", choices=list(SIZES), default=["tiny"])
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--rows", type=int, default=60, help="validation rows of each expert's task")
    parser.add_argument("--count", action="store_true", help="count on a narrow model instead of measuring")
    parser.add_argument("--card", choices=list(CARDS), default="h100", help="whose seconds --count projects")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    right = True
    for size in options.size:
        found = count(size, options) if options.count else measure(size, options)
        right &= found.get("agree", True)
        print(json.dumps(found), flush=True) if options.json else _show(found)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
