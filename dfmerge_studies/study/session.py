"""A study that is open: its database, its loaded models, and the ways to work on it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from dfmerge_studies.checkpoints.digest import Contents
from dfmerge_studies.importance.cache import Shelf
from dfmerge_studies.methods import Method
from dfmerge_studies.objective.computing import with_compute
from dfmerge_studies.objective.derive import derive_problem
from dfmerge_studies.objective.evaluate import evaluate_model
from dfmerge_studies.objective.loading import choose_device, load_problem
from dfmerge_studies.objective.merger import Merger, Outcome
from dfmerge_studies.objective.preflight import check_extras
from dfmerge_studies.objective.problem import Problem
from dfmerge_studies.objective.rehearsal import rehearse_
from dfmerge_studies.points import Point
from dfmerge_studies.progress import Progress, silent
from dfmerge_studies.ranks import SOLO, Ranks
from dfmerge_studies.spec import StudySpec
from dfmerge_studies.storage import check_constraints, is_read_only, open_storage, storage_errors, storage_of
from dfmerge_studies.study import provenance
from dfmerge_studies.study.evaluating import Trials, traced_points
from dfmerge_studies.study.fingerprint import (
    as_stored,
    refuse_other_fingerprint,
    stated_fingerprint,
    whole_fingerprint,
)
from dfmerge_studies.study.fishers import spec_cache
from dfmerge_studies.study.plan import Plan
from dfmerge_studies.study.recurrence import Recurrence
from dfmerge_studies.study.repair import sweep_unfinished
from dfmerge_studies.study.scores import KeptScores, find_model, trial_row
from dfmerge_studies.study.selection import name_winner_
from dfmerge_studies.study.startup import with_startup
from dfmerge_studies.study.stopping import Noise, Rule, StopWatch, reconsider
from dfmerge_studies.study.totals import add_trials, owe, state_total, stored_total
from dfmerge_studies.study.value import directions, metric_names
from dfmerge_studies.study.warm_start import agreed, points_of, taken_over
from dfmerge_studies.study.winner import winner_of
from dfmerge_studies.tasks.metrics import TaskScore
from dfmerge_studies.tasks.splits import Split
from dfmerge_studies.trials.keeping import Keeper
from dfmerge_studies.trials.loop import Summary, work
from dfmerge_studies.trials.marks import COEFFICIENTS, TASKS
from dfmerge_studies.trials.outbox import outbox_folder
from dfmerge_studies.trials.queue import enqueue
from dfmerge_studies.trials.reading import counts, ended
from dfmerge_studies.trials.results import Event

logger = logging.getLogger(__name__)


@dataclass
class Session:
    """An open study with its models loaded.

    Attributes:
        plan: what the spec means for the study.
        problem: models and data in memory.
        study: the Optuna study.
        merger: merges and scores.
        keeper: looks after what a run has told the storage; None before there was one.
        warm: what it starts from of another study, as `warm_start.taken_over` has it.
    """

    plan: Plan
    problem: Problem
    study: optuna.Study
    merger: Merger
    keeper: Keeper | None = None
    warm: Mapping[str, Any] | None = None

    @property
    def spec(self) -> StudySpec:
        """The settings."""
        return self.plan.spec

    @property
    def method(self) -> Method:
        """Row of the method table."""
        return self.plan.method

    def run(
        self,
        *,
        target: int | None = None,
        lower: bool = True,
        regardless: bool = True,
        on_event: Callable[[Event], None] = lambda event: None,
        name_winner: bool = True,
    ) -> Summary:
        """Work until the study has its total of trials, then name its winner.

        Args:
            target: the total; by default the spec's, or what an earlier call raised it to.
            lower: whether `target` may undo what was added to the study since it was stated.
            regardless: whether `target` is reached whatever `search.patience` and `search.stop` say.
            on_event: told of every trial.
            name_winner: whether to name it; a worker whose parent will do so need not.

        Raises:
            RunError: three trials in a row failed, or the database is gone for good.
        """
        sweep_unfinished(self.spec)
        rule = self._rule()
        watch = StopWatch(self.study, rule, self.spec.search.stops) if rule is not None else None
        with storage_errors(self.plan.url):
            if target is None or not regardless:
                reconsider(self.study, rule)
            else:
                owe(self.study, target)
            total = self.total(target)
            self._check_total(total)
            state_total(self.study, total, lower=lower)
            others = map(self.plan.space.spread, points_of(self.warm))
            enqueue(self.study, self.plan.space, [*self.plan.points, *traced_points(self), *others])
            references = self.references("validation")
            self.keeper = Keeper(self.study)
            trial = Trials(self, references)
            try:
                summary = work(
                    self.study,
                    self.plan.space,
                    trial,
                    target=total,
                    outbox=outbox_folder(self.spec.workdir, self.plan.url, self.spec.name),
                    on_event=on_event,
                    raised=self.stored_target,
                    keeper=self.keeper,
                    enough=watch.enough if watch is not None else None,
                )
            finally:
                self.merger.importances.shelf.flush()
            if watch is not None and summary.stopped is not None:
                watch.keep(summary.stopped, ended(summary.counts))
                on_event(Event("stopped", summary.stopped.after, summary.stopped.after, message=summary.stopped.why))
            if name_winner and not summary.interrupted:
                name_winner_(self)
            return summary

    def _rule(self) -> Rule | None:
        """When the search stops before its total."""
        if not self.method.searches:
            return None
        rows = {task: len(self.problem.examples(task, "validation")) for task in self.spec.tasks}
        return Rule.of(self.spec.search, Noise(self.spec.objective, self.spec.metrics("validation"), rows))

    def total(self, wanted: int | None = None) -> int:
        """Trials that a run works towards.

        Args:
            wanted: an explicit total; methods without a search have as many trials as points, whatever is wanted.
        """
        return self.plan.goal(self.study, wanted)

    def add_trials(self, more: int) -> None:
        """Raise the study's total; several that do so at one moment all count.

        Args:
            more: by how many trials; without effect for a method that has its own number.
        """
        if self.method.searches:
            with storage_errors(self.plan.url):
                add_trials(self.study, more, at_least=self.plan.trials)

    def stored_target(self) -> int:
        """Total that the study was last asked to reach, 0 for a new one."""
        return stored_total(self.study)

    def best(self) -> FrozenTrial | None:
        """The winner: the trial that was named, or else the best of the search."""
        return winner_of(self.study, self.spec.objective)

    def point(self, trial: FrozenTrial) -> Point:
        """What a completed trial was merged at."""
        return self.method.stored_point(trial.user_attrs[COEFFICIENTS], trial.user_attrs)

    def merge_(self, trial: FrozenTrial) -> Outcome:
        """Write the merged weights of a completed trial into the resident model.

        Args:
            trial: a completed trial.

        Raises:
            RunError: an importance or a weight is not finite, or memory ran out.
        """
        return self.merger.merge_(self.point(trial))

    def reference_scores(self, row: str, split: Split) -> dict[str, float]:
        """Scores of the base or of the experts, computed once per study and then kept in it.

        Args:
            row: "base", or "experts" (each on its own task).
            split: of the tasks' data.
        """
        compute = self.merger.base_results if row == "base" else self.merger.expert_results
        return self.scores.shared(row, split, lambda: compute(split))

    def references(self, split: Split) -> dict[str, float]:
        """What the score of each task is compared with: its own expert's, of a guard the base's.

        Args:
            split: of the tasks' data.
        """
        found, guards = self.reference_scores("experts", split), self.spec.metrics(split).guards
        base = self.reference_scores("base", split) if guards else {}
        return {**found, **{task: base[task] for task in guards if task in base}}

    def model_scores(self, reference: str, split: Split) -> dict[str, float]:
        """Scores of any model (the multi-task model, say), computed once per study and then kept in it.

        Args:
            reference: directory (relative to the spec's folder), Hub id, or adapter on the spec's base.
            split: of the tasks' data.

        Raises:
            InputError: the model cannot be loaded or does not fit the tasks.
            RunError: its files change while they are read.
        """
        contents = Contents()
        path, row = find_model(self.spec, reference, contents)

        def compute() -> dict[str, TaskScore]:
            return evaluate_model(
                self.spec,
                str(path),
                split,
                progress=self.merger.progress,
                ranks=self.problem.ranks,
                contents=contents,
            )

        return self.scores.shared(row, split, compute)

    def trial_scores(self, trial: FrozenTrial, split: Split) -> dict[str, float]:
        """Scores of a completed trial; those of other splits than validation are computed once and kept in the study.

        Args:
            trial: a completed trial.
            split: of the tasks' data.
        """
        if split == "validation":
            return dict(trial.user_attrs[TASKS])

        def compute() -> dict[str, TaskScore]:
            self.merger.ask_experts_(split)
            self.merge_(trial)
            return self.merger.results(split)

        return self.scores.kept(trial_row(trial), split, compute)

    def kept_scores(self, row: str | FrozenTrial, split: Split) -> dict[Split, dict[str, float]]:
        """Scores that the study already has, as `{split: scores}`, or nothing.

        Args:
            row: "base", "experts", or a trial.
            split: of the tasks' data.
        """
        if split == "test" and self.spec.untested:
            return {}
        stored = self.scores.stored(row if isinstance(row, str) else trial_row(row), split)
        return {split: stored} if stored is not None else {}

    @property
    def scores(self) -> KeptScores:
        """The scores that the study keeps."""
        return KeptScores(self.study, self.problem)

    def _check_total(self, total: int) -> None:
        if total < (done := ended(counts(self.study))):
            logger.warning("the study already has %d completed trials, more than the total of %d", done, total)


def open_study(
    spec: StudySpec,
    *,
    problem: Problem | None = None,
    splits: Sequence[Split] = ("validation",),
    progress: Progress = silent,
    ranks: Ranks = SOLO,
    on_loaded: Callable[[Problem], None] | None = None,
    share: int | None = None,
    looking: bool = False,
) -> Session:
    """Create the study that a spec names, or join it.

    Nothing is written before everything that can be checked has been checked.

    Args:
        spec: what to study.
        problem: models and data that are loaded already, of a spec with the same models and data.
        splits: what will be scored; each is read now, since a bad test split should not wait for the last trial.
        progress: told how far loading is.
        ranks: processes that share the work of a trial; only their leader calls this.
        on_loaded: called when models and data are there and rehearsed, before anything is written.
        share: bytes of the device that `memory: auto` may take, where other workers are on it.
        looking: whether the study is there and no trials are run: a storage that cannot be written to will do then.

    Raises:
        InputError: models or data do not fit, or the study in the storage is about something else.
    """
    check_extras(spec)
    plan = Plan.of(spec)
    if spec.allowed:
        check_constraints(plan.url, len(spec.allowed), where=spec.where("search.max_drop"))
    cache, stored, where = spec_cache(spec), plan.study_if_any(), plan.place
    if stored is not None:
        found = provenance.stored_fingerprint(stored)
        spec = as_stored(spec, found)
        refuse_other_fingerprint(spec.name, found, stated_fingerprint(spec), where)
    spec = with_compute(spec, choose_device(spec, ranks) if problem is None else problem.resident.device)
    plan = plan.of_new(spec)
    warm = taken_over(plan, stored)
    indices = None
    if stored is not None and spec.importance.indices is None:
        indices = stored.user_attrs.get(provenance.INDICES)
    if problem is None:
        problem = load_problem(spec, indices=indices, splits=splits, progress=progress, ranks=ranks, share=share)
    else:
        problem = derive_problem(problem, spec, indices=indices)
    for split in splits:
        for task in spec.tasks_on(split):
            problem.examples(task, split)
    fingerprint = whole_fingerprint(spec, problem)
    if stored is not None:
        refuse_other_fingerprint(spec.name, provenance.stored_fingerprint(stored), fingerprint, where)
    shelf = Shelf(cache, spec.cache_policy, together=len(spec.experts))
    if stored is None:
        problem = with_startup(problem)
        plan = plan.of_new(problem.spec)
    rehearse_(problem, plan.method)
    if on_loaded is not None:
        on_loaded(problem)
    unchanged = looking and stored is not None and is_read_only(storage_of(stored))
    study = stored if stored is not None and unchanged else _join(plan, fingerprint, problem, warm)
    plan = plan.joined(study)
    if plan.startup is not None and plan.startup != problem.spec.search.startup:  # who founded it decided otherwise
        plan = replace(plan, spec=plan.spec.derive(search={"startup": plan.startup}))
        problem = replace(problem, spec=plan.spec)
    merger = Merger(problem, plan.method, shelf, uses=Recurrence(plan).uses, progress=progress)
    study.sampler = plan.sampler()
    return Session(plan, problem, study, merger, warm=agreed(study, warm))


def stored_study(spec: StudySpec) -> optuna.Study:
    """The study of a spec as it is in its storage, without loading any model.

    Raises:
        InputError: there is none.
    """
    return Plan.of(spec).study()


def _join(plan: Plan, fingerprint: Mapping[str, Any], problem: Problem, warm: Mapping[str, Any] | None) -> optuna.Study:
    spec = plan.spec
    settled = spec.derive(search={"sampler": plan.proposer, "startup": plan.startup})
    with storage_errors(plan.url):
        study = provenance.join(
            open_storage(plan.url),
            spec.name,
            directions=directions(spec.objective, spec.aims),
            fingerprint=fingerprint,
            left_open=stated_fingerprint(settled),
            attributes={
                provenance.SPEC: provenance.describe_spec(settled),
                provenance.INDICES: problem.fisher_indices(),
                **({provenance.WARM_START: warm} if warm is not None else {}),
            },
            metric_names=metric_names(spec.objective, spec.aims),
            where=plan.place,
        )
        described = study.user_attrs.get(provenance.SPEC, {})
        if (public := provenance.without_secrets(described)) != described:  # an earlier version kept tokens
            study.set_user_attr(provenance.SPEC, public)
    return study
