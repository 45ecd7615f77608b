"""What a spec means for its study, worked out once and handed down: method, space, first points, total, storage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import optuna
from optuna.samplers import BaseSampler

from dfmerge_studies.methods import Method
from dfmerge_studies.spec import DEFAULT_SAMPLER, DESCENT, StudySpec
from dfmerge_studies.storage import load_study, load_study_if_any, open_storage, resolve_url, safe_url, storage_errors
from dfmerge_studies.study import provenance
from dfmerge_studies.study.fingerprint import groups_of, sampler_of, startup_of
from dfmerge_studies.study.proposals import first_points, goal_of, new_startup, study_sampler, total_trials
from dfmerge_studies.study.totals import Asked
from dfmerge_studies.trials.space import Space
from dfmerge_studies.trust_region import at_least


@dataclass(frozen=True)
class Plan:
    """A spec's study, before anything is loaded.

    Attributes:
        spec: the settings.
        method: row of the method table, with the spec's values of its parameters.
        space: what its trials differ in.
        points: those that it tries first: 1/M, then what the spec asks for; none on a grid.
        trials: total that it should reach: the spec's, or as many points as a method without a search has.
        url: of its storage, absolute; it may hold a password: never print it, print `place`.
        proposer: what proposes its trials, in the words of `search.sampler`: the spec's, or what a new study has.
        startup: of the sampler `auto`, what its startup trials are, in the words of `search.startup`; None of others.
        groups: of parameters that have a coefficient each; none where experts have one, or before the study is there.
    """

    spec: StudySpec
    method: Method
    space: Space
    points: tuple[Mapping[str, float], ...]
    trials: int
    url: str
    proposer: str
    startup: str | None = None
    groups: tuple[str, ...] = ()

    @classmethod
    def of(cls, spec: StudySpec) -> Plan:
        """The plan of a spec.

        Raises:
            InputError: the space cannot be searched, or a parameter of the method has no value.
        """
        method, search, experts = spec.row, spec.search, list(spec.experts)
        method.check_whole(spec.where("parameters"))
        return cls(
            spec=spec,
            method=method,
            space=method.space(experts, search.bounds, search.step),
            points=tuple(first_points(method, experts, search)),
            trials=total_trials(method, search),
            url=storage_url(spec),
            proposer=search.stated_sampler or DEFAULT_SAMPLER,
            startup=new_startup(spec),
        )

    def joined(self, study: optuna.Study) -> Plan:
        """The plan as a study has it that is there already: with the sampler that it keeps.

        Args:
            study: its study.
        """
        fingerprint = provenance.stored_fingerprint(study)
        if fingerprint is None:
            return self
        plan = self.with_groups(groups_of(fingerprint))
        return replace(plan, proposer=sampler_of(fingerprint), startup=startup_of(fingerprint))

    def of_new(self, spec: StudySpec) -> Plan:
        """The plan of a new study, whose spec says more than this one's does.

        Args:
            spec: the same settings, with what was decided of those that they leave open.
        """
        return replace(self, spec=spec, startup=new_startup(spec))

    def with_groups(self, groups: Sequence[str]) -> Plan:
        """The plan with a coefficient for each group of an expert's parameters; which there are, the models say.

        Args:
            groups: names of the groups; none where every expert has one coefficient.
        """
        if not groups or not self.method.searches:
            return self
        search = self.spec.search
        space = self.method.space(list(self.spec.experts), search.bounds, search.step, groups)
        return replace(self, groups=tuple(groups), space=space, points=tuple(map(space.spread, self.points)))

    @property
    def place(self) -> str:
        """The storage as it may be printed."""
        return safe_url(self.url)

    def total(self, stored: int = 0, wanted: int | None = None) -> int:
        """Trials that a run works towards; a method without a search has its own number, whatever is wanted.

        Args:
            stored: a total that an earlier run raised the study to.
            wanted: an explicit total.
        """
        if not self.method.searches:
            return self.trials
        return wanted if wanted is not None else max(self.trials, stored)

    def is_settled(self, study: optuna.Study) -> bool:
        """Whether a stop of a study, if it has stopped before its total, is one under the settings of today."""
        stopped = Asked.of(study).stopped
        return stopped is None or stopped["by"] == self.spec.search.stops

    def goal(self, study: optuna.Study, wanted: int | None = None) -> int:
        """Trials that a run of a study works towards: one that a rule has stopped has reached its total.

        Args:
            study: its study.
            wanted: an explicit total.
        """
        asked = Asked.of(study)
        if wanted is None and self.method.searches and asked.stopped is not None:
            return asked.total
        return self.total(asked.total, wanted)

    def sampler(self) -> BaseSampler:
        """The sampler that proposes the study's trials."""
        spec = self.spec
        goal = goal_of(spec.objective, spec.metrics("validation"), spec.allowed)
        return study_sampler(spec.name, self.method, self.space, spec.search, goal, self.proposer, self.startup)

    def needs_slope(self, place: int) -> bool:
        """Whether a later point follows from the slope of the loss at a trial's point.

        Args:
            place: of the trial.
        """
        if not self.method.searches:
            return False
        return self.proposer == "gradient" or (
            self.startup == DESCENT and place < at_least(self.spec.search.startup_trials) - 1
        )

    @property
    def search(self) -> dict[str, Any] | None:
        """How trials are proposed, for who asks: fields of `search`; None for a method that does not search."""
        if not self.method.searches:
            return None
        search = self.spec.search
        return {
            "sampler": self.proposer,
            "acquisition": search.acquisition if self.proposer == "gp" else None,
            "startup": self.startup,
            "startup_trials": search.startup_trials,
        }

    def study(self) -> optuna.Study:
        """The study as it is in its storage, without loading any model.

        Raises:
            InputError: there is none.
        """
        with storage_errors(self.url):
            return load_study(open_storage(self.url, create=False), self.spec.name)

    def study_if_any(self) -> optuna.Study | None:
        """The same, or None where there is none yet; nothing is created."""
        with storage_errors(self.url):
            study = load_study_if_any(self.url, self.spec.name)
            return None if study is None or provenance.is_unfinished(study) else study


def storage_url(spec: StudySpec) -> str:
    """The spec's storage, its relative path made absolute."""
    return resolve_url(spec.storage_url, spec.workdir)
