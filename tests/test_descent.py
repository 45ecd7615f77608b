"""The sampler `gradient`: slopes of the loss along the coefficients, and the steps that follow from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import FrozenTrial, TrialState, create_trial
from torch.func import functional_call
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from dfmerge_studies import InputError, StudySpec, load_problem, optimize_merge
from dfmerge_studies.descent import adam_step
from dfmerge_studies.objective.merger import Merger
from dfmerge_studies.objective.problem import Problem
from dfmerge_studies.objective.rehearsal import rehearse_
from dfmerge_studies.objective.slopes import Sample
from dfmerge_studies.points import Point, fine_name
from dfmerge_studies.report.kinds import kinds_of
from dfmerge_studies.report.view import StudyView
from dfmerge_studies.search import make_sampler
from dfmerge_studies.storage import load_study, open_storage
from dfmerge_studies.study.provenance import stored_fingerprint
from dfmerge_studies.study.session import Session, open_study
from dfmerge_studies.tasks.encoding import Encoded, Kind
from dfmerge_studies.tasks.supervised import answer_losses
from dfmerge_studies.tasks.tags import IGNORED
from dfmerge_studies.trials.marks import DRAWN, GRADIENT, PLACE, PROPOSAL
from dfmerge_studies.trials.reading import results
from dfmerge_studies.trials.space import Space
from tests import ranks_child
from tests.models import make_model
from tests.project import EXPERTS, Project, make_project, run_cut_at, start_ranks
from tests.test_fisher import loop_losses
from tests.test_generate_tasks import generating
from tests.test_in_memory import target_score, toys
from tests.test_lm_eval import CASES, harness_project
from tests.test_token_classification import expert as tagger

optuna.logging.set_verbosity(optuna.logging.ERROR)
TWO = {"groups": {"attention": "attention|Attention|attn", "mlp": "DenseReluDense|mlp|intermediate"}}
ROWS = {"red": [0, 3, 5], "blue": [1, 2]}
WEIGHTS = {"red": 0.25, "blue": 0.75}


def descending(project: Project, **changes: Any) -> StudySpec:
    search = {"trials": 5, "sampler": "gradient", "gradient_rows": 6, **changes.pop("search", {})}
    return StudySpec.from_yaml(project.write(search=search, **changes))


# The loss


@pytest.mark.parametrize("family", ["t5", "gpt2", "bert"])
def test_the_loss_of_an_answer_is_that_of_the_model_s_own_logits_row_by_row(family: str, tmp_path: Path) -> None:
    problem = load_problem(descending(make_project(tmp_path, family), dtype="float64"))
    model, kind = problem.resident.model, problem.kinds["red"]
    problem.resident.use_head_("red")
    examples = problem.examples("red", "validation")[:7]
    with torch.no_grad():
        found = answer_losses(model, kind, examples, pad_id=problem.pad_id)
        for example, loss in zip(examples, found.tolist(), strict=True):
            losses = loop_losses(model, kind, example).double()
            assert loss == pytest.approx(-float(torch.log_softmax(-losses, 0)[example.label or 0]), rel=1e-6)


def test_the_loss_of_a_text_is_the_mean_over_its_tokens(tmp_path: Path) -> None:
    problem = load_problem(StudySpec.from_yaml(generating(tmp_path, "llama").write(dtype="float64")))
    example = problem.examples("red", "validation")[0]
    with torch.no_grad():
        found = answer_losses(problem.resident.model, problem.kinds["red"], [example], pad_id=problem.pad_id)
        (expected,) = loop_losses(problem.resident.model, problem.kinds["red"], example).tolist()
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_the_losses_of_heads_that_pick_no_class_are_those_of_their_kind() -> None:
    model = make_model("bert", torch.float64, num_labels=3)
    rows = [Encoded(0, (2, 7, 9, 3), label=[1, 0, 1]), Encoded(1, (2, 5, 3), label=[0, 0, 1])]
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([row.input_ids])).logits[0] for row in rows]
        found = answer_losses(model, Kind.MULTI_LABEL, rows, pad_id=0).tolist()
    for z, row, loss in zip(alone, rows, found, strict=True):
        expected = binary_cross_entropy_with_logits(z, torch.tensor(row.label, dtype=torch.float64))
        assert loss == pytest.approx(float(expected), rel=1e-9)
    number = make_model("bert", torch.float64, num_labels=1)
    targets = [Encoded(row.index, row.input_ids, label=0.5) for row in rows]
    with torch.no_grad():
        alone = [number(input_ids=torch.tensor([row.input_ids])).logits[0, 0] for row in rows]
        found = answer_losses(number, Kind.REGRESSION, targets, pad_id=0).tolist()
    assert found == pytest.approx([0.5 * (float(z) - 0.5) ** 2 for z in alone], rel=1e-9)


def test_the_loss_of_tags_is_the_mean_over_the_words_that_have_one() -> None:
    model = tagger(1, ["a", "b", "c"]).double().eval()
    row = Encoded(0, (2, 7, 9, 5, 3), label=(1, IGNORED, 2), words=(1, 2, 3))
    shorter = Encoded(1, (2, 5, 3), label=(0,), words=(1,))
    with torch.no_grad():
        z = model(input_ids=torch.tensor([row.input_ids])).logits[0]
        found = answer_losses(model, Kind.TOKENS, [row, shorter], pad_id=0)
    expected = cross_entropy(z[[1, 3]], torch.tensor([1, 2]))
    assert float(found[0]) == pytest.approx(float(expected), rel=1e-9)


def test_a_row_without_a_label_is_named() -> None:
    model = make_model("bert")
    with pytest.raises(InputError, match="row 4"):
        answer_losses(model, Kind.CLASSIFICATION, [Encoded(4, (2, 3))], pad_id=0)


# The slope


def coefficients(problem: Problem, granular: bool) -> Point:
    plain = {"red": 0.3, "blue": 0.8}
    if not granular:
        return Point(plain)
    groups = list(problem.groups)
    return Point.grouped({e: {g: plain[e] + 0.05 * k for k, g in enumerate(groups)} for e in EXPERTS}, {})


class Losses(torch.nn.Module):
    """Losses of answers as a module's forward pass, so that its weights can be given as functions of something."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.model = problem.resident.model
        self.problem = problem

    def forward(self, task: str, row: int) -> torch.Tensor:
        examples = self.problem.examples(task, "validation")
        kind, pad_id = self.problem.kinds[task], self.problem.pad_id
        return answer_losses(self.model, kind, [examples[row]], pad_id=pad_id)[0]


