"""What a run does with a trial's point: merge, score, tell what it is worth, and keep its Fishers if it is the best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial

from dfmerge_studies.methods import Coefficients
from dfmerge_studies.objective.slopes import Sample, Slope
from dfmerge_studies.points import Point, fine_name
from dfmerge_studies.spec import TRACED
from dfmerge_studies.study.proposals import inside
from dfmerge_studies.study.provenance import TRACED_POINT
from dfmerge_studies.study.races import Races
from dfmerge_studies.study.rows import rows_attribute
from dfmerge_studies.study.value import counted_weights, rounded_seconds, standing, trial_result
from dfmerge_studies.tasks.sampling import draw_rows, seeded_generator
from dfmerge_studies.trials.marks import FISHERS, GRADIENT, SECONDS
from dfmerge_studies.trials.reading import results
from dfmerge_studies.trials.results import TrialResult

if TYPE_CHECKING:
    from dfmerge_studies.study.session import Session


class Trials:
    """Evaluates the trials of one run.

    Args:
        session: an open study.
        references: what each task is compared with, from `Session.references`.
    """

    def __init__(self, session: Session, references: Mapping[str, float]) -> None:
        self._session = session
        self._references = references
        self._races = Races(session)
        self._best = max(map(self._standing, results(session.study)), default=None)

    def _standing(self, trial: FrozenTrial | TrialResult) -> tuple[float, ...]:
        constraints = trial.constraints
        missing = constraints.values() if isinstance(constraints, Mapping) else constraints
        return standing(trial.values, missing, self._session.spec.objective)

    def _asked(self, values: Mapping[str, float]) -> Point:
        """What a trial is to be merged at: what was proposed, or what a method without proposals chooses itself."""
        session = self._session
        if session.method.coefficients is Coefficients.FISHER_TRACE:
            return session.merger.traced_point()
        point = session.method.point(values, session.problem.experts, session.plan.groups)
        return point.on_step(session.spec.search.step)

    def _sample(self, place: int) -> Sample | None:
        """Rows that a trial's slope is taken of, where a later point needs it; a repeated trial has the same."""
        session, spec = self._session, self._session.spec
        if not session.plan.needs_slope(place):
            return None
        weights = counted_weights(spec.objective, spec.aims)
        rows = {
            task: draw_rows(
                len(session.problem.examples(task, "validation")),
                spec.search.gradient_rows,
                seeded_generator(spec.search.seed, "gradient", task, str(place)),
            )
            for task in weights
        }
        return Sample(rows, weights, optional=session.plan.proposer == "auto")

    def __call__(self, point: Mapping[str, float], place: int) -> TrialResult:
        """Merge at a point and score; the Fishers of the best trial so far, as this process knows it, are kept.

        Args:
            point: what was proposed.
            place: of the trial; where trials are raced, it is against the best of those before it, unless its slope
                is asked for.
        """
        session, spec = self._session, self._session.spec
        at, sample = self._asked(point), self._sample(place)
        incumbent = self._races.incumbent(place) if sample is None else None
        with session.merger.importances.shelf.trial() as fishers:
            outcome = session.merger.run(at, self._races.rival(incumbent), sample)
            attributes = {
                SECONDS: rounded_seconds(outcome.seconds),
                FISHERS: {"computed": outcome.computed, "cached": outcome.cached},
                **self._races.attribute(incumbent, outcome.raced),
                **slope_attribute(outcome.slope),
            }
            if outcome.raced is not None and outcome.raced.stopped is not None:
                return self._races.pruned(at, outcome.raced, attributes)
            result = trial_result(
                at,
                outcome.tasks,
                spec.metrics("validation"),
                objective=spec.objective,
                references=self._references,
                allowed=spec.allowed,
                attributes={**attributes, **rows_attribute(outcome.rows)},
            )
            result = replace(result, intermediate=self._races.intermediate(outcome.raced))
            reached = self._standing(result)
            if self._best is None or reached > self._best:
                self._best = reached
                fishers.keep()
        return result


def slope_attribute(slope: Slope | None) -> dict[str, Any]:
    """What a trial keeps of the loss's slope.

    Args:
        slope: None where none was asked for.
    """
    return {} if slope is None else {GRADIENT: {"loss": slope.loss, "slopes": dict(slope.slopes)}}


def traced_points(session: Session) -> list[dict[str, float]]:
    """The point of `search.enqueue: [fisher-trace]`, if the spec asks for it; computed once in a study, and kept in it.

    Args:
        session: an open study.
    """
    if TRACED not in session.spec.search.enqueue or not session.plan.groups:
        return []
    point = session.study.user_attrs.get(TRACED_POINT)
    if point is None:
        found, space = session.merger.traced_point().groups, session.plan.space
        own = {each.name: each.default for each in session.method.searched}
        fine = {fine_name(expert, group): value for expert, by in found.items() for group, value in by.items()}
        point = {**own, **{name: inside(space, name, value) for name, value in fine.items()}}
        session.study.set_user_attr(TRACED_POINT, point)
    return [dict(point)]
