"""The table of metrics: a new metric is a new row of `METRICS`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dfmerge_studies.tasks.choices import (
    Answers,
    balanced_accuracy,
    balanced_accuracy_rows,
    f1,
    f1_rows,
    macro_f1,
    macro_f1_rows,
    mcc,
    mcc_rows,
    no_positive,
    one_class,
)
from dfmerge_studies.tasks.label_sets import LabelSets, no_labels
from dfmerge_studies.tasks.metrics.row import AGREEMENT, CHOICES, GENERATE, NUMBERS, SETS, TAGS, TEXTS, Metric, Settled
from dfmerge_studies.tasks.numbers import all_equal, pearson, spearman, squared_errors
from dfmerge_studies.tasks.splits import Split
from dfmerge_studies.tasks.tags import Tags, no_entities_in, no_entity
from dfmerge_studies.tasks.texts import bits_per_byte, perplexity
from dfmerge_studies.tasks.written import (
    ROUGE,
    Written,
    best_of,
    no_number,
    nothing_for_rouge,
    rouge,
    same_number,
    token_f1,
)


def agrees(split: Split, doc_to_target: object) -> bool:
    """Whether `objective: agreement` scores a split by agreement: what is searched on, and what has no labels."""
    return split != "test" or doc_to_target is None


def _right(answers: Settled) -> list[float]:
    return list(map(float, answers.right))


def _log_probability(answers: Answers | LabelSets | Tags) -> list[float]:
    return answers.log_probabilities


def _nothing_for_rouge(answers: Written) -> str | None:
    return nothing_for_rouge(answers.wanted)


def _no_labels(answers: Answers | LabelSets) -> str | None:
    return no_labels(answers) if isinstance(answers, LabelSets) else None


_accuracy = Metric("accuracy", of_rows=_right, tasks=CHOICES | SETS)
_of_sums = Metric("acc", of_rows=_right, tasks=frozenset({"choice"}), size=lambda text: 1.0)
_likelihood = Metric("log_likelihood", of_rows=_log_probability, low=-math.inf, high=0.0, percent=False)
_of_texts = Metric("bits_per_byte", high=math.inf, higher_is_better=False, percent=False, tasks=TEXTS)
METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        _accuracy,
        # As lm-evaluation-harness has them: `acc_norm` divides by the characters of a choice, `acc_bytes` by its bytes.
        _of_sums,
        replace(_of_sums, name="acc_norm", size=lambda text: float(len(text))),
        replace(_of_sums, name="acc_bytes", size=lambda text: float(len(text.encode()))),
        # Classes that neither labels nor answers have do not count in the three that follow: scikit-learn's rule.
        Metric("balanced_accuracy", of_all=balanced_accuracy, linear=balanced_accuracy_rows, classes=True),
        Metric("f1", of_all=f1, linear=f1_rows, classes=True, positive=True, pointless=no_positive),
        Metric(
            "macro_f1", of_all=macro_f1, linear=macro_f1_rows, classes=True, tasks=CHOICES | SETS, pointless=_no_labels
        ),
        Metric("mcc", of_all=mcc, linear=mcc_rows, low=-1.0, classes=True, pointless=one_class),
        replace(_likelihood, tasks=CHOICES | SETS | TAGS),
        Metric("micro_f1", of_all=LabelSets.micro_f1, linear=LabelSets.micro_f1_rows, tasks=SETS, pointless=_no_labels),
        Metric(
            "entity_f1",
            of_all=Tags.entity_f1,
            linear=Tags.entity_f1_rows,
            tasks=TAGS,
            pointless=no_entity,
            unreadable=no_entities_in,
        ),
        Metric("word_accuracy", of_all=Tags.word_accuracy, linear=Tags.word_accuracy_rows, tasks=TAGS),
        replace(_of_texts, of_rows=bits_per_byte),
        replace(_of_texts, name="byte_perplexity", of_rows=perplexity("bytes"), low=1.0),
        replace(_of_texts, name="word_perplexity", of_rows=perplexity("words"), low=1.0),
        Metric("pearson", of_all=pearson, tasks=NUMBERS, low=-1.0, pointless=all_equal),
        Metric("spearman", of_all=spearman, tasks=NUMBERS, low=-1.0, pointless=all_equal),
        Metric("mse", of_rows=squared_errors, tasks=NUMBERS, high=math.inf, higher_is_better=False, percent=False),
        Metric("exact_match", of_rows=_right, tasks=GENERATE),
        Metric("token_f1", of_rows=best_of(token_f1), tasks=GENERATE),
        *(Metric(name, of_rows=rouge(kind), tasks=GENERATE, pointless=_nothing_for_rouge) for name, kind in ROUGE),
        Metric("numeric", of_rows=best_of(same_number), tasks=GENERATE, fault=no_number),
        replace(_accuracy, name=AGREEMENT, labels=False, tasks=CHOICES | SETS | TAGS | GENERATE),
    )
}


# What the numbers of lm-evaluation-harness are, where they are no shares; it judges them itself.
_HARNESS = {
    metric.name: metric
    for metric in (
        *(Metric(name) for name in ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "f1", "em")),
        Metric("mcc", low=-1.0),
        Metric("brier_score", high=2.0, higher_is_better=False, percent=False),
        Metric("bits_per_byte", high=math.inf, higher_is_better=False, percent=False),
        *(
            Metric(name, low=1.0, high=math.inf, higher_is_better=False, percent=False)
            for name in ("perplexity", "word_perplexity", "byte_perplexity")
        ),
        *(Metric(name, high=100.0, percent=False) for name in ("bleu", "chrf")),
        Metric("ter", high=math.inf, higher_is_better=False, percent=False),
    )
}


def own_metric(name: str, score: Callable[[Any], float | Sequence[float]] | None = None) -> Metric:
    """What a score of somebody's own is.

    Args:
        name: of the function; a minus before it says that lower is better.
        score: from answers to the score; None where only what is stored is looked at.
    """
    return Metric(
        name,
        of_all=score,
        tasks=CHOICES | SETS | TAGS | NUMBERS | GENERATE,
        low=-math.inf,
        high=math.inf,
        higher_is_better=not name.startswith("-"),
        percent=False,
    )


def is_own(name: str) -> bool:
    """Whether a metric's name is that of code: `package.module:function`."""
    return ":" in name


def metric_named(name: str) -> Metric:
    """The metric of a name, which may be one that another version, or somebody's own code, has stored."""
    return METRICS.get(name) or (own_metric(name) if is_own(name) or name.startswith("-") else harness_metric(name))


def harness_metric(name: str) -> Metric:
    """What a number of lm-evaluation-harness is; of a name that is not known, a number of which more is better.

    Args:
        name: as the harness names it.
    """
    return replace(_HARNESS.get(name) or Metric(name, percent=False), tasks=frozenset({"lm_eval"}))


def row_by_row(metric: Metric) -> bool:
    """Whether a row's score does not depend on the other rows, and there is a best one: a few rows then bound the rest.

    Of tasks of lm-evaluation-harness, whether that can be: their rows say whether they have a score each.
    """
    scored = metric.of_rows is not None or (metric.tasks == frozenset({"lm_eval"}) and metric.name in _HARNESS)
    return scored and not metric.tasks <= TEXTS and math.isfinite(metric.best)


def task_metrics(task_type: str | None = None) -> list[str]:
    """Names that a task's `metric` can have.

    Args:
        task_type: type of the task; None for all types.
    """
    return [n for n, row in METRICS.items() if n != AGREEMENT and (task_type is None or task_type in row.tasks)]
