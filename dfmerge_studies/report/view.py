"""What figures and pages may know of a study: all of it from the storage, without a spec file and without models."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from dfmerge_studies.errors import InputError
from dfmerge_studies.methods import SHARED, Coefficients, Method, find_method, label, protected
from dfmerge_studies.points import fine_name
from dfmerge_studies.spec import ObjectiveSettings
from dfmerge_studies.storage import storage_of, study_names
from dfmerge_studies.study import provenance
from dfmerge_studies.study.fingerprint import allowed_drops, groups_of, metrics_of, objective_of
from dfmerge_studies.study.scores import results_in, scores_in
from dfmerge_studies.study.value import objective_values, one_value, trial_value
from dfmerge_studies.study.variants import variants
from dfmerge_studies.study.winner import Selection, selection_of, winner_of
from dfmerge_studies.tasks.metrics import Metrics, TaskScore
from dfmerge_studies.tasks.splits import Split
from dfmerge_studies.trials.marks import COEFFICIENTS, TASKS
from dfmerge_studies.trials.reading import pruned_of, results_of


@dataclass(frozen=True)
class StudyView:
    """A stored study, read only.

    Attributes:
        study: the Optuna study.
        fingerprint: what it is about, as `provenance` stored it.
        spec: the spec that created it, passwords masked.
        trials: completed trials in the order of their places.
        attributes: all that the study says of itself.
        pruned: trials that were stopped on a part of their rows, which have no score.
    """

    study: optuna.Study
    fingerprint: Mapping[str, Any]
    spec: Mapping[str, Any]
    trials: list[FrozenTrial]
    attributes: Mapping[str, Any]
    pruned: Sequence[FrozenTrial] = ()

    @classmethod
    def of(cls, study: optuna.Study) -> StudyView:
        """Read a study.

        Raises:
            InputError: this program did not make it.
        """
        fingerprint = provenance.stored_fingerprint(study)
        if fingerprint is None:
            raise InputError(f"the study {study.study_name!r} was not made by this program")
        attributes, trials = study.user_attrs, study.get_trials(deepcopy=False)
        spec = provenance.without_secrets(attributes.get(provenance.SPEC, {}))
        return cls(study, fingerprint, spec, results_of(trials), attributes, pruned_of(trials))

    @property
    def name(self) -> str:
        """Name of the study."""
        return self.study.study_name

    @property
    def method(self) -> str:
        """Name of the method."""
        return str(self.fingerprint["method"])

    @property
    def experts(self) -> dict[str, str | None]:
        """Experts in their order, each with its task, None where it has none of its own."""
        return dict(self.fingerprint["experts"])

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return list(self.fingerprint["tasks"])

    @property
    def row(self) -> Method | None:
        """Row of the method table, None where this version has none of that name."""
        found = find_method(self.method)
        return protected(found) if found is not None and self.fingerprint.get("protect") else found

    @property
    def policy(self) -> Coefficients:
        """Who chooses the coefficients."""
        method = self.row
        return method.coefficients if method is not None else Coefficients.PER_EXPERT

    @cached_property
    def objective(self) -> ObjectiveSettings:
        """What makes one trial better than another."""
        return objective_of(self.fingerprint)

    @cached_property
    def best(self) -> FrozenTrial | None:
        """The winner: the trial that was named, or else the best of the search."""
        return winner_of(self.study, self.objective, self.trials)

    @cached_property
    def selection(self) -> Selection | None:
        """How the winner was named, None where it was not."""
        return selection_of(self.study, self.trials)

    @property
    def measure(self) -> str:
        """What a trial's value is, in words."""
        metric = self.metrics("validation").short
        words = {
            "mean": f"mean {metric}",
            "weighted": f"weighted mean {metric}",
            "min": f"{metric} on the worst task",
            "pareto": f"mean {metric}",
            "agreement": "agreement with the experts",
        }
        return words.get(self.objective.kind, self.objective.kind)

    def metrics(self, split: Split) -> Metrics:
        """What the scores of a split are, by task."""
        return metrics_of(self.fingerprint, self.spec, split)

    @property
    def allowed(self) -> dict[str, float]:
        """Points that each task may lose, of those that have a bound: against its expert, a guard against the base."""
        return allowed_drops(self.fingerprint)

    @property
    def unit(self) -> str:
        """Of a trial's value as it is shown: "%" or nothing."""
        return self.metrics("validation").mean.unit

    def scores_alike(self, other: StudyView, split: Split) -> bool:
        """Whether the scores of another study may stand beside this one's."""
        ours, theirs = self.metrics(split), other.metrics(split)
        return ours == theirs and ours.guards.keys() == theirs.guards.keys()

    @cached_property
    def baselines(self) -> dict[str, StudyView]:
        """Studies NAME.VARIANT with a result, of the same storage and about the same weights and data, by VARIANT."""
        other_seed = re.compile(rf"\.seed(?!{self.seed}$)\d+$")
        # Of a comparison over seeds, only the studies of this seed are read.
        found = vars(self).get("variants") or self._beside(lambda name: not other_seed.search(name))
        return {
            variant: views[self.seed]
            for variant, views in found.items()
            if self.seed in views and views[self.seed] is not self and self._shares(views[self.seed], "data digest")
        }

    @property
    def seed(self) -> int:
        """Of everything random."""
        return int(self.fingerprint.get("search.seed", 0))

    @cached_property
    def variants(self) -> dict[str, dict[int, StudyView]]:
        """Studies NAME.VARIANT and NAME.VARIANT.seedS with a result and about the same weights, by VARIANT and seed.

        They are in the order of the method table; the study itself is among them, as its method, which comes last.
        """
        return self._beside(lambda name: True)

    def _beside(self, wanted: Callable[[str], bool]) -> dict[str, dict[int, StudyView]]:
        """`variants`, of the studies whose names are wanted."""
        found: dict[str, dict[int, StudyView]] = {}
        known = variants()
        storage = storage_of(self.study)
        for name in sorted(study_names(storage)):
            suffix = re.sub(r"\.seed\d+$", "", name.removeprefix(f"{self.name}."))
            if suffix == name or suffix not in known or not wanted(name):
                continue
            # One that cannot be read is no row; `list` says why.
            with suppress(InputError), provenance.reading_study(name):
                other = optuna.load_study(study_name=name, storage=storage)
                if provenance.stored_fingerprint(other) is None:
                    continue
                view = StudyView.of(other)
                if view.best is not None and self._shares(view, "digest", but="data digest"):
                    found.setdefault(suffix, {})[view.seed] = view
        if self.best is not None:
            found.setdefault(self.method, {})[self.seed] = self
        order = [*(name for name in known if name != self.method), self.method]
        return {name: dict(sorted(found[name].items())) for name in order if name in found}

    def _shares(self, other: StudyView, what: str, but: str = "\n") -> bool:
        """Whether the fields of both fingerprints whose names hold `what`, and not `but`, are equal."""
        fields = [name for name in other.fingerprint if what in name and but not in name]
        return all(self.fingerprint.get(name) == other.fingerprint[name] for name in fields)

    def value_of(self, scores: Mapping[str, float]) -> float:
        """What validation scores are worth under this study's objective, as `value` of a trial.

        Args:
            scores: per task.
        """
        metrics = self.metrics("validation")
        return metrics.mean.worth(one_value(objective_values(self.objective, scores, metrics)))

    def scores(self, row: str, split: Split) -> dict[str, float] | None:
        """Scores that the study keeps of the base or of the experts, if any.

        Args:
            row: "base" or "experts".
            split: of the tasks' data.
        """
        return scores_in(self.attributes, row, split)

    def results(self, row: str | FrozenTrial, split: Split) -> dict[str, TaskScore] | None:
        """Scores that the study keeps, with the rows that they rest on as far as it keeps these.

        Args:
            row: "base", "experts", or a completed trial.
            split: of the tasks' data.
        """
        return results_in(self.attributes, row, split)

    def trial_scores(self, trial: FrozenTrial, split: Split) -> dict[str, float] | None:
        """Scores of a completed trial; on test only where they have been computed."""
        return dict(trial.user_attrs[TASKS]) if split == "validation" else scores_in(self.attributes, trial, split)

    @property
    def dimensions(self) -> dict[str, str]:
        """What each trial chooses, as figures call it, by name of its Optuna parameter; nothing if all is fixed."""
        groups = groups_of(self.fingerprint)
        return self._chosen([fine_name(expert, group) for expert in self.experts for group in groups] or self.experts)

    def _chosen(self, coefficients: Iterable[str]) -> dict[str, str]:
        if not self.policy.chosen:
            return {}
        shared = {SHARED: "λ of all experts"} if self.policy is Coefficients.SHARED_GRID else {}
        row = self.row
        known = [each.name for each in row.parameters] if row is not None else []
        own = {name: label(name) for name in known if any(name in trial.params for trial in self.trials[:1])}
        return {**(shared or {name: name for name in coefficients}), **own}

    @property
    def searched_parameters(self) -> list[str]:
        """The method's own parameters in which trials differ, as figures call them."""
        known = {SHARED, *self.experts}
        return [words for name, words in self._chosen(self.experts).items() if name not in known]

    def points(self) -> dict[str, list[float]]:
        """What the completed trials have chosen, as figures call it, in the order of `trials`.

        Of experts whose groups of parameters have a coefficient each, their means.
        """
        found, first = {}, next(iter(self.experts))
        for name, words in self._chosen(self.experts).items():
            values = [
                {**trial.user_attrs, SHARED: self.coefficients(trial)[first], **self.coefficients(trial)}
                for trial in self.trials
            ]
            found[words] = [float(value[name]) for value in values]
        return found

    def parameters(self, trial: FrozenTrial) -> dict[str, float]:
        """The method's own parameters of a completed trial."""
        method = self.row
        return method.stored_parameters(trial.user_attrs) if method is not None else {}

    def coefficients(self, trial: FrozenTrial) -> dict[str, float]:
        """Coefficient per expert of a completed trial."""
        return dict(trial.user_attrs[COEFFICIENTS])

    def value(self, trial: FrozenTrial) -> float:
        """What a completed trial is worth, as one number of the study's metric."""
        return self.metrics("validation").mean.worth(trial_value(trial))

    def value_text(self, trial: FrozenTrial, digits: int = 1) -> str:
        """The same as text, in percent where the metric is shown so."""
        return self.metrics("validation").mean.shown(self.value(trial), digits)
