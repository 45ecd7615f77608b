"""What a study is about, stored with it, so that nothing else can be mixed into it later."""

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage

from dfmerge_studies.checkpoints.digest import json_digest
from dfmerge_studies.errors import InputError
from dfmerge_studies.methods import Method, method_named
from dfmerge_studies.redact import public
from dfmerge_studies.spec import ObjectiveSettings, SearchSettings, StudySpec
from dfmerge_studies.storage import create_study, join_study, safe_url
from dfmerge_studies.study.totals import OWED, TARGET
from dfmerge_studies.tasks.metrics import AGREEMENT, Metrics, agrees
from dfmerge_studies.tasks.splits import Split

if TYPE_CHECKING:
    from dfmerge_studies.objective.problem import Problem

# User attributes of a study.
FINGERPRINT = "dfmerge:science"
SPEC = "dfmerge:spec"
INDICES = "dfmerge:fisher_indices"
VERSIONS = "dfmerge:versions"
WARM_START = "dfmerge:warm_start"
TRACED_POINT = "dfmerge:fisher_trace"
ATTRIBUTES = frozenset({FINGERPRINT, SPEC, INDICES, VERSIONS, TARGET, OWED, WARM_START})

_FOUNDING_SECONDS = 5.0  # a founder writes four attributes; one that takes longer has been killed

_LIBRARIES = (
    "dfmerge-studies",
    "torch",
    "transformers",
    "optuna",
    "datasets",
    "peft",
    "numpy",
    "scipy",
    "scikit-learn",
    "seqeval",
    "lm-eval",
)


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


def allowed_drops(fingerprint: Mapping[str, Any]) -> dict[str, float]:
    """Points that each task of a stored study may lose, of those that have a bound.

    Args:
        fingerprint: what the study is about.
    """
    shared = fingerprint.get("search.max_drop")
    own = {**dict.fromkeys(fingerprint.get("tasks", ()), shared), **fingerprint.get(MAX_DROP, {})}
    own |= fingerprint.get(GUARDS, {})
    return {task: float(points) for task, points in own.items() if points is not None}


def _granularity(spec: StudySpec) -> dict[str, Any] | None:
    """What of a spec decides which groups of parameters have a coefficient each, None where experts have one."""
    settings = spec.search.granularity
    return settings.model_dump(exclude_none=True) if settings is not None and spec.row.searches else None


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
        spec = spec.derive(search={"sampler": "gradient"})  # the one sampler that asks more of models, data and memory
    return spec


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


