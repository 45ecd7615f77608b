"""Everything that can be checked before anything is spent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import optuna

from dfmerge_studies.checkpoints.adapters import other_base
from dfmerge_studies.checkpoints.resident import head_classes
from dfmerge_studies.errors import DFMergeError, InputError, did_you_mean
from dfmerge_studies.methods import Estimator, Importance
from dfmerge_studies.objective.classes import Classes, classes_of_heads
from dfmerge_studies.objective.importances import writer_for
from dfmerge_studies.objective.inputs import read_split
from dfmerge_studies.objective.loading import choose_device, find_checkpoints, load_problem
from dfmerge_studies.objective.memory import activations_of, fisher_bytes, memory_of
from dfmerge_studies.objective.preflight import check_extras, model_problems, read_indices
from dfmerge_studies.objective.problem import Problem
from dfmerge_studies.objective.rehearsal import rehearse_
from dfmerge_studies.progress import Progress, silent
from dfmerge_studies.spec import Examined, StudySpec
from dfmerge_studies.storage import check_url
from dfmerge_studies.study import provenance
from dfmerge_studies.study.fingerprint import as_stored, refuse_other_fingerprint, whole_fingerprint
from dfmerge_studies.study.fishers import cache_limit, spec_cache
from dfmerge_studies.study.plan import Plan, storage_url
from dfmerge_studies.study.recurrence import Recurrence
from dfmerge_studies.study.startup import available_bytes, with_startup
from dfmerge_studies.study.warm_start import taken_over
from dfmerge_studies.tasks.encoding import HEADED
from dfmerge_studies.tasks.files import check_data_files
from dfmerge_studies.tasks.shown import Shown, shown_input


@dataclass(frozen=True)
class Estimate:
    """What a run works on and needs.

    Attributes:
        parameters: of the base.
        changed_parameters: those on which some expert differs.
        experts: how many.
        validation_inputs: scored in each trial, by task.
        fisher_inputs: that importance is estimated on, by task.
        truncated_inputs: validation inputs that are cut, by task.
        fisher_bytes: of one Fisher in the cache.
        cache: what a whole study writes there: `policy`, `fishers` and `bytes` under it, `all_bytes` if all is kept,
            and `limit` in bytes, None for no limit.
        peak_bytes: of a trial on the device that computes.
        host_bytes: of the host's memory, beside a device that is no CPU.
        memory: both by what they are for, `device` and `host`; and `parts`, in how many the parameters are merged.
        available_bytes: of the device, free or held by this process.
        groups: parameters of each group that has coefficients of its own; empty where experts have one each.
    """

    parameters: int
    changed_parameters: int
    experts: int
    validation_inputs: dict[str, int]
    fisher_inputs: dict[str, int]
    truncated_inputs: dict[str, int]
    fisher_bytes: int
    cache: dict[str, Any]
    peak_bytes: int
    host_bytes: int
    memory: dict[str, Any]
    available_bytes: int
    groups: dict[str, int]


@dataclass(frozen=True)
class Validation:
    """What was found before anything was spent.

    Attributes:
        problems: what is wrong.
        notes: `where` and `what` of that which is valid and may still be meant otherwise.
        estimate: None unless everything could be loaded.
        search: how trials would be proposed; None where that is not known, or the method does not search.
        shown: an input of the task that was asked for; None unless everything could be loaded.
    """

    problems: list[DFMergeError]
    notes: list[dict[str, str]]
    estimate: Estimate | None
    search: Mapping[str, Any] | None = None
    shown: Shown | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def validate(spec: StudySpec, *, progress: Progress = silent) -> Validation:
    """Check files, shapes, tokenizers, data, storage, and estimate the memory that a run needs."""
    return validate_examined(Examined(spec=spec), progress=progress)


def validate_examined(
    found: Examined[StudySpec], *, show: str | None = None, progress: Progress = silent
) -> Validation:
    """The same for a spec that may be wrong: what is left of it is checked as far as that goes.

    Args:
        found: from `StudySpec.examine`.
        show: a task of which one input is shown as the model reads it.
        progress: told how far it is.

    Raises:
        InputError: there is no such task.
    """
    problems: list[DFMergeError] = [*found.problems]
    spec = found.spec
    notes: list[dict[str, str]] = []
    estimate: Estimate | None = None
    search: Mapping[str, Any] | None = None
    shown: Shown | None = None
    if spec is not None and show is not None and show not in spec.tasks:
        raise InputError(
            f"unknown task {show!r}",
            where="--show",
            hint=did_you_mean(show, spec.tasks) or f"The tasks are {', '.join(spec.tasks)}",
        )
    if spec is not None:
        for each in (*_file_problems(spec, found.is_sound), *_data_problems(spec, found.is_sound, notes)):
            if str(each) not in map(str, problems):  # a missing file fails every split
                problems.append(each)
    if spec is not None and not problems:
        try:
            stored = Plan.of(spec).study_if_any()
            if stored is not None:
                spec = as_stored(spec, provenance.stored_fingerprint(stored))
            problem = load_problem(spec, progress=progress)
            if stored is None:
                problem = with_startup(problem)
                spec = problem.spec
            shown = None if show is None else _shown(problem, show)
            for task, settings in spec.tasks.items():
                if settings.test_split is not None:
                    problem.examples(task, "test")
            search = _plan(spec, problem, stored).search
            rehearse_(problem, spec.row)
            notes += [*_adapter_notes(spec, problem), *_estimator_notes(spec, problem), *_split_notes(spec, problem)]
            estimate = memory_estimate(problem)
        except DFMergeError as error:  # a RunError where a loss is not finite
            problems.append(error)
    return Validation(problems, notes, estimate, search, shown)


def _shown(problem: Problem, task: str) -> Shown:
    """The first validation input of a task that trials are scored on."""
    example, resident = problem.examples(task, "validation")[0], problem.resident
    head = resident.heads.get(task)
    numbers = [f"class {number}" for number in range(head_classes(head))] if head else []
    classes = problem.classes.get(task) or numbers
    return shown_input(task, problem.spec.tasks[task], problem.kinds[task], example, resident.tokenizer, classes)


def memory_estimate(problem: Problem) -> Estimate:
    """Bytes that a trial needs at its peak, by what they are for, and what there is; see `objective.memory`."""
    resident = problem.resident
    memory, size = memory_of(problem, activations_of(problem)), fisher_bytes(problem)
    return Estimate(
        parameters=sum(p.numel() for p in resident.model.parameters()),
        changed_parameters=sum(problem.sizes.values()),
        experts=len(resident.task_vectors),
        validation_inputs={name: len(task.splits["validation"]) for name, task in problem.tasks.items()},
        fisher_inputs={name: len(task.fisher) for name, task in problem.tasks.items()},
        truncated_inputs={n: sum(e.truncated for e in t.splits["validation"]) for n, t in problem.tasks.items()},
        fisher_bytes=size,
        cache=_cache(problem.spec, size),
        peak_bytes=memory.device.total,
        host_bytes=memory.host.total,
        memory={"device": asdict(memory.device), "host": asdict(memory.host), "parts": len(problem.parts())},
        available_bytes=available_bytes(problem),
        groups={group: sum(problem.sizes[n] for n in names) for group, names in problem.groups.items()},
    )


def _cache(spec: StudySpec, fisher_bytes: int) -> dict[str, Any]:
    recurrence = Recurrence(Plan.of(spec))
    written, everything = (recurrence.written(fisher_bytes, policy) for policy in (spec.cache_policy, "all"))
    return {
        "policy": spec.cache_policy if spec.cache_place is not None else "none",
        "fishers": written.fishers,
        "bytes": written.bytes,
        "all_bytes": everything.bytes,
        "limit": cache_limit(spec),
    }


def _file_problems(spec: StudySpec, is_sound: Callable[[str], bool]) -> Iterator[InputError]:
    yield from model_problems(spec, is_sound)
    checks: dict[str, Callable[[StudySpec], object]] = {
        "device": choose_device,
        "search.acquisition": check_extras,
        "search.warm_start": lambda spec: taken_over(plan := Plan.of(spec), plan.study_if_any()),
        "importance.indices": read_indices,
        "storage": lambda spec: check_url(storage_url(spec)),
        "cache": spec_cache,
    }
    for field, check in checks.items():
        if is_sound(field):
            try:
                check(spec)
            except InputError as error:
                yield error


def _data_problems(
    spec: StudySpec, is_sound: Callable[[str], bool], notes: list[dict[str, str]]
) -> Iterator[InputError]:
    classes: Classes | None = None
    with suppress(InputError):  # of a model: told elsewhere
        if spec.tasks and all(map(is_sound, ("base", "experts", "tasks"))):
            found = find_checkpoints(spec)
            classes = classes_of_heads(spec, found.base, found.experts)
    for name, task in spec.tasks.items():
        whole = is_sound(f"tasks.{name}") and (classes is not None or task.type not in HEADED)
        for split in ("validation", "test"):
            if getattr(task, f"{split}_split") is None or not is_sound(f"tasks.{name}.dataset"):
                continue
            remarks: list[str] = []
            try:
                if whole:
                    read_split(spec, name, split, classes or {}, remarks=remarks)
                else:
                    check_data_files(name, task, root=spec.root, spec_file=str(spec.file))
            except InputError as error:
                yield error
            notes += [{"where": spec.where(f"tasks.{name}.doc_to_target ({split})"), "what": what} for what in remarks]


def _adapter_notes(spec: StudySpec, problem: Problem) -> Iterator[dict[str, str]]:
    found = problem.checkpoints
    for name, checkpoint in found.experts.items():
        if checkpoint.is_adapter and (what := other_base(checkpoint, found.base)):
            yield {"where": spec.where(f"experts.{name}"), "what": what}


def _estimator_notes(spec: StudySpec, problem: Problem) -> Iterator[dict[str, str]]:
    texts = [name for name in spec.tasks if writer_for(problem, name) is not None]
    weighed = spec.row.importance is not Importance.UNIFORM
    if texts and spec.row.estimator_for(spec.importance.estimator) == Estimator.EXACT and weighed:
        what = f"of generated texts ({', '.join(texts)}) exact means sampled: they have no finite set of choices"
        yield {"where": spec.where("importance.estimator"), "what": what}


def _split_notes(spec: StudySpec, problem: Problem) -> Iterator[dict[str, str]]:
    """Tasks of lm-evaluation-harness whose trials are scored on another split than lm_eval scores."""
    for task, inputs in problem.tasks.items():
        question = inputs.validation[0].question
        if question is not None and question.loaded.split != question.loaded.usual:
            usual, split = question.loaded.usual, question.loaded.split
            what = (
                f"trials are scored on the split {split!r}; lm_eval scores {usual!r}, which test_split: {usual} reports"
            )
            yield {"where": spec.where(f"tasks.{task}.validation_split"), "what": what}


def _plan(spec: StudySpec, problem: Problem, stored: optuna.Study | None) -> Plan:
    """The plan of a spec, and of the study that it would join.

    Raises:
        InputError: that study is about something else.
    """
    plan = Plan.of(spec)
    if stored is None:
        return plan.with_groups(list(problem.groups))
    found = provenance.stored_fingerprint(stored)
    refuse_other_fingerprint(spec.name, found, whole_fingerprint(spec, problem), plan.place)
    return plan.joined(stored)
