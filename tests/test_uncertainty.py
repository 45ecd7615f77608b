"""Standard errors and differences against repeated draws of rows; which cells of tables are marked as best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from dfmerge_studies.report.renderings import standings_section, standings_table
from dfmerge_studies.report.standings import Scored, Standings, side_by_side
from dfmerge_studies.tasks.choices import Answers
from dfmerge_studies.tasks.metrics import METRICS, Metrics, TaskScore
from dfmerge_studies.tasks.uncertainty import difference, mean_error, mean_rows, standard_error

ACCURACY = METRICS["accuracy"]
TWO = Metrics.named({"a": "accuracy", "b": "accuracy"})


def scored(rows: Sequence[float], *, keep: bool = True) -> TaskScore:
    return TaskScore(float(np.mean(rows)), "accuracy", len(rows), list(rows) if keep else None)


def bits(share: float, n: int, seed: int) -> list[float]:
    return (np.random.default_rng(seed).random(n) < share).astype(float).tolist()


def test_a_standard_error_is_the_spread_of_the_score_over_draws_of_rows():
    draw = np.random.default_rng(0)
    scores = [(draw.random(200) < 0.7).mean() for _ in range(4000)]
    assert standard_error(scored(bits(0.7, 200, 1)), ACCURACY) == pytest.approx(np.std(scores), rel=0.08)


def test_of_accuracy_the_error_is_the_same_without_the_rows():
    rows = bits(0.6, 57, 2)
    assert standard_error(scored(rows, keep=False), ACCURACY) == pytest.approx(standard_error(scored(rows), ACCURACY))


def test_a_score_that_a_study_keeps_without_its_rows_has_the_error_of_a_share() -> None:
    error = standard_error(TaskScore(0.7, "f1", 101), METRICS["f1"])
    assert error == pytest.approx(math.sqrt(0.7 * 0.3 / 100))
    known = METRICS["f1"].result(Answers([[0.0, 1.0], [1.0, 0.0]] * 20, [0, 1, 1, 1] * 10, 1))
    found = difference({"t": known}, {"t": TaskScore(0.5, "f1", 40)}, Metrics.named({"t": "f1"}))
    assert not found.paired
    assert found.error == pytest.approx(math.hypot(standard_error(known, METRICS["f1"]) or 0.0, 0.5 / math.sqrt(39)))


def test_one_row_or_none_has_no_error_nor_has_a_range_without_an_end():
    assert standard_error(TaskScore(1.0, "accuracy", 1, [1.0]), ACCURACY) is None
    assert standard_error(TaskScore(0.5, "accuracy", 0), ACCURACY) is None
    assert standard_error(TaskScore(-1.2, "log_likelihood", 50), METRICS["log_likelihood"]) is None


def test_the_error_of_a_mean_over_tasks_is_the_spread_of_the_mean():
    draw = np.random.default_rng(3)
    means = [((draw.random(100) < 0.9).mean() + (draw.random(40) < 0.5).mean()) / 2 for _ in range(4000)]
    found = mean_error({"a": scored(bits(0.9, 100, 4)), "b": scored(bits(0.5, 40, 5))}, TWO)
    assert found == pytest.approx(np.std(means), rel=0.1)


def test_a_difference_is_taken_row_by_row_so_that_hard_rows_cancel_out():
    easy = np.array(bits(0.5, 400, 6))
    better = easy.copy()
    better[np.flatnonzero(easy == 0)[:12]] = 1.0  # right wherever the other is, and on twelve rows more
    found = difference({"t": scored(better)}, {"t": scored(easy)}, Metrics.named({"t": "accuracy"}))
    assert found.paired
    assert found.value == pytest.approx(12 / 400)
    assert found.error == pytest.approx(np.std(better - easy, ddof=1) / 20)
    assert found.clear
    apart = difference(
        {"t": scored(better, keep=False)}, {"t": scored(easy, keep=False)}, Metrics.named({"t": "accuracy"})
    )
    assert not apart.paired
    assert not apart.clear
    assert apart.error > 3 * found.error


def test_a_difference_is_called_clear_by_chance_in_one_of_twenty_comparisons():
    draw, called = np.random.default_rng(7), 0
    for _ in range(1000):
        a, b = ((draw.random(150) < 0.6).astype(float) for _ in range(2))
        found = difference({"t": scored(a)}, {"t": scored(b)}, Metrics.named({"t": "accuracy"}))
        called += bool(found.clear)
    assert 25 <= called <= 70


def test_where_lower_is_better_less_is_more():
    metrics = Metrics({"t": METRICS["accuracy"].__class__("loss", of_rows=lambda a: [], higher_is_better=False)})
    low, high = TaskScore(0.2, "loss", 3, [0.1, 0.2, 0.3]), TaskScore(0.5, "loss", 3, [0.4, 0.5, 0.6])
    assert difference({"t": low}, {"t": high}, metrics).value == pytest.approx(0.3)


def test_rows_of_several_seeds_are_averaged_row_by_row():
    assert mean_rows([[1.0, 0.0], [0.0, 0.0]]) == [0.5, 0.0]
    assert mean_rows([[1.0, 0.0], [0.0]]) is None


def test_a_metric_gives_its_rows_with_its_score():
    given = Answers([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]], [0, 0, 0])
    assert METRICS["accuracy"].result(given) == TaskScore(2 / 3, "accuracy", 3, [1.0, 0.0, 1.0])
    assert METRICS["macro_f1"].result(given).n == len(METRICS["macro_f1"].result(given).rows or ()) == 3


# Tables


def table(rows: Mapping[str, Mapping[str, Sequence[float]]], *, keep: bool = True) -> Standings:
    entries = [
        Scored(
            name,
            {"test": {task: float(np.mean(found)) for task, found in tasks.items()}},
            results={"test": {task: scored(found) for task, found in tasks.items()}} if keep else {},
        )
        for name, tasks in rows.items()
    ]
    return side_by_side(entries, {"test": TWO})["test"]


def near_and_far() -> dict[str, dict[str, list[float]]]:
    """On `a` one method is better on 60 of 200 rows, on `b` on one."""
    a, b = bits(0.5, 200, 8), bits(0.5, 200, 9)
    more_a, more_b = list(a), list(b)
    for row in [row for row, right in enumerate(a) if not right][:60]:
        more_a[row] = 1.0
    more_b[b.index(0.0)] = 1.0
    return {"gta": {"a": a, "b": b}, "df-merge": {"a": more_a, "b": more_b}}


def test_only_a_best_that_the_rows_tell_from_the_others_is_marked():
    found = table(near_and_far())
    assert found.ranks["b"] == {"df-merge": 1, "gta": 2}
    assert found.marks["a"] == {"df-merge": 1, "gta": 2}
    assert found.marks["b"] == {}
    assert found.undecided == ["b"]
    section = standings_section(found, "t")
    assert [cell.bold for cell in section.rows[1].cells] == [False, True, False, True]
    texts = standings_table(found, title="t").columns[2].cells
    assert [str(text.style) for text in list(texts)[:2]] == ["", ""]


def test_equal_scores_are_marked_only_where_nothing_is_known_of_their_rows():
    same = bits(0.5, 30, 10)
    rows = {name: {"a": same, "b": same} for name in ("gta", "df-merge")}
    assert table(rows).marks == {"a": {}, "b": {}, "mean": {}}
    assert table(rows, keep=False).marks["a"] == {"gta": 1, "df-merge": 1}


def test_tables_end_with_the_rows_of_data_and_standard_errors():
    found = table(near_and_far())
    section = standings_section(found, "t")
    last = [[cell.text for cell in row.cells] for row in section.rows[-2:]]
    assert last[1] == ["rows", "200", "200", "400"]
    assert last[0][0] == "± standard error"
    cell = found.rows[1].cells["a"]
    assert last[0][1] == f"{100 * cell.error:.1f}"
    assert cell.error == pytest.approx(math.sqrt(cell.mean * (1 - cell.mean) / 199))
    assert found.rows[1].cells["mean"].n == 400
