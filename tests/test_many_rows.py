"""Comparisons of all methods: one table, and figures that name twenty rows, grouped by what they choose."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from dfmerge_studies.methods import METHODS
from dfmerge_studies.report.figures.comparison import SeedScores
from dfmerge_studies.report.figures.rows import MANY, lines_of
from dfmerge_studies.report.figures.scores import Scores
from dfmerge_studies.report.standings import BASE, EXPERTS
from dfmerge_studies.study.variants import variants
from tests.project import make_project

TASKS = ["red", "blue"]
ROWS = ["zero-shot", "fine-tuned", *variants()]


def scores_of(place: int) -> dict[str, float]:
    return {task: 0.4 + 0.02 * place + 0.01 * number for number, task in enumerate(TASKS)}


def over_seeds(methods: list[str]) -> SeedScores:
    by_seed = {row: {0: scores_of(place), 1: scores_of(place + 1)} for place, row in enumerate(methods)}
    whole = {"zero-shot": {0: scores_of(0)}, "fine-tuned": {0: scores_of(20)}}
    accuracy = dict.fromkeys(TASKS, "accuracy")
    return SeedScores("comparison", "t", "c", "test", "accuracy", "%", accuracy, TASKS, whole, by_seed)


def one_seed(rows: list[str]) -> Scores:
    values = {row: {"validation": scores_of(place)} for place, row in enumerate(rows)}
    accuracy = {"validation": dict.fromkeys(TASKS, "accuracy")}
    return Scores("scores", "t", "c", TASKS, {"validation": "accuracy"}, accuracy, values, {})


def test_rows_stand_under_what_they_choose_for_c_and_in_the_order_of_what_they_choose_for_lambda():
    lines = list(lines_of([*ROWS, "ties_fisher-at-expert_per-expert", "df-merge (trial 7)"]))
    assert sorted(line.row for line in lines if line.row) == sorted(
        [*ROWS, "ties_fisher-at-expert_per-expert", "df-merge (trial 7)"]
    )
    headings = [line.text for line in lines if line.row is None]
    assert headings[:3] == ["whole models, not merged", "C = 1", "C = F(θ_i)"]
    texts = [line.text for line in lines]
    assert texts.index("averaging · λ = 1/M") < texts.index("gta · λ_i searched") < texts.index("C = F(θ_i)")
    assert "ties · one λ, Φ trim-and-elect" in texts
    assert texts.index("C = F(θ_i)") < next(i for i, t in enumerate(texts) if t.startswith("ties_fisher-at-expert"))
    under = {line.row: line.colour for line in lines if line.row}
    assert under["df-merge"] == under["df-merge (trial 7)"] == under["df-merge-gp"] != under["gta"] == under["ties"]


@pytest.mark.parametrize(
    "drawing", [over_seeds(list(METHODS)), one_seed([BASE, EXPERTS, *METHODS])], ids=["seeds", "one"]
)
def test_many_rows_have_a_line_each_and_no_label_covers_another(drawing: SeedScores | Scores):
    figure = drawing.plotly()
    marks = [trace for trace in figure.data if trace.type == "scatter"]
    assert len(marks) == 3  # two tasks and the mean
    assert len(figure.layout.yaxis.ticktext) == len(list(lines_of([*METHODS]))) + 3  # whole models and their heading
    assert figure.layout.height / len(figure.layout.yaxis.ticktext) > 20
    static = drawing.static()
    FigureCanvasAgg(static).draw()
    boxes = [tick.get_window_extent() for tick in static.axes[0].get_yticklabels()]
    for one, other in pairwise(boxes):
        assert abs(one.y0 - other.y0) >= 0.8 * one.height
        assert one.x0 >= 0
    panels = [axes.get_window_extent() for axes in static.axes]
    assert all(panel.width > 60 for panel in panels)
    assert json.dumps(drawing.data())


def test_a_panel_of_many_rows_names_its_task_and_its_split_whole():
    rows = {row: dict.fromkeys(("validation", "test"), scores_of(place)) for place, row in enumerate(METHODS)}
    splits = {split: dict.fromkeys(TASKS, "accuracy") for split in ("validation", "test")}
    drawing = Scores("scores", "t", "c", TASKS, dict.fromkeys(splits, "accuracy"), splits, rows, {})
    labels = [axes.get_xlabel() for axes in drawing.static().axes]
    assert labels[0] == "red\nvalidation\naccuracy, %"
    assert labels[1:] == ["blue\nvalidation", "mean\nvalidation", "red\ntest", "blue\ntest", "mean\ntest"]
    assert drawing.plotly().layout.xaxis2.title.text == "blue<br>validation"


def test_few_rows_stay_bars_side_by_side():
    few = list(METHODS)[:5]
    assert {trace.type for trace in over_seeds(few).plotly().data} == {"bar"}
    assert {trace.type for trace in one_seed(few).plotly().data} == {"bar"}
    assert len(few) <= MANY < len(METHODS)


@pytest.mark.slow
def test_all_methods_are_compared_in_one_table_and_shown_on_the_page(tmp_path):
    project = make_project(tmp_path / "project", "bert", rows=8, samples=2, layers=1)
    one_rate = {"drop_rate": 0.5}
    search = {"trials": 2, "startup_trials": 1, "sampler": "random"}
    project.write(search=search, parameters={"dare": one_rate, "della": one_rate})  # 11 trials of 55 each
    found = project.json("compare", "spec.yaml", "--methods", "all", "--split", "validation")
    rows = [row["method"] for row in found["rows"] if row["merged"]]
    assert set(METHODS) <= set(rows)
    assert len(rows) == len(set(rows))
    assert all(row["mean"] is not None for row in found["rows"] if row["merged"])
    shown = project.cli("compare", "spec.yaml", "--methods", "all", "--split", "validation").stdout
    assert all(re.search(rf"^\s*{name}\s", shown, re.MULTILINE) for name in METHODS)
    page = project.json("report", "spec.yaml")["page"]
    text = (project.folder / page).read_text()
    assert all(name in text for name in METHODS)
