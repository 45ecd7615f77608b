"""The search space, and samplers that propose the same points however a run was cut."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.samplers import GPSampler

from dfmerge_studies.errors import InputError
from dfmerge_studies.search import SAMPLERS, grid_rows, make_sampler, trial_seed
from dfmerge_studies.trials.space import GridExhausted, Space

SPACE = Space(("a", "b"))


@pytest.mark.parametrize(
    ("point", "words"),
    [
        ({"a": 0.5, "b": 7.0}, ["b", "7.0", "[0, 1]"]),
        ({"a": -0.1, "b": 0.0}, ["a", "-0.1"]),
        ({"a": float("nan"), "b": 0.0}, ["a", "nan"]),
        ({"a": 0.5}, ["no coefficient for", "b"]),
        ({"a": 0.5, "b": 0.5, "z": 1.0}, ["unknown name", "z"]),
        ({"a": True, "b": 0.5}, ["a", "True"]),
        ({"a": "0.5", "b": 0.5}, ["a", "0.5"]),
    ],
)
def test_a_point_outside_the_space_is_refused_by_name_value_and_bounds(point: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        SPACE.check(point)
    assert all(word in str(caught.value) for word in words)


def test_the_corners_and_the_middle_of_the_space_are_inside() -> None:
    for values in itertools.product([0.0, 0.5, 1.0, 1], repeat=2):
        SPACE.check(dict(zip("ab", values, strict=True)))


def test_a_stepped_space_takes_multiples_of_its_step_only() -> None:
    space = Space(("a",), 0.0, 1.0, step=0.1)
    space.check({"a": 0.1 * 3})
    with pytest.raises(InputError, match=r"0\.25"):
        space.check({"a": 0.25})


@pytest.mark.parametrize(
    "arguments",
    [
        {"names": ()},
        {"names": ("a", "a")},
        {"names": ("a",), "low": 1.0, "high": 1.0},
        {"names": ("a",), "high": float("inf")},
        {"names": ("a",), "step": 0.3},
        {"names": ("a",), "step": 0.0},
    ],
)
def test_a_space_that_cannot_be_searched_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Space(**arguments)


def test_a_name_may_have_a_range_of_its_own() -> None:
    space = Space(("a", "p"), 0.0, 1.8, step=0.1, own={"p": (0.1, 0.9)})
    space.check({"a": 1.7, "p": 0.55})
    with pytest.raises(InputError, match=r"'p' is 1.0, outside the bounds \[0.1, 0.9\]"):
        space.check({"a": 1.7, "p": 1.0})
    assert space.distributions()["p"] == optuna.distributions.FloatDistribution(0.1, 0.9)
    with pytest.raises(InputError):
        Space(("a", "p"), own={"p": (0.9, 0.1)})


def test_trial_seeds_depend_on_each_of_their_parts_and_on_nothing_else() -> None:
    seeds = [trial_seed(0, "s", 0), trial_seed(1, "s", 0), trial_seed(0, "t", 0), trial_seed(0, "s", 1)]
    assert len(set(seeds)) == 4
    assert trial_seed(0, "s", 0) == seeds[0] == 921069608


def test_unknown_samplers_are_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match="auto, gp, random, gradient, grid, ucb"):
        make_sampler("tpe", seed=0, study_name="s", space=SPACE)


def _value(point: dict[str, float]) -> float:
    return -((point["a"] - 0.3) ** 2) - (point["b"] - 0.6) ** 2


def _study(name: str, **settings: Any) -> optuna.Study:
    sampler = make_sampler(name, seed=settings.pop("seed", 0), study_name="s", space=SPACE, **settings)
    return optuna.create_study(direction="maximize", sampler=sampler)


def _run(study: optuna.Study, trials: int) -> list[dict[str, float]]:
    for _ in range(trials):
        trial = study.ask(SPACE.distributions())
        study.tell(trial, _value(trial.params))
    return [trial.params for trial in study.trials]


@pytest.mark.parametrize("name", ["gp", "random", "ucb"])
def test_a_study_seen_by_a_new_sampler_at_every_trial_proposes_the_same_points(name: str) -> None:
    whole = _run(_study(name, startup_trials=4), 8)
    study = _study(name, startup_trials=4)
    for _ in range(8):
        study.sampler = make_sampler(name, seed=0, study_name="s", space=SPACE, startup_trials=4)
        _run(study, 1)
    assert [trial.params for trial in study.trials] == whole


@pytest.mark.parametrize("name", ["gp", "random", "ucb"])
def test_another_seed_and_another_study_name_propose_other_points(name: str) -> None:
    one, two = _run(_study(name), 3), _run(_study(name, seed=1), 3)
    assert all(a != b for a, b in zip(one, two, strict=True))


def test_startup_points_spread_over_the_whole_space_and_over_both_axes() -> None:
    points = np.array([[p["a"], p["b"]] for p in _run(_study("random"), 400)])
    assert abs(points.mean() - 0.5) < 0.05
    assert points.min() < 0.02
    assert points.max() > 0.98
    assert abs(np.corrcoef(points.T)[0, 1]) < 0.15  # one seed for both axes would give 1


@pytest.mark.slow
def test_the_gaussian_process_finds_a_smooth_maximum_that_random_points_miss() -> None:
    names = ("gp", "ucb", "random")
    best = {name: max(_value(p) for p in _run(_study(name, startup_trials=5), 20)) for name in names}
    for name in names[:2]:
        assert best[name] > -1e-3
        assert best[name] > best["random"]


@pytest.mark.parametrize("name", ["gp", "ucb"])
def test_the_gaussian_process_proposes_on_the_step(name: str) -> None:
    space = Space(("a", "b"), step=0.25)
    sampler = make_sampler(name, seed=0, study_name="s", space=space, startup_trials=3)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for _ in range(6):
        trial = study.ask(space.distributions())
        space.check(trial.params)
        study.tell(trial, _value(trial.params))


def test_the_private_name_that_we_override_is_called_by_optunas_sampler() -> None:
    seen = []

    class Spy(type(SAMPLERS["gp"](_settings(), 0))):  # type: ignore[misc]
        def _sample_relative_impl(self, *arguments: Any) -> Any:
            seen.append([trial.number for trial in arguments[1]])
            return super()._sample_relative_impl(*arguments)

    assert "_sample_relative_impl" in vars(GPSampler), "Optuna renamed what search._OrderedGP overrides"
    study = optuna.create_study(sampler=Spy(seed=0, n_startup_trials=2))
    _run(study, 3)
    assert seen == [[0, 1]]


def _settings() -> Any:
    from dfmerge_studies.search import SamplerSettings

    return SamplerSettings(SPACE)


@pytest.mark.parametrize("name", ["gp", "ucb"])
def test_the_gaussian_process_sees_completed_trials_in_the_order_of_their_places(name: str) -> None:
    sampler = make_sampler(name, seed=0, study_name="s", space=SPACE, startup_trials=3)
    points = [{"a": 0.1, "b": 0.9}, {"a": 0.7, "b": 0.2}, {"a": 0.4, "b": 0.5}, {"a": 0.9, "b": 0.8}]
    proposals = []
    for order in ([0, 1, 2, 3], [2, 3, 1, 0]):
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for place in order:
            study.add_trial(
                optuna.create_trial(
                    value=_value(points[place]),
                    params=points[place],
                    distributions=SPACE.distributions(),
                    user_attrs={"place": place},
                )
            )
        proposals.append(study.ask(SPACE.distributions()).params)
    assert proposals[0] == proposals[1]


def test_a_trial_whose_coefficients_are_given_costs_no_proposal() -> None:
    study = _study("gp", startup_trials=2)
    _run(study, 3)
    study.enqueue_trial({"a": 0.25, "b": 0.75})
    trial = study.ask(SPACE.distributions())
    assert trial.params == {"a": 0.25, "b": 0.75}
    assert not [key for key in study.trials[-1].system_attrs if key.startswith("gp:")]


@pytest.mark.parametrize("constraints", [0, 1, 2])
@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_the_gaussian_process_takes_several_objectives_and_constraints(objectives: int, constraints: int) -> None:
    runs = []
    for _ in range(2):
        sampler = make_sampler("gp", seed=3, study_name="s", space=SPACE, startup_trials=3)
        study = optuna.create_study(directions=["maximize"] * objectives, sampler=sampler)
        for _ in range(5):
            trial = study.ask(SPACE.distributions())
            point = trial.params
            for index in range(constraints):
                trial.set_constraint(f"{index:03d}", point["ab"[index]] - 0.6)
            study.tell(trial, [_value(point), point["a"], point["b"]][:objectives])
        runs.append([trial.params for trial in study.trials])
        assert len(study.trials[0].constraints) == constraints
    assert runs[0] == runs[1]


GRID = {"a": [0.0, 0.5], "b": [0.0, 0.3, 1.0]}


def test_a_grid_is_proposed_row_by_row_each_once_and_then_is_exhausted() -> None:
    study = _study("grid", grid=GRID)
    assert _run(study, 6) == grid_rows(SPACE, GRID)
    with pytest.raises(GridExhausted):
        study.ask(SPACE.distributions())


def test_a_grid_leaves_out_points_that_were_queued_by_hand() -> None:
    study = _study("grid", grid=GRID)
    study.enqueue_trial({"a": 0.0, "b": 0.3})
    study.enqueue_trial({"a": 0.9, "b": 0.9})
    points = _run(study, 7)
    assert points[:2] == [{"a": 0.0, "b": 0.3}, {"a": 0.9, "b": 0.9}]
    assert sorted(map(str, points[2:])) == sorted(str(r) for r in grid_rows(SPACE, GRID) if r != points[0])


def test_trials_that_draw_from_a_grid_at_the_same_moment_get_different_rows() -> None:
    study = _study("grid", grid=GRID)
    together = [study.ask() for _ in range(6)]  # nothing has been suggested yet
    rows = [{name: trial.suggest_float(name, 0, 1) for name in ("b", "a")} for trial in reversed(together)]
    assert sorted(map(sorted, (row.items() for row in rows))) == sorted(
        map(sorted, (row.items() for row in grid_rows(SPACE, GRID)))
    )


def test_a_grid_whose_last_rows_are_still_being_drawn_is_exhausted_for_everyone_else() -> None:
    study = _study("grid", grid=GRID)
    _run(study, 4)
    last, more = [study.ask(), study.ask()], study.ask()
    with pytest.raises(GridExhausted):
        more.suggest_float("a", 0, 1)
    assert [{n: t.suggest_float(n, 0, 1) for n in "ab"} for t in last] == grid_rows(SPACE, GRID)[4:]


@pytest.mark.parametrize("grid", [None, {}, {"a": [0.5]}, {"a": [], "b": [0.5]}, {"a": [0.5], "b": [1.5]}])
def test_a_grid_that_does_not_fit_the_space_is_refused(grid: Any) -> None:
    with pytest.raises(InputError):
        make_sampler("grid", seed=0, study_name="s", space=SPACE, grid=grid)


@pytest.mark.parametrize("name", ["gp", "ucb"])
def test_sampling_raises_no_warning(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _run(_study(name, startup_trials=2), 4)
