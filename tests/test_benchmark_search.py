"""The benchmark of searches: recorded surfaces are real merges, and searches of them are told as they went."""

from __future__ import annotations

import importlib.resources
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from dfmerge_studies import StudySpec, load_problem, merge
from scripts import benchmark_search
from scripts.surfaces import VARIANTS, Grid, Merges, RealSurface, gathered, read_log, record

QUICKSTART = ["sentiment", "continent", "syllables"]


@pytest.fixture
def spec(project):
    return StudySpec.from_yaml(project.file)


@pytest.mark.slow
def test_a_recorded_surface_is_what_merges_score(spec, tmp_path):
    logs = {variant: tmp_path / f"{variant}.jsonl" for variant in ("df-merge", "gta")}
    for variant, log in logs.items():
        record(spec, variant, {"validation": log}, steps=2)
    file = tmp_path / "surfaces.npz"
    empty = Grid(list(spec.experts), list(spec.tasks))
    gathered(empty, {(variant, "validation"): log for variant, log in logs.items()}, steps=2).save(file)
    grid = Grid.load(file)
    assert (grid.experts, grid.tasks) == (list(spec.experts), list(spec.tasks))
    problem = load_problem(spec)
    for variant in ("df-merge", "gta"):
        for values in itertools.product((0.0, 0.5, 1.0), repeat=2):
            point = dict(zip(grid.experts, values, strict=True))
            scores = merge(problem, point, method=variant).tasks
            assert grid.surface(variant)(point).tolist() == pytest.approx(
                [100 * scores[t] for t in grid.tasks], abs=0.01
            )
    assert grid.best("gta") == pytest.approx(grid.validation["gta"].mean(-1).max())