def slopes_by_autograd(problem: Problem, point: Point, weights: list[Any]) -> tuple[float, dict[str, float]]:
    """The loss as a function of the coefficients, written down as the equation has it and given to autograd."""
    at = {
        name: torch.tensor(value, dtype=torch.float64, requires_grad=True)
        for expert in EXPERTS
        for name, value in (
            [(fine_name(expert, group), value) for group, value in point.groups[expert].items()]
            if point.groups
            else [(expert, point.coefficients[expert])]
        )
    }
    group_of = {name: group for group, names in problem.groups.items() for name in names} if point.groups else {}
    merged = {}
    for name, start in problem.resident.base.items():
        step = torch.zeros_like(start)
        for vector, weight in zip(problem.resident.task_vectors, weights, strict=True):
            lam = at[fine_name(vector.expert, group_of[name]) if group_of else vector.expert]
            step = step + weight[name] * lam * vector.deltas[name]
        merged[f"model.{name}"] = start + len(weights) * step / sum(weight[name] for weight in weights)
    losses, loss = Losses(problem), torch.zeros((), dtype=torch.float64)
    for task, rows in ROWS.items():
        problem.resident.use_head_(task)
        for row in rows:
            loss = loss + WEIGHTS[task] / len(rows) * functional_call(losses, merged, (task, row))
    found = torch.autograd.grad(loss, list(at.values()))
    return float(loss.detach()), dict(zip(at, map(float, found), strict=True))


