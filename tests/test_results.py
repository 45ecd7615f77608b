"""scripts/results.py: its spec is one that studies and finetune.py take, and its tables say what `compare` says."""

from __future__ import annotations

import json
from pathlib import Path

from dfmerge_studies.spec import StudySpec
from dfmerge_studies.tasks.data import load_rows
from scripts import results


def test_the_spec_reads_the_data_folder_that_is_named(tmp_path: Path) -> None:
    for name, classes in results.TASKS.items():
        for split in ("train", "validation", "test"):
            lines = [{"text": "rain" if i else "", "label": i % len(classes)} for i in range(8)]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (tmp_path / f"{name}.{split}.jsonl").write_text(text)
    file = results.write_spec(tmp_path, tmp_path / "work", limit=4, test_rows=5, trials=3, startup=2)
    spec = StudySpec.from_yaml(file)
    assert spec.search.startup == "uniform"  # as the tables of the page were made
    assert list(spec.tasks) == list(spec.experts) == list(results.RECIPES)
    for name, task in spec.tasks.items():
        assert task.training_split is not None
        assert task.test_split is not None
        rows = load_rows(name, task, task.test_split, root=spec.root, spec_file=str(file))
        assert [row.text for row in rows] == [".", "rain", "rain", "rain", "rain"]
        assert len(load_rows(name, task, task.training_split, root=spec.root, spec_file=str(file))) == 8


def test_a_markdown_table_marks_the_best_the_second_and_what_df_merge_beats() -> None:
    def row(method: str, mean: float, rank: int | None, *, merged: bool = True, star: bool = False) -> dict:
        ranks = {} if rank is None else {"trec": rank, "mean": rank}
        drop = {"task": "trec", "points": 1.25} if merged else None
        return {
            "method": method,
            "merged": merged,
            "tasks": {"trec": {"mean": mean, "std": 0.0}},
            "mean": mean,
            "std": 0.005,
            "ranks": ranks,
            "star": star,
            "drop": drop,
            "trials": 3.0 if merged else None,
            "seconds": 1.4 if merged else None,
        }

    table = {"rows": [row("fine-tuned", 0.9, None, merged=False), row("gta", 0.7, 2, star=True), row("fisher", 0.8, 1)]}
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in results.markdown(table)]
    assert lines[2] == ["fine-tuned", "90.0", "", "", "", "", "90.0", "", "", "", ""]
    assert lines[3] == [r"gta \*", "*70.0*", "", "", "", "", "*70.0*", "0.5", "1.2 trec", "3", "1"]
    assert lines[4][:2] == ["fisher", "**80.0**"]
