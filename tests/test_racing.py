"""The decision to stop a trial: the bound on its error by simulation, its arithmetic, the estimates that are left."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest

from dfmerge_studies.racing import SHARES, Rival, loses

TRIALS = 1000
Rows = dict[str, list[float]]


def bits(count: int, right: int, generator: np.random.Generator) -> list[float]:
    return [float(bit) for bit in generator.permutation([1.0] * right + [0.0] * (count - right))]


def is_stopped(rival: Rival, rows: Mapping[str, Sequence[float]]) -> int | None:
    """After how many rows a trial is stopped."""
    seen = [((task, row), rows[task][row]) for task, row in rival.order()]
    return next((count for count in rival.looks() if rival.cannot_win(seen[:count])), None)


def is_ever_stopped(rival: Rival, rows: Mapping[str, Sequence[float]]) -> bool:
    """Whether a trial is stopped if one looks after every row up to the last look: more often than at the looks."""
    return rival.cannot_win([((task, row), rows[task][row]) for task, row in rival.order()[: rival.looks()[-1]]])


def level_bits(generator: np.random.Generator) -> tuple[Rows, Rows, dict[str, float]]:
    """Two models of which the second is right once more on all rows, at the same tasks with other numbers of rows."""
    first = {"a": bits(40, 30, generator), "b": bits(25, 20, generator)}
    second = {"a": bits(40, 31, generator), "b": bits(25, 20, generator)}
    return first, second, {"a": 0.5, "b": 0.5}


def level_and_torn(generator: np.random.Generator) -> tuple[Rows, Rows, dict[str, float]]:
    """The second wins a task by a third and loses the other by as much: the rows come mixed from both."""
    first = {"a": bits(60, 20, generator), "b": bits(60, 40, generator)}
    return first, {"a": bits(60, 40, generator), "b": bits(60, 20, generator)}, {"a": 0.5, "b": 0.5}


def level_and_heavy(generator: np.random.Generator) -> tuple[Rows, Rows, dict[str, float]]:
    """The same under weights that make one task count four times."""
    first = {"a": bits(60, 20, generator), "b": bits(60, 40, generator)}
    return first, {"a": bits(60, 25, generator), "b": bits(60, 20, generator)}, {"a": 0.8, "b": 0.2}


def level_losses(generator: np.random.Generator) -> tuple[Rows, Rows, dict[str, float]]:
    """Log-likelihoods, which have no worst value, with the same mean: most rows are a bit worse, a few much better."""
    first = -generator.exponential(1.0, 60)
    second = first - 0.2
    second[:3] = first[:3] / 2
    second += (first.mean() - second.mean()) * (second / second.mean())
    return {"a": first.tolist()}, {"a": np.minimum(second, 0.0).tolist()}, {"a": 1.0}


@pytest.mark.parametrize("error", [0.1, 0.3])
@pytest.mark.parametrize("level", [level_bits, level_and_torn, level_and_heavy, level_losses])
def test_trials_that_win_or_tie_are_stopped_no_more_often_than_the_bound_over_all_looks_together(
    level: Callable[[np.random.Generator], tuple[Rows, Rows, dict[str, float]]], error: float
) -> None:
    generator = np.random.default_rng(0)
    stopped = 0
    for seed in range(TRIALS):
        first, second, weights = level(generator)
        lead = sum(weight * (np.mean(second[task]) - np.mean(first[task])) for task, weight in weights.items())
        assert lead >= -1e-9
        highest = dict.fromkeys(first, 0.0 if level is level_losses else 1.0)
        stopped += is_ever_stopped(Rival(first, highest, weights, error, seed), second)
    assert stopped / TRIALS <= error + 2 * math.sqrt(error * (1 - error) / TRIALS)


def test_the_same_bound_holds_for_the_worst_task() -> None:
    generator = np.random.default_rng(1)
    stopped = 0
    for seed in range(TRIALS):
        first = {"a": bits(40, 20, generator), "b": bits(30, 16, generator)}  # the worst: 0.5
        second = {"a": bits(40, 21, generator), "b": bits(30, 16, generator)}  # the worst: 0.525
        rival = Rival(first, {"a": 1.0, "b": 1.0}, None, 0.2, seed)
        stopped += is_ever_stopped(rival, second)
    assert stopped / TRIALS <= 0.2


@pytest.mark.parametrize("weights", [{"a": 0.5, "b": 0.5}, None])
def test_a_hopeless_trial_is_stopped_after_a_third_of_the_rows(weights: dict[str, float] | None) -> None:
    generator = np.random.default_rng(2)
    shares = []
    for seed in range(100):
        first = {"a": bits(100, 80, generator), "b": bits(100, 80, generator)}
        second = {"a": bits(100, 40, generator), "b": bits(100, 45, generator)}
        shares.append((is_stopped(Rival(first, {"a": 1.0, "b": 1.0}, weights, 0.1, seed), second) or 200) / 200)
    assert np.mean(shares) < 1 / 3


def test_the_capital_is_that_of_a_plain_loop() -> None:
    generator = np.random.default_rng(3)
    for _ in range(200):
        count = int(generator.integers(5, 40))
        z = generator.choice([-1.0, 0.0, 1.0], count, p=[0.4, 0.4, 0.2])[: int(generator.integers(2, count))]
        error = float(generator.choice([0.05, 0.2, 0.5]))
        assert loses(z, count, 1.0, error) == _loses_slowly(z.tolist(), count, 1.0, error)


def _loses_slowly(z: list[float], count: int, highest: float, error: float) -> bool:
    capital, total = [1.0] * len(SHARES), 0.0
    for seen, each in enumerate(z):
        level = -total / (count - seen)
        if level > highest:
            return True
        for i, share in enumerate(SHARES):
            capital[i] *= max(0.0, 1 - share * (each - level) / max(highest - level, 1e-12))
        total += each
        if sum(capital) / len(capital) >= 1 / error:
            return True
    return -total / (count - len(z)) > highest


def test_a_trial_that_no_answers_to_the_other_rows_could_save_is_stopped_whatever_the_error() -> None:
    assert loses(np.array([-1.0] * 6), 11, 1.0, 1e-12)
    assert not loses(np.array([-1.0] * 5), 11, 1.0, 1e-12)


def test_a_trial_that_differs_nowhere_is_not_stopped() -> None:
    rows = {"a": bits(50, 30, np.random.default_rng(0))}
    assert is_stopped(Rival(rows, {"a": 1.0}, {"a": 1.0}, 0.5, 0), rows) is None


def test_the_order_is_one_of_all_rows_and_the_same_for_all_trials_of_a_seed() -> None:
    rows = {"a": [1.0] * 30, "b": [0.0] * 20}
    rivals = [Rival(rows, {"a": 1.0, "b": 1.0}, {"a": 0.5, "b": 0.5}, 0.1, seed) for seed in (0, 0, 1)]
    orders = [rival.order() for rival in rivals]
    assert sorted(orders[0]) == [("a", i) for i in range(30)] + [("b", i) for i in range(20)]
    assert orders[0] == orders[1] != orders[2]
    assert rivals[0].looks() == [30, 35, 40, 45]
    many = Rival({"a": [1.0] * 10000}, {"a": 1.0}, {"a": 1.0}, 0.1, 0)
    assert many.looks() == [200, 500, *range(1000, 10000, 1000)]


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_estimates_hit_the_score_on_all_rows_on_average_and_their_errors_say_how_far_off_they_are(share: float) -> None:
    generator = np.random.default_rng(4)
    first = {"a": bits(80, 60, generator), "b": bits(120, 80, generator)}
    second = {task: [row if generator.random() < 0.7 else 1 - row for row in rows] for task, rows in first.items()}
    truth = np.mean([np.mean(rows) for rows in second.values()])
    off, plain, errors = [], [], []
    for seed in range(400):
        rival = Rival(first, {"a": 1.0, "b": 1.0}, {"a": 0.5, "b": 0.5}, 0.1, seed)
        seen = [((task, row), second[task][row]) for task, row in rival.order()[: int(share * 200)]]
        estimate = rival.estimate(seen)
        off.append(estimate.value - truth)
        errors.append(estimate.error)
        plain.append(np.mean([np.mean([s for (t, _), s in seen if t == task]) for task in first]) - truth)
    assert abs(np.mean(off)) < 3 * np.std(off) / 20
    assert np.std(off) == pytest.approx(np.mean(errors), rel=0.2)


def test_the_incumbent_s_luck_with_the_first_rows_cancels_out_of_an_estimate() -> None:
    generator = np.random.default_rng(5)
    first = {"a": bits(200, 140, generator)}
    second = {"a": [0.0 if i % 20 == 0 else row for i, row in enumerate(first["a"])]}  # errs on more rows
    off, plain = [], []
    for seed in range(200):
        rival = Rival(first, {"a": 1.0}, {"a": 1.0}, 0.1, seed)
        seen = [((task, row), second[task][row]) for task, row in rival.order()[:60]]
        off.append(rival.estimate(seen).value - np.mean(second["a"]))
        plain.append(np.mean([score for _, score in seen]) - np.mean(second["a"]))
    assert np.std(off) < 0.5 * np.std(plain)


def test_no_estimate_from_a_part_of_the_rows_is_exact() -> None:
    first = {"a": [1.0] * 50, "b": [1.0] * 50}
    rival = Rival(first, {"a": 1.0, "b": 1.0}, {"a": 0.5, "b": 0.5}, 0.1, 0)
    seen = [((task, row), 0.0 if task == "a" else 1.0) for task, row in rival.order()[:20]]
    tasks = rival.estimate(seen).tasks
    assert tasks["a"][0] == pytest.approx(0.0)
    assert tasks["b"][0] == pytest.approx(1.0)
    assert all(error > 0.05 for _, error in tasks.values())
    unseen = rival.estimate([(("a", 0), 0.0)]).tasks["b"]
    assert unseen == (1.0, 1.0)
