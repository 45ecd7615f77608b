"""Methods side by side: which studies make a comparison, running what is missing of them, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self, TypeAlias

from optuna.trial import FrozenTrial

from dfmerge_studies.errors import InputError, RunError
from dfmerge_studies.progress import Progress, silent
from dfmerge_studies.spec import DEFAULT_SAMPLER, UNIFORM, StudySpec
from dfmerge_studies.storage import safe_url
from dfmerge_studies.study import provenance
from dfmerge_studies.study.fingerprint import as_stored, refuse_other_fingerprint, stated_fingerprint
from dfmerge_studies.study.plan import Plan, storage_url
from dfmerge_studies.study.scores import find_model, keep_multi_task_row, results_by_split
from dfmerge_studies.study.selection import name_winner_
from dfmerge_studies.study.variants import Variant, choose_variants, study_spec
from dfmerge_studies.study.winner import Selection
from dfmerge_studies.tasks.metrics import Metrics, TaskScore
from dfmerge_studies.tasks.splits import Split, as_split
from dfmerge_studies.trials.keeping import Keeper, StorageLost, check_all
from dfmerge_studies.trials.loop import Summary
from dfmerge_studies.trials.marks import COEFFICIENTS, FISHERS, SECONDS, place_of
from dfmerge_studies.trials.reading import counts, ended, results

if TYPE_CHECKING:
    from dfmerge_studies.objective.problem import Problem
    from dfmerge_studies.study.session import Session

ZERO_SHOT, FINE_TUNED, MULTI_TASK = "zero-shot", "fine-tuned", "multi-task"

Scores = Mapping[Split, Mapping[str, float]]  # split -> task -> score


@dataclass(frozen=True)
class ComparedStudy:
    """One variant at one seed: the best trial by validation of one study.

    Attributes:
        variant: name of the variant.
        seed: of the study.
        study: name of the study in the storage.
        scores: by split and task; empty if it failed.
        coefficients: of the trial that was scored, by expert.
        trial: its Optuna number.
        trials: completed trials that it was chosen from.
        seconds: wall-clock time of those trials, summed.
        fishers: Fishers of those trials, `computed` and `cached`.
        error: why there are no scores, None if there are.
        selection: how the trial was named the winner of the study, None where it was not.
        results: the scores with the rows that they rest on, as far as the study keeps these.
    """

    variant: str
    seed: int
    study: str
    scores: Scores = field(default_factory=dict)
    coefficients: Mapping[str, float] = field(default_factory=dict)
    trial: int | None = None
    trials: int = 0
    seconds: float = 0.0
    fishers: Mapping[str, int] = field(default_factory=lambda: {"computed": 0, "cached": 0})
    error: str | None = None
    selection: Selection | None = None
    results: Mapping[Split, Mapping[str, TaskScore]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        variant: str,
        seed: int,
        study: str,
        trial: FrozenTrial,
        *,
        among: Sequence[FrozenTrial],
        scores: Scores,
        results: Mapping[Split, Mapping[str, TaskScore]],
        selection: Selection | None = None,
    ) -> Self:
        """The entry of one trial.

        Args:
            variant: name of the variant.
            seed: of the study.
            study: its name.
            trial: the best by validation.
            among: the completed trials that it was chosen from.
            scores: of the trial, by split and task.
            selection: how it was named the winner.
            results: the same with their rows.
        """
        fishers = [one.user_attrs[FISHERS] for one in among]
        return cls(
            variant=variant,
            seed=seed,
            study=study,
            scores=scores,
            results=results,
            coefficients=dict(trial.user_attrs[COEFFICIENTS]),
            trial=trial.number,
            trials=len(among),
            seconds=round(sum(sum(one.user_attrs[SECONDS].values()) for one in among), 4),
            fishers={kind: sum(each[kind] for each in fishers) for kind in ("computed", "cached")},
            selection=selection,
        )


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes:
        study: name of the spec that it was made under.
        storage: where its studies are, without password; empty if it was read from an open one.
        tasks: names of the tasks, in the order of the spec.
        variants: names of what was compared, in order.
        seeds: of the studies, the spec's first.
        splits: that everything was scored on: "validation", and "test" where it was asked for.
        metrics: what the scores of each split are.
        entries: one per variant and seed.
        references: scores of whole models that took part without merging: `zero-shot` (the base), `fine-tuned` (each
            expert on its own task) and, if one is named, `multi-task`; by row, then by seed.
        interrupted: whether a signal ended the work before everything was there.
    """

    study: str
    storage: str
    tasks: tuple[str, ...]
    variants: tuple[str, ...]
    seeds: tuple[int, ...]
    splits: tuple[Split, ...]
    metrics: Mapping[Split, Metrics]
    entries: tuple[ComparedStudy, ...]
    references: Mapping[str, Mapping[int, Scores]]
    interrupted: bool = False

    def of(self, variant: str) -> list[ComparedStudy]:
        """The entries of one variant that have scores, in the order of the seeds.

        Args:
            variant: its name.
        """
        return [entry for entry in self.entries if entry.variant == variant and entry.error is None]

    @property
    def failed(self) -> list[ComparedStudy]:
        """The entries without scores."""
        return [entry for entry in self.entries if entry.error is not None]