@pytest.mark.parametrize("family", ["t5", "gpt2", "bert"])
@pytest.mark.parametrize("method", ["gta", "df-merge", "df-merge-scaled"])
@pytest.mark.parametrize("granular", [False, True], ids=["model", "groups"])
def test_slopes_are_those_of_the_equation_with_the_importance_held_fixed(
    tmp_path: Path, family: str, method: str, granular: bool
) -> None:
    project = make_project(tmp_path, family, samples=3)
    search = {"granularity": TWO} if granular else {}
    spec = descending(
        project, method=method, dtype="float64", importance={"samples": 3, "dtype": "float32"}, search=search
    )
    problem = load_problem(spec)
    merger = Merger(problem, spec.row, None)
    point = coefficients(problem, granular)
    merger.merge_(point, keep=True)
    weights = [
        {
            name: torch.ones_like(start) if each is None else each[name].double() + spec.importance.floor
            for name, start in problem.resident.base.items()
        }
        for each in merger._weighed
    ]
    slope = merger.run(point, sample=Sample(ROWS, WEIGHTS)).slope
    assert slope is not None
    loss, expected = slopes_by_autograd(problem, point, weights)
    assert slope.loss == pytest.approx(loss, rel=1e-6)
    assert list(slope.slopes) == list(expected)
    for name, value in expected.items():
        assert slope.slopes[name] == pytest.approx(value, rel=2e-4, abs=1e-9), name  # T5's norms compute in float32


@pytest.mark.parametrize("method", ["gta", "df-merge", "df-merge-scaled"])
def test_a_merge_in_parts_has_the_slopes_of_one(project: Project, method: str) -> None:
    spec = descending(project, method=method)
    slopes = []
    for parts in (1, 3):
        problem = load_problem(spec)
        problem.part_entries = sum(problem.sizes.values()) // parts if parts > 1 else None
        rehearse_(problem, spec.row)
        merger = Merger(problem, spec.row, None)
        slopes.append(merger.run(coefficients(problem, False), sample=Sample(ROWS, WEIGHTS)).slope)
    assert slopes[0].loss == pytest.approx(slopes[1].loss, rel=1e-5)
    assert slopes[0].slopes == pytest.approx(slopes[1].slopes, rel=1e-3)


def test_a_slope_leaves_the_merge_its_scores_and_the_model_as_they_are(project: Project) -> None:
    problem = load_problem(descending(project))
    merger = Merger(problem, problem.spec.row, None)
    plain = merger.run(Point({"red": 0.4, "blue": 0.6}))
    before = {name: p.detach().clone() for name, p in problem.resident.model.named_parameters()}
    sloped = merger.run(Point({"red": 0.4, "blue": 0.6}), sample=Sample(ROWS, WEIGHTS))
    assert (sloped.tasks, sloped.rows) == (plain.tasks, plain.rows)
    for name, parameter in problem.resident.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
        assert not parameter.requires_grad
    assert not merger._weighed


@pytest.mark.slow
def test_two_ranks_share_the_rows_of_a_slope(project: Project) -> None:
    spec = descending(project, search={"granularity": TWO})
    problem = load_problem(spec)
    alone = Merger(problem, spec.row, None).run(coefficients(problem, True), sample=Sample(ROWS, WEIGHTS)).slope
    assert alone is not None
    point, sample = coefficients(problem, True), Sample(ROWS, WEIGHTS)
    for rank in start_ranks(ranks_child.slopes, project.folder, point, sample, folder=project.folder):
        output, errors = rank.communicate(timeout=300)
        assert rank.returncode == 0, (output, errors)
    found = json.loads((project.folder / "slopes.json").read_text())
    assert found["loss"] == pytest.approx(alone.loss, rel=1e-5)
    for name, slope in alone.slopes.items():
        assert found["slopes"][name] == pytest.approx(slope, rel=1e-3, abs=1e-6)


# The steps


def test_a_step_is_that_of_torch_s_adam() -> None:
    slopes = [0.5, -0.1, 0.3, 1e-4, -2.0]
    parameter = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = torch.optim.Adam([parameter], lr=1.0)
    for count, slope in enumerate(slopes, 1):
        before = float(parameter)
        parameter.grad = torch.tensor(slope, dtype=torch.float64)
        optimizer.step()
        assert adam_step(slopes[:count]) == pytest.approx(before - float(parameter), rel=1e-9)