def test_a_recording_that_was_cut_goes_on_and_an_incomplete_one_is_left_out(spec, tmp_path, capsys):
    log, grid = tmp_path / "gta.jsonl", Grid(list(spec.experts), list(spec.tasks))
    grid.validation["df-merge"] = np.zeros((2, 2, 2))  # of an earlier recording
    record(spec, "gta", {"validation": log}, steps=1, part=(0, 2))
    with log.open("a") as stream:
        stream.write('{"x": [1, 1], "scor')  # cut
    assert list(gathered(grid, {("gta", "validation"): log}, steps=1).validation) == ["df-merge"]
    assert "lacks 2 points of gta" in capsys.readouterr().out
    record(spec, "gta", {"validation": log}, steps=1)
    assert sorted(tuple(line["x"]) for line in read_log(log)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert list(gathered(grid, {("gta", "validation"): log}, steps=1).validation) == ["df-merge", "gta"]


@pytest.mark.slow
def test_a_recording_scores_what_merges_score_without_the_layers_that_they_have_in_common(monkeypatch):
    file = importlib.resources.files("dfmerge_studies") / "quickstart/quickstart.yaml"
    spec = StudySpec.from_yaml(Path(str(file)), [f"tasks.{task}.limit=24" for task in QUICKSTART])
    problem = load_problem(spec)
    points = [dict.fromkeys(QUICKSTART, 0.5), {"sentiment": 0.9, "continent": 0.1, "syllables": 0.4}]
    wanted = [merge(problem, point, method="df-merge").tasks for point in points]
    merges, layers = Merges(problem, None), problem.resident.model.base_model.encoder.layer
    for number, (point, tasks) in enumerate(zip(points, wanted, strict=True)):
        merges.merge_("df-merge", point)
        if number:  # the first merge has been through the lower layers
            monkeypatch.setattr(layers[0].attention, "forward", None)
        assert merges.scores("validation").tolist() == pytest.approx([100 * tasks[task] for task in QUICKSTART])
    assert wanted[0] != wanted[1]


def test_between_grid_points_a_surface_is_linear_along_every_coefficient():
    values = np.zeros((3, 3, 1))
    values[..., 0] = [[0, 10, 20], [30, 40, 50], [60, 70, 90]]
    surface = Grid(["a", "b"], ["t"], {"gta": values}).surface("gta")
    assert surface({"a": 0.25, "b": 0.75})[0] == pytest.approx((10 + 20 + 40 + 50) / 4)
    assert surface({"a": 1.0, "b": 1.0})[0] == 90.0


@pytest.mark.slow
def test_a_real_surface_scores_the_rows_of_its_seed(project):
    spec = StudySpec.from_yaml(project.file, ["tasks.red.limit=4", "tasks.blue.limit=4"])
    merges = Merges(load_problem(spec), None)
    point = {"red": 0.5, "blue": 0.5}
    of_seeds = [RealSurface.of_seed(merges, "df-merge", seed)(point).tolist() for seed in range(4)]
    for seed, scores in enumerate(of_seeds):
        problem = load_problem(
            spec.derive(search={"seed": seed}, importance={"indices": merges.problem.fisher_indices()})
        )
        wanted = merge(problem, point, method="df-merge").tasks
        assert scores == pytest.approx([100 * wanted[task] for task in problem.tasks], abs=0.01)
    assert len({tuple(scores) for scores in of_seeds}) > 1


@pytest.mark.slow
def test_the_default_search_of_real_merges_descends_and_has_their_scores(project):
    spec = StudySpec.from_yaml(project.file, ["tasks.red.limit=4", "tasks.blue.limit=4"])
    real = RealSurface.of_seed(Merges(load_problem(spec), None), "df-merge", 1)
    found = real.search(trials=4, startup=3)
    points = [point for point, _ in found]
    assert points[0] == {"red": 0.5, "blue": 0.5}
    assert points[1] == pytest.approx({name: 0.5 - 0.05 * sign for name, sign in _signs(points[1]).items()})
    assert len({tuple(point.values()) for point in points}) == 4
    for point, scores in found:
        assert scores.tolist() == pytest.approx(real(point).tolist())


def _signs(point):
    return {name: 1 if value < 0.5 else -1 for name, value in point.items()}  # Adam's first step is of one length


@pytest.mark.slow
def test_searches_of_a_recorded_surface_are_logged_once_and_told(tmp_path, monkeypatch, capsys):
    steps = np.arange(11) / 10
    a, b = np.meshgrid(steps, steps, indexing="ij")
    peak = 100 * np.exp(-4 * ((a - 0.7) ** 2 + (b - 0.3) ** 2))
    values = np.stack([peak, peak / 2], -1)
    Grid(["a", "b"], ["s", "t"], {"gta": values}, {"gta": values}).save(tmp_path / "surface.npz")
    out = tmp_path / "out"
    command = ["benchmark_search.py", "grid", str(tmp_path / "surface.npz"), "--out", str(out), "--seeds", "1"]
    command += ["--trials", "15", "--startup", "6", "--samplers", "auto", "random", "tpe", "qmc"]
    monkeypatch.setattr(sys, "argv", command)
    benchmark_search.main()
    first = capsys.readouterr().out
    lines = read_log(out / "searches.jsonl")
    assert len(lines) == 4
    for line in lines:
        assert line["trials"][0] == [0.5, 0.5]
        assert len(line["trials"]) == len(line["scores"]) == 15
    starts = {json.dumps(line["trials"][:6]) for line in lines if line["sampler"] != "qmc"}
    assert len(starts) == 1  # the same start for all
    best = {line["sampler"]: np.array(line["scores"]).mean(-1).max() for line in lines}
    assert best["auto"] > 74.0  # of 75
    assert (out / "gaps.png").stat().st_size > 1000
    assert "| auto | " in first
    assert "gap at 15" in first
    benchmark_search.main()  # nothing is left to do
    assert capsys.readouterr().out == first
    assert read_log(out / "searches.jsonl") == lines


def test_the_recorded_surfaces_of_the_quickstart_are_there():
    grid = Grid.load(Path(benchmark_search.__file__).parent / "surfaces" / "quickstart.npz")
    assert grid.experts == grid.tasks == QUICKSTART
    base = {"validation": [50.0, 70.0, 33.33], "test": [50.67, 70.33, 33.33]}  # what a merge at (0, 0, 0) is
    for split, surfaces in {"validation": grid.validation, "test": grid.test}.items():
        assert set(surfaces) == set(VARIANTS)
        for values in surfaces.values():
            assert values.shape == (11, 11, 11, 3)
            assert values[0, 0, 0].tolist() == pytest.approx(base[split], abs=0.01)
    assert grid.validation["gta"][10, 0, 0, 0] == pytest.approx(86.67, abs=0.01)  # at (1, 0, 0) it is the expert
    assert round(grid.best("df-merge"), 1) == 81.7
