"""`search.patience` and `search.stop`: when a study stops before its total, the same for every worker and every run."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from dfmerge_studies import InputError, optimize_merge
from dfmerge_studies.search import make_sampler
from dfmerge_studies.spec import ObjectiveSettings, SearchSettings
from dfmerge_studies.storage import join_study, open_storage
from dfmerge_studies.study.rows import rows_attribute
from dfmerge_studies.study.stopping import EXPECTED, FOUND, IN_A_ROW, Noise, Rule, StopWatch
from dfmerge_studies.study.totals import STOPPED, add_trials, state_total, stop_of, stored_total
from dfmerge_studies.tasks.metrics import Metrics
from dfmerge_studies.trials.claims import Stop
from dfmerge_studies.trials.loop import work
from dfmerge_studies.trials.marks import PROPOSAL, place_of
from dfmerge_studies.trials.queue import put_back
from dfmerge_studies.trials.reading import settled
from dfmerge_studies.trials.results import TrialResult
from dfmerge_studies.trials.space import Space
from tests.project import Project
from tests.test_in_memory import target_score, toys

optuna.logging.set_verbosity(optuna.logging.ERROR)
SPACE = Space(("a", "b"))
ROWS = 100  # of one task; at 0.8 the standard error is 0.04
ERROR = 0.04


def rule(objective: str = "mean", startup: int = 1, **settings: Any) -> Rule:
    search = SearchSettings.model_validate({"startup_trials": startup, **settings})
    metrics = Metrics.named(dict.fromkeys("ab", "accuracy"))
    found = Rule.of(search, Noise(ObjectiveSettings(kind=objective), metrics, {"a": ROWS, "b": ROWS}))
    assert found is not None
    return found


def trials(values: Sequence[float | tuple[float, ...]], gains: Sequence[float | None] = ()) -> list[FrozenTrial]:
    """Completed trials of one task `a`, or of `a` and `b` for pairs."""
    made = []
    for place, value in enumerate(values):
        several = value if isinstance(value, tuple) else (value,)
        attributes: dict[str, Any] = {"place": place, "tasks": dict(zip("ab", several, strict=False))}
        if place < len(gains) and gains[place] is not None:
            attributes[PROPOSAL] = {"gain": gains[place]}
        made.append(create_trial(values=several, user_attrs=attributes))
    return made


# The rules


def test_patience_ends_after_so_many_trials_without_a_gain_above_a_quarter_of_the_standard_error() -> None:
    small, large = 0.8 + 0.9 * FOUND * ERROR, 0.8 + 1.1 * FOUND * ERROR
    assert rule(patience=3).stop(trials([0.7, 0.8, small, small]), 1) is None
    assert rule(patience=3).stop(trials([0.7, 0.8, small, small, 0.5, 0.5]), 1) == Stop(
        5, "no gain above the noise in 3 trials"
    )
    assert rule(patience=3).stop(trials([0.7, 0.8, 0.5, 0.5, large, 0.5]), 1) is None


def test_startup_trials_do_not_count_for_patience() -> None:
    assert rule(patience=2, startup=5).stop(trials([0.8] * 6), 1) is None
    assert rule(patience=2, startup=5).stop(trials([0.8] * 9), 1) == Stop(7, "no gain above the noise in 2 trials")


def test_small_gains_that_add_up_to_one_above_the_noise_count() -> None:
    step = 0.4 * FOUND * ERROR
    assert rule(patience=3).stop(trials([0.8 + step * i for i in range(12)]), 1) is None


def test_a_trial_that_breaks_constraints_less_is_a_gain() -> None:
    missed = [3.0, 3.0, 3.0, 3.0, 1.0]  # by so many points
    found = [
        create_trial(value=trial.value, user_attrs=trial.user_attrs, constraints={"000": by})
        for trial, by in zip(trials([0.8, 0.8, 0.8, 0.7, 0.7]), missed, strict=True)
    ]
    assert rule(patience=3).stop(found[:4], 1) is not None
    assert rule(patience=3).stop(found[1:], 1) is None


def test_of_several_objectives_a_point_that_none_before_it_comes_near_is_a_gain() -> None:
    front: list[float | tuple[float, ...]] = [(0.8, 0.2), (0.2, 0.8)]
    assert rule("pareto", patience=2).stop(trials([*front, (0.5, 0.5), (0.1, 0.1)]), 3) is None
    assert rule("pareto", patience=2).stop(trials([*front, (0.79, 0.2), (0.2, 0.79)]), 3) is not None


def test_no_gain_is_expected_when_three_proposals_in_a_row_expect_less_than_a_tenth_of_the_standard_error() -> None:
    little, much = 0.9 * EXPECTED * ERROR, 1.1 * EXPECTED * ERROR
    stopping = rule(stop="gain")
    assert stopping.stop(trials([0.8] * 5, [None, None, little, little, much]), 1) is None
    assert stopping.stop(trials([0.8] * 5, [None, little, little, little, much]), 1) == Stop(
        1 + IN_A_ROW, "no gain above the noise is expected any more"
    )


def test_the_standard_error_is_that_of_the_rows_where_a_trial_keeps_them() -> None:
    scores = {"a": [1.0] * 30 + [0.0] * 10, "b": [0.1, 0.5, 0.9, 0.5]}
    means = {task: sum(rows) / len(rows) for task, rows in scores.items()}
    trial = create_trial(value=0.6, user_attrs={"tasks": means, **rows_attribute(scores)})
    slow = {t: math.sqrt(sum((v - means[t]) ** 2 for v in rows) / len(rows) / len(rows)) for t, rows in scores.items()}
    noise = Noise(ObjectiveSettings(kind="mean"), Metrics.named(dict.fromkeys("ab", "accuracy")), {})
    assert noise.of(trial) == pytest.approx([math.sqrt(slow["a"] ** 2 + slow["b"] ** 2) / 2])
    worst = Noise(ObjectiveSettings(kind="min"), noise.metrics, {})
    assert worst.of(trial) == pytest.approx([slow["b"]])
    weighted = Noise(ObjectiveSettings(kind="weighted", weights={"a": 3.0, "b": 1.0}), noise.metrics, {})
    assert weighted.of(trial) == pytest.approx([math.hypot(3 * slow["a"], slow["b"]) / 4])


def test_a_trial_counts_once_every_place_before_it_has_ended() -> None:
    study = optuna.create_study()
    for place, state in enumerate([TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE, TrialState.RUNNING]):
        value = {"value": 1.0} if state == TrialState.COMPLETE else {}
        study.add_trial(create_trial(state=state, user_attrs={"place": place, "error": "no"}, **value))
    study.add_trial(create_trial(value=1.0, user_attrs={"place": 4}))
    assert [place_of(trial) for trial in settled(study.get_trials())] == [0, 2]


# A study that stops


def stopped_study(url: str, *, target: int = 30, workers: int = 1, patience: int = 3) -> optuna.Study:
    """A study whose value falls from trial to trial, worked on until it stops."""

    def one(_: int = 0) -> None:
        sampler = make_sampler("random", seed=0, study_name="s", space=SPACE)
        study = join_study(open_storage(url), "s", directions=["maximize"], sampler=sampler)
        watch = StopWatch(study, rule(patience=patience), {"patience": patience})
        state_total(study, target, lower=False)
        summary = work(
            study,
            SPACE,
            lambda point, place: TrialResult((0.8 - 0.01 * place,), {"tasks": {"a": 0.8 - 0.01 * place}}),
            target=stored_total(study),
            enough=watch.enough,
            raised=lambda: stored_total(study),
        )
        if summary.stopped is not None:
            watch.keep(summary.stopped, summary.counts["complete"])

    threads = [threading.Thread(target=one, args=(number,)) for number in range(workers)]
    if workers == 1:
        one()
    else:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    return optuna.load_study(study_name="s", storage=open_storage(url))


def complete(study: optuna.Study) -> int:
    return len(study.get_trials(states=(TrialState.COMPLETE,)))


def test_a_study_that_stops_has_the_total_that_it_has_reached_and_says_why(tmp_path: Path) -> None:
    study = stopped_study(f"sqlite:///{tmp_path}/s.db")
    assert complete(study) == stored_total(study) == 4
    assert stop_of(study) == {"after": 4, "of": 30, "why": "no gain above the noise in 3 trials"}


def test_what_is_added_comes_on_top_of_what_was_reached_whichever_comes_first(tmp_path: Path) -> None:
    study = stopped_study(f"sqlite:///{tmp_path}/s.db")
    add_trials(study, 5, at_least=30)
    add_trials(study, 2, at_least=30)
    assert stored_total(study) == 4 + 5 + 2
    assert stop_of(study) is None  # more is wanted
    study = stopped_study(f"sqlite:///{tmp_path}/s.db", target=0)
    assert complete(study) == 11
    # Added while a worker that had seen enough was about to say so:
    late = StopWatch(study, rule(patience=3), {})
    study.set_user_attr(STOPPED, None)
    state_total(study, 30)
    stop = late.enough(study.get_trials())
    assert stop is not None
    add_trials(study, 4, at_least=30)
    late.keep(stop, 11)
    assert stored_total(study) == 15


def test_a_trial_that_was_at_work_when_another_worker_noted_the_stop_counts(tmp_path: Path) -> None:
    study = stopped_study(f"sqlite:///{tmp_path}/s.db")
    last = StopWatch(study, rule(patience=3), {"patience": 3})
    study.add_trial(create_trial(value=0.1, user_attrs={"place": 4, "tasks": {"a": 0.1}}))
    stop = last.enough(settled(study.get_trials()))
    assert stop is not None
    last.keep(stop, complete(study))
    assert complete(study) == stored_total(study) == 5
    assert stop_of(study) == {"after": 4, "of": 30, "why": "no gain above the noise in 3 trials"}


def test_a_trial_put_back_in_the_queue_keeps_what_was_expected_of_it(tmp_path: Path) -> None:
    study = optuna.create_study(storage=f"sqlite:///{tmp_path}/s.db")
    attributes = {"place": 0, PROPOSAL: {"gain": 0.1}, "drawn": True}
    ranges = SPACE.distributions()
    study.add_trial(
        create_trial(
            state=TrialState.RUNNING, params={"a": 0.1, "b": 0.2}, distributions={**ranges}, user_attrs=attributes
        )
    )
    put_back(study, study.trials[0]._trial_id)
    assert study.trials[1].state == TrialState.WAITING
    assert study.trials[1].user_attrs[PROPOSAL] == {"gain": 0.1}


def test_three_workers_stop_together_and_none_waits_for_places_that_nobody_will_take(tmp_path: Path) -> None:
    study = stopped_study(f"sqlite:///{tmp_path}/s.db", workers=3)
    # What ran when the first four places had ended is finished; while a slow worker is at one of them, others go on.
    assert 4 <= complete(study) < 20
    assert stored_total(study) == complete(study) == len([t for t in study.trials if t.state != TrialState.FAIL])
    stop = stop_of(study)
    assert stop is not None
    assert stop["after"] == 4


# From Python


def test_optimize_merge_stops_without_patience_left_and_stays_stopped(tmp_path: Path) -> None:
    base, experts = toys("a", "b")
    kept: dict[str, Any] = {"storage": f"sqlite:///{tmp_path}/s.db", "startup_trials": 2, "sampler": "random"}
    result = optimize_merge(base, experts, target_score, trials=40, patience=4, **kept)
    assert result.summary.stopped is not None
    count = len(result.study.trials)
    assert count < 40
    values = [trial.value for trial in result.study.trials]
    assert max(values[:-4]) == max(values)
    assert len(optimize_merge(base, experts, target_score, trials=40, patience=4, **kept).study.trials) == count
    longer = optimize_merge(base, experts, target_score, trials=count + 3, **kept)  # no patience: on to the total
    assert len(longer.study.trials) == count + 3
    with pytest.raises(InputError, match="patience"):
        optimize_merge(base, experts, target_score, stop="gain")


@pytest.mark.slow
def test_a_study_that_was_cut_stops_where_an_uncut_one_stops(tmp_path: Path) -> None:
    base, experts = toys("a", "b")
    settings: dict[str, Any] = {"trials": 40, "startup_trials": 3, "patience": 3, "sampler": "gp"}
    whole = optimize_merge(base, experts, target_score, **settings)
    url, scored = f"sqlite:///{tmp_path}/s.db", 0

    def cut(model: Any) -> dict[str, float]:
        nonlocal scored
        scored += 1
        if scored == 5:
            raise ConnectionError
        return target_score(model)

    with pytest.raises(ConnectionError):
        optimize_merge(base, experts, cut, storage=url, **settings)
    resumed = optimize_merge(base, experts, target_score, storage=url, **settings)
    assert resumed.summary.stopped == whole.summary.stopped
    done = [trial for trial in resumed.study.trials if trial.state == TrialState.COMPLETE]
    assert [trial.params for trial in done] == [trial.params for trial in whole.study.trials]


# On the command line


@pytest.mark.slow
def test_run_status_and_list_agree_on_where_a_study_stopped_and_add_goes_on(project: Project) -> None:
    project.write(search={"trials": 30, "startup_trials": 2, "patience": 2, "sampler": "random", "step": 0.5})
    run = project.cli("run", "spec.yaml", "--json", "--no-test")
    told = json.loads(run.stdout)
    stopped, count = told["stopped"], told["trials"]["complete"]
    assert stopped["of"] == 30
    assert stopped["after"] == count == told["trials"]["target"] < 30
    words = f"stopped after {count} of 30"
    assert words in run.stderr
    assert f"{words}: no gain above the noise in 2 trials" in project.cli("status", "spec.yaml").stdout
    assert words in project.cli("status", "spec.yaml", "--watch").stdout  # it ends
    (listed,) = project.json("list", "spec.yaml")
    assert (listed["trials"]["target"], listed["stopped"]) == (count, stopped)
    again = project.cli("run", "spec.yaml", "--no-test")
    assert f"{count} trials complete, {words}" in again.stdout
    more = project.json("run", "spec.yaml", "--add", "2", "--no-test")
    assert (more["trials"]["complete"], more["trials"]["target"], more["stopped"]) == (count + 2, count + 2, None)
    total = project.json("run", "spec.yaml", "--trials", str(count + 3), "--no-test")
    assert (total["trials"]["complete"], total["stopped"]) == (count + 3, None)


@pytest.mark.slow
def test_an_explicit_total_is_reached_whatever_the_patience(project: Project) -> None:
    project.write(search={"trials": 30, "startup_trials": 1, "patience": 1, "sampler": "random", "step": 0.5})
    told = project.json("run", "spec.yaml", "--trials", "5", "--no-test")
    assert told["trials"]["complete"] == 5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["search.patience=0"], ["search.patience", "0"]),
        (["search.stop=soon"], ["search.stop", "'gain'"]),
        (["search.stop=gain", "search.sampler=random"], ["patience needs none"]),
        (["search.stop=gain", "objective=pareto"], ["one objective"]),
    ],
)
def test_settings_that_cannot_stop_a_search_are_refused(
    project: Project, settings: list[str], words: list[str]
) -> None:
    overrides = [part for setting in settings for part in ("--set", setting)]
    refused = project.cli("validate", "spec.yaml", *overrides, check=2).stderr
    assert all(word in refused for word in words), refused


@pytest.mark.slow
def test_several_worker_processes_stop_together_and_say_so_once(project: Project) -> None:
    project.write(search={"trials": 30, "startup_trials": 2, "patience": 2, "sampler": "random", "step": 0.5})
    run = project.process("run", "spec.yaml", "--workers", "2", "--no-test")
    status = project.json("status", "spec.yaml")
    trials, stopped = status["trials"], status["stopped"]
    # While one worker has the trial after which the rule holds, the other may end some and begin the next.
    assert stopped["after"] <= trials["complete"] == trials["target"] <= stopped["after"] + 4
    assert (trials["running"], trials["waiting"]) == (0, 0)
    words = f"stopped after {stopped['after']} of 30"
    assert run.stderr.count(words) == 1
    assert f"{trials['complete']} trials complete, {words}" in run.stdout
