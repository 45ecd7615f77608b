"""The benchmark of an iteration: both sides compute the same, or it says so and fails."""

from __future__ import annotations

import json

import pytest

from scripts import benchmark, sides
from scripts.sides import PHASES

TINY = ["--json", "--experts", "2", "--inputs", "3", "--rows", "6", "--tokens", "10", "--repeats", "1"]


@pytest.mark.parametrize("size", ["tiny", pytest.param("minilm", marks=pytest.mark.slow)])
def test_both_sides_agree_and_every_phase_has_seconds_a_ratio_and_a_share(size: str, capsys) -> None:
    assert benchmark.main([*TINY, "--size", size]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["agree"]
    assert found["scores"]["plain"] == found["scores"]["ours"]
    for side in ("plain", "ours"):
        assert set(found["seconds"][side]) == set(PHASES)
    assert set(found["ratio"]) == {*PHASES, "total"}
    assert sum(found["share"].values()) == pytest.approx(1, abs=1e-3)
    assert set(found["peak_bytes"]) == {"plain", "ours"}


def test_sides_that_differ_fail(capsys, monkeypatch) -> None:
    exact = sides.loop
    monkeypatch.setattr(sides, "loop", lambda *given: {n: 1.01 * f for n, f in exact(*given).items()})
    assert benchmark.main([*TINY, "--size", "tiny"]) == 1
    assert not json.loads(capsys.readouterr().out)["agree"]


@pytest.mark.slow
def test_counts_are_scaled_to_the_real_widths(capsys) -> None:
    assert benchmark.main([*TINY, "--size", "tiny", "--count"]) == 0
    found = json.loads(capsys.readouterr().out)
    parameters = sum(p.numel() for p in benchmark.SIZES["tiny"].build().parameters())
    assert found["parameters"] == parameters
    copy, add, experts = 2, 3, 2  # tensors that each reads and writes
    assert found["phases"]["write"]["bytes"] == experts * (copy + add) * 4 * parameters
    assert found["total"]["floor_seconds"] <= found["total"]["projected_seconds"]


def test_a_causal_model_is_measured_too(capsys, monkeypatch) -> None:
    shape = benchmark.SIZES["causal-135m"]
    small = type(shape)(shape.kind, 2, 3, 30, 50, 200, key_heads=1)
    monkeypatch.setitem(benchmark.SIZES, "causal-135m", small)
    assert benchmark.main([*TINY, "--size", "causal-135m"]) == 0
    assert json.loads(capsys.readouterr().out)["agree"]