@dataclass(frozen=True)
class Planned:
    """One study of a comparison, before it is opened.

    Attributes:
        variant: what it is a study of.
        seed: of everything random in it.
        spec: its own spec.
        number: its position among the planned ones, from 1.
        of: how many there are.
        note: what is not as the spec has it; empty where all is.
    """

    variant: Variant
    seed: int
    spec: StudySpec
    number: int
    of: int
    note: str = ""


Work: TypeAlias = "Callable[[Session, int, Planned], Summary]"


def quietly(session: Session, total: int, planned: Planned) -> Summary:
    """Run a study up to its total without showing anything.

    Raises:
        RunError: three trials in a row failed, or the database is gone for good.
    """
    return session.run(target=total, regardless=False)


def plan(spec: StudySpec, variants: Sequence[Variant], seeds: int) -> list[Planned]:
    """The studies of a comparison in the order in which they run: all variants at one seed, then the next seed.

    Args:
        spec: what is compared on; its seed is the first, the others follow it.
        variants: what is compared.
        seeds: how many.

    Raises:
        InputError: a study of that name is there and says that it is about something else.
    """
    pairs = [(spec.search.seed + offset, variant) for offset in range(seeds) for variant in variants]
    planned = []
    for number, (seed, variant) in enumerate(pairs, 1):
        derived = study_spec(spec, variant, seed)
        planned.append(Planned(variant, seed, derived, number, len(pairs), _note(spec, derived)))
    for each in planned:
        own = Plan.of(each.spec)
        stored = own.study_if_any()
        if stored is not None:
            found = provenance.stored_fingerprint(stored)
            stated = stated_fingerprint(as_stored(own.spec, found))
            refuse_other_fingerprint(own.spec.name, found, stated, own.place)
    return planned


def _note(spec: StudySpec, own: StudySpec) -> str:
    if not spec.search.descends or own.search.startup != UNIFORM:
        return ""
    return f"by {DEFAULT_SAMPLER}, from uniform points: it has no slopes to descend"


