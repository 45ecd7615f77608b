"""A study of models that are in memory, without a spec: `optimize_merge`.

The method table, the samplers, the loop of trials and the rules of joining and resuming are those of every study; only
scores and importance come from functions of the caller's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic

import optuna
import torch
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import FrozenTrial

from dfmerge_studies.errors import InputError, RunError, memory_errors
from dfmerge_studies.importance.cache.file import checksum
from dfmerge_studies.methods import Normalise, Scale, method_named, per_expert
from dfmerge_studies.objective.in_memory import (
    FLOOR,
    Experts,
    Fishers,
    ImportanceOf,
    MergeSettings,
    Model,
    ModelMerger,
    finite_scores,
    not_finite,
)
from dfmerge_studies.spec import DEFAULT_SAMPLER, ObjectiveSettings, SearchSettings
from dfmerge_studies.storage import (
    check_constraints,
    check_name,
    load_study,
    open_storage,
    resolve_url,
    safe_url,
    storage_errors,
    storage_file,
)
from dfmerge_studies.study import provenance, warm_start
from dfmerge_studies.study.fingerprint import GUARDS, SAMPLER, sampler_of, stated_sampler
from dfmerge_studies.study.given import check_guards, check_weights, given_objective, given_search
from dfmerge_studies.study.proposals import first_points, goal_of, study_sampler, total_trials
from dfmerge_studies.study.scores import scores_attribute, stored_scores
from dfmerge_studies.study.stopping import Noise, Rule, StopWatch, reconsider
from dfmerge_studies.study.totals import Asked, state_total, stored_total
from dfmerge_studies.study.value import best_trial, directions, metric_names, rounded_seconds, trial_result, trial_value
from dfmerge_studies.tasks.metrics import Metrics
from dfmerge_studies.trials.loop import Summary, work
from dfmerge_studies.trials.marks import COEFFICIENTS, SECONDS, TASKS
from dfmerge_studies.trials.outbox import outbox_folder
from dfmerge_studies.trials.queue import enqueue
from dfmerge_studies.trials.reading import ended, results
from dfmerge_studies.trials.results import Event, TrialResult, ignore

logger = logging.getLogger(__name__)

_NOT_SCIENCE = ("startup", "trials", "enqueue", "warm_start", "patience", "stop")  # fields of a search that may change
_OF_SLOPES = ("rate", "gradient_rows")  # which no scoring function gives
_METRIC = "score"  # what the numbers of a scoring function are called; of each, higher is better

Score = Callable[[Any], Mapping[str, float] | float]


@dataclass(frozen=True)
class MergeResult(Generic[Model]):
    """What a search found.

    Attributes:
        model: the merge of the best trial, in evaluation mode.
        best: the best trial; with `max_drop` the best of those that keep it, if there are any.
        study: the Optuna study, for everything that Optuna plots or prints.
        summary: how the run ended, with the number of trials by state.
        base_scores: what the unmerged base scores, per task.
    """

    model: Model
    best: FrozenTrial
    study: optuna.Study
    summary: Summary
    base_scores: Mapping[str, float]

    @property
    def coefficients(self) -> dict[str, float]:
        """Coefficient per expert of the best trial."""
        return dict(self.best.user_attrs[COEFFICIENTS])

    @property
    def scores(self) -> dict[str, float]:
        """Score per task of the best trial."""
        return dict(self.best.user_attrs[TASKS])

    @property
    def value(self) -> float:
        """What the best trial is worth: the objective, or for `pareto` the mean over the tasks."""
        return trial_value(self.best)


def optimize_merge(
    base: Model,
    experts: Experts,
    score: Score,
    *,
    trials: int = 20,
    importance: ImportanceOf | Fishers | None = None,
    method: str | None = None,
    parameters: Mapping[str, float | Sequence[float]] | None = None,
    objective: str | Mapping[str, Any] = "mean",
    guards: Mapping[str, float] | None = None,
    storage: str | BaseStorage | None = None,
    name: str = "merge",
    exclude: Sequence[str] = (),
    floor: float = FLOOR,
    normalise: Normalise = "none",
    power: float = 1.0,
    on_event: Callable[[Event], None] = ignore,
    **search: Any,
) -> MergeResult[Model]:
    """Search the coefficients whose merge scores best; base and experts are left as they are.

    >>> import torch
    >>> from dfmerge_studies import optimize_merge
    >>> base, a, b = (torch.nn.Linear(2, 1, bias=False) for _ in range(3))
    >>> for model, weights in ((base, [0.0, 0.0]), (a, [1.0, 0.0]), (b, [0.0, 1.0])):
    ...     _ = model.weight.data.copy_(torch.tensor([weights]))
    >>> def score(model):
    ...     x, y = model.weight[0].tolist()
    ...     return {"a": -((x - 0.7) ** 2), "b": -((y - 0.2) ** 2)}
    >>> result = optimize_merge(base, {"a": a, "b": b}, score, trials=15, seed=1)
    >>> result.value > -0.01
    True
    >>> sorted(result.coefficients) == ["a", "b"] and len(result.study.trials) == 15
    True

    Args:
        base: the model that every expert was fine-tuned from.
        experts: by name, models (a LoRA adapter as `merge_and_unload()` gives it) or their state dicts.
        score: from a model to {task: number}, or to one number; higher is better. It gets the merged model in
            evaluation mode, without gradients; the next trial overwrites that model. The base is scored first.
        trials: total that the study should reach, over all runs.
        importance: see `merge_models`.
        method: see `merge_models`.
        parameters: of the method: a number fixes it, a list is searched (values of a grid, or the two ends of a range).
        objective: how task scores become one value: mean, min, pareto (one objective per task), or
            {"kind": "weighted", "weights": {task: number}}.
        guards: tasks that are not in the objective and must not fall far below the base, each with the points (0.01 of
            a score) that it may lose.
        storage: URL of an Optuna storage (sqlite:///study.db, relative to the working directory; PostgreSQL; a
            journal), or a storage object. With one, the study is kept: the same call joins it and goes on to `trials`.
            Without one it ends with the process.
        name: of the study in its storage. What `score` and `importance` do cannot be compared when a study is joined:
            give another name when they change.
        exclude: see `merge_models`.
        floor: see `merge_models`.
        normalise: see `merge_models`.
        power: see `merge_models`.
        on_event: told of everything that happens to a trial.
        **search: further fields of a spec's `search`: seed, bounds, step, sampler, startup_trials, enqueue,
            warm_start, patience (here every gain counts), and max_drop, for which each expert is scored on the task of
            its own name, too.

    Raises:
        InputError: models, settings or scores do not fit, or the stored study is about something else.
        RunError: three trials in a row failed, no trial has completed, or the storage is gone for good.
    """
    settings, how = given_search(search, trials), given_objective(objective)
    if method is not None and settings.coefficients == "per-expert":
        method = per_expert(method_named(method, "method")).name
    merging = MergeSettings(importance, method, parameters, exclude, floor, Scale(normalise, power), settings.seed)
    merger = ModelMerger(base, experts, merging)
    search_of = _Search(merger, score, settings, how, name, guards or {})
    url = resolve_url(storage, Path.cwd()) if isinstance(storage, str) else None
    with storage_errors(url):
        study = search_of.study(storage if isinstance(storage, BaseStorage) else None, url)
        summary = search_of.run(study, url, on_event)
        best = best_trial(results(study), how)
    if best is None:
        raise RunError("no trial has completed", where=name, hint="Look at the study's failed trials, and run again")
    merger.merge_(search_of.point_of(best))
    return MergeResult(merger.released(), best, study, summary, search_of.base_scores)


class _Search(Generic[Model]):
    """One search: what is merged, how it is scored, and what its trials are."""

    def __init__(
        self,
        merger: ModelMerger[Model],
        score: Score,
        settings: SearchSettings,
        objective: ObjectiveSettings,
        name: str,
        guards: Mapping[str, float],
    ) -> None:
        self.merger = merger
        self.score = score
        self.settings = settings
        self.objective = objective
        self.name = name
        self.guards = guards
        self.space = merger.method.space(merger.experts, settings.bounds, settings.step)
        self.warm: Mapping[str, Any] | None = None  # what is tried first of another study
        self.tasks: list[str] = []
        self.base_scores: dict[str, float] = {}
        self.expert_scores: dict[str, float] = {}

    def study(self, storage: BaseStorage | None, url: str | None) -> optuna.Study:
        """The study, created or joined; base and experts are scored once per study."""
        store = storage if storage is not None else open_storage(url) if url is not None else InMemoryStorage()
        check_name(self.name)
        former = load_study(store, self.name) if self.name in optuna.get_all_study_names(store) else None
        self._score_references(former)
        warm = self._taken_over(former, store, url)
        check_weights(self.objective, self.tasks)
        check_guards(self.guards, self.tasks, self.merger.experts, self.objective)
        if self.allowed and url is not None:
            check_constraints(url, len(self.allowed), where="max_drop")
        study = provenance.join(
            store,
            self.name,
            directions=directions(self.objective, list(self.metrics.aims)),
            fingerprint=self._science(),
            left_open={SAMPLER: DEFAULT_SAMPLER},
            attributes={
                **scores_attribute("base", "validation", self.base_scores),
                **scores_attribute("experts", "validation", self.expert_scores),
                **({provenance.WARM_START: warm} if warm is not None else {}),
            },
            metric_names=metric_names(self.objective, list(self.metrics.aims)),
            where=safe_url(url) if url is not None else self.name,
        )
        study.sampler = self._sampler(study)
        self.warm = warm_start.agreed(study, warm)
        return study

    @property
    def metrics(self) -> Metrics:
        """What the scores are."""
        return Metrics.named(dict.fromkeys(self.tasks, _METRIC), self.guards)

    @property
    def allowed(self) -> dict[str, float]:
        """Points that tasks may lose, of those that have a bound."""
        shared = self.settings.max_drop
        return {**({} if shared is None else dict.fromkeys(self.expert_scores, shared)), **self.guards}

    def _taken_over(self, former: optuna.Study | None, store: BaseStorage, url: str | None) -> dict[str, Any] | None:
        settings = self.settings.warm_start
        if settings is None or not self.merger.method.searches:
            return None
        here: str | BaseStorage = url if url is not None else store
        source = resolve_url(settings.storage, Path.cwd()) if settings.storage is not None else here
        return warm_start.chosen(settings, former, self.space, self.merger.experts, source)

    def _sampler(self, study: optuna.Study) -> BaseSampler:
        settings, goal = self.settings, goal_of(self.objective, self.metrics, self.allowed)
        kept = sampler_of(provenance.stored_fingerprint(study) or {})
        return study_sampler(self.name, self.merger.method, self.space, settings, goal, settings.stated_sampler or kept)

    def _score_references(self, former: optuna.Study | None) -> None:
        """What the base scores, which also says what the tasks are; with `max_drop` each expert on its own task."""
        known = stored_scores(former, "base", "validation") if former is not None else None
        if former is not None and known:
            self.tasks, self.base_scores = list(known), known
            self.expert_scores = stored_scores(former, "experts", "validation") or {}
            return
        self.merger.place.load_base_()
        self.base_scores = self.scored()
        if self.settings.max_drop is None:
            return
        for index, expert in enumerate(self.merger.experts):
            if expert in self.tasks:
                self.merger.place.load_scaled_(index, 1.0)
                self.expert_scores[expert] = self.scored()[expert]
        if not self.expert_scores:
            hint = f"The tasks are {', '.join(self.tasks)}"
            raise InputError("no task has the name of an expert", where="max_drop", hint=hint)

    def run(self, study: optuna.Study, url: str | None, on_event: Callable[[Event], None]) -> Summary:
        """Work until the study has its total."""
        method, settings = self.merger.method, self.settings
        rule = Rule.of(settings, Noise(self.objective, self.metrics, {})) if method.searches else None
        watch = StopWatch(study, rule, settings.stops) if rule is not None else None
        reconsider(study, rule)
        stopped = Asked.of(study).stopped is not None
        total = stored_total(study) if stopped else total_trials(method, settings)
        state_total(study, total)
        first = first_points(method, self.merger.experts, settings)
        enqueue(study, self.space, [*first, *warm_start.points_of(self.warm)])
        file = storage_file(url) if url is not None else None
        summary = work(
            study,
            self.space,
            self._trial,
            target=total,
            outbox=outbox_folder(file.parent if file else Path.cwd(), url, self.name) if url is not None else None,
            on_event=on_event,
            enough=watch.enough if watch is not None else None,
        )
        if watch is not None and summary.stopped is not None:
            watch.keep(summary.stopped, ended(summary.counts))
        if summary.interrupted:
            logger.warning("%s: interrupted after %d trials", self.name, summary.counts["complete"])
        return summary

    def point_of(self, trial: FrozenTrial) -> Any:
        """What a completed trial was merged at."""
        return self.merger.method.stored_point(trial.user_attrs[COEFFICIENTS], trial.user_attrs)

    def scored(self) -> dict[str, float]:
        """Scores of the model as it stands, of the same tasks every time."""
        with torch.no_grad(), memory_errors():
            scores = finite_scores(self.score(self.merger.model))
        self.tasks = self.tasks or list(scores)
        if set(scores) != set(self.tasks):
            raise InputError(f"scores of {sorted(scores)}, before of {sorted(self.tasks)}", where="score")
        if (task := not_finite(scores)) is not None:
            raise RunError(f"the score of {task!r} is {scores[task]}", where="score")
        return {task: scores[task] for task in self.tasks}

    def _trial(self, values: Mapping[str, float], place: int) -> TrialResult:
        point = self.merger.method.point(values, self.merger.experts).on_step(self.settings.step)
        with memory_errors():
            seconds = self.merger.merge_(point)
        scores = self.scored()
        return trial_result(
            point,
            scores,
            self.metrics,
            objective=self.objective,
            references={**self.expert_scores, **{guard: self.base_scores[guard] for guard in self.guards}},
            allowed=self.allowed,
            attributes={SECONDS: rounded_seconds(seconds)},
        )

    def _science(self) -> dict[str, Any]:
        """What decides the results, as far as it can be compared."""
        merger, place = self.merger, self.merger.place
        unmerged = dict(merger.model.named_parameters())
        searched = self.settings.model_dump(mode="json", exclude={"sampler", *_OF_SLOPES, *_NOT_SCIENCE})
        return {
            "made by": "optimize_merge",
            "method": merger.method.name,
            "parameters": {p.name: [p.default, list(p.grid), list(p.bounds or ())] for p in merger.method.parameters},
            "experts": [[expert, expert if expert in self.tasks else None] for expert in merger.experts],
            "tasks": self.tasks,
            "metrics": dict.fromkeys(self.tasks, _METRIC),
            **({GUARDS: dict(self.guards)} if self.guards else {}),
            **{f"search.{field}": value for field, value in searched.items()},
            **stated_sampler(self.settings),
            "objective": self.objective.model_dump(),
            "importance.floor": merger.how.floor,
            **{f"importance.{field}": value for field, value in asdict(merger.scale).items()},
            "base digest": checksum({name: place.base.get(name, p).detach().cpu() for name, p in unmerged.items()}),
            **{
                f"expert digest of {vector.expert}": checksum({n: d.cpu() for n, d in vector.deltas.items()})
                for vector in place.task_vectors
            },
        }
