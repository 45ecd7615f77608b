"""What logged searches come to: how far each was from the best known merge after so many trials, as tables and a plot.

A log has one JSON line per search: variant, sampler, seed, points and scores of its trials, and its test scores.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

try:
    from scripts.surfaces import Array, Grid, read_log
except ModuleNotFoundError:  # run beside a file
    from surfaces import Array, Grid, read_log

AFTER = (10, 15, 20, 30, 40, 60)  # trials
EDGE = 0.005


def best_known(lines: Sequence[Mapping[str, Any]], grid: Grid | None) -> Callable[[Mapping[str, Any]], float]:
    """From a logged search to the best mean score that is known where it searched.

    Of recorded merges that is the grid's; of real ones the best that any search found on the same seed's rows.

    Args:
        lines: of the log.
        grid: the recorded surfaces, None for real merges.
    """
    tops: dict[tuple[str, int], float] = defaultdict(lambda: -np.inf)
    for line in lines:
        key = line["variant"], line["seed"]
        tops[key] = max(tops[key], best_so_far(line)[-1])
    return lambda line: grid.best(line["variant"]) if grid else tops[line["variant"], line["seed"]]


def best_so_far(line: Mapping[str, Any]) -> Array:
    """Best mean score after each trial of a search."""
    return np.maximum.accumulate(np.array(line["scores"]).mean(-1))


def at_edges(line: Mapping[str, Any]) -> float:
    """Share of the proposals with two or more coefficients at an edge."""
    points = np.array(line["trials"][line["startup"] :])
    return float((((points < EDGE) | (points > 1 - EDGE)).sum(-1) >= 2).mean()) if len(points) else 0.0


def tables(log: Path, grid: Grid | None) -> Iterator[str]:
    """Markdown, one table per variant."""
    lines = read_log(log)
    best = best_known(lines, grid)
    for variant in dict.fromkeys(line["variant"] for line in lines):
        mine = [line for line in lines if line["variant"] == variant]
        after = [n for n in AFTER if n <= min(len(line["scores"]) for line in mine)]
        yield f"\n**{variant}**, {len({line['seed'] for line in mine})} seeds\n"
        yield "| sampler | " + " | ".join(f"gap at {n}" for n in after) + " | at an edge | s | validation | test |"
        yield "|---|" + "---:|" * (len(after) + 4)
        for sampler in dict.fromkeys(line["sampler"] for line in mine):
            rows = [line for line in mine if line["sampler"] == sampler]
            gaps = [best(line) - best_so_far(line) for line in rows]
            cells = [f"{np.mean([g[n - 1] for g in gaps]):.2f} ({max(g[n - 1] for g in gaps):.1f})" for n in after]
            cells.append(f"{100 * np.mean([at_edges(line) for line in rows]):.0f} %")
            seconds = np.mean([line["seconds"] for line in rows])
            cells.append("" if np.isnan(seconds) else f"{seconds:.2f}")
            cells.append(with_error([best_so_far(line)[-1] for line in rows]))
            cells.append(with_error([np.mean(line["test"]) for line in rows if line["test"] is not None]))
            yield f"| {sampler} | " + " | ".join(cells) + " |"


def with_error(values: Sequence[float]) -> str:
    """Mean and its standard error over seeds."""
    if not values:
        return ""
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{np.mean(values):.1f} ± {error:.1f}"


def plot(log: Path, grid: Grid | None, file: Path) -> None:
    """Gap over trials, one panel per variant, the mean over seeds."""
    import matplotlib.pyplot as plt

    lines = read_log(log)
    best = best_known(lines, grid)
    variants = list(dict.fromkeys(line["variant"] for line in lines))
    figure, axes = plt.subplots(1, len(variants), figsize=(5 * len(variants), 4), sharey=True, squeeze=False)
    for axis, variant in zip(axes[0], variants, strict=True):
        mine = [line for line in lines if line["variant"] == variant]
        for sampler in dict.fromkeys(line["sampler"] for line in mine):
            curves = [best(line) - best_so_far(line) for line in mine if line["sampler"] == sampler]
            shortest = min(map(len, curves))
            axis.plot(range(1, shortest + 1), np.mean([c[:shortest] for c in curves], 0), label=sampler)
        axis.set(title=variant, xlabel="trials", ylim=(0, None))
    axes[0][0].set_ylabel("gap to the best known, points")
    axes[0][-1].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