def compare(
    spec: StudySpec,
    methods: Sequence[str] | None = None,
    *,
    seeds: int = 1,
    split: str | None = None,
    trials: int | None = None,
    ablation: bool = False,
    problem: Problem | None = None,
    work: Work = quietly,
    progress: Progress = silent,
) -> Comparison:
    """Run what is missing of a comparison and collect its scores.

    Each method at each seed is a study in the spec's storage, so an interrupted comparison goes on where it was, and
    studies that `run` has made are taken as they are.  A method whose study fails does not stop the others.

    Args:
        spec: models, data and settings that all methods share; `multi_task` adds a row.
        methods: names out of `variants.variants`; all that are installed by default.
        seeds: how many, from the spec's own upwards.
        split: "validation", or "test" (the default where every task has one): the best trial by validation is scored
            on it too.
        trials: total of trials of every method that searches; the spec's by default.
        ablation: by default the rows that take one thing at a time away from df-merge.
        problem: models and data that are loaded already.
        work: runs one study up to a total.
        progress: told how far loading and scoring are.

    Raises:
        InputError: a method is unknown, something does not fit, or a stored study is about something else.
        RunError: base or experts cannot be scored, or the database is gone for good.
    """
    from dfmerge_studies.study.session import open_study  # torch: reports show comparisons without it

    splits = check_split(spec, split)
    variants = choose_variants(spec, methods, ablation=ablation, split=splits[-1])
    planned = plan(spec, variants, seeds)
    multi_task = find_model(spec, spec.multi_task)[1] if spec.multi_task is not None else None
    entries: list[ComparedStudy] = []
    references: dict[str, dict[int, Scores]] = {}
    interrupted = False
    keepers: list[Keeper] = []
    for each in planned:
        check_all(keepers)  # a file that was deleted must not be made anew
        session = open_study(each.spec, problem=problem, splits=splits, progress=progress)
        problem, session.merger.progress = session.problem, progress
        if multi_task is not None:
            keep_multi_task_row(session.study, multi_task)
        if each.seed not in next(iter(references.values()), {}):
            for row, scores in _references(spec, session, splits):
                references.setdefault(row, {})[each.seed] = scores
        try:
            interrupted = _finish(session, each, trials, work)
            keepers += [session.keeper] if session.keeper is not None else []
            if interrupted:
                break
            session.merger.progress = progress
            entries.append(_entry(session, each, splits))
        except StorageLost:
            raise
        except RunError as error:
            entries.append(ComparedStudy(each.variant.name, each.seed, each.spec.name, error=str(error)))
    check_all(keepers)
    return Comparison(
        study=spec.name,
        storage=safe_url(storage_url(spec)),
        tasks=tuple(spec.tasks),
        variants=tuple(variant.name for variant in variants),
        seeds=tuple(dict.fromkeys(each.seed for each in planned)),
        splits=splits,
        metrics={split: spec.metrics(split) for split in splits},
        entries=tuple(entries),
        references=references,
        interrupted=interrupted,
    )


def check_split(spec: StudySpec, split: str | None) -> tuple[Split, ...]:
    """The splits that a comparison scores on.

    Args:
        spec: names the splits of its tasks.
        split: a user's word, or None for test where every task has one.

    Raises:
        InputError: another word, or a task without a test split.
    """
    wanted = as_split(split, "--split") if split is not None else None
    if wanted == "test" and spec.untested:
        raise InputError(
            "no test_split", where=spec.where(f"tasks.{spec.untested[0]}"), hint="Name one, or use --split validation"
        )
    return ("validation",) if wanted == "validation" or spec.untested else ("validation", "test")


def _references(spec: StudySpec, session: Session, splits: Sequence[Split]) -> Iterator[tuple[str, Scores]]:
    yield ZERO_SHOT, {split: session.reference_scores("base", split) for split in splits}
    yield FINE_TUNED, {split: session.reference_scores("experts", split) for split in splits}
    if spec.multi_task is not None:
        yield MULTI_TASK, {split: session.model_scores(spec.multi_task, split) for split in splits}


def _finish(session: Session, planned: Planned, trials: int | None, work: Work) -> bool:
    """Run what is missing of a study; whether it was interrupted."""
    total = session.total(trials)
    return ended(counts(session.study)) < total and work(session, total, planned).interrupted


def _entry(session: Session, planned: Planned, splits: Sequence[Split]) -> ComparedStudy:
    done = results(session.study)
    trial: FrozenTrial | None
    selection: Selection | None = None
    if planned.variant.first:
        done = [trial for trial in done if place_of(trial) == 0]
        trial = done[0] if done else None
    else:
        selection = name_winner_(session)  # also in a study that had its total already
        trial = session.best()
    if trial is None:
        raise RunError("no trial has a result", where=planned.spec.name)
    scores = {split: session.trial_scores(trial, split) for split in splits}
    found = results_by_split(session.study, trial, splits)
    return ComparedStudy.of(
        planned.variant.name,
        planned.seed,
        planned.spec.name,
        trial,
        among=done,
        scores=scores,
        results=found,
        selection=selection,
    )