def differences(stored: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Fields on which two fingerprints disagree, one readable line each; fields that only one states are ignored.

    Args:
        stored: the fingerprint of the stored study.
        ours: that of this run.
    """
    stored, ours = {**_FORMERLY, SAMPLER: _FORMER_SAMPLER, COMPUTE: _FORMER_COMPUTE, **stored}, {**_FORMERLY, **ours}
    return [
        f"{field}: the study has {_short(stored[field])}, this run has {_short(ours[field])}"
        for field in ours
        if field in stored and stored[field] != ours[field]
    ]


def is_unfinished(study: optuna.Study) -> bool:
    """Tell whether a study is what a first start leaves that was killed: empty, without a word of what it is about."""
    if study.user_attrs.keys() - ATTRIBUTES or study.get_trials(deepcopy=False):
        return False
    return stored_fingerprint(study) is None


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


def describe_spec(spec: StudySpec) -> dict[str, Any]:
    """The spec as JSON, as it may be stored and exported: without passwords, tokens and keys."""
    return without_secrets(spec.model_dump(mode="json"))


def without_secrets(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A described spec without passwords, tokens and keys; also one that an earlier version has stored.

    Args:
        fields: from `describe_spec`, or what a study has.
    """
    shown = dict(fields)
    shown.update({name: public(fields[name]) for name in ("base", "multi_task", "cache") if fields.get(name)})
    if fields.get("storage"):
        shown["storage"] = safe_url(str(fields["storage"]))
    if warm := (fields.get("search") or {}).get("warm_start"):
        shown["search"] = {
            **fields["search"],
            "warm_start": {**warm, "storage": safe_url(warm["storage"])} if warm.get("storage") else warm,
        }
    for group, field in (("experts", "model"), ("tasks", "dataset")):
        entries = fields.get(group, {})
        shown[group] = {
            name: {**entry, field: public(entry[field])}
            if isinstance(entry, Mapping) and field in entry
            else public(entry)
            for name, entry in entries.items()
        }
    return shown


def library_versions() -> dict[str, str]:
    """Versions of what computes the results."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def join(
    storage: BaseStorage,
    name: str,
    *,
    directions: Sequence[str],
    fingerprint: Mapping[str, Any],
    sampler: str,
    attributes: Mapping[str, Any],
    metric_names: Sequence[str],
    where: str,
) -> optuna.Study:
    """Create a study and state what it is about, or join one that is about the same; give it its sampler then.

    Args:
        storage: open.
        name: the study's name.
        directions: "maximize" or "minimize", one for each objective.
        fingerprint: what it is about.
        sampler: what a new study has where the fingerprint leaves it open.
        attributes: what else its founder states.
        metric_names: of the objectives.
        where: the storage, without password.

    Raises:
        InputError: the stored study is about something else; with the list of differences.
    """
    founder = create_study(storage, name, directions=directions)
    study = join_study(storage, name, directions=directions)
    if founder or (awaited_fingerprint(study) is None and not study.get_trials(deepcopy=False)):
        whole = {SAMPLER: sampler, **fingerprint}
        for key, value in {**attributes, VERSIONS: library_versions(), FINGERPRINT: whole}.items():
            study.set_user_attr(key, value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            study.set_metric_names(list(metric_names))
    refuse_other_fingerprint(name, stored_fingerprint(study), fingerprint, where)
    return study


def stored_fingerprint(study: optuna.Study) -> dict[str, Any] | None:
    """A study's fingerprint attribute; None where it has none.

    Args:
        study: a study that this program made, or another.

    Raises:
        InputError: it has one of another form than this program writes.
    """
    with reading_study(study.study_name):
        fingerprint = study.user_attrs.get(FINGERPRINT)
        if fingerprint is not None and not (isinstance(fingerprint["method"], str) and "experts" in fingerprint):
            raise ValueError(fingerprint)
        return fingerprint


def stored_spec_objective(study: optuna.Study) -> ObjectiveSettings:
    """The objective that a stored study was made with."""
    return objective_of(stored_fingerprint(study) or {})


def objective_of(fingerprint: Mapping[str, Any]) -> ObjectiveSettings:
    """The objective that a fingerprint states."""
    return ObjectiveSettings.model_validate(fingerprint.get("objective", {}))


def stored_metrics(study: optuna.Study, split: Split) -> Metrics:
    """What the scores of a split of a stored study are, by task.

    Args:
        study: one that this program made.
        split: of the tasks' data.
    """
    return metrics_of(stored_fingerprint(study) or {}, study.user_attrs.get(SPEC, {}), split)


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


def awaited_fingerprint(study: optuna.Study) -> dict[str, Any] | None:
    """A study's fingerprint attribute, waited for while another process may be about to write it.

    Who creates a study founds it; two first starts that both wrote would each find its own fingerprint there.

    Args:
        study: a study that this process did not create.

    Returns:
        The attribute; None if other software made the study, or its founder died.
    """
    until = time.monotonic() + _FOUNDING_SECONDS
    while (fingerprint := stored_fingerprint(study)) is None and time.monotonic() < until:
        if study.get_trials(deepcopy=False):
            return stored_fingerprint(study)  # a founder writes it before its first trial: there by now, or never
        time.sleep(0.1)
    return fingerprint


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@contextmanager
def reading_study(name: str) -> Iterator[None]:
    """Around whatever reads what a stored study says of itself: damage, or another program's words, are named.

    Raises:
        InputError: an attribute is missing or of another form than this program writes.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"the study {name!r} cannot be read: what it stores of itself is damaged, or of another program",
            hint="Restore a copy of the database, or delete the study",
        ) from error
