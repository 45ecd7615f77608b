"""What is stored with a study, so that nothing else can be mixed into it later: what it is about, and who made it."""

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage

from dfmerge_studies.errors import InputError
from dfmerge_studies.redact import public
from dfmerge_studies.spec import ObjectiveSettings, StudySpec
from dfmerge_studies.storage import create_study, join_study, safe_url
from dfmerge_studies.study.fingerprint import metrics_of, objective_of, refuse_other_fingerprint
from dfmerge_studies.study.totals import OWED, TARGET
from dfmerge_studies.tasks.metrics import Metrics
from dfmerge_studies.tasks.splits import Split

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


def is_unfinished(study: optuna.Study) -> bool:
    """Tell whether a study is what a first start leaves that was killed: empty, without a word of what it is about."""
    if study.user_attrs.keys() - ATTRIBUTES or study.get_trials(deepcopy=False):
        return False
    return stored_fingerprint(study) is None


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
    left_open: Mapping[str, Any],
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
        left_open: what a new study has of that which the fingerprint leaves open.
        attributes: what else its founder states.
        metric_names: of the objectives.
        where: the storage, without password.

    Raises:
        InputError: the stored study is about something else; with the list of differences.
    """
    founder = create_study(storage, name, directions=directions)
    study = join_study(storage, name, directions=directions)
    if founder or (awaited_fingerprint(study) is None and not study.get_trials(deepcopy=False)):
        whole = {**left_open, **fingerprint}
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


def stored_metrics(study: optuna.Study, split: Split) -> Metrics:
    """What the scores of a split of a stored study are, by task.

    Args:
        study: one that this program made.
        split: of the tasks' data.
    """
    return metrics_of(stored_fingerprint(study) or {}, study.user_attrs.get(SPEC, {}), split)


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
