"""The sampler `auto`: its region as a function of the history, and its proposals on surfaces whose optimum is known."""

from __future__ import annotations

import math
import subprocess
import sys

import optuna
import pytest
import torch
from optuna.trial import TrialState, create_trial

from dfmerge_studies.search import make_sampler
from dfmerge_studies.surrogate import HALF_WIDTH, PATIENCE, SMALLEST, WHOLE, History, proposal, region_after, utility
from dfmerge_studies.trials.space import Space
from dfmerge_studies.trust_region import Goal

CENTRES = torch.tensor([[0.9, 0.2], [0.3, 0.8]], dtype=torch.float64)  # where each task is at its best


def scores(x: torch.Tensor) -> torch.Tensor:
    """Two tasks that pull apart; their mean is largest near (0.6, 0.5), their minimum too."""
    return torch.exp(-2 * (x[:, None, :] - CENTRES).square().sum(-1))


# The region


def test_the_first_region_stands_around_the_best_startup_point() -> None:
    region = region_after([(0.1, 0.1), (0.6, 0.4), (0.9, 0.9)], [(0.0, 0.3), (0.0, 0.7), (0.0, 0.5)], 3)
    assert region.centre == (0.6, 0.4)
    assert region.half_width == HALF_WIDTH
    assert region.box(2).tolist() == [pytest.approx([0.2, 0.0]), pytest.approx([1.0, 0.8])]


def test_a_gain_moves_the_region_and_trials_without_gain_halve_it() -> None:
    points = [(0.5, 0.5), (0.6, 0.6)] + [(0.1, 0.1)] * PATIENCE
    merits = [(0.0, 0.5), (0.0, 0.6)] + [(0.0, 0.1)] * PATIENCE
    moved = region_after(points[:2], merits[:2], 1)
    assert (moved.centre, moved.half_width) == ((0.6, 0.6), HALF_WIDTH)
    almost = region_after(points[:-1], merits[:-1], 1)
    assert almost.half_width == HALF_WIDTH
    halved = region_after(points, merits, 1)
    assert (halved.centre, halved.half_width, halved.without_gain) == ((0.6, 0.6), HALF_WIDTH / 2, 0)


def test_a_region_that_has_become_too_small_gives_way_to_the_best_point_outside_it() -> None:
    halvings = int(math.log2(HALF_WIDTH / SMALLEST)) + 1
    dull = [(0.2, 0.2)] * (PATIENCE * halvings)
    points = [(0.2, 0.2), (0.9, 0.9), (0.3, 0.3), *dull]
    merits = [(0.0, 0.9), (0.0, 0.4), (0.0, 0.8), *[(0.0, 0.1)] * len(dull)]
    region = region_after(points, merits, 3)
    assert region.ended == ((0.2, 0.2),)
    assert (region.centre, region.half_width, region.best) == ((0.9, 0.9), HALF_WIDTH, (0.0, 0.4))


def test_where_no_point_lies_outside_the_whole_cube_is_searched_next() -> None:
    halvings = int(math.log2(HALF_WIDTH / SMALLEST)) + 1
    count = 1 + PATIENCE * halvings
    region = region_after([(0.5, 0.5)] * count, [(0.0, 0.5)] * count, 1)
    assert region.centre is None
    assert region.box(2).tolist() == [[0.0, 0.0], [1.0, 1.0]]
    after = region_after([(0.5, 0.5)] * count + [(1.0, 0.0)], [(0.0, 0.5)] * count + [(0.0, 0.1)], 1)
    assert after.centre == (1.0, 0.0)


def test_a_trial_that_breaks_a_constraint_is_no_gain() -> None:
    assert region_after([(0.5,), (0.6,)], [(0.0, 0.5), (-3.0, 0.9)], 1).centre == (0.5,)


# Proposals


def history(n: int = 12, **more: torch.Tensor) -> History:
    x = torch.rand(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return History(x, scores(x), **more)


def test_a_proposal_lies_in_the_region_and_is_the_same_for_the_same_seed() -> None:
    region = region_after([(0.1, 0.9)], [(0.0, 1.0)], 1)
    first = proposal(history(), utility("mean", None), region=region, seed=3)
    again = proposal(history(), utility("mean", None), region=region, seed=3)
    assert first.point.tolist() == again.point.tolist()
    lower, upper = region.box(2)
    assert bool(((first.point >= lower) & (first.point <= upper)).all())


def test_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3).tolist()
    torch.manual_seed(7)
    proposal(history(), utility("mean", None), region=WHOLE, seed=1)
    assert torch.rand(3).tolist() == expected


def test_a_point_that_runs_elsewhere_is_not_proposed_again() -> None:
    alone = proposal(history(), utility("mean", None), region=WHOLE, seed=0).point
    beside = proposal(history(pending=alone[None]), utility("mean", None), region=WHOLE, seed=0).point
    assert (beside - alone).abs().max() > 0.01