SPACE = Space(("a", "b"))


def trial(place: int, point: tuple[float, float], slopes: tuple[float, float] | None, **changes: Any) -> FrozenTrial:
    state = changes.pop("state", TrialState.COMPLETE)
    proposal = {PROPOSAL: {"from": changes.pop("path")}} if "path" in changes else {}
    gradient = {GRADIENT: {"loss": 1.0, "slopes": dict(zip("ab", slopes, strict=True))}} if slopes else {}
    return create_trial(
        state=state,
        params=dict(zip("ab", point, strict=True)),
        distributions=SPACE.distributions(),
        values=[changes.pop("value", 0.5)] if state is TrialState.COMPLETE else None,
        user_attrs={PLACE: place, DRAWN: True, **proposal, **gradient},
    )


def proposed(*trials: FrozenTrial, rate: float = 0.05, place: int | None = None) -> tuple[dict[str, float], Any]:
    study = optuna.create_study(direction="maximize")
    study.add_trials(trials)
    asked = study.ask()
    if place is not None:
        asked.set_user_attr(PLACE, place)
    sampler = make_sampler("gradient", seed=0, study_name="s", space=SPACE, rate=rate)
    point = sampler.sample_relative(study, study.trials[asked.number], {**SPACE.distributions()})
    return point, study.trials[asked.number].user_attrs.get(PROPOSAL)


def test_the_first_step_goes_a_rate_down_each_slope_from_the_best_of_what_was_given() -> None:
    better, worse = trial(1, (0.4, 0.6), (2.0, -0.001), value=0.7), trial(0, (0.9, 0.9), (1.0, 1.0), value=0.6)
    point, kept = proposed(worse, better)
    assert point == pytest.approx({"a": 0.35, "b": 0.65}, abs=1e-6)
    assert kept == {"from": 1}


def test_steps_follow_the_path_in_the_order_of_places_whatever_the_order_of_trials() -> None:
    trials = [
        trial(0, (0.5, 0.5), (1.0, -1.0)),
        trial(1, (0.45, 0.55), (1.0, 0.5), path=0),
        trial(2, (0.4, 0.56), (-0.2, 0.5), path=0, value=0.1),
    ]
    point, _ = proposed(*trials)
    a, b = adam_step([1.0, 1.0, -0.2]), adam_step([-1.0, 0.5, 0.5])
    assert point == pytest.approx({"a": 0.4 - 0.05 * a, "b": 0.56 - 0.05 * b})
    assert proposed(*reversed(trials))[0] == point


def test_steps_end_at_the_bounds() -> None:
    assert proposed(trial(0, (0.02, 0.99), (1.0, -1.0)))[0] == {"a": 0.0, "b": 1.0}


@pytest.mark.parametrize("state", [TrialState.RUNNING, TrialState.FAIL])
def test_trials_without_a_slope_are_steps_in_the_same_direction(state: TrialState) -> None:
    begun = trial(0, (0.5, 0.5), (1.0, -1.0))
    running = trial(1, (0.45, 0.55), None, path=0, state=state)
    assert proposed(begun, running)[0] == pytest.approx({"a": 0.4, "b": 0.6})


@pytest.mark.parametrize("later", [1, 2])
def test_a_trial_without_its_point_is_no_step_ahead_of_the_one_that_takes_its_place(later: int) -> None:
    """A process may be killed when it has noted where a path started and not yet the point."""
    begun = trial(0, (0.5, 0.5), (1.0, -1.0))
    lost = create_trial(state=TrialState.FAIL, user_attrs={PLACE: 1, DRAWN: True, PROPOSAL: {"from": 0}})
    running = trial(2, (0.4, 0.6), None, path=0, state=TrialState.RUNNING)
    found = proposed(begun, lost, *[running][: later - 1], place=1)[0]
    assert found == pytest.approx({"a": 0.45, "b": 0.55})


def test_a_better_point_that_is_given_later_does_not_move_the_path() -> None:
    begun, step = trial(0, (0.5, 0.5), (1.0, -1.0)), trial(1, (0.45, 0.55), (1.0, -1.0), path=0)
    assert proposed(begun, step, trial(2, (0.9, 0.1), (1.0, 1.0), value=0.9))[0] == proposed(begun, step)[0]


