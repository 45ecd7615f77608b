"""What an iteration launches on an accelerator and how often the host waits for it: counted, with a ceiling each.

A change that adds a wait to a hot path, or a pass over the parameters, fails here without a GPU and without a clock.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import pytest
import torch

from dfmerge_studies.importance.task_fisher import task_fisher
from dfmerge_studies.tasks.evaluate import choice_losses
from dfmerge_studies.tasks.folding import settle_folding
from scripts.benchmark import counted
from scripts.counting import counting, elsewhere, here, move_
from scripts.sides import Work
from scripts.sizes import SIZES, Size

EXPERTS, INPUTS, ROWS = 1, 8, 16

# Two layers of each family, an iteration after the first.  Launches per parameter; waits of `write` and `merge`
# per iteration, of `fisher` per input, of `evaluate` per task.  Lower a ceiling when a change makes it lower.
CEILINGS = {
    "base": {"write": (2, 0), "merge": (9.2, 1), "fisher": (35.3, 3.8), "evaluate": (5.4, 3)},
    "bert-base": {"write": (2, 0), "merge": (9.2, 1), "fisher": (24, 1.8), "evaluate": (1.4, 2)},
    "causal-135m": {"write": (2, 0), "merge": (9.4, 1), "fisher": (26.4, 2.4), "evaluate": (5.7, 1)},
}


def shallow(name: str) -> Size:
    return replace(SIZES[name], layers=2)


def work_of(size: Size, *, inputs: int = INPUTS, rows: int = ROWS) -> Work:
    options = {"seed": 0, "experts": EXPERTS, "inputs": inputs, "rows": rows, "tokens": 100, "choices": 3}
    return Work.of(size, argparse.Namespace(**options))


@pytest.mark.parametrize("name", CEILINGS)
def test_an_iteration_launches_and_waits_no_more_than_its_ceiling(name: str) -> None:
    small, widths = shallow(name).narrow()
    work = work_of(small)
    parameters = len(work.vectors[0].deltas)
    found = counted(work, widths)
    per_wait = {"write": 1, "merge": 1, "fisher": EXPERTS * INPUTS, "evaluate": EXPERTS}
    for phase, (launches, waits) in CEILINGS[name].items():
        each = found[phase]
        assert each.launches / (EXPERTS * parameters) <= launches, (phase, each)
        assert each.waits / per_wait[phase] <= waits, (phase, each)


@pytest.mark.parametrize("name", CEILINGS)
def test_what_is_counted_computes_what_the_cpu_computes(name: str) -> None:
    work = work_of(shallow(name).narrow()[0], inputs=4, rows=4)
    model, names = work.base, list(work.vectors[0].deltas)
    fisher = task_fisher(model, work.kind, work.inputs[0], pad_id=0, names=names).values
    losses = choice_losses(model, work.kind, work.rows[0], pad_id=0)
    move_(model)
    with counting() as counts:
        counted_fisher = here(task_fisher(model, work.kind, work.inputs[0], pad_id=0, names=names).values)
        counted_losses = choice_losses(model, work.kind, work.rows[0], pad_id=0)
    assert counts.launches > 0
    torch.testing.assert_close(counted_fisher, fisher, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(torch.tensor(counted_losses), torch.tensor(losses), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["bert-base", "causal-135m"])
def test_within_its_budget_an_importance_takes_as_many_launches_for_many_inputs_as_for_few(name: str) -> None:
    work = work_of(shallow(name).narrow()[0], inputs=24, rows=1)
    model, kind, names = work.base, work.kind, list(work.vectors[0].deltas)
    task_fisher(model, kind, work.inputs[0][:2], pad_id=0, names=names)
    move_(model)
    launches = []
    for inputs in (4, 24):
        with counting() as counts:
            task_fisher(model, kind, work.inputs[0][:inputs], pad_id=0, names=names, row_budget=1 << 20)
        launches.append(counts.launches)
    assert launches[1] <= 1.05 * launches[0]


@pytest.mark.parametrize("name", ["base", "causal-135m"])
def test_an_evaluation_in_16_bits_launches_and_waits_as_one_in_float32(name: str) -> None:
    launches, waits = [], []
    for dtype in (torch.float32, torch.bfloat16):
        work = work_of(shallow(name).narrow()[0], inputs=1)
        model = work.base.to(dtype)
        settle_folding(model, work.kind, work.rows[0], pad_id=0)
        move_(model)
        with counting():
            choice_losses(model, work.kind, work.rows[0], pad_id=0)
        with counting() as counts:
            choice_losses(model, work.kind, work.rows[0], pad_id=0)
        launches.append(counts.launches)
        waits.append(counts.waits)
    assert waits[1] == waits[0]
    assert launches[1] <= 1.15 * launches[0]  # casts to float32 and back, in norms and losses


def test_reads_by_the_host_copies_and_kernels_are_counted_and_views_are_not() -> None:
    a = elsewhere({"a": torch.ones(3, 4)})["a"]
    with counting() as counts:
        b = a.t() @ a.view(3, 4)
        assert (counts.launches, counts.waits, counts.flops) == (1, 0, 2 * 4 * 3 * 4)
        assert float(b.sum()) == 48.0
        assert (counts.launches, counts.waits) == (3, 1)  # the sum; the read is a launch, too
        b.cpu()
        torch.ones(2).to(b.device)
        assert counts.waits == 3
        with pytest.raises(RuntimeError, match="two devices"):
            a + torch.ones(3, 4)
