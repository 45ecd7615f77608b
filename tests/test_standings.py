"""The numbers of a comparison's table against values worked out by hand, and its renderings against the numbers."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace

import pytest
from rich.console import Console

from dfmerge_studies.report.latex import standings_latex
from dfmerge_studies.report.renderings import (
    notes,
    rows_json,
    standings_csv,
    standings_json,
    standings_section,
    standings_table,
    task_lines,
)
from dfmerge_studies.report.standings import Scored, largest_drop, paired_p, ranked, side_by_side, spread, standings
from dfmerge_studies.study.comparison import ComparedStudy, Comparison
from dfmerge_studies.tasks.metrics import METRICS, Metrics

ACCURACY = METRICS["accuracy"]
BOTH = Metrics.named({"a": "accuracy", "b": "accuracy"})
OURS = {0: (0.8, 0.8), 1: (0.82, 0.82), 2: (0.81, 0.81)}
GTA = {0: (0.6, 0.8), 1: (0.62, 0.8), 2: (0.7, 0.8)}  # means 0.7, 0.71, 0.75
FISHER = {0: (0.84, 0.8), 1: (0.78, 0.82), 2: (0.8, 0.83)}


def scores(values):
    return {"test": dict(zip(("a_1", "b"), values, strict=True))}


def made(variant, by_seed, **more):
    return [
        ComparedStudy(variant, seed, f"s.{variant}", scores(v), {"a": 0.5}, 3, 20, 1.5, **more)
        for seed, v in by_seed.items()
    ]


@pytest.fixture
def comparison() -> Comparison:
    lost = [ComparedStudy("ties", seed, "s.ties", error="3 trials in a row failed") for seed in (0, 1, 2)]
    return Comparison(
        study="s",
        storage="sqlite:///s.db",
        tasks=("a_1", "b"),
        variants=("gta", "fisher", "ties", "df-merge"),
        seeds=(0, 1, 2),
        splits=("test",),
        metrics={"test": Metrics.named(dict.fromkeys(("a_1", "b"), "accuracy"))},
        entries=(*made("gta", GTA), *made("fisher", FISHER), *lost, *made("df-merge", OURS)),
        references={
            "zero-shot": dict.fromkeys((0, 1, 2), scores((0.5, 0.3))),
            "fine-tuned": dict.fromkeys((0, 1, 2), scores((0.9, 0.85))),
        },
    )


def test_cells_are_means_and_sample_deviations_over_seeds(comparison):
    rows = {row.method: row for row in standings(comparison, "test").rows}
    assert rows["gta"].cells["a_1"].mean == pytest.approx(0.64)
    assert rows["gta"].cells["a_1"].std == pytest.approx(math.sqrt((0.04**2 + 0.02**2 + 0.06**2) / 2))
    assert rows["gta"].cells["b"].mean == pytest.approx(0.8)
    assert rows["gta"].cells["mean"].mean == pytest.approx(0.72)
    assert rows["gta"].cells["mean"].std == pytest.approx(math.sqrt((0.02**2 + 0.01**2 + 0.03**2) / 2))
    assert rows["zero-shot"].cells["mean"].mean == pytest.approx(0.4)
    assert rows["ties"].cells == {}
    assert spread([0.25]).std is None


def test_best_and_second_are_shared_by_those_that_tie_and_references_do_not_compete(comparison):
    ranks = standings(comparison, "test").ranks
    assert ranks["a_1"] == {"df-merge": 1, "fisher": 2}
    assert ranks["b"] == {"fisher": 1, "df-merge": 2}
    assert ranks["mean"] == {"fisher": 1, "df-merge": 2}
    tied = {"a": 0.3, "b": 0.1 + 0.2, "c": 0.2, "d": 0.2, "e": 0.1}
    assert ranked(tied, ACCURACY) == {"a": 1, "b": 1, "c": 2, "d": 2}
    assert ranked({"a": 0.0}, ACCURACY) == {"a": 1}
    assert ranked({}, ACCURACY) == {}


def test_the_star_is_a_paired_one_sided_t_test_over_seeds(comparison):
    rows = {row.method: row for row in standings(comparison, "test").rows}
    # Differences 0.10, 0.11, 0.06; Student's distribution with two degrees of freedom has a closed form.
    t = 0.09 / (math.sqrt((0.01**2 + 0.02**2 + 0.03**2) / 2) / math.sqrt(3))
    assert rows["gta"].p == pytest.approx(0.5 - t / (2 * math.sqrt(2 + t * t)))
    assert rows["gta"].star
    assert rows["fisher"].p > 0.5
    assert not rows["fisher"].star
    assert rows["df-merge"].p is None
    assert rows["ties"].p is None
    one, other = {0: 0.8, 1: 0.83, 7: 0.0}, {0: 0.7, 1: 0.7, 9: 1.0}  # two common seeds: one degree of freedom
    t = 0.115 / (0.03 / math.sqrt(2) / math.sqrt(2))
    assert paired_p(one, other, ACCURACY) == pytest.approx(0.5 - math.atan(t) / math.pi)
    assert paired_p({0: 0.8}, {0: 0.1}, ACCURACY) is None
    assert paired_p({0: 0.8, 1: 0.9}, {0: 0.1, 1: 0.2}, ACCURACY) is None  # differences without spread


def test_the_largest_drop_names_the_task_that_loses_most_against_its_expert(comparison):
    rows = {row.method: row for row in standings(comparison, "test").rows}
    assert rows["gta"].drop == ("a_1", pytest.approx(26.0))
    assert rows["zero-shot"].drop == ("b", pytest.approx(55.0))
    assert rows["fine-tuned"].drop is None
    assert largest_drop({"a": 0.9, "b": 0.7}, {"a": 0.8}, BOTH) == ("a", pytest.approx(-10.0))
    assert largest_drop({"a": 0.9}, {}, BOTH) is None


def test_every_form_of_the_table_holds_the_same_numbers(comparison):
    found = standings(comparison, "test")
    printed = json.loads(json.dumps(standings_json(found, comparison)))
    assert set(printed) >= {"split", "rows"}
    lines = list(csv.DictReader(io.StringIO(standings_csv(found))))
    assert len(lines) == 3 * len(printed["rows"])
    for row in printed["rows"]:
        assert set(row) >= {"method", "seeds", "tasks", "mean", "std"}
        cells = {**row["tasks"], "mean": {"mean": row["mean"], "std": row["std"]}}
        for line in (line for line in lines if line["method"] == row["method"]):
            if row["method"] == "ties":
                assert (line["mean"], line["std"], line["error"].count("in a row")) == ("", "", 3)
                continue
            assert float(line["mean"]) == cells[line["task"]]["mean"]
            assert float(line["std"]) == cells[line["task"]]["std"]
            assert int(line["star"]) == row["star"]
            assert line["rank"] == str(row["ranks"].get(line["task"], ""))
            assert int(line["seeds"]) == row["seeds"] == 3
    by_name = {row["method"]: row for row in printed["rows"]}
    assert (by_name["ties"]["seeds"], by_name["ties"]["mean"], len(by_name["ties"]["errors"])) == (0, None, 3)
    assert by_name["gta"]["trials"] == 20
    assert [study["seed"] for study in by_name["gta"]["studies"]] == [0, 1, 2]


def test_the_latex_table_is_a_whole_tabular_with_marks_and_escapes(comparison):
    text = standings_latex(standings(comparison, "test"), {"gta": r"[50%] of_it \ <*>"})
    body = [line for line in text.splitlines() if not line.startswith("%")]
    two = r"r@{\,}l"
    assert (body[0], body[1], body[-2], body[-1]) == (
        rf"\begin{{tabular}}{{l{two * 3}r@{{ }}lr}}",
        r"\toprule",
        r"\bottomrule",
        r"\end{tabular}",
    )
    head, *rows = [line for line in body if line.endswith(r"\\")]
    assert head.count(r"\multicolumn{2}{c}") == head.count("&") - 1 == 4
    assert all(line.count("&") == 9 for line in rows)  # ten columns: the name, three scores and the drop of two, trials
    assert len(rows) == 6
    assert r"a\_1" in head
    gta = next(
        line for line in rows if line.startswith(r"{[}50\%] of\_it \textbackslash{} \textless{}{*}\textgreater{}")
    )
    assert r"72.0 & {\scriptsize$\pm$\,2.6}$^{*}$" in gta
    assert sum(line.count(r"\textbf{") for line in rows) == 3
    assert sum(line.count(r"\underline{") for line in rows) == 3
    assert r"\textbf{81.0} & {\scriptsize$\pm$\,1.0}" in text
    assert text.count("{") == text.count("}")


def test_the_latex_table_of_one_seed_has_no_columns_for_a_spread(comparison):
    one = [entry for entry in comparison.entries if entry.seed == 0]
    rows = {row: {0: by_seed[0]} for row, by_seed in comparison.references.items()}
    found = standings(replace(comparison, seeds=(0,), entries=tuple(one), references=rows), "test")
    lines = [line for line in standings_latex(found, {}).splitlines() if not line.startswith("%")]
    assert lines[0] == r"\begin{tabular}{lrrrr@{ }lr}"
    assert all(line.count("&") == 6 for line in lines if line.endswith(r"\\") and "multicolumn" not in line)
    assert not any(r"\pm" in line for line in lines)


def test_the_terminal_s_table_marks_best_second_star_and_failure(comparison):
    found = standings(comparison, "test")
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(standings_table(found, title="t"))
    text = console.export_text(clear=False)
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert "± 2.6*" in lines["gta"]
    assert "failed" in lines["ties"]
    assert "+26.0 a_1" in lines["gta"]
    styled = console.export_text(styles=True)
    assert "\x1b[1m 81.0" in styled or "\x1b[1m81.0" in styled
    assert any("gta" not in note and "better" in note for note in notes(found))


def test_a_study_s_own_table_its_json_page_and_card_are_one_table():
    metrics = {"validation": BOTH, "test": BOTH}
    rows = [
        Scored("base", {"validation": {"a": 0.5, "b": 0.9}, "test": {"a": 0.25, "b": 0.5}}, compete=False),
        Scored("gta", {"validation": {"a": 0.6, "b": 0.4}}, detail={"coefficients": {"x": 0.3}}),
        Scored("df-merge", {"validation": {"a": 0.7, "b": 0.3}, "test": {"a": 0.75, "b": 0.125}}),
        Scored("nothing yet", {}),
    ]
    tables = side_by_side(rows, metrics, "s")
    assert [row.method for row in tables["test"].rows] == ["base", "df-merge"]
    assert tables["validation"].ranks["a"] == {"df-merge": 1, "gta": 2}
    assert tables["validation"].ranks["mean"] == {"gta": 1, "df-merge": 1}
    assert rows_json(tables)[1] == {
        "name": "gta",
        "coefficients": {"x": 0.3},
        "validation": {"tasks": {"a": 0.6, "b": 0.4}, "mean": 0.5},
    }
    cells = [["base", "25.0", "50.0", "37.5"], ["df-merge", "75.0", "12.5", "43.8"]]
    section = standings_section(tables["test"], "Test")
    assert section.columns == ["", "a", "b", "mean"]
    assert [[cell.text for cell in row.cells] for row in section.rows] == cells
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(standings_table(tables["test"], title="t"))
    assert console.export_text().split()[-8:] == [*cells[0], *cells[1]]
    assert task_lines(tables)[2:] == [
        "| a | 50.0 | 60.0 | 70.0 | 25.0 | 75.0 |",
        "| b | 90.0 | 40.0 | 30.0 | 50.0 | 12.5 |",
    ]


def test_a_row_without_all_tasks_has_no_mean_in_any_table():
    experts = Scored("own", {"validation": {"a": 0.9}}, compete=False)
    tables = side_by_side([experts, Scored("df-merge", {"validation": {"a": 0.5, "b": 0.5}})], {"validation": BOTH})
    assert rows_json(tables)[0]["validation"] == {"tasks": {"a": 0.9}, "mean": None}
    assert [cell.text for cell in standings_section(tables["validation"], "").rows[0].cells] == [
        "own",
        "90.0",
        "-",
        "-",
    ]
