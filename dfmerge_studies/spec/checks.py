"""Names inside a spec that must match each other, and coefficients that must fit it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from dfmerge_studies.errors import InputError, did_you_mean
from dfmerge_studies.methods import METHODS
from dfmerge_studies.names import NAME
from dfmerge_studies.spec.reading import shortened
from dfmerge_studies.tasks.encoding import HEADED, Kind
from dfmerge_studies.tasks.metrics import AGREEMENT, METRICS, row_by_row
from dfmerge_studies.tasks.settings import metric_of
from dfmerge_studies.trials.space import Space

if TYPE_CHECKING:
    from dfmerge_studies.spec.study import StudySpec


def reference_problems(spec: StudySpec) -> Iterator[tuple[str, InputError]]:
    """Names inside the spec that do not match each other, and points and baselines that do not fit.

    Yields:
        The dotted name of a field, and what is wrong with it.
    """
    for field, what, hint in (
        *_naming(spec),
        *_experts_without_task(spec),
        *_odd_guards(spec),
        *labels_lacking(spec),
        *_odd_baselines(spec),
        *_starts_from_itself(spec),
        *_nothing_to_split(spec),
        *_unknown_tasks(spec),
        *_unknown_protected(spec),
        *without_slopes(spec),
        *_rows_lacking(spec),
    ):
        yield field, InputError(what, where=spec.where(field), hint=hint)
    unfit = list(odd_parameters(spec))
    yield from unfit
    if spec.experts and not unfit:
        yield from _odd_points(spec)


Finding = tuple[str, str, str]  # the field, what is wrong with it, the mend


def _naming(spec: StudySpec) -> Iterator[Finding]:
    if not spec.experts:
        yield "experts", "no experts", "Name at least one fine-tuned model"
    if not spec.tasks:
        yield "tasks", "no tasks", "Name at least one task to score on"
    for kind, names in (("experts", spec.experts), ("tasks", spec.tasks)):
        for name in names:
            if not NAME.fullmatch(name):
                yield kind, f"{shortened(name)} is no usable name", "Use letters, digits, '.', '_' and '-'"
    types = list(dict.fromkeys(task.type for task in spec.tasks.values()))
    if len({_models(type_) for type_ in types}) > 1:
        what = f"tasks of type {' and '.join(types)} cannot be mixed: one model answers them all"
        hint = "Use tasks of language models alone, of heads on whole texts alone, or token-classification alone"
        yield "tasks", what, hint


def _models(type_: str) -> str:
    """What models of some type of task have in common, so that one can answer all such tasks."""
    if type_ not in HEADED:
        return "a vocabulary to answer with"
    return "a head on words" if type_ == Kind.TOKENS else "a head on the text"


def _experts_without_task(spec: StudySpec) -> Iterator[Finding]:
    for name, expert in spec.experts.items():
        if expert.task is not None and expert.task not in spec.tasks:
            what = f"the expert has no task: {expert.task!r} is not among the tasks ({', '.join(spec.tasks)})"
            yield f"experts.{name}", what, "Name its task, or write 'task: null' to weigh it by all tasks"


def _odd_guards(spec: StudySpec) -> Iterator[Finding]:
    """Guards that nothing bounds, that an expert stands for or that the objective names; bounds against nothing."""
    owners = {expert.task: name for name, expert in spec.experts.items()}
    if spec.tasks and not spec.aims:
        yield "tasks", "all tasks are guards, so nothing is left to search for", "Add the experts' own tasks"
    for name, task in spec.tasks.items():
        where = f"tasks.{name}"
        if task.guard and name in owners:
            what = f"the expert {owners[name]} stands for this task, and a guard is one that no expert stands for"
            yield (
                f"{where}.guard",
                what,
                f"Leave guard out and give max_drop alone, or write experts.{owners[name]}.task",
            )
        if task.guard and name not in spec.allowed:
            what = "a guard needs a bound: how many points it may lose against the base"
            yield f"{where}.max_drop", what, "Add max_drop here or to search"
        if not task.guard and task.max_drop is not None and name not in owners:
            what = "no expert has this task, so there is nothing that it could fall below"
            yield f"{where}.max_drop", what, "Write guard: true, which compares it with the base, or leave it out"
    named = {"objective.weights": spec.objective.weights, "importance.indices": spec.importance.indices}
    for field, of_tasks in named.items():
        guards = [n for n in of_tasks if n in spec.tasks and spec.tasks[n].guard] if isinstance(of_tasks, dict) else []
        for name in guards:
            reason = "the objective" if field == "objective.weights" else "any importance"
            yield field, f"{name!r} is a guard, which is no part of {reason}", f"Leave {name} out here"


def labels_lacking(spec: StudySpec) -> Iterator[Finding]:
    """Tasks that the objective cannot score: without a label, or for agreement without an expert.

    Yields:
        The field, what is wrong with it, the mend.
    """
    with_expert = {expert.task for expert in spec.experts.values()}
    for name, task in spec.tasks.items():
        if spec.needs_labels(name) and task.doc_to_target is None:
            hint = "Add it; without labels use objective: agreement, and no estimator that needs them"
            yield f"tasks.{name}.doc_to_target", "this field is required", hint
        if task.guard:
            continue
        if spec.objective.kind == AGREEMENT and task.type not in METRICS[AGREEMENT].tasks:
            what = f"objective: agreement compares answers that can be equal, and a task of type {task.type} has none"
            yield f"tasks.{name}.type", what, "Use another objective, such as mean, or another type of task"
        elif spec.objective.kind == AGREEMENT and name not in with_expert:
            what = "no expert has this task, and objective: agreement compares with the task's expert"
            yield f"tasks.{name}", what, "Add an expert with this task, or remove the task"


def _odd_baselines(spec: StudySpec) -> Iterator[Finding]:
    for baseline in dict.fromkeys(spec.baselines):
        if spec.row_of(baseline).name == spec.row.name:
            yield "baselines", f"{baseline!r} is the method itself", "Name every other method once"
        elif spec.baselines.count(baseline) > 1:
            yield "baselines", f"{baseline!r} is named twice", "Name every other method once"
        if not NAME.fullmatch(f"{spec.name}.{baseline}"):
            yield "name", f"the name is too long for a baseline's study {spec.name}.{baseline}", "Choose a shorter one"


def _starts_from_itself(spec: StudySpec) -> Iterator[Finding]:
    warm = spec.search.warm_start
    if warm is not None and warm.storage is None and warm.study == spec.name:
        yield (
            "search.warm_start",
            f"{warm.study!r} is this study itself",
            "Name another one, or give this one a new name",
        )


def _nothing_to_split(spec: StudySpec) -> Iterator[Finding]:
    if spec.search.granularity is not None and not spec.row.searches:
        of_experts = ", ".join(name for name, row in METHODS.items() if row.searches)
        what = f"the method {spec.method!r} has no coefficient per expert to make finer"
        yield "search.granularity", what, f"Leave it out, use one of {of_experts}, or search: per-expert"


def without_slopes(spec: StudySpec) -> Iterator[Finding]:
    """What a spec that descends cannot descend on."""
    if spec.search.descends:
        yield from _slopes_lacking(spec, spec.search.descent_text)


def has_slopes(spec: StudySpec) -> bool:
    """Whether trials of a study can have slopes, as far as its spec alone says it."""
    search = spec.search
    return spec.row.searches and not (search.step or any(_slopes_lacking(spec, "a descent")))


def _slopes_lacking(spec: StudySpec, how: str) -> Iterator[Finding]:
    row = spec.row
    if not row.searches:
        return
    other = "sampler: auto" if how == "sampler: gradient" else "startup: uniform"
    if spec.objective.kind not in ("mean", "weighted"):
        what = f"{how} descends a mean of losses, and the objective is {spec.objective.kind}"
        yield "objective", what, f"Use mean or weighted, or {other}"
    if row.importance.blocks is not None:
        yield "method", f"{spec.method!r} has importance in blocks, whose slopes are not known", f"Use {other}"
    if row.searched:
        own = ", ".join(each.name for each in row.searched)
        what = f"{how} has slopes of coefficients only, and {own} would be searched beside them"
        yield f"parameters.{spec.method}", what, f"Give a value to each of them, or use {other}"
    if spec.protect is not None:
        yield "protect", f"{how} does not know the step that protect takes away", f"Use {other}"


def _rows_lacking(spec: StudySpec) -> Iterator[Finding]:
    """Tasks of the objective that cannot be raced: a part of their rows has no score, or no row has a best one."""
    if spec.search.race is None or spec.objective.kind == AGREEMENT:
        return
    for name in spec.aims:
        task = spec.tasks[name]
        if not row_by_row(metric_of(task)):
            what = f"search.racing needs metrics that are means over rows with a best score, and {task.metric} is none"
            yield f"tasks.{name}.metric", what, "Use such a metric, for example accuracy, or leave racing out"


def _unknown_tasks(spec: StudySpec) -> Iterator[Finding]:
    for field, named in (
        ("objective.weights", spec.objective.weights),
        ("importance.indices", spec.importance.indices),
    ):
        if isinstance(named, dict):
            for odd in sorted(set(named) - set(spec.tasks)):
                yield field, f"unknown task {odd!r}", f"The tasks are {', '.join(spec.tasks)}"


def _unknown_protected(spec: StudySpec) -> Iterator[Finding]:
    if spec.protect is not None and spec.protect.task not in spec.tasks:
        hint = did_you_mean(spec.protect.task, spec.tasks) or f"The tasks are {', '.join(spec.tasks)}"
        yield "protect.task", f"unknown task {spec.protect.task!r}", hint


def odd_parameters(spec: StudySpec) -> Iterator[tuple[str, InputError]]:
    """Values of methods' parameters that the methods do not have or that cannot be.

    Yields:
        The dotted name of a field, and what is wrong with it.
    """
    for method in spec.parameters:
        try:
            spec.row_of(method)
        except InputError as error:
            yield f"parameters.{method}", error
    if spec.protect is not None and spec.method not in spec.parameters:
        try:
            spec.row_of(spec.method)
        except InputError as error:
            yield "protect.strength", error


def _odd_points(spec: StudySpec) -> Iterator[tuple[str, InputError]]:
    search, row, experts = spec.search, spec.row, list(spec.experts)
    plain = Space(tuple(experts), *search.bounds, search.step)
    space = row.space(experts, search.bounds, search.step) if row.searches else plain
    own = {each.name: each.default for each in row.searched if each.default is not None} if row.searches else {}
    for point in search.enqueue:
        if isinstance(point, str):
            if search.granularity is None:
                what = f"{point!r} is a coefficient for each group of parameters, and the experts have one each"
                yield "search.enqueue", InputError(what, where=spec.where("search.enqueue"), hint="Add granularity")
            continue
        given = dict.fromkeys(experts, point) if isinstance(point, float) else point
        try:
            space.check({**own, **given}, where=spec.where("search.enqueue"))
        except InputError as error:
            yield "search.enqueue", error


def check_coefficients(
    spec: StudySpec,
    point: Mapping[str, float],
    field: str,
    *,
    bounds: tuple[float, float] | None = None,
) -> dict[str, float]:
    """A coefficient for every expert, each inside the bounds (a merge needs no step), in the order of the experts.

    Args:
        spec: names the experts and the bounds.
        point: coefficient per expert.
        field: where the point stands, for messages: a field of the spec, or a flag with its dashes.
        bounds: range of a method whose coefficients may lie elsewhere than `search.bounds`.

    Raises:
        InputError: as `Space.check` has it.
    """
    space = Space(tuple(spec.experts), *(bounds or spec.search.bounds))
    space.check(point, where=field if field.startswith("-") else spec.where(field))
    return {name: float(point[name]) for name in spec.experts}
