"""The races of a study: against which trial one is scored, and what is stored of it.

A trial of a raced study has the attribute `raced`:

    against    number of the incumbent, the best trial on all rows among those before it; null where there is none
    scored     validation rows that the trial was scored on, of all tasks
    of         those that there are
    rows       of a pruned trial, how many of each task it was scored on
    value      of a pruned trial, its estimated value on all rows, and the standard error of that
    tasks      the same of each task's score
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial

from dfmerge_studies.points import Point
from dfmerge_studies.racing import Rival
from dfmerge_studies.study.rows import trial_rows
from dfmerge_studies.study.value import best_trial, counted_weights
from dfmerge_studies.trials.marks import RACED, place_of
from dfmerge_studies.trials.reading import results, violation
from dfmerge_studies.trials.results import TrialResult

if TYPE_CHECKING:
    from dfmerge_studies.objective.raced import Raced
    from dfmerge_studies.study.session import Session

logger = logging.getLogger(__name__)


class Races:
    """Finds the incumbent of each trial of a run, and says what the race gave.

    Args:
        session: an open study, raced or not.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._settings = session.spec.search.race
        self._told = False

    def incumbent(self, place: int) -> FrozenTrial | None:
        """The best of the trials before a place, None where trials are not raced or none can be raced against yet.

        One that breaks a constraint is no incumbent: a trial that is worth less may break it less.  With one worker the
        trials before a place are the same in every run, cut and resumed or not.

        Args:
            place: of the trial.
        """
        if self._settings is None:
            return None
        before = [trial for trial in results(self._session.study) if place_of(trial) < place]
        best = best_trial(before, self._session.spec.objective)
        return best if best is not None and violation(best) == 0 and self._has_rows(best) else None

    def _has_rows(self, trial: FrozenTrial) -> bool:
        """Whether a trial keeps its score on each row, or says once that nothing is raced."""
        kept = trial_rows(trial)
        missing = [task for task in self._weights if task not in kept]
        if missing and not self._told:
            self._told = True
            text = "%s: nothing is raced, since trial %d does not keep its score on each row of %s"
            logger.warning(text, self._session.spec.name, trial.number, ", ".join(missing))
        return not missing

    @property
    def _weights(self) -> dict[str, float]:
        spec = self._session.spec
        return counted_weights(spec.objective, spec.metrics("validation").aims)

    def rival(self, incumbent: FrozenTrial | None) -> Rival | None:
        """What a merge is scored against.

        Args:
            incumbent: from `incumbent`.
        """
        if incumbent is None or self._settings is None:
            return None
        spec, metrics, kept = self._session.spec, self._session.spec.metrics("validation"), trial_rows(incumbent)
        weights = self._weights
        return Rival(
            rows={task: [metrics[task].worth(score) for score in kept[task]] for task in weights},
            highest={task: metrics[task].worth(metrics[task].best) for task in weights},
            weights=None if spec.objective.kind == "min" else weights,
            error=self._settings.error,
            seed=spec.search.seed,
        )

    def attribute(self, incumbent: FrozenTrial | None, raced: Raced | None) -> dict[str, Any]:
        """What a trial keeps of its race, stopped or not.

        Args:
            incumbent: from `incumbent`.
            raced: how it went, None without one.
        """
        if self._settings is None:
            return {}
        problem, metrics = self._session.problem, self._session.spec.metrics("validation")
        count = sum(len(problem.examples(task, "validation")) for task in problem.tasks)
        found: dict[str, Any] = {"against": None, "scored": count, "of": count}
        if incumbent is not None and raced is not None:
            found |= {"against": incumbent.number, "scored": sum(raced.rows.values())}
            if raced.stopped is not None:
                tasks = {t: [metrics[t].worth(score), error] for t, (score, error) in raced.stopped.tasks.items()}
                value = [raced.stopped.value, raced.stopped.error]
                found |= {"rows": dict(raced.rows), "value": value, "tasks": tasks}
        return {RACED: found}

    @staticmethod
    def intermediate(raced: Raced | None) -> dict[int, float]:
        """Estimates of the value, by how many rows they rest on."""
        return {} if raced is None else {count: each.value for count, each in raced.estimates.items()}

    def pruned(self, point: Point, raced: Raced, attributes: Mapping[str, Any]) -> TrialResult:
        """The result of a trial that was stopped: its value is an estimate, as Optuna has it of pruned trials.

        Args:
            point: what was merged.
            raced: how it went.
            attributes: what else is stored.
        """
        assert raced.stopped is not None
        return TrialResult(
            values=(raced.stopped.value,),
            attributes={**point.described(), **attributes},
            pruned=True,
            intermediate=self.intermediate(raced),
        )
