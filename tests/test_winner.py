"""The winner of a study: trials that noise of the rows cannot tell from the best are compared on more rows."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import FrozenTrial

from dfmerge_studies import StudySpec, load_problem, merge
from dfmerge_studies.objective.merger import Merger
from dfmerge_studies.spec import ObjectiveSettings
from dfmerge_studies.study.rows import rows_attribute
from dfmerge_studies.study.selection import LEVEL, budget, contenders, name_winner_, preferred
from dfmerge_studies.study.session import Session, open_study
from dfmerge_studies.study.value import best_trial
from dfmerge_studies.study.winner import Rescored, stored_selection, winner_of
from dfmerge_studies.tasks.metrics import Metrics, TaskScore
from dfmerge_studies.tasks.sampling import divided_rows
from tests.project import Project, copied

MEAN = ObjectiveSettings()
ONE = Metrics.named({"t": "accuracy"})


def trial(
    number: int, rows: Mapping[str, Sequence[float]], *, keep: bool = True, drops: Mapping[str, float] | None = None
) -> FrozenTrial:
    """A completed trial with these scores of rows; with `keep` it keeps them."""
    tasks = {task: float(np.mean(row)) for task, row in rows.items()}
    attributes: dict[str, Any] = {"tasks": tasks, "place": number, "drops": dict(drops or {})}
    made = optuna.trial.create_trial(
        value=float(np.mean(list(tasks.values()))),
        user_attrs={**attributes, **(rows_attribute(rows) if keep else {})},
    )
    made.number = number
    return made


# Which trials are compared again


@pytest.mark.slow
def test_trials_are_told_apart_as_a_paired_test_over_their_rows_tells_them() -> None:
    draw, n, seen = np.random.default_rng(3), 300, {"near": 0, "far": 0}
    for _ in range(60):
        easy = draw.random(n) < 0.7
        first, second = ((easy ^ (draw.random(n) < noise)).astype(float) for noise in (0.04, 0.10))
        first, second = sorted((first, second), key=np.mean, reverse=True)
        difference = first - second
        z = difference.mean() / max(1e-12, difference.std() / math.sqrt(n))
        found = contenders([trial(0, {"t": first}), trial(1, {"t": second})], MEAN, ONE, {"t": n}, seed=0)
        if z < 1.4:  # the normal quantile is 1.64; a bootstrap of 1,000 draws is not exact at the edge
            seen["near"] += 1
            assert [each.number for each in found] == [0, 1]
        if z > 1.9:
            seen["far"] += 1
            assert [each.number for each in found] == [0]
    assert min(seen.values()) > 5


def test_the_same_difference_is_noise_between_trials_that_err_on_other_rows_and_none_between_trials_that_do_not() -> (
    None
):
    n = 400
    best = np.ones(n)
    best[:100] = 0.0
    subset, other = best.copy(), np.ones(n)
    subset[100:106] = 0.0  # fails where the best fails, and on six more
    other[200:306] = 0.0  # fails elsewhere
    rows = {"t": n}
    assert len(contenders([trial(0, {"t": best}), trial(1, {"t": subset})], MEAN, ONE, rows, seed=0)) == 1
    assert len(contenders([trial(0, {"t": best}), trial(1, {"t": other})], MEAN, ONE, rows, seed=0)) == 2


@pytest.mark.parametrize("kind", ["mean", "weighted", "min"])
def test_every_objective_is_resampled_whole(kind: str) -> None:
    """Against a loop that draws rows one by one and computes the objective by hand."""
    draw = np.random.default_rng(5)
    rows = [{task: (draw.random(40) < share).astype(float) for task in "ab"} for share in (0.8, 0.72, 0.6)]
    weights = {"a": 3.0, "b": 1.0} if kind == "weighted" else None
    how = {
        "mean": lambda a, b: (a + b) / 2,
        "weighted": lambda a, b: (3 * a + b) / 4,
        "min": min,
    }[kind]
    ranked = sorted(rows, key=lambda row: -how(row["a"].mean(), row["b"].mean()))
    trials = []
    for number, row in enumerate(ranked):
        made = trial(number, row)
        made.values = [float(how(row["a"].mean(), row["b"].mean()))]
        trials.append(made)
    as_good = np.zeros(3)
    for _ in range(4000):
        picks = {task: draw.integers(0, 40, 40) for task in "ab"}
        values = [how(row["a"][picks["a"]].mean(), row["b"][picks["b"]].mean()) for row in ranked]
        as_good += [value >= values[0] - 1e-9 for value in values]
    shares = as_good / 4000
    assert all(abs(share - LEVEL) > 0.015 for share in shares[1:]), "too near the edge for two bootstraps to agree"
    objective, metrics = ObjectiveSettings(kind=kind, weights=weights), Metrics.named(dict.fromkeys("ab", "accuracy"))
    found = contenders(trials, objective, metrics, {"a": 40, "b": 40}, seed=1)
    assert [each.number for each in found] == [number for number in range(3) if shares[number] >= LEVEL]


def test_trials_without_rows_are_told_apart_by_the_standard_error_of_a_share() -> None:
    n = 100
    best, near, far = (np.r_[np.ones(k), np.zeros(n - k)] for k in (80, 73, 60))
    trials = [trial(number, {"t": rows}, keep=False) for number, rows in enumerate((best, near, far))]
    # sqrt(2 * 0.8 * 0.2 / 100) is 5.7 points: 7 are 1.2 of them, and 20 are 3.2.
    assert [each.number for each in contenders(trials, MEAN, ONE, {"t": n}, seed=0)] == [0, 1]


def test_a_trial_that_misses_its_constraints_is_no_contender_where_another_keeps_them() -> None:
    study = optuna.create_study(direction="maximize")
    for value, missed in ((0.9, 1.0), (0.5, -1.0), (0.5, -2.0)):
        running = study.ask()
        running.set_constraint("000", missed)
        for name, content in (("tasks", {"t": value}), ("drops", {"t": 3.0 + missed})):
            running.set_user_attr(name, content)
        study.tell(running, value)
    found = contenders(study.trials, MEAN, ONE, {"t": 10}, seed=0)
    assert {each.number for each in found} == {1, 2}
    assert preferred(found, {}).number == 2


@given(st.integers(1, 5000))
def test_scoring_again_costs_at_most_a_twentieth_of_the_trials_or_one(trials: int) -> None:
    most, share = budget(trials)
    assert 2 <= most <= 5
    assert most * share <= max(1.0, 0.05 * trials)
    assert budget(trials + 1)[1] >= share


# Which of them is named


def test_ties_go_to_the_smaller_largest_drop_and_then_to_the_earliest() -> None:
    rows = {"a": [1.0, 0.0], "b": [0.0, 1.0]}
    drops = [{"a": 4.0, "b": 1.0}, {"a": 3.0, "b": 3.0}, {"a": 3.0, "b": 0.0}]
    trials = [trial(number, rows, drops=each) for number, each in enumerate(drops)]
    assert preferred(trials, {}).number == 1
    assert best_trial(trials, MEAN) is trials[0]  # the search's own word


def test_the_best_on_all_rows_is_named_and_constraints_count_on_them_too() -> None:
    trials = [trial(number, {"t": [1.0, 0.0]}) for number in range(3)]
    scored = {
        0: Rescored(0.8, {"t": 0.8}, drops={"t": 9.0}),
        1: Rescored(0.7, {"t": 0.7}, drops={"t": 2.0}),
        2: Rescored(0.7, {"t": 0.7}, drops={"t": 1.0}),
    }
    assert preferred(trials, scored).number == 0
    assert preferred(trials, scored, {"t": 5.0}).number == 2


# Which rows they are scored on


@given(
    st.integers(1, 60),
    st.none() | st.integers(1, 80) | st.floats(0.01, 1.0),
    st.none() | st.integers(0, 80) | st.floats(0.01, 0.99),
    st.integers(0, 3),
)
@settings(deadline=None)
def test_no_row_is_both_searched_on_and_held_out(
    total: int, limit: float | None, holdout: float | None, seed: int
) -> None:
    seen, held = divided_rows(total, limit, holdout, np.random.default_rng(seed))
    assert not set(seen) & set(held)
    assert seen == sorted(set(seen))
    assert len(set(held)) == len(held)
    assert set(seen) | set(held) <= set(range(total))
    if holdout is None:
        assert len(seen) + len(held) == total
        assert seen == divided_rows(total, limit, 0, np.random.default_rng(seed))[0]
    elif isinstance(holdout, int):
        assert len(held) == min(holdout, total)


def limited(project: Project, limit: int = 6, **search: Any) -> None:
    """A study of eight random trials of `gta` on six of 24 rows, whose best is not its winner."""
    tasks = {name: {**task, "limit": limit, "metric": "log_likelihood"} for name, task in project.spec["tasks"].items()}
    fields = {"trials": 8, "seed": 6, "sampler": "random", **search}
    project.write(tasks=tasks, name="lucky", method="gta", search=fields)


@pytest.fixture(scope="module")
def lucky_original(make_copy: Callable[[str, Path], Project], tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = make_copy("t5-deep", tmp_path_factory.mktemp("lucky"))
    limited(project)
    project.cli("run", "spec.yaml", "--no-test")
    return project


@pytest.fixture
def lucky(lucky_original: Project, tmp_path: Path) -> Project:
    return copied(lucky_original, tmp_path / "lucky")


def opened(project: Project) -> Session:
    return open_study(StudySpec.from_yaml(project.file))


@pytest.mark.slow
def test_a_trial_is_judged_by_its_mean_over_the_search_s_rows_and_as_many_again_as_may_be_spent(
    lucky: Project,
) -> None:
    """Against a merge that is scored on the whole split, whose rows are then picked by hand."""
    session = opened(lucky)
    selection = stored_selection(session.study)
    assert selection is not None
    assert (selection.rows, selection.further_rows) == ({"red": 9, "blue": 9}, {"red": 3, "blue": 3})
    session.merger.hold_out_(0.5)
    whole = load_problem(session.spec.derive(tasks=without_limit(session.spec)))
    for number, scored in selection.scored.items():
        outcome = merge(whole, session.study.trials[number].user_attrs["coefficients"])
        for task, rows in outcome.rows.items():
            seen, held = (
                [rows[each.index] for each in session.problem.examples(task, split)]
                for split in ("validation", "holdout")
            )
            assert (len(seen), len(held)) == (6, 3)
            assert scored.tasks[task] == pytest.approx(np.mean([*seen, *held]), rel=1e-5)
            assert scored.further[task] == pytest.approx(np.mean(held), rel=1e-5)
        assert scored.value == pytest.approx(np.mean(list(scored.tasks.values())))
    assert selection.winner == max(selection.scored, key=lambda number: selection.scored[number].value)


def without_limit(spec: StudySpec) -> dict[str, Any]:
    return {name: {**task, "limit": None} for name, task in spec.model_dump()["tasks"].items()}


@pytest.mark.slow
def test_every_command_names_the_winner_and_not_the_luckiest_trial(lucky: Project) -> None:
    study = opened(lucky).study
    named = winner_of(study, MEAN)
    assert named is not None
    number, luckiest = named.number, study.best_trial.number
    assert number != luckiest
    status = lucky.json("status", "spec.yaml")["best"]
    assert (status["number"], status["value"]) == (number, study.trials[number].value)
    assert status["selection"]["value"] == status["selection"]["scored"][str(number)] < status["value"] + 1
    assert lucky.json("run", "spec.yaml", "--no-test")["best"] == status
    shown = lucky.cli("run", "spec.yaml", "--no-test").stdout
    assert f"gta (trial {number})" in shown
    assert f"winner: trial {number}" in shown
    rows = {row["name"]: row for row in lucky.json("run", "spec.yaml", "--no-test")["rows"]}
    assert rows[f"gta (trial {number})"]["validation"]["mean"] == pytest.approx(status["value"])
    assert rows[f"gta (trial {number}), on all rows"]["validation"]["mean"] == pytest.approx(
        status["selection"]["value"]
    )
    assert "on 9 rows a task (3 rows a task new to the search)" in shown
    assert "on 9 rows a task" in lucky.cli("status", "spec.yaml").stdout
    (entry,) = lucky.json("list", "spec.yaml")
    assert entry["best_value"] == status["value"]
    (row,) = [
        r
        for r in lucky.json("compare", "spec.yaml", "--methods", "gta", "--split", "validation", "--set", "name=lucky")[
            "rows"
        ]
        if r["method"] == "gta"
    ]
    assert row["studies"][0]["trial"] != luckiest
    page = lucky.json("report", "spec.yaml")["page"]
    assert f"The best is trial {number}" in (lucky.folder / page).read_text()


@pytest.mark.slow
def test_the_winner_is_exported_with_both_numbers_and_another_trial_on_request(lucky: Project) -> None:
    number = lucky.json("status", "spec.yaml")["best"]["number"]
    assert lucky.json("export", "spec.yaml", "--out", "model")["trial"] == number
    card = (lucky.folder / "model" / "README.md").read_text()
    assert "on 9 rows a task (3 rows a task new to the search)" in card
    kept = json.loads((lucky.folder / "model" / "dfmerge.json").read_text())
    assert kept["value"] != kept["selection"]["value"]
    assert lucky.json("export", "spec.yaml", "--out", "other", "--trial", "0")["trial"] == 0
    assert json.loads((lucky.folder / "other" / "dfmerge.json").read_text())["selection"] is None


# Stored once, exact under cut and resume


class Scored:
    """Counts what is scored besides trials, and stops at a given count."""

    def __init__(self, patch: pytest.MonkeyPatch, stop: int | None = None) -> None:
        self.splits: list[str] = []
        real = Merger.results

        def results(merger: Merger, split: str) -> dict[str, TaskScore]:
            if split == "validation":  # of trials
                return real(merger, split)
            if len(self.splits) == stop:
                raise KeyboardInterrupt
            self.splits.append(split)
            return real(merger, split)  # type: ignore[arg-type]

        patch.setattr(Merger, "results", results)


@pytest.mark.slow
def test_a_choice_that_was_cut_goes_on_with_what_it_had_scored(lucky: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = stored_selection(opened(lucky).study)
    limited(lucky)
    lucky.write(**{**read(lucky), "storage": "sqlite:///again.db"})
    with monkeypatch.context() as patch:
        first = Scored(patch, stop=1)
        with pytest.raises(KeyboardInterrupt):
            opened(lucky).run()
        assert first.splits == ["holdout"]
    assert stored_selection(opened(lucky).study) is None
    with monkeypatch.context() as patch:
        second = Scored(patch)
        session = opened(lucky)
        session.run()
        assert second.splits == ["holdout"]
        assert stored_selection(session.study) == whole
        session.run()
        assert second.splits == ["holdout"]


def read(project: Project) -> dict[str, Any]:
    import yaml

    return dict(yaml.safe_load(project.file.read_text()))


def test_trials_that_are_added_make_the_choice_anew_and_until_then_the_search_s_best_stands(lucky: Project) -> None:
    session = opened(lucky)
    before = stored_selection(session.study)
    session.add_trials(2)
    study = session.study
    study.add_trial(
        optuna.trial.create_trial(
            value=-9.0,
            params={"red": 0.1, "blue": 0.1},
            distributions=study.trials[0].distributions,
            user_attrs={**study.trials[0].user_attrs, "place": 8, "tasks": {"red": -9.0, "blue": -9.0}},
        )
    )
    assert before is not None
    assert winner_of(study, MEAN) == study.best_trial
    assert lucky.json("status", "spec.yaml")["best"]["selection"] is None
    session.run()
    after = stored_selection(study)
    assert after is not None
    assert after.among == 10


@pytest.mark.slow
def test_several_workers_name_the_winner_that_one_names(lucky: Project) -> None:
    whole = stored_selection(opened(lucky).study)
    lucky.write(**{**read(lucky), "storage": "sqlite:///again.db"})
    lucky.process("run", "spec.yaml", "--no-test", "--workers", "2")
    study = opened(lucky).study
    found = stored_selection(study)
    assert whole is not None
    assert found is not None
    place = {each.number: each.user_attrs["place"] for each in study.trials}
    assert place[found.winner] == whole.winner
    assert [place[number] for number in found.tied] == list(whole.tied)


# Where there is nothing more to choose on


def test_without_further_rows_the_best_of_the_search_is_named_and_only_ties_are_broken(finished: Project) -> None:
    session = opened(finished)
    selection = stored_selection(session.study)
    assert selection is not None
    assert not selection.scored
    assert set(selection.further_rows.values()) == {0}
    assert session.study.trials[selection.winner].value == session.study.best_value
    assert "these rows" in finished.cli("status", "spec.yaml").stdout


@pytest.mark.slow
def test_an_objective_per_task_keeps_its_front_and_names_no_winner(project: Project) -> None:
    project.write(objective="pareto", method="gta", search={"trials": 2})
    printed = project.json("run", "spec.yaml", "--no-test")["best"]
    assert printed["selection"] is None
    assert name_winner_(opened(project)) is None


def test_a_study_of_an_earlier_version_shows_what_it_showed(finished: Project) -> None:
    study = opened(finished).study
    storage = study._storage
    storage.set_study_user_attr(study._study_id, "dfmerge:winner", None)
    best = best_trial(sorted(study.trials, key=lambda each: each.user_attrs["place"]), MEAN)
    status = finished.json("status", "spec.yaml")["best"]
    assert best is not None
    assert status["number"] == best.number
    assert status["selection"] is None


@pytest.mark.slow
def test_agreement_is_compared_on_rows_that_the_experts_answer_first(project: Project) -> None:
    tasks = {name: {**task, "limit": 0.5} for name, task in project.spec["tasks"].items()}
    project.write(tasks=tasks, objective="agreement", method="gta", search={"trials": 3, "max_drop": 60})
    selection = project.json("run", "spec.yaml", "--no-test")["best"]["selection"]
    assert selection["further_rows"] == {"red": 6, "blue": 6}
    assert selection["scored"] or len(selection["tied"]) == 1


@pytest.mark.slow
def test_rows_can_be_held_out_without_a_limit_and_not_all_of_them(project: Project) -> None:
    search = {"trials": 2, "sampler": "random"}
    project.write(method="gta", search={**search, "holdout": 0.25})
    session = opened(project)
    assert len(session.problem.examples("red", "validation")) == 18
    session.run()
    selection = stored_selection(session.study)
    assert selection is not None
    assert selection.rows["red"] in (18, 24)
    project.write(method="gta", search={**search, "holdout": 24}, name="all")
    refused = project.cli("run", "spec.yaml", check=2).stderr
    assert "search.holdout" in refused
    assert "holds back all 24 validation rows" in refused
    project.write(method="gta", search={**search, "holdout": 1.0}, name="whole")
    assert "a fraction must lie in (0, 1)" in project.cli("run", "spec.yaml", check=2).stderr


def test_a_study_whose_rows_a_holdout_would_take_is_not_joined_by_another_split_of_them(finished: Project) -> None:
    shutil.copy(finished.file, finished.folder / "other.yaml")
    refused = finished.cli("run", "other.yaml", "--set", "search.holdout=8", check=2).stderr
    assert "data digest" in refused
