"""What a study is about: all that decides its results, stated by its spec and measured from its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dfmerge_studies.checkpoints.digest import json_digest
from dfmerge_studies.errors import InputError
from dfmerge_studies.methods import Method, method_named
from dfmerge_studies.spec import DESCENT, ObjectiveSettings, SearchSettings, StudySpec, has_slopes
from dfmerge_studies.tasks.metrics import AGREEMENT, Metrics, agrees
from dfmerge_studies.tasks.splits import Split

if TYPE_CHECKING:
    from dfmerge_studies.objective.problem import Problem

GRANULARITY, _GROUPS = "search.granularity", "groups of parameters"  # of a fingerprint

RACING = "search.racing"  # of a fingerprint: how trials that cannot win are stopped
GUARDS = "guards"  # of a fingerprint: points that each may lose against the base
TOKENIZER = "tokenizer"  # of a fingerprint: whose tokens the merge has
MAX_DROP = "max_drop"  # of a fingerprint: points of the tasks that have a bound of their own

# What studies did before a field came to be stated: whoever does not state it, did this.
_FORMERLY: Mapping[str, Any] = {
    "importance.normalise": "none",
    "importance.power": 1.0,
    GRANULARITY: "model",
    RACING: None,
    "positive": {},
    GUARDS: {},
    TOKENIZER: "base",
    MAX_DROP: {},
    "scoring": {},
    "parameters": {},
    "protect": None,
}
COMPUTE, _FORMER_COMPUTE = "compute", "float32"  # the same; a new study states what `auto` means on its device
_OF_STEPS = ("rate", "gradient_rows")
SAMPLER = "search.sampler"  # a spec may leave it open: of a new study it is ours, one that is there keeps its own
_FORMER_SAMPLER = "gp"
STARTUP = "search.startup"  # the same, of the sampler `auto`
_FORMER_STARTUP = "uniform"


def stated_fingerprint(spec: StudySpec) -> dict[str, Any]:
    """What decides a study's results, as far as the spec alone says it.

    Budget, device, batch sizes, paths and storage are left out: they may change between runs.
    """
    search, importance = spec.search, spec.importance
    classes = {name: task.positive_class() for name, task in spec.tasks.items()}
    positive = {name: index for name, index in classes.items() if index is not None}
    scoring = {name: stated for name, task in spec.tasks.items() if (stated := task.stated())}
    return {
        "method": spec.row.name,
        "experts": [[name, expert.task] for name, expert in spec.experts.items()],  # in their order
        "tasks": list(spec.tasks),
        "metrics": {name: task.metric for name, task in spec.tasks.items()},
        **({"positive": positive} if positive else {}),
        **({TOKENIZER: spec.tokenizer} if spec.tokenizer != "base" else {}),
        **({GUARDS: dict(guards)} if (guards := spec.metrics("validation").guards) else {}),
        **({MAX_DROP: own} if (own := _own_bounds(spec)) else {}),
        **({"scoring": scoring} if scoring else {}),
        **({"parameters": changed} if (changed := _changed_parameters(spec.row)) else {}),
        **({"protect": spec.protect.model_dump(exclude={"strength"})} if spec.protect is not None else {}),
        "importance.estimator": spec.row.estimator_for(importance.estimator),
        "importance.samples": importance.samples if importance.indices is None else None,
        "importance.floor": importance.floor,
        "importance.dtype": importance.rounding,
        **{f"importance.{field}": value for field, value in asdict(spec.row.scale_for(importance.scale)).items()},
        **stated_sampler(search),
        "search.acquisition": search.acquisition,
        **({"search.kappa": search.kappa} if search.acquisition == "ucb" else {}),
        **({STARTUP: search.startup} if search.startup is not None and spec.row.searches else {}),
        **({f"search.{each}": getattr(search, each) for each in _OF_STEPS} if search.descends else {}),
        "search.startup_trials": search.startup_trials,
        **({RACING: search.race.model_dump()} if search.race is not None and spec.row.coefficients.chosen else {}),
        **({GRANULARITY: granularity} if (granularity := _granularity(spec)) is not None else {}),
        "search.bounds": list(search.bounds),
        "search.step": search.step,
        "search.seed": search.seed,
        "search.max_drop": search.max_drop,
        "objective": spec.objective.model_dump(),
        "dtype": spec.dtype,
        **({COMPUTE: spec.compute} if spec.compute != "auto" else {}),
    }


def stated_sampler(search: SearchSettings) -> dict[str, str]:
    """What a fingerprint says of the sampler that settings name; nothing of one that they leave to the study."""
    return {SAMPLER: search.stated_sampler} if search.stated_sampler is not None else {}


def _own_bounds(spec: StudySpec) -> dict[str, float]:
    return {n: task.max_drop for n, task in spec.tasks.items() if task.max_drop is not None and not task.guard}


def _granularity(spec: StudySpec) -> dict[str, Any] | None:
    """What of a spec decides which groups of parameters have a coefficient each, None where experts have one."""
    settings = spec.search.granularity
    return settings.model_dump(exclude_none=True) if settings is not None and spec.row.searches else None


def _changed_parameters(row: Method) -> dict[str, float | list[float] | None]:
    """Parameters of a method that a spec has set otherwise than the table: a value, or what is tried or searched."""
    usual = {each.name: each for each in method_named(row.name).parameters}
    return {
        own.name: list(own.grid or own.bounds or ()) or own.default
        for own in row.parameters
        if own != usual.get(own.name)
    }


def measured_fingerprint(problem: Problem) -> dict[str, Any]:
    """What decides a study's results, as far as the files say it: digests of weights, data and Fisher inputs."""
    return {
        "base digest": problem.base_digest,
        **{f"expert digest of {name}": digest for name, digest in problem.expert_digests.items()},
        **{f"data digest of {name}": digest for name, digest in problem.data_digests().items()},
        **{f"Fisher inputs of {name}": rows for name, rows in problem.fisher_indices().items()},
    }