def test_nothing_is_proposed_while_no_trial_has_a_slope() -> None:
    assert proposed(trial(0, (0.5, 0.5), None)) == ({}, None)


# The study


def history(session: Session) -> list[Any]:
    return [(each.params, each.values, each.user_attrs[GRADIENT]) for each in results(session.study)]


@pytest.mark.parametrize("granularity", [None, "layers"])
def test_a_study_descends_and_the_loss_of_all_rows_falls(project: Project, granularity: str | None) -> None:
    fields = {"trials": 6, "rate": 0.005, "gradient_rows": 100, "granularity": granularity}
    session = open_study(descending(project, method="gta", search=fields))
    session.run()
    losses = [each[2]["loss"] for each in history(session)]
    assert sorted(losses, reverse=True) == losses
    assert losses[-1] < losses[0]
    width = len(session.problem.groups) if granularity else 1
    assert len(history(session)[1][0]) == len(EXPERTS) * width
    first, second = (each[0] for each in history(session)[:2])
    slopes = history(session)[0][2]["slopes"]
    assert all((second[name] < first[name]) == (slope > 0) for name, slope in slopes.items() if slope)


def test_a_layer_is_a_group_and_its_name_is_that_of_blocks(project_of: Callable[[str], Project]) -> None:
    problem = load_problem(descending(project_of("t5-deep"), search={"granularity": "layers"}))
    assert list(problem.groups) == ["embeddings", "block1", "block2", "block3", "block4", "final"]


@pytest.mark.slow
def test_a_study_that_is_cut_goes_on_as_the_uncut_one(project: Project) -> None:
    fields: dict[str, Any] = {"method": "gta", "search": {"granularity": TWO}}
    whole = open_study(descending(project, **fields))
    whole.run()
    cut = descending(project, **fields, storage="sqlite:///cut.db")
    run_cut_at(cut, 1, 3)
    last = open_study(cut)
    last.run()
    assert history(last) == history(whole)


def test_the_short_form_is_a_coefficient_per_layer_in_twenty_trials(project: Project) -> None:
    spec = StudySpec.from_yaml(project.write(search="gradient"))
    assert (spec.search.sampler, spec.search.trials) == ("gradient", 20)
    assert "each of 4 groups: embeddings" in project.cli("validate", "spec.yaml").stdout


def test_a_study_keeps_its_sampler_and_refuses_another_rate(project: Project) -> None:
    descending(project, method="gta", search={"trials": 2})
    project.json("run", "spec.yaml", "--no-test")
    refused = project.cli("run", "spec.yaml", "--set", "search.rate=0.1", check=2).stderr
    assert "search.rate: the study has 0.05, this run has 0.1" in refused
    left_open = ("--set", "search.sampler=null")
    refused = project.cli("run", "spec.yaml", *left_open, "--set", "search.rate=0.1", check=2).stderr
    assert "search.rate: the study has 0.05, this run has 0.1" in refused
    needs = [project.json("validate", "spec.yaml", *each)["estimate"]["memory"] for each in ((), left_open)]
    assert needs[0] == needs[1]
    going_on = project.cli("run", "spec.yaml", "--no-test", *left_open, "--trials", "3", "--json")
    assert "colours goes on with the sampler gradient" in going_on.stderr
    more = json.loads(going_on.stdout)
    assert more["search"]["sampler"] == "gradient"
    status = project.cli("status", "spec.yaml").stdout
    assert "gradient (steps down the loss)" in status
    view = StudyView.of(load_study(open_storage(f"sqlite:///{project.folder}/colours.db", create=False), "colours"))
    assert kinds_of(view) == ["known", "step", "step"]
    ends = more["descent"]
    assert (ends["first"]["trial"], ends["last"]["trial"]) == (0, 2)
    assert f"{ends['first']['loss']:.3f} in trial 0, {ends['last']['loss']:.3f} in trial 2" in status
    assert more["seconds_per_trial"]["gradient"] > 0


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"objective": {"kind": "min"}}, ["objective", "is min"]),
        ({"objective": "pareto"}, ["objective", "is pareto"]),
        ({"method": "df-merge-kfac"}, ["method", "importance in blocks"]),
        ({"search": {"step": 0.1}}, ["search", "leave step out"]),
        ({"search": {"racing": True}}, ["search", "racing needs sampler: auto or random"]),
        ({"search": {"stop": "gain"}}, ["search", "stop: gain needs"]),
        ({"search": {"acquisition": "ucb"}}, ["search", "ucb needs sampler: gp"]),
        ({"search": {"rate": 0}}, ["search.rate", "greater than 0"]),
        ({"search": {"gradient_rows": 0}}, ["search.gradient_rows", "greater than 0"]),
        (
            {"method": {"transform": "dare", "importance": "uniform", "coefficients": "per-expert"}},
            ["slopes of coefficients only", "drop_rate"],
        ),
    ],
)
def test_what_has_no_slope_is_refused_with_the_field_and_the_way_out(
    project: Project, changes: dict[str, Any], messages: list[str]
) -> None:
    search = {"sampler": "gradient", **changes.pop("search", {})}
    project.write(search=search, **changes)
    refused = project.cli("validate", "spec.yaml", check=2).stderr
    for message in messages:
        assert message in refused