def test_a_threshold_of_one_task_moves_the_proposal_to_where_that_task_keeps_it() -> None:
    kept = torch.tensor([0.85, -math.inf], dtype=torch.float64)
    free = proposal(history(25), utility("mean", None), region=WHOLE, seed=0).point
    bound = proposal(history(25, thresholds=kept), utility("mean", None), region=WHOLE, seed=0).point
    assert scores(free[None])[0, 0] < 0.85 <= scores(bound[None])[0, 0] + 0.02


def test_weights_pull_the_proposal_to_the_heavier_task() -> None:
    point = proposal(history(25), utility("mean", [1.0, 0.0]), region=WHOLE, seed=0).point
    assert (point - CENTRES[0]).abs().max() < 0.1


# The sampler in a study


def study_of(seed: int = 0, goal: Goal | None = None, step: float | None = None, **kind: object) -> optuna.Study:
    space = Space(("a", "b"), step=step)
    sampler = make_sampler(
        "auto", seed=seed, study_name="s", space=space, startup_trials=5, **({"goal": goal} if goal else {})
    )
    return optuna.create_study(sampler=sampler, **(kind or {"direction": "maximize"}))  # type: ignore[arg-type]


def run(study: optuna.Study, trials: int, step: float | None = None, pareto: bool = False) -> None:
    def objective(trial: optuna.Trial) -> float | tuple[float, ...]:
        x = torch.tensor([[trial.suggest_float(name, 0, 1, step=step) for name in "ab"]], dtype=torch.float64)
        found = dict(zip(("first", "second"), scores(x)[0].tolist(), strict=True))
        trial.set_user_attr("place", trial.number)
        trial.set_user_attr("tasks", found)
        return tuple(found.values()) if pareto else sum(found.values()) / 2

    study.optimize(objective, n_trials=trials)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_optimum_of_the_mean_is_found_in_fifteen_trials(seed: int) -> None:
    fine = torch.cartesian_prod(*[torch.linspace(0, 1, 101, dtype=torch.float64)] * 2)
    study = study_of(seed)
    run(study, 15)
    assert study.best_value > scores(fine).mean(1).max().item() - 0.005


@pytest.mark.slow
def test_a_cut_study_proposes_what_an_uncut_one_proposes() -> None:
    whole = study_of()
    run(whole, 9)
    cut = study_of()
    for trial in reversed(whole.trials[:7]):  # stored in another order: places decide
        cut.add_trial(
            create_trial(
                state=TrialState.COMPLETE,
                value=trial.value,
                params=trial.params,
                distributions=trial.distributions,
                user_attrs=trial.user_attrs,
            )
        )
    run(cut, 2)
    assert [t.params for t in cut.trials[7:]] == [t.params for t in whole.trials[7:]]


@pytest.mark.slow
def test_a_stepped_space_is_searched_on_its_steps_and_no_point_twice() -> None:
    study = study_of(step=0.25)
    run(study, 12, step=0.25)
    proposed = [tuple(t.params.values()) for t in study.trials[5:]]
    assert len(set(proposed)) == len(proposed)
    assert not set(proposed) & {tuple(t.params.values()) for t in study.trials[:5]}


@pytest.mark.slow
def test_a_pareto_study_spreads_along_the_front() -> None:
    study = study_of(goal=Goal("pareto"), directions=["maximize", "maximize"])
    run(study, 15, pareto=True)
    proposed = torch.tensor([[t.params["a"], t.params["b"]] for t in study.trials[5:]], dtype=torch.float64)
    # Of two equal bells the points that nothing dominates are those between the centres.
    along = CENTRES[1] - CENTRES[0]
    share = ((proposed - CENTRES[0]) @ along / along.square().sum()).clamp(0, 1)
    off = (proposed - CENTRES[0] - share[:, None] * along).norm(dim=1)
    assert off.median() < 0.1
    assert share.max() - share.min() > 0.3


@pytest.mark.slow
def test_botorch_is_imported_where_a_trial_is_proposed_and_not_before() -> None:
    code = """
import sys
import dfmerge_studies.report.summary, dfmerge_studies.study.session
from dfmerge_studies.search import make_sampler
from dfmerge_studies.trials.space import Space
make_sampler("auto", seed=0, study_name="s", space=Space(("a", "b")))
print(sorted({"botorch", "gpytorch", "dfmerge_studies.surrogate"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_trials_of_other_software_without_task_scores_are_left_out() -> None:
    study = study_of()
    run(study, 6)
    distributions = study.trials[0].distributions
    study.add_trial(create_trial(value=5.0, params={"a": 0.0, "b": 0.0}, distributions=distributions))
    run(study, 1)
    assert study.trials[-1].state == TrialState.COMPLETE
