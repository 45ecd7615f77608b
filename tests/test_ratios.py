"""Standard errors of scores that are no means over rows, against scores of drawn rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from dfmerge_studies.tasks.choices import Answers
from dfmerge_studies.tasks.label_sets import LabelSets
from dfmerge_studies.tasks.metrics import METRICS, Metrics, TaskScore
from dfmerge_studies.tasks.tags import IGNORED, Tags
from dfmerge_studies.tasks.uncertainty import difference, standard_error

NAMES = ("O", "B-X", "I-X", "B-Y")
Draw = np.random.Generator
Make = Callable[[Sequence[Any], Sequence[Any]], Any]  # from what is wanted and what is taken, per input


def classes(wanted: Sequence[int], taken: Sequence[int]) -> Answers:
    return Answers([[float(c != each) for c in range(4)] for each in taken], list(wanted), 1)


def sets(wanted: Sequence[Sequence[int]], taken: Sequence[Sequence[int]]) -> LabelSets:
    return LabelSets([[each - 0.5 for each in bits] for bits in taken], [tuple(bits) for bits in wanted])


def tags(wanted: Sequence[Sequence[int]], taken: Sequence[Sequence[int]]) -> Tags:
    given = [[[float(c != each) for c in range(len(NAMES))] for each in words] for words in taken]
    return Tags(given, wanted, NAMES)


def some_classes(draw: Draw, n: int) -> tuple[list[int], list[int]]:
    wanted = draw.choice(3, size=n, p=[0.75, 0.1, 0.15])
    return wanted.tolist(), np.where(draw.random(n) < 0.3, draw.integers(0, 3, n), wanted).tolist()


def some_sets(draw: Draw, n: int) -> tuple[list[list[int]], list[list[int]]]:
    wanted = draw.random((n, 3)) < [0.3, 0.1, 0.0]  # no row has the last label, nor is it given to any
    return wanted.astype(int).tolist(), (wanted ^ (draw.random((n, 3)) < [0.2, 0.1, 0.0])).astype(int).tolist()


def some_tags(draw: Draw, n: int, share: float = 0.4) -> tuple[list[list[int]], list[list[int]]]:
    wanted, taken = [], []
    for has in draw.random(n) < share:
        words = draw.choice(4, size=draw.integers(1, 6), p=[0.4, 0.25, 0.2, 0.15] if has else [1, 0, 0, 0])
        wrong = draw.random(len(words)) < np.where(words > 0, 0.3, 0.15 * share)
        taken.append(np.where(wrong, draw.integers(0, 4, len(words)), words).tolist())
        wanted.append(words.tolist())
    return wanted, taken


KINDS: dict[str, tuple[Make, Callable[[Draw, int], tuple[list[Any], list[Any]]]]] = {
    "balanced_accuracy": (classes, some_classes),
    "f1": (classes, some_classes),
    "macro_f1": (classes, some_classes),
    "mcc": (classes, some_classes),
    "macro_f1 of sets": (sets, some_sets),
    "micro_f1": (sets, some_sets),
    "entity_f1": (tags, some_tags),
    "word_accuracy": (tags, some_tags),
}


def test_every_metric_of_classes_labels_or_tags_together_has_numbers_of_its_rows() -> None:
    names = {name for name, metric in METRICS.items() if metric.linear is not None}
    assert names == {kind.split()[0] for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_s_number_is_the_score_and_what_one_copy_more_of_the_row_does_to_it(kind: str) -> None:
    copies, n = 60, 25
    make, some = KINDS[kind]
    metric = METRICS[kind.split()[0]]
    wanted, taken = some(np.random.default_rng(3), n)
    result = metric.result(make(wanted, taken))
    assert result.rows is not None
    assert fmean(result.rows) == pytest.approx(result.score, abs=1e-12)
    for row, number in enumerate(result.rows):
        scores = []
        for change in (1, -1):
            rows = [each for each in range(n) for _ in range(copies + (change if each == row else 0))]
            scores.append(metric.score(make([wanted[each] for each in rows], [taken[each] for each in rows])))
        slope = (scores[0] - scores[1]) / 2 * copies * n
        assert number == pytest.approx(result.score + slope, abs=0.01)  # the curve over one copy in sixty


@pytest.mark.parametrize(
    ("name", "wanted", "taken"), [("f1", [0, 1, 1], [0, 0, 2]), ("mcc", [0, 1, 2], [1, 1, 1]), ("f1", [0, 2], [2, 0])]
)
def test_where_nothing_is_hit_or_all_rows_get_one_answer_all_rows_have_the_score(
    name: str, wanted: list[int], taken: list[int]
) -> None:
    assert METRICS[name].result(classes(wanted, taken)) == TaskScore(0.0, name, len(wanted), [0.0] * len(wanted))


def test_words_without_a_tag_and_entities_that_cross_them_count_as_in_the_score() -> None:
    found = METRICS["entity_f1"].result(tags([[1, IGNORED, 2], [0, 3]], [[1, 0, 2], [3, 3]]))
    assert found.score == 2 * 2 / 5
    assert found.rows == pytest.approx([0.8 + (2 - 0.8 * 2) / 2.5, 0.8 + (2 - 0.8 * 3) / 2.5])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_the_spread_of_the_score_over_rows_drawn_again(kind: str) -> None:
    make, some = KINDS[kind]
    metric, draw, n = METRICS[kind.split()[0]], np.random.default_rng(4), 400
    wanted, taken = some(draw, n)
    scores = []
    for _ in range(400):
        rows = draw.integers(0, n, n)
        scores.append(metric.score(make([wanted[row] for row in rows], [taken[row] for row in rows])))
    # A spread of 400 draws is itself known to 3.5 %.
    assert standard_error(metric.result(make(wanted, taken)), metric) == pytest.approx(np.std(scores), rel=0.1)


def rare_classes(draw: Draw, common: float) -> list[TaskScore]:
    """Two equally good models, 1,000 rows, one of twenty positive; recall and precision are 0.7."""
    wanted = (draw.random(1000) < 0.05).astype(int)
    hard, shared = draw.random(1000), draw.random(1000) < common
    wrong = [np.where(shared, hard, draw.random(1000)) < np.where(wanted, 0.3, 0.3 * 0.05 / 0.95) for _ in range(2)]
    return [METRICS["f1"].result(classes(wanted.tolist(), (wanted ^ each).tolist())) for each in wrong]


def rare_entities(draw: Draw, common: float) -> list[TaskScore]:
    """Two equally good models, 200 sentences, one of ten with entities."""
    wanted = [(draw.random(4) < 0.5 * has).astype(int) for has in draw.random(200) < 0.1]
    models: list[list[list[int]]] = [[], []]
    for words in wanted:
        hard, shared = draw.random(4), draw.random(4) < common
        for model in models:
            wrong = np.where(shared, hard, draw.random(4)) < np.where(words, 0.3, 0.015)
            model.append((words ^ wrong).tolist())
    return [METRICS["entity_f1"].result(tags([each.tolist() for each in wanted], model)) for model in models]


@pytest.mark.slow
@pytest.mark.parametrize("common", [0.0, 0.5])
@pytest.mark.parametrize(("name", "pair"), [("f1", rare_classes), ("entity_f1", rare_entities)])
def test_equally_good_models_are_told_apart_in_one_of_twenty_comparisons_where_the_class_is_rare(
    name: str, pair: Callable[[Draw, float], list[TaskScore]], common: float
) -> None:
    draw, metrics = np.random.default_rng(5), Metrics({"t": METRICS[name]})
    found = []
    for _ in range(600):
        a, b = pair(draw, common)
        found.append(difference({"t": a}, {"t": b}, metrics))
    assert all(each.paired for each in found)
    errors = [each.error or 0.0 for each in found]
    # A spread of 600 differences is itself known to 3 %.
    assert math.sqrt(fmean(error**2 for error in errors)) == pytest.approx(
        np.std([each.value for each in found]), rel=0.1
    )
    assert 0.02 <= fmean(bool(each.clear) for each in found) <= 0.1
