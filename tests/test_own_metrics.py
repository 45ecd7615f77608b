"""Metrics of one's own: code that a spec names runs only with the user's word, and is then a metric like any other."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import optuna
import pytest
from sklearn.metrics import accuracy_score

from dfmerge_studies import StudySpec, add_metric, evaluate_model
from dfmerge_studies.errors import InputError, RunError
from dfmerge_studies.tasks.choices import Answers
from dfmerge_studies.tasks.label_sets import LabelSets
from dfmerge_studies.tasks.metrics import METRICS, Metric, Metrics
from dfmerge_studies.tasks.numbers import Numbers
from dfmerge_studies.tasks.own import check_function, named_metric
from dfmerge_studies.tasks.tags import IGNORED, Tags
from dfmerge_studies.tasks.written import Written
from tests.project import Project

CODE = """
from collections.abc import Iterator
from pathlib import Path
import numpy, torch
Path(__file__).with_suffix(".ran").write_text("")
TABLE = {}

def right(predictions, references):
    assert isinstance(predictions, list) and len(predictions) == len(references)
    return sum(a == b for a, b in zip(predictions, references)) / len(references)

def each(predictions, references):
    return [float(a == b) for a, b in zip(predictions, references)]

def wrong(predictions, references):
    return 1 - right(predictions, references)

def mirrored(y_true, y_pred):
    return [y_true, y_pred] and right(y_pred, y_true)

class Table:
    @staticmethod
    def right(predictions, references):
        return right(predictions, references)

def nothing(predictions, references):
    return None

def text(predictions, references):
    return "good"

def few(predictions, references):
    return [1.0]

def infinite(predictions, references):
    return float("nan")

def fails(predictions, references):
    return references["a"]

def array(predictions, references):
    return numpy.array(right(predictions, references))

def tensor(predictions, references):
    return torch.tensor(right(predictions, references))

def flags(predictions, references):
    return numpy.array(predictions) == numpy.array(references)

def ends(predictions, references):
    raise SystemExit(2)