def test_a_comparison_searches_by_scores_what_has_no_slopes_and_says_so(project: Project) -> None:
    project.write(search={"sampler": "gradient", "trials": 2}, baselines=["df-merge-kfac"])
    methods = "gta,df-merge-kfac,df-merge-agreement,averaging"
    done = project.cli("compare", "spec.yaml", "--methods", methods, "--split", "test", "--json")
    samplers = {}
    for name in methods.split(","):
        study = load_study(open_storage(f"sqlite:///{project.folder}/colours.db", create=False), f"colours.{name}")
        assert all(trial.values for trial in study.trials)
        samplers[name] = stored_fingerprint(study)["search.sampler"]
    assert samplers == {**dict.fromkeys(samplers, "gradient"), "df-merge-kfac": "auto", "df-merge-agreement": "auto"}
    assert "colours.df-merge-kfac (by auto, from uniform points: it has no slopes to descend)" in done.stderr
    assert "colours.gta\n" in done.stderr
    assert project.json("run", "spec.yaml", "--no-test")["search"]["sampler"] == "gradient"


def test_patience_counts_from_the_first_step(project: Project) -> None:
    spec = descending(project, method="gta", search={"trials": 12, "patience": 2, "rate": 1e-6})
    summary = open_study(spec).run()
    assert summary.stopped is not None
    assert summary.stopped.after == 3


def test_a_scoring_function_of_one_s_own_has_no_slopes() -> None:
    base, experts = toys()
    with pytest.raises(InputError, match="no slopes"):
        optimize_merge(base, experts, target_score, method="gta", sampler="gradient")


def test_tasks_of_lm_evaluation_harness_descend_on_their_targets(tmp_path: Path) -> None:
    cases = {name: CASES[name][0] for name in ("shots", "written")}
    project = harness_project(tmp_path / "p", **cases)
    session = open_study(descending(project, method="gta", search={"trials": 3}))
    session.run()
    assert all(each[2]["loss"] > 0 for each in history(session))
    assert len({json.dumps(each[0]) for each in history(session)}) == 3


def test_texts_that_a_model_writes_descend_on_their_tokens(tmp_path: Path) -> None:
    project = generating(tmp_path, "llama")
    session = open_study(descending(project, method="gta", search={"trials": 3, "rate": 0.002, "gradient_rows": 50}))
    session.run()
    losses = [each[2]["loss"] for each in history(session)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_a_row_without_an_answer_is_refused_before_anything_is_stored(project: Project) -> None:
    with (project.folder / "red.validation.jsonl").open("a") as file:
        file.write(json.dumps({"input": "a question", "choices": ["yes", "no"], "label": None}) + "\n")
    project.write(search={"sampler": "gradient"})
    refused = project.cli("run", "spec.yaml", check=2).stderr
    assert "row 24" in refused
    assert not list(project.folder.glob("*.db"))