def whole_fingerprint(spec: StudySpec, problem: Problem) -> dict[str, Any]:
    """Everything that decides a study's results.

    Args:
        spec: the settings of the study; a baseline's differ from those that `problem` was loaded with.
        problem: the loaded models and data.
    """
    return {**stated_fingerprint(spec), **measured_fingerprint(problem), **_measured_groups(spec, problem)}


def _measured_groups(spec: StudySpec, problem: Problem) -> dict[str, Any]:
    """Which parameters are in which group: name, number of parameters, digest of their names."""
    if _granularity(spec) is None:
        return {}
    return {_GROUPS: [[name, len(found), json_digest(found)] for name, found in problem.groups.items()]}


def as_stored(spec: StudySpec, stored: Mapping[str, Any] | None) -> StudySpec:
    """The spec, with what it leaves to the program as the stored study has it: defaults of its time.

    Args:
        spec: the settings.
        stored: the study's fingerprint, None where there is no study yet.
    """
    if stored is None:
        return spec
    if spec.importance.dtype == "auto":
        spec = spec.derive(importance={"dtype": stored.get("importance.dtype", "float32")})
    if spec.compute == "auto" and spec.dtype == "float32":
        spec = spec.derive(compute=stored.get(COMPUTE, _FORMER_COMPUTE))
    if spec.search.stated_sampler is None and sampler_of(stored) == "gradient":
        spec = spec.derive(search={"sampler": "gradient"})  # which asks more of models, data and memory than others
    open_startup = spec.search.startup is None and spec.search.stated_sampler in (None, "auto")
    if open_startup and startup_of(stored) == DESCENT and has_slopes(spec):
        spec = spec.derive(search={"startup": DESCENT})  # which asks as much
    return spec


def differences(stored: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Fields on which two fingerprints disagree, one readable line each; fields that only one states are ignored.

    Args:
        stored: the fingerprint of the stored study.
        ours: that of this run.
    """
    left_open = {SAMPLER: _FORMER_SAMPLER, STARTUP: _FORMER_STARTUP, COMPUTE: _FORMER_COMPUTE}
    stored, ours = {**_FORMERLY, **left_open, **stored}, {**_FORMERLY, **ours}
    return [
        f"{field}: the study has {_short(stored[field])}, this run has {_short(ours[field])}"
        for field in ours
        if field in stored and stored[field] != ours[field]
    ]


def refuse_other_fingerprint(
    study_name: str, stored: Mapping[str, Any] | None, ours: Mapping[str, Any], where: str
) -> None:
    """Refuse to join a study that is about something else.

    Args:
        study_name: its name.
        stored: its fingerprint attribute, None if it has none.
        ours: what this run would do.
        where: the storage, without password.

    Raises:
        InputError: with the list of differences.
    """
    if stored is None:
        raise InputError(
            f"the name {study_name!r} is taken by a study that this program did not make",
            where=where,
            hint="Choose another name in the spec, or with --set name=NAME",
        )
    odd = differences(stored, ours)
    if odd:
        raise InputError(
            f"the study {study_name!r} is about something else:\n  - " + "\n  - ".join(odd) + "\n",
            where=where,
            hint="Put the spec back as it was, or give the new study another name with --set name=NAME",
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def allowed_drops(fingerprint: Mapping[str, Any]) -> dict[str, float]:
    """Points that each task of a stored study may lose, of those that have a bound.

    Args:
        fingerprint: what the study is about.
    """
    shared = fingerprint.get("search.max_drop")
    own = {**dict.fromkeys(fingerprint.get("tasks", ()), shared), **fingerprint.get(MAX_DROP, {})}
    own |= fingerprint.get(GUARDS, {})
    return {task: float(points) for task, points in own.items() if points is not None}


def groups_of(fingerprint: Mapping[str, Any]) -> list[str]:
    """Names of the groups of parameters that have a coefficient each in a stored study; none where experts have one.

    Args:
        fingerprint: what the study is about.
    """
    return [name for name, _, _ in fingerprint.get(_GROUPS, [])]


def sampler_of(fingerprint: Mapping[str, Any]) -> str:
    """The sampler of a stored study.

    Args:
        fingerprint: what the study is about.
    """
    return str(fingerprint.get(SAMPLER, _FORMER_SAMPLER))


def startup_of(fingerprint: Mapping[str, Any]) -> str | None:
    """What the startup trials of a stored study are, in the words of `search.startup`; None where it has none.

    Args:
        fingerprint: what the study is about.
    """
    return str(fingerprint.get(STARTUP, _FORMER_STARTUP)) if sampler_of(fingerprint) == "auto" else None


def objective_of(fingerprint: Mapping[str, Any]) -> ObjectiveSettings:
    """The objective that a fingerprint states."""
    return ObjectiveSettings.model_validate(fingerprint.get("objective", {}))


def metrics_of(fingerprint: Mapping[str, Any], spec: Mapping[str, Any], split: Split) -> Metrics:
    """`stored_metrics`, from a study's fingerprint and the spec that created it."""
    guards = fingerprint.get(GUARDS, {})
    names = {task: fingerprint.get("metrics", {}).get(task, "accuracy") for task in fingerprint.get("tasks", ())}
    if objective_of(fingerprint).kind == AGREEMENT:
        targets = {task: spec.get("tasks", {}).get(task, {}).get("doc_to_target") for task in names}
        names = {
            task: AGREEMENT if task not in guards and agrees(split, targets[task]) else name
            for task, name in names.items()
        }
    return Metrics.named(names, guards)
