"""`search.warm_start`: the best points of another study are tried first, the same ones in every run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, create_trial

from dfmerge_studies import InputError, optimize_merge
from dfmerge_studies.spec import WarmStart
from dfmerge_studies.study.provenance import FINGERPRINT, without_secrets
from dfmerge_studies.study.warm_start import NEAR, best_points
from dfmerge_studies.trials.marks import FIXED
from dfmerge_studies.trials.space import Space
from tests.project import Project
from tests.test_in_memory import target_score, toys

optuna.logging.set_verbosity(optuna.logging.ERROR)


def other(points: list[tuple[dict[str, float], tuple[float, ...]]], kind: str = "mean") -> optuna.Study:
    """A study of this program with given results."""
    study = optuna.create_study(study_name="other", directions=["maximize"] * len(points[0][1]))
    study.set_user_attr(FINGERPRINT, {"method": "gta", "experts": [], "objective": {"kind": kind}})
    for point, values in points:
        study.add_trial(create_trial(values=values, user_attrs={"coefficients": point}))
    return study


def taken(study: optuna.Study, space: Space, count: int = 5) -> list[tuple[int, dict[str, float]]]:
    chosen = best_points(study, space, list(space.names), WarmStart(study="other", points=count))
    return [(each["trial"], each["point"]) for each in chosen]


# Which points


def test_the_best_points_come_first_and_those_near_a_better_one_are_left_out() -> None:
    study = other(
        [
            ({"a": 0.9, "b": 0.1}, (0.5,)),
            ({"a": 0.5, "b": 0.5}, (0.8,)),
            ({"a": 0.5 + 0.9 * NEAR, "b": 0.5}, (0.7,)),  # near the best
            ({"a": 0.5, "b": 0.5 + 1.1 * NEAR}, (0.6,)),
        ]
    )
    assert [number for number, _ in taken(study, Space(("a", "b")))] == [1, 3, 0]
    assert taken(study, Space(("a", "b")), count=1) == [(1, {"a": 0.5, "b": 0.5})]


def test_an_expert_that_the_other_study_lacks_gets_one_over_m_and_one_that_only_it_has_is_dropped() -> None:
    study = other([({"a": 0.9, "z": 0.3}, (0.5,))])
    assert taken(study, Space(("a", "b", "c", "d"))) == [(0, {"a": 0.9, "b": 0.25, "c": 0.25, "d": 0.25})]


def test_points_are_moved_into_the_bounds_and_onto_the_step() -> None:
    study = other([({"a": 0.93, "b": 0.12}, (0.5,))])
    assert taken(study, Space(("a", "b"), 0.2, 0.7, step=0.25)) == [(0, {"a": 0.7, "b": 0.2})]


def test_of_several_objectives_only_points_that_nothing_dominates_are_taken() -> None:
    study = other(
        [
            ({"a": 0.1, "b": 0.9}, (0.9, 0.2)),
            ({"a": 0.5, "b": 0.5}, (0.6, 0.6)),
            ({"a": 0.6, "b": 0.8}, (0.59, 0.59)),  # second by its mean, and dominated
            ({"a": 0.9, "b": 0.1}, (0.1, 0.8)),
        ],
        "pareto",
    )
    assert [number for number, _ in taken(study, Space(("a", "b")))] == [1, 0, 3]


@pytest.mark.parametrize(
    ("study", "message"),
    [
        (other([({"y": 0.5, "z": 0.5}, (0.5,))]), "shares no expert with this one: it has y, z"),
        (optuna.create_study(study_name="other"), "was not made by this program"),
    ],
    ids=["other experts", "other software"],
)
def test_a_study_that_nothing_can_be_taken_from_is_refused_by_name(study: optuna.Study, message: str) -> None:
    with pytest.raises(InputError, match=f"'other' {message}"):
        taken(study, Space(("a", "b")))


# In a search


def best(trials: list[FrozenTrial], count: int) -> list[dict[str, float]]:
    """The best distinct points, the obvious way."""
    found: list[dict[str, float]] = []
    for trial in sorted(trials, key=lambda trial: -trial.values[0]):
        if all(max(abs(trial.params[n] - each[n]) for n in each) >= NEAR for each in found):
            found.append(trial.params)
    return found[:count]


def test_a_search_tries_one_over_m_then_its_own_points_then_those_of_the_other_study() -> None:
    base, experts = toys("a", "b")
    storage = InMemoryStorage()
    first = optimize_merge(base, experts, target_score, trials=8, storage=storage, name="first").study
    own = {"a": 0.05, "b": 0.95}
    result = optimize_merge(
        base, experts, target_score, trials=6, storage=storage, name="second", enqueue=[own], warm_start="first"
    )
    tried, half = [trial.params for trial in result.study.trials], {"a": 0.5, "b": 0.5}
    assert tried[:2] == [half, own]
    assert tried[2:5] == [point for point in best(first.trials, 5) if point != half][:3]  # 1/M was tried already


def test_a_run_that_goes_on_tries_the_points_of_the_first_one_whatever_became_of_the_other_study() -> None:
    base, experts = toys("a", "b")
    storage = InMemoryStorage()
    first: dict[str, Any] = {"storage": storage, "name": "first", "sampler": "random"}
    settings: dict[str, Any] = {"storage": storage, "sampler": "random", "warm_start": "first"}
    optimize_merge(base, experts, target_score, trials=6, **first)
    whole = optimize_merge(base, experts, target_score, trials=6, name="whole", **settings).study
    optimize_merge(base, experts, target_score, trials=2, name="cut", **settings)
    optimize_merge(base, experts, target_score, trials=20, **first)
    cut = optimize_merge(base, experts, target_score, trials=6, name="cut", **settings).study
    given = [[t.params for t in study.trials if FIXED in t.system_attrs] for study in (whole, cut)]
    assert given[0] == given[1]
    assert len(given[0]) > 3


def test_a_missing_study_is_refused_with_those_that_there_are() -> None:
    base, experts = toys("a", "b")
    storage = InMemoryStorage()
    optimize_merge(base, experts, target_score, trials=1, storage=storage, name="first")
    with pytest.raises(InputError, match=r"no study named 'fisrt'(?s:.*)first"):
        optimize_merge(base, experts, target_score, trials=1, storage=storage, name="new", warm_start="fisrt")


# On the command line

HERE = ("--set", "storage=sqlite:///colours.db")
NEW = ("--set", "name=new", *HERE)


@pytest.mark.slow
def test_run_says_where_its_first_points_are_from_and_status_shows_it(finished: Project) -> None:
    new = ("spec.yaml", *NEW, "--set", "method=gta", "--set", "search.warm_start=colours")
    run = finished.cli("run", *new, "--trials", "2", "--no-test")
    (warm,) = [line for line in run.stderr.splitlines() if "tries first" in line]
    shown = finished.json("status", *new)["warm_start"]
    numbers = [each["trial"] for each in shown["points"]]
    assert warm.endswith(f"trials {', '.join(map(str, numbers))} of colours")
    assert shown["study"] == "colours"
    assert f"trials {', '.join(map(str, numbers))} of colours" in finished.cli("status", *new).stdout
    study = optuna.load_study(study_name="new", storage=f"sqlite:///{finished.folder}/colours.db")
    others = [each["point"] for each in shown["points"] if set(each["point"].values()) != {0.5}]
    assert study.trials[1].params == others[0]  # after 1/M, which need not be tried twice


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("colour", ["no study named 'colour'", "colours"]),
        ("new", ["is this study itself"]),
        ("{study: colours, storage: 'sqlite:///gone.db'}", ["gone.db"]),
        ("{study: colours, points: 0}", ["points", "found 0"]),
        ("{name: colours}", ["study", "required"]),
    ],
)
def test_what_cannot_be_started_from_is_refused_before_anything_is_loaded(
    finished: Project, settings: str, words: list[str]
) -> None:
    new = ("spec.yaml", *NEW, "--set", f"search.warm_start={settings}")
    for command in ("run", "validate"):
        refused = finished.cli(command, *new, check=2).stderr
        assert all(word in refused for word in ["search.warm_start", *words]), refused
    assert optuna.get_all_study_names(f"sqlite:///{finished.folder}/colours.db") == ["colours"]


def test_the_password_of_the_other_storage_is_not_kept_with_the_study() -> None:
    url = "postgresql+psycopg://me:geheim@host/studies"
    kept = without_secrets({"search": {"seed": 3, "warm_start": {"study": "first", "storage": url, "points": 5}}})
    assert "geheim" not in str(kept)
    assert kept["search"]["seed"] == 3
    assert kept["search"]["warm_start"]["study"] == "first"


@pytest.mark.slow
def test_a_baseline_that_the_study_starts_from_starts_from_nothing_itself(finished: Project, tmp_path: Path) -> None:
    finished.cli("run", "spec.yaml", "--set", "method=gta", "--set", "name=new.gta", *HERE, "--trials", "1")
    both = (*NEW, "--set", "baselines=[gta]", "--set", "search.warm_start=new.gta")
    finished.cli("run", "spec.yaml", *both, "--set", "search.trials=2", "--no-test")
    studies = {
        entry["study"]: entry["trials"]["complete"]
        for entry in finished.json("list", "spec.yaml", "--storage", "sqlite:///colours.db")
    }
    assert studies == {"colours": 4, "new": 2, "new.gta": 2}
