"""The method table: its rows, the parameters that they declare, and what specs, flags and studies make of them."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from dfmerge_studies import StudySpec, load_problem, merge
from dfmerge_studies.errors import InputError
from dfmerge_studies.methods import (
    METHODS,
    SHARED,
    Coefficients,
    Importance,
    Method,
    Parameter,
    Point,
    coefficient_range,
    fixed_coefficients,
    importance_coefficient,
)
from dfmerge_studies.study import value as attributes
from dfmerge_studies.study.fingerprint import differences, stated_fingerprint
from dfmerge_studies.transforms import TRANSFORMS
from dfmerge_studies.trials import marks

TENTHS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
SEARCHED = Method(
    "toy",
    Importance.UNIFORM,
    Coefficients.PER_EXPERT,
    "https://example.org",
    parameters=(Parameter("sharpness", "how sharp", 0.0, 4.0, default=1.0, bounds=(0.5, 2.0)),),
)


def test_the_method_table_has_the_rows_of_the_paper():
    assert importance_coefficient(METHODS["df-merge"], 0.3) == 0.3
    assert importance_coefficient(METHODS["fisher"], 0.3) == 1.0
    assert METHODS["averaging"].coefficients is Coefficients.FIXED
    assert METHODS["gta"].coefficients is Coefficients.PER_EXPERT
    assert METHODS["task-arithmetic"].grid == {SHARED: TENTHS}
    assert METHODS["dare"].grid == {SHARED: TENTHS, "drop_rate": (0.1, 0.3, 0.5, 0.7, 0.9)}
    assert METHODS["ties"].grid == {SHARED: (0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8)}
    assert METHODS["ties"].complete({}) == {"density": 0.2}


@pytest.mark.parametrize("row", METHODS.values(), ids=lambda row: row.name)
def test_every_row_is_whole(row):
    taken = {v for module in (marks, attributes) for v in vars(module).values() if isinstance(v, str)} | {"value"}
    assert row.transform in TRANSFORMS
    assert row.paper.startswith("https://")
    assert bool(row.shared) == (row.coefficients is Coefficients.SHARED_GRID)
    for each in row.parameters:
        assert each.name not in taken
        assert each.searched or each.default is not None
        assert not each.grid or row.coefficients is Coefficients.SHARED_GRID
        assert each.bounds is None or (row.searches and each.default is not None)
        for value in (*each.grid, *(each.bounds or ()), *([] if each.default is None else [each.default])):
            each.check(value)
    for policy, grid in ((row.coefficients, row.shared),):
        assert policy is not Coefficients.SHARED_GRID or all(one < other for one, other in pairwise(grid))


def test_a_trial_s_point_has_a_coefficient_per_expert_and_every_parameter():
    assert METHODS["ties"].point({SHARED: 0.9}, ["a", "b"]) == Point({"a": 0.9, "b": 0.9}, {"density": 0.2})
    assert METHODS["ties"].point({SHARED: 0.9}, [SHARED, "b"]).coefficients == {SHARED: 0.9, "b": 0.9}
    dare = METHODS["dare"].point({SHARED: 0.3, "drop_rate": 0.7}, ["a", "b"])
    assert dare == Point({"a": 0.3, "b": 0.3}, {"drop_rate": 0.7})
    assert METHODS["gta"].point({"b": 0.1, "a": 0.2}, ["a", "b"]) == Point({"a": 0.2, "b": 0.1})
    assert SEARCHED.point({"a": 0.1, "sharpness": 1.5}, ["a"]) == Point({"a": 0.1}, {"sharpness": 1.5})
    assert fixed_coefficients(["a", "b", "c", "d"]) == dict.fromkeys("abcd", 0.25)


def test_a_merge_may_be_asked_for_what_a_study_of_its_method_could_have():
    assert coefficient_range(METHODS["df-merge"], (0.0, 1.0)) == (0.0, 1.0)
    assert coefficient_range(METHODS["ties"], (0.0, 1.0)) == (0.0, 1.8)
    assert coefficient_range(METHODS["dare"], (0.2, 1.5)) == (0.0, 1.5)


def test_a_parameter_with_a_range_is_searched_beside_the_coefficients():
    space = SEARCHED.space(["a", "b"], (0.0, 1.0), 0.5)
    ranges = {name: (each.low, each.high, each.step) for name, each in space.distributions().items()}
    assert ranges == {"a": (0.0, 1.0, 0.5), "b": (0.0, 1.0, 0.5), "sharpness": (0.5, 2.0, None)}
    narrow = SEARCHED.adjusted({"sharpness": [1.5, 3]})
    assert narrow.space(["a"], (0.0, 1.0), None).own == {"sharpness": (1.5, 3.0)}
    assert narrow.complete({}) == {"sharpness": 1.5}  # the default, moved into the range
    fixed = SEARCHED.adjusted({"sharpness": 3})
    assert fixed.space(["a"], (0.0, 1.0), None).names == ("a",)
    assert fixed.point({"a": 0.2}, ["a"]).parameters == {"sharpness": 3.0}


@pytest.mark.parametrize(
    ("method", "given", "words"),
    [
        ("dare", {}, "'dare' needs a drop rate"),
        ("dare", {"drop_rate": 1.0}, r"the drop rate is 1.0, outside \[0, 1\)"),
        ("dare", {"drop_rate": -0.1}, "outside"),
        ("dare", {"droprate": 0.1}, "Did you mean 'drop_rate'?"),
        ("ties", {"drop_rate": 0.5}, "'ties' has no drop rate. It has: density"),
        ("gta", {"density": 0.5}, "'gta' has no density. Leave it out"),
    ],
)
def test_parameters_that_do_not_go_with_the_method_are_refused(method, given, words):
    with pytest.raises(InputError, match=words):
        METHODS[method].complete(given, "here")


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"tie": {"density": 0.3}}, ["parameters.tie", "did you mean 'ties'?"]),
        ({"density": 0.3}, ["parameters.density", "the methods are averaging"]),
        ({"ties": {"densty": 0.3}}, ["parameters.ties", "has no densty", "'density'"]),
        ({"ties": {"density": 1.3}}, ["parameters.ties", "the density is 1.3, outside [0, 1]"]),
        ({"ties": {"density": "much"}}, ["parameters.ties.density", "'much'"]),
        ({"ties": {"density": True}}, ["parameters.ties.density", "found true"]),
        ({"ties": {"density": []}}, ["parameters.ties", "cannot be []"]),
        ({"ties": {"density": [0.3, 0.3]}}, ["parameters.ties", "a list of different values"]),
        ({"dare": {"drop_rate": [0.3, 1.0]}}, ["parameters.dare", "outside [0, 1)"]),
    ],
)
def test_parameters_in_a_spec_are_checked_by_their_row(project, parameters, words):
    project.write(parameters=parameters)
    with pytest.raises(InputError) as caught:
        StudySpec.from_yaml(project.file)
    for word in words:
        assert word in str(caught.value)


def test_the_names_of_methods_are_checked_without_torch():
    code = (
        "import sys; import dfmerge_studies.methods, dfmerge_studies.report.figures, dfmerge_studies.cli.app;"
        "print([m for m in ('torch', 'optuna', 'plotly', 'matplotlib', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.slow
def test_a_spec_s_density_is_searched_stored_shown_and_part_of_what_a_study_is_about(project):
    project.write(method="ties", parameters={"ties": {"density": [0.3, 0.6]}})
    spec = StudySpec.from_yaml(project.file)
    assert stated_fingerprint(spec)["parameters"] == {"density": [0.3, 0.6]}
    assert "parameters" not in stated_fingerprint(spec.derive(method="dare"))
    assert "parameters" not in stated_fingerprint(spec.derive(parameters={}))
    printed = project.json("run", "spec.yaml", "--no-test")
    assert printed["trials"]["complete"] == 22
    assert printed["best"]["density"] in (0.3, 0.6)
    assert printed["rows"][-1]["density"] == printed["best"]["density"]
    assert f"density {printed['best']['density']:g}" in project.cli("run", "spec.yaml", "--no-test").stdout
    assert "density" in project.cli("status", "spec.yaml").stdout
    exported = project.json("export", "spec.yaml", "--out", "merged")
    assert exported["density"] == printed["best"]["density"]
    card = (project.folder / "merged/README.md").read_text()
    assert f"--density {exported['density']!r}" in card
    coefficients = ",".join(f"{name}={value!r}" for name, value in exported["coefficients"].items())
    again = ["merge", "spec.yaml", "--out", "again", "--coefficients", coefficients, "--density", exported["density"]]
    assert project.json(*again)["digest"] == exported["digest"]
    other = project.cli("run", "spec.yaml", "--set", "parameters.ties.density=0.3", check=2).stderr
    assert "parameters: the study has {'density': [0.3, 0.6]}, this run has {'density': 0.3}" in other
    usual = project.cli("run", "spec.yaml", "--set", "parameters={}", check=2).stderr
    assert "parameters: the study has {'density': [0.3, 0.6]}, this run has {}" in usual


def test_a_study_of_the_usual_parameters_is_not_joined_with_others(project):
    project.write(method="ties")
    spec = StudySpec.from_yaml(project.file)
    stored = stated_fingerprint(spec)  # as a version that knew no parameters stored it
    assert differences(stored, stated_fingerprint(spec)) == []
    other = stated_fingerprint(spec.derive(parameters={"ties": {"density": 0.5}}))
    assert [line.split(":")[0] for line in differences(stored, other)] == ["parameters"]


def test_merges_in_python_take_parameters_by_name(project):
    problem = load_problem(StudySpec.from_yaml(project.file))
    point = {"red": 1.0, "blue": 1.0}
    usual = merge(problem, point, method="ties").tasks
    assert merge(problem, point, method="ties", density=0.2).tasks == usual
    merge(problem, point, method="dare", drop_rate=0.5)
    with pytest.raises(InputError, match="needs a drop rate"):
        merge(problem, point, method="dare")
    given = problem.spec.derive(parameters={"dare": {"drop_rate": 0.5}})
    assert (
        merge(load_problem(given), point, method="dare").tasks
        == merge(problem, point, method="dare", drop_rate=0.5).tasks
    )


@pytest.mark.slow
def test_baselines_have_the_parameters_that_the_spec_gives_their_methods(project):
    project.write(method="averaging", baselines=["ties"], parameters={"ties": {"density": 0.9}})
    rows = {row["name"].split()[0]: row for row in project.json("run", "spec.yaml", "--no-test")["rows"]}
    assert rows["ties"]["density"] == 0.9
    assert "density" not in rows["averaging"]


@pytest.mark.slow
def test_the_scaled_method_is_df_merge_with_the_root_of_every_importance_over_its_mean(project):
    def weights(method, **importance):
        problem = load_problem(StudySpec.from_yaml(project.file).derive(importance=importance))
        merge(problem, {"red": 0.4, "blue": 0.9}, method=method)
        return torch.cat([value.detach().flatten() for value in problem.resident.model.parameters()])

    scaled = weights("df-merge-scaled")
    assert torch.equal(scaled, weights("df-merge", normalise="expert", power=0.5))
    assert torch.equal(scaled, weights("df-merge-scaled", normalise="tensor"))
    assert not torch.allclose(scaled, weights("df-merge"))
