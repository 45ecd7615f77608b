"""One merge at given coefficients, from Python, without a study."""

from __future__ import annotations

from collections.abc import Mapping

from dfmerge_studies.importance.cache import FisherCache
from dfmerge_studies.objective.merger import Merger, Outcome
from dfmerge_studies.objective.problem import Problem


def merge(
    problem: Problem,
    coefficients: Mapping[str, float | Mapping[str, float]] | None = None,
    *,
    method: str | None = None,
    cache: FisherCache | None = None,
    **parameters: float,
) -> Outcome:
    """Merge at given coefficients and score every task's validation inputs; the model is `problem.resident.model`.

    >>> from dfmerge_studies import StudySpec, load_problem, merge
    >>> spec = StudySpec.from_yaml(quickstart)          # the shipped example: three LoRA experts on one encoder
    >>> problem = load_problem(spec)
    >>> mean = merge(problem, {"sentiment": 1 / 3, "continent": 1 / 3, "syllables": 1 / 3}, method="averaging")
    >>> sorted(mean.tasks)
    ['continent', 'sentiment', 'syllables']
    >>> expert = merge(problem, {"sentiment": 1.0, "continent": 0.0, "syllables": 0.0}, method="gta")
    >>> expert.tasks["sentiment"] > mean.tasks["sentiment"]
    True

    Args:
        problem: the loaded spec.
        coefficients: lambda per expert; with `search.granularity` also per group, as `{"EXPERT.GROUP": x}` or
            `{"EXPERT": {"GROUP": x}}`. Those of `fim` are its own: leave them out.
        method: row of the method table; the spec's by default.
        cache: where Fishers are looked up and kept, if anywhere.
        **parameters: the method's own, by the names of its row; the spec's or their defaults otherwise.

    Raises:
        InputError: a coefficient is missing, unknown or outside the bounds, or a parameter does not fit the method.
        RunError: something is not finite, or memory ran out.
    """
    row = problem.spec.row_of(method or problem.spec.method)
    own, merger = row.complete(parameters, "merge"), Merger(problem, row, cache)
    return merger.run(merger.point(coefficients, own, "coefficients"))