"""
TRUST = "--trust-remote-code"


@pytest.fixture
def module(tmp_path: Path) -> tuple[Path, str]:
    """A folder with a module of a name of its own, since modules are imported once in a process."""
    name = f"mine_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(CODE)
    return tmp_path, name


def metric(module: tuple[Path, str], function: str, *, trusted: bool = True) -> Any:
    folder, name = module
    sign = "-" if function.startswith("-") else ""
    return named_metric(
        f"{sign}{name}:{function.removeprefix('-')}", str(folder), trusted=trusted, where="spec: metric"
    )


ANSWERS = Answers([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]], [0, 0, 0])

# Scores


@pytest.mark.parametrize("function", ["right", "mirrored", "Table.right", "each", "array", "tensor", "flags"])
def test_a_function_gets_predictions_and_references_and_gives_the_score(module, function: str) -> None:
    result = metric(module, function).result(ANSWERS)
    assert result.score == pytest.approx(2 / 3)
    assert result.n == 3
    assert result.rows == ([1.0, 0.0, 1.0] if function in ("each", "flags") else None)


def test_functions_of_libraries_are_called_by_their_own_names_of_the_two_sides(tmp_path: Path) -> None:
    found = named_metric("sklearn.metrics:accuracy_score", str(tmp_path), trusted=True, where="w")
    assert found.score(ANSWERS) == accuracy_score([0, 0, 0], [0, 1, 0])


@pytest.fixture
def table() -> Iterator[dict[str, Metric]]:
    """The table of metrics, which is as it was afterwards."""
    rows = cast("dict[str, Metric]", METRICS)
    before = dict(rows)
    yield rows
    rows.clear()
    rows.update(before)


@pytest.mark.parametrize(
    ("answers", "predictions", "references"),
    [
        (LabelSets([[1.0, -1.0]], [(0, 1)]), [(1, 0)], [(0, 1)]),
        (Numbers([1.5], [2.0]), [1.5], [2.0]),
        (Written(["yes"], [["yes", "no"]]), ["yes"], [["yes", "no"]]),
        (Tags([[[0.0, 1.0], [1.0, 0.0]]], [(1, IGNORED)], ["O", "B-X"]), [["O"]], [["B-X"]]),
        (Tags([[[0.0, 1.0], [1.0, 0.0]]], [(1, 0)], []), [[0, 1]], [[1, 0]]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_type_of_task_hands_over_what_its_answers_are(answers, predictions, references, table) -> None:
    seen: dict[str, Any] = {}
    add_metric("looking", lambda predictions, references: seen.update(p=predictions, r=references) or 1.0)
    table["looking"].score(answers)
    assert seen == {"p": predictions, "r": references}


def test_a_minus_says_that_less_is_better_also_where_only_the_name_is_known(module) -> None:
    found = metric(module, "-wrong")
    assert found.score(ANSWERS) == pytest.approx(1 / 3)
    assert not found.higher_is_better
    stored = Metrics.named({"a": found.name})
    assert not stored["a"].higher_is_better
    assert stored.value_text([-0.25]) == "0.250"


@pytest.mark.parametrize(
    ("function", "kind", "says"),
    [
        ("rihgt", InputError, "has no 'rihgt'. Did you mean 'right'?"),
        ("TABLE", InputError, "is dict, not a function"),
        ("nothing", InputError, "returned NoneType, not a number"),
        ("text", InputError, "returned str, not a number"),
        ("few", InputError, "returned 1 numbers for 3 inputs"),
        ("infinite", RunError, "returned nan, not a finite number"),
        ("fails", InputError, "fails: "),
        ("ends", InputError, "fails: it ends the program (SystemExit: 2)"),
    ],
)
def test_what_is_no_metric_is_told_by_the_field_that_names_it(module, function: str, kind, says: str) -> None:
    with pytest.raises(kind) as caught:
        metric(module, function).score(ANSWERS)
    assert says in str(caught.value)
    assert "spec: metric" in str(caught.value)


def test_a_module_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the module 'nowhere\.at_all' cannot be imported: No module named 'nowhere'"):
        check_function(named_metric("nowhere.at_all:f", str(tmp_path), trusted=True, where="w"))


def test_a_file_beside_the_spec_that_another_module_of_its_name_hides_is_refused(tmp_path: Path) -> None:
    (tmp_path / "colorsys.py").write_text("def score(predictions, references): return 1.0")
    with pytest.raises(InputError, match=r"the module 'colorsys' is .*, not colorsys\.py beside the spec. Rename"):
        check_function(named_metric("colorsys:score", str(tmp_path), trusted=True, where="w"))


def test_code_is_not_even_imported_without_the_user_s_word(module) -> None:
    folder, name = module
    with pytest.raises(InputError, match="names code, which is not run unless you say so"):
        metric(module, "right", trusted=False).score(ANSWERS)
    assert not (folder / f"{name}.ran").exists()


# Python


def test_python_hands_over_any_callable(project: Project, table) -> None:
    add_metric("share_right", lambda predictions, references: accuracy_score(references, predictions))
    spec = StudySpec.from_yaml(project.file, ["tasks.red.metric=share_right"])
    found = evaluate_model(spec, str(project.folder / "red"), "validation")
    plain = evaluate_model(StudySpec.from_yaml(project.file), str(project.folder / "red"), "validation")
    assert found["red"].score == plain["red"].score
    assert found["red"].metric == "share_right"
    for name in ("accuracy", "two words", "share_right"):
        with pytest.raises(InputError, match="no free name"):
            add_metric(name, len)
    with pytest.raises(InputError, match="not a function"):
        add_metric("other", "len")  # type: ignore[arg-type]


# Specs


@pytest.fixture
def own(project: Project) -> tuple[Project, str]:
    """A project whose task red is scored by a function of a file beside the spec."""
    name = f"mine_{abs(hash(project.folder))}"
    (project.folder / f"{name}.py").write_text(CODE)
    project.spec = copy.deepcopy(project.spec)
    project.spec["tasks"]["red"]["metric"] = f"{name}:each"
    project.write()
    return project, name


@pytest.mark.parametrize("command", ["validate", "run"])
def test_a_spec_alone_runs_no_code_that_it_names(own, command: str) -> None:
    project, name = own
    project.write(trust_remote_code=True)
    said = project.cli(command, "spec.yaml", check=2).stderr
    assert f"tasks.red.metric: '{name}:each' names code, which is not run unless you say so" in said
    assert "--trust-remote-code" in said
    assert not (project.folder / f"{name}.ran").exists()
    assert not (project.folder / "colours.db").exists()


@pytest.mark.slow
def test_a_study_with_a_metric_of_one_s_own_is_that_of_the_same_metric_of_ours(own) -> None:
    project, name = own
    mine = project.json("run", "spec.yaml", TRUST, "--set", "method=gta")
    assert mine["task_metrics"] == {"red": f"{name}:each", "blue": "accuracy"}
    plain = ("--set", "storage=sqlite:///ours.db", "--set", "tasks.red.metric=accuracy")
    ours = project.json("run", "spec.yaml", "--set", "method=gta", *plain)
    assert [row["validation"]["tasks"] for row in mine["rows"]] == [row["validation"]["tasks"] for row in ours["rows"]]
    assert mine["rows"][0]["validation"]["standard_errors"]["red"] is not None
    assert mine["best"]["value"] == pytest.approx(ours["best"]["value"])
    project.cli("status", "spec.yaml", "--set", "method=gta")  # which looks at what is stored, and imports nothing
    other = ("--set", f"tasks.red.metric={name}:right")
    said = project.cli("run", "spec.yaml", TRUST, "--set", "method=gta", *other, check=2)
    assert "is about something else" in said.stderr
    del project.spec["tasks"]["red"]["test_split"]
    project.write()
    said = project.cli("export", "spec.yaml", TRUST, "--set", "method=gta", "--out", "merged")
    project.cli(*said.stdout.partition("next:\n  dfmerge ")[2].split())  # without a test split, and trusted again


def test_where_less_is_better_the_best_trial_has_the_least(own) -> None:
    project, name = own
    flags = ("--set", "method=gta", "--set", f"tasks.red.metric='-{name}:wrong'", "--set",
             "objective={kind: weighted, weights: {red: 1, blue: 0}}")  # fmt: skip
    project.cli("run", "spec.yaml", TRUST, *flags, "--no-test")
    trials = optuna.load_study(study_name="colours", storage=f"sqlite:///{project.folder}/colours.db").trials
    best = project.json("status", "spec.yaml", *flags)["best"]
    assert best["tasks"]["red"] == min(trial.user_attrs["tasks"]["red"] for trial in trials)


def test_a_metric_that_gives_no_finite_number_fails_the_run_with_its_name(own) -> None:
    project, name = own
    said = project.cli("run", "spec.yaml", TRUST, "--set", f"tasks.red.metric={name}:infinite", check=1).stderr
    assert f"the metric {name}:infinite returned nan, not a finite number" in said
    fails = ("--set", "name=other", "--set", f"tasks.red.metric={name}:fails")
    said = project.cli("run", "spec.yaml", TRUST, *fails, check=2).stderr
    assert f"the metric {name}:fails fails: " in said


@pytest.mark.slow
def test_workers_have_the_user_s_word_too(own) -> None:
    project, _ = own
    project.process("run", "spec.yaml", TRUST, "--workers", "2", "--no-test", "--set", "method=gta")
    assert math.isfinite(project.json("status", "spec.yaml", "--set", "method=gta")["best"]["tasks"]["red"])
