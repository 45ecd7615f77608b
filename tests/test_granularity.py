"""Coefficients that are finer than a model: one per expert and group of parameters."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import yaml

from dfmerge_studies import InputError, StudySpec, load_problem, merge
from dfmerge_studies.methods import METHODS
from dfmerge_studies.objective.groups import parameter_groups
from dfmerge_studies.objective.merger import Merger
from dfmerge_studies.objective.problem import Problem
from dfmerge_studies.points import Point
from dfmerge_studies.report.figures import figures
from dfmerge_studies.report.figures.base import Drawing
from dfmerge_studies.report.view import StudyView
from dfmerge_studies.spec import SearchSettings
from dfmerge_studies.study.plan import Plan
from dfmerge_studies.study.session import Session, open_study
from dfmerge_studies.trials.reading import results
from tests.models import FAMILIES, make_model
from tests.project import EXPERTS, Project, run_cut_at
from tests.test_fisher import loop_fisher

TWO = {"groups": {"attention": "attention|Attention", "mlp": "DenseReluDense|mlp"}}


def granular(project: Project, granularity: Any = TWO, **changes: Any) -> StudySpec:
    search = {"trials": 6, "startup_trials": 2, "granularity": granularity, **changes.pop("search", {})}
    return StudySpec.from_yaml(project.write(search=search, **changes))


# Groups


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_runs_of_layers_between_the_embeddings_and_what_is_final(project: Project, family: str) -> None:
    spec = granular(project, {"blocks": 2})
    model = make_model(family)
    names = [name for name, _ in model.named_parameters()]
    found = parameter_groups(spec, model, names)
    assert list(found) == ["embeddings", "block1", "block2", "final"]
    assert sorted(name for members in found.values() for name in members) == sorted(names)
    assert not any(part in name for name in found["embeddings"] for part in ("final", "ln_f", "lm_head", "classifier"))
    assert {"t5": "shared.weight", "gpt2": "transformer.wte.weight"}.get(family, found["embeddings"][0]) in found[
        "embeddings"
    ]
    assert not any("embed" in name.lower() for name in found["final"])
    layers = [{name.split(".layer")[0] for name in found[block]} for block in ("block1", "block2")]
    assert not layers[0] & layers[1] or family in ("bert", "roberta", "distilbert", "llama", "llama-tied")


def test_layers_of_several_stacks_count_one_after_the_other(project: Project) -> None:
    model = make_model("t5")
    names = [name for name, _ in model.named_parameters()]
    found = parameter_groups(granular(project, {"blocks": 4}), model, names)
    assert {name.split(".")[0] for name in found["block1"]} == {"encoder"}
    assert {tuple(name.split(".")[:3]) for name in found["block3"]} == {("decoder", "block", "0")}
    with pytest.raises(InputError, match="5 blocks of a model with 4 layers"):
        parameter_groups(granular(project, {"blocks": 5}), model, names)


def test_expressions_find_groups_and_what_they_leave_is_the_rest(project: Project) -> None:
    model = make_model("t5")
    names = [name for name, _ in model.named_parameters()]
    found = parameter_groups(granular(project), model, names)
    assert list(found) == ["attention", "mlp", "rest"]
    assert all("DenseReluDense" in name for name in found["mlp"])
    assert "shared.weight" in found["rest"]
    everything = parameter_groups(granular(project, {"groups": {"all": "."}}), model, names)
    assert list(everything) == ["all"]


@pytest.mark.parametrize(
    ("granularity", "names", "message"),
    [
        ({"groups": {"a": "Attention", "b": r"\.q\."}}, None, "is found by 'a' and 'b'"),
        ({"groups": {"a": "Attention", "b": "conv"}}, None, "'b', 'conv', finds no parameter"),
        (
            {"groups": {"a": "Attention", "b": "shared"}},
            4,
            "'b', 'shared', finds only parameters that no expert changed",
        ),
    ],
)
def test_groups_that_do_not_fit_the_model_are_refused_with_names(
    project: Project, granularity: Any, names: int | None, message: str
) -> None:
    model = make_model("t5")
    everything = [name for name, _ in model.named_parameters()]
    changed = [name for name in everything if "shared" not in name] if names else everything
    with pytest.raises(InputError, match=message):
        parameter_groups(granular(project, granularity), model, changed)


@pytest.mark.parametrize(
    ("granularity", "message"),
    [
        ({}, "write model"),
        ({"blocks": 2, "groups": {"a": "b"}}, "write model"),
        ({"groups": {}}, "no group"),
        ({"groups": {"a.b": "x"}}, "no usable name"),
        ({"groups": {"rest": "x"}}, "no usable name"),
        ({"groups": {"a": "("}}, "no regular expression"),
        ({"blocks": 0}, "blocks"),
        ({"layers": 2}, "layers"),
        ("layer", "granularity"),
    ],
)
def test_granularities_that_cannot_be_are_refused(project: Project, granularity: Any, message: str) -> None:
    project.write(search={"granularity": granularity})
    assert message in project.cli("validate", "spec.yaml", check=2).stderr


@pytest.mark.slow
def test_a_regex_that_finds_nothing_is_refused_before_anything_is_stored(project: Project) -> None:
    granular(project)
    assert project.json("validate", "spec.yaml")["estimate"]["groups"]["mlp"] > 0
    assert "each of 3 groups: attention" in project.cli("validate", "spec.yaml").stdout
    project.write(search={"granularity": {"groups": {"conv": "conv"}}})
    for command in (("validate", "spec.yaml"), ("run", "spec.yaml")):
        assert "search.granularity.groups.conv" in project.cli(*command, check=2).stderr
    assert not list(project.folder.glob("*.db"))


def test_a_method_without_a_coefficient_per_expert_refuses_it_and_as_a_baseline_goes_without(project: Project) -> None:
    project.write(method="ties", search={"granularity": {"blocks": 2}})
    refused = project.cli("validate", "spec.yaml", check=2).stderr
    assert "'ties' has no coefficient per expert" in refused
    granular(project, method="gta", baselines=["averaging"], search={"trials": 2})
    rows = project.json("run", "spec.yaml", "--no-test")["rows"]
    assert [row["name"] for row in rows][-2] == "averaging"
    assert "groups" in rows[-1]
    assert "groups" not in rows[-2]


# The merge


@pytest.fixture
def problem(project: Project) -> Problem:
    return load_problem(granular(project, dtype="float64", importance={"samples": 3, "dtype": "float32"}))


POINT = {"red": {"attention": 0.2, "mlp": 0.9, "rest": 0.5}, "blue": {"attention": 0.7, "mlp": 0.1, "rest": 0.4}}


def lam(problem: Problem, expert: str, name: str) -> float:
    (group,) = [group for group, members in problem.groups.items() if name in members]
    return POINT[expert][group]


def test_the_fisher_is_estimated_at_the_model_that_is_scaled_group_by_group(problem: Problem) -> None:
    merger = Merger(problem, problem.spec.row, None)
    at = Point.grouped(POINT, {}).spread(problem.groups)
    found, _ = merger.importance(0, at["red"])
    model = make_model("t5", torch.float64, layers=1)
    model.load_state_dict(problem.resident.model.state_dict())
    deltas = problem.resident.task_vectors[0].deltas
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in problem.resident.base:
                scaled = problem.resident.base[name].clone()
                if name in deltas:
                    scaled += lam(problem, "red", name) * deltas[name]
                parameter.copy_(scaled)
    expected = loop_fisher(model, problem.kinds["red"], list(problem.tasks["red"].fisher), names=list(found))
    for name, value in expected.items():
        error = (found[name].double() - value).norm() / value.norm().clamp_min(1e-300)
        assert error < 1e-5, name  # Fishers are stored in float32


@pytest.mark.parametrize("method", ["df-merge", "df-merge-static", "gta"])
def test_a_merge_is_the_equation_entry_by_entry_with_each_entry_s_own_coefficient(
    problem: Problem, method: str
) -> None:
    row = METHODS[method]
    merger = Merger(problem, row, None)
    at = Point.grouped(POINT, {}).spread(problem.groups)
    weights = []
    for index, expert in enumerate(problem.experts):
        if method == "gta":
            weights.append({name: torch.ones_like(base) for name, base in problem.resident.base.items()})
            continue
        values, _ = merger.importance(index, at[expert] if method == "df-merge" else 1.0)
        floor = problem.spec.importance.floor
        weights.append({name: value + floor for name, value in values.items()})
    merger.merge_(Point.grouped(POINT, {}))
    merged = dict(problem.resident.model.named_parameters())
    for name, base in problem.resident.base.items():
        expected = base.double().flatten().clone()
        for entry in range(0, base.numel(), max(1, base.numel() // 7)):
            total = sum(float(weight[name].flatten()[entry]) for weight in weights)
            step = sum(
                float(weight[name].flatten()[entry])
                * lam(problem, vector.expert, name)
                * float(vector.deltas[name].flatten()[entry])
                for weight, vector in zip(weights, problem.resident.task_vectors, strict=True)
                if name in vector.deltas
            )
            expected[entry] += len(weights) * step / total
            assert float(merged[name].detach().flatten()[entry]) == pytest.approx(
                float(expected[entry]), rel=1e-5, abs=1e-8
            )


@pytest.mark.parametrize("method", ["df-merge", "df-merge-static", "gta"])
def test_groups_with_one_coefficient_are_the_model_wise_merge_bit_for_bit(project: Project, method: str) -> None:
    problem = load_problem(granular(project, method=method))
    merger = Merger(problem, problem.spec.row, None)
    plain = {"red": 0.3, "blue": 0.85}
    fine = Point.grouped({expert: dict.fromkeys(problem.groups, value) for expert, value in plain.items()}, {})
    assert fine.coefficients == plain
    models = []
    for point in (Point(plain), fine):
        merger.merge_(point)
        models.append({name: p.detach().clone() for name, p in problem.resident.model.named_parameters()})
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


def test_a_fisher_is_kept_under_the_vector_of_its_coefficients(problem: Problem) -> None:
    key = Merger(problem, problem.spec.row, None).importances.key
    names = list(problem.resident.names)
    fine = Point.grouped(POINT, {}).spread(problem.groups)["red"]
    other = Point.grouped({**POINT, "red": {**POINT["red"], "mlp": 0.8}}, {}).spread(problem.groups)["red"]
    tied = Point.grouped({"red": dict.fromkeys(problem.groups, 0.5)}, {}).spread(problem.groups)["red"]
    digests = [key(0, each, names).digest for each in (fine, other, tied, 0.5)]
    assert digests[2] == digests[3]
    assert len(set(digests)) == 3


def test_a_merge_takes_coefficients_by_expert_by_name_or_nested(problem: Problem) -> None:
    flat = {f"{expert}.{group}": value for expert, own in POINT.items() for group, value in own.items()}
    assert merge(problem, flat).tasks == merge(problem, POINT).tasks
    half = merge(problem, {"red": 0.5, "blue": POINT["blue"]})
    assert half.tasks == merge(problem, {"red": dict.fromkeys(problem.groups, 0.5), "blue": POINT["blue"]}).tasks
    for given, message in (
        ({"red": 0.5, "blue": {"attention": 0.1}}, "no coefficient for 'blue.mlp'"),
        ({**flat, "red.lost": 0.1}, "unknown name 'red.lost'"),
        ({**flat, "red": 0.1}, "'red.attention' has two coefficients"),
        ({**flat, "red.mlp": 7.0}, "outside the bounds"),
    ):
        with pytest.raises(InputError, match=message):
            merge(problem, given)
    with pytest.raises(InputError, match="granularity gives their groups"):
        merge(load_problem(problem.spec.derive(search={"granularity": None})), flat)


def test_the_merge_command_takes_the_same_and_the_card_says_how_to_make_it_again(project: Project) -> None:
    granular(project, importance={"samples": 2})
    text = ",".join(f"{expert}.{group}={value}" for expert, own in POINT.items() for group, value in own.items())
    merged = project.json("merge", "spec.yaml", "--out", "one", "--coefficients", text)
    assert merged["groups"] == POINT
    assert merged["coefficients"]["red"] == pytest.approx(1.6 / 3)
    again = project.json("merge", "spec.yaml", "--out", "two", "--coefficients", json.dumps(POINT))
    assert again["digest"] == merged["digest"]
    card = (project.folder / "one" / "README.md").read_text()
    assert "| red | 0.2 | 0.9 | 0.5 |" in card
    assert text in card
    assert json.loads((project.folder / "one" / "dfmerge.json").read_text())["groups"] == POINT
    for wrong, message in (("red=a", "is not NAME=NUMBER"), ("{", "is no JSON"), ('{"red": "x"}', "than numbers")):
        assert message in project.cli("merge", "spec.yaml", "--out", "x", "--coefficients", wrong, check=2).stderr


# The study


def trials_of(session: Session) -> list[Any]:
    return [(each.params, each.values, each.user_attrs["tasks"]) for each in results(session.study)]


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["auto", "gp", "random"])
def test_the_first_half_of_the_trials_is_the_model_wise_search_draw_for_draw(project: Project, sampler: str) -> None:
    search = {"trials": 8, "startup_trials": 2, "sampler": sampler}
    fields = {"method": "gta", "search": search}
    fine = open_study(granular(project, **fields))
    fine.run()
    plain = open_study(StudySpec.from_yaml(project.write(**fields, storage="sqlite:///plain.db")))
    plain.run(target=4)
    tied, free = trials_of(fine)[:4], trials_of(fine)[4:]
    for (params, values, tasks), (coarse, their_values, their_tasks) in zip(tied, trials_of(plain)[:4], strict=True):
        assert (values, tasks) == (their_values, their_tasks)
        assert params == {f"{e}.{g}": coarse[e] for e in EXPERTS for g in fine.problem.groups}
    assert all(len({params[f"red.{group}"] for group in fine.problem.groups}) > 1 for params, _, _ in free)
    assert all(set(params) == set(fine.plan.space.names) for params, _, _ in free)
    best = fine.best()
    assert best is not None
    assert best.values[0] >= max(values[0] for _, values, _ in tied)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["auto", "gp"])
def test_a_study_that_is_cut_in_either_half_goes_on_as_the_uncut_one(project: Project, sampler: str) -> None:
    fields: dict[str, Any] = {"method": "gta", "search": {"trials": 6, "startup_trials": 2, "sampler": sampler}}
    whole = open_study(granular(project, **fields))
    whole.run()
    cut = granular(project, **fields, storage="sqlite:///cut.db")
    session = open_study(cut)
    session.add_trials(1)  # states the total of the spec, and one more, before the first trial
    whole.run(target=7)
    run_cut_at(cut, 2, 5)
    last = open_study(cut)
    last.run()
    assert len(results(last.study)) == 7
    found, expected = trials_of(last), trials_of(whole)
    assert found[:3] == expected[:3]


@pytest.mark.slow
def test_every_view_of_a_study_shows_means_and_groups(project_of: Callable[[str], Project]) -> None:
    project = project_of("t5-deep")
    granular(project, method="gta", search={"trials": 4, "startup_trials": 1, "sampler": "random"})
    best = project.json("run", "spec.yaml", "--no-test")["best"]
    groups = best["groups"]["red"]
    assert best["coefficients"]["red"] == pytest.approx(sum(groups.values()) / len(groups))
    assert project.json("status", "spec.yaml")["best"] == best
    assert "attention=" in project.cli("status", "spec.yaml").stdout
    assert project.json("export", "spec.yaml", "--out", "model")["groups"] == best["groups"]
    view = StudyView.of(open_study(StudySpec.from_yaml(project.file)).study)
    assert list(view.dimensions) == [f"{e}.{g}" for e in EXPERTS for g in ("attention", "mlp", "rest")]
    assert list(view.points()) == list(EXPERTS)
    drawn = {each.name for each in figures(view) if isinstance(each, Drawing)}
    assert {"importance", "slices", "trajectory"} <= drawn
    assert project.json("report", "spec.yaml")["page"]


def test_a_study_is_joined_by_the_same_groups_only(project: Project) -> None:
    fields: dict[str, Any] = {"method": "gta", "search": {"trials": 1}}
    open_study(granular(project, **fields)).run()
    session = open_study(granular(project, **fields))
    assert session.plan.groups == ("attention", "mlp", "rest")
    assert Plan.of(session.spec).joined(session.study).space == session.plan.space
    for other in ({"blocks": 2}, None):
        refused = project.cli("status" if other is None else "run", "spec.yaml", check=0 if other is None else None)
        granular(project, other, **fields)
        refused = project.cli("run", "spec.yaml", check=2)
        assert "search.granularity" in refused.stderr


@pytest.mark.slow
def test_a_study_without_the_field_is_a_model_wise_one(finished: Project) -> None:
    content = yaml.safe_load(finished.file.read_text())
    finished.write(search={**content["search"], "granularity": "model"})
    assert finished.json("run", "spec.yaml", "--no-test")["trials"]["complete"] == 4
    granular(finished, search=content["search"])
    assert "search.granularity" in finished.cli("run", "spec.yaml", check=2).stderr


def test_the_words_of_the_spec_are_read() -> None:
    assert SearchSettings.model_validate({"granularity": "model"}).granularity is None
    found = SearchSettings.model_validate({"granularity": {"blocks": 3}}).granularity
    assert found is not None
    assert found.blocks == 3
