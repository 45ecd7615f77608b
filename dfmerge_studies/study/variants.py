"""What a comparison compares: methods, and methods with a few settings of their own, each a study per seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dfmerge_studies.errors import InputError, did_you_mean
from dfmerge_studies.methods import METHODS, find_method
from dfmerge_studies.objective.preflight import installed
from dfmerge_studies.spec import DEFAULT_SAMPLER, UNIFORM, StudySpec, without_slopes
from dfmerge_studies.study.fingerprint import stated_fingerprint
from dfmerge_studies.study.plan import storage_url
from dfmerge_studies.tasks.splits import Split


@dataclass(frozen=True)
class Variant:
    """One entry of a comparison.

    Attributes:
        name: as `--methods` and the table have it.
        method: row of the method table.
        changes: fields of the spec that differ, as `StudySpec.derive` takes them.
        needs: Python packages that must be installed.
        first: score the study's first trial (1/M for every expert) instead of its best.
    """

    name: str
    method: str
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    first: bool = False

    @property
    def installed(self) -> bool:
        """Whether everything that it needs can be imported."""
        return all(map(installed, self.needs))


NO_SEARCH = "df-merge-no-search"
_OTHERS = (
    Variant("df-merge-nodes", "df-merge", {"importance": {"estimator": "mask-nodes"}}),
    Variant("df-merge-gp", "df-merge", {"search": {"sampler": "gp", "startup": None, "racing": False}}),
    Variant(
        "df-merge-ucb",
        "df-merge",
        {"search": {"sampler": "gp", "startup": None, "acquisition": "ucb", "racing": False}},
        needs=("botorch", "optuna_integration"),
    ),
    Variant("df-merge-agreement", "df-merge", {"objective": {"kind": "agreement", "weights": None}}),
    Variant(NO_SEARCH, "df-merge", first=True),
)


def variants() -> dict[str, Variant]:
    """All that a comparison can have, by name: the methods, then methods with settings of their own."""
    return {variant.name: variant for variant in (*(Variant(name, name) for name in METHODS), *_OTHERS)}


# The ablation takes one thing at a time away from df-merge (the paper's Table 3): its rows are rows of the comparison.
ABLATION: Mapping[str, str] = {
    "df-merge": "df-merge",
    "df-merge-scaled": "scaled importance (df-merge-scaled)",
    "df-merge-gp": "one GP of the objective, uniform startup, no trust region (df-merge-gp)",
    "df-merge-ucb": "UCB instead of EI (df-merge-ucb)",
    "df-merge-static": "static Fisher (df-merge-static)",
    "gta": "no Fisher (gta)",
    NO_SEARCH: "no search (1/M)",
    "fisher": "no search, static Fisher (fisher)",
}


def choose_variants(
    spec: StudySpec, names: Sequence[str] | None, *, ablation: bool = False, split: Split = "test"
) -> list[Variant]:
    """The variants of a comparison.

    Args:
        spec: what is compared on; a variant that is what the spec says anyway is left out unless it is named.
        names: which ones, in the order of the table; None for all that are installed and go with the spec.
        ablation: the rows of the ablation instead of all.
        split: what will be shown; agreement on the validation split does not stand beside other metrics.

    Raises:
        InputError: a name is unknown or given twice, what it needs is not installed, or its scores are of another kind.
    """
    known = variants()
    if names is None:
        every = [known[name] for name in (ABLATION if ablation else known)]
        fitting = [
            v
            for v in every
            if v.installed and (ablation or not v.first) and _adds_a_row(spec, v) and _is_comparable(spec, v, split)
        ]
        return _once_each(spec, fitting)
    known |= {name: Variant(name, name) for name in names if name not in known and find_method(name) is not None}
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known) or f"The methods are {', '.join(known)}"
            raise InputError(f"unknown method {name!r}", where="--methods", hint=hint)
        if names.count(name) > 1:
            raise InputError(f"{name!r} is named twice", where="--methods", hint="Name it once")
        if not known[name].installed:
            missing = ", ".join(known[name].needs)
            raise InputError(f"{name!r} needs {missing}", where="--methods", hint="Install it, or leave the method out")
        if not _is_comparable(spec, known[name], split):
            raise InputError(
                f"{name!r} has agreement and not {spec.metrics(split).short} on the validation split",
                where="--methods",
                hint="Use --split test, or leave the method out",
            )
    if not names:
        raise InputError("no method is named", where="--methods", hint=f"The methods are {', '.join(known)}")
    return [known[name] for name in names]


def _once_each(spec: StudySpec, variants: Sequence[Variant]) -> list[Variant]:
    """The variants without those that the spec makes the same as one before: task-arithmetic and gta, per expert."""
    found: dict[str, Variant] = {}
    for variant in variants:
        found.setdefault(
            variant.name if variant.changes or variant.first else spec.row_of(variant.method).name, variant
        )
    return list(found.values())


def study_spec(spec: StudySpec, variant: Variant, seed: int) -> StudySpec:
    """The spec of one variant's study at one seed, in the storage of the spec that it is compared under.

    The spec's own method at its own seed is the spec's own study NAME; others are NAME.VARIANT, and NAME.VARIANT.seedS
    at another seed than the spec's.

    Args:
        spec: what is compared on.
        variant: a method and its own settings.
        seed: of everything random.

    Raises:
        InputError: the variant's settings do not go with the spec's.
    """
    plain, own = _specs(spec, variant, seed)
    if _same(own, spec):
        return own
    name = variant.method if _same(own, plain) else variant.name
    suffix = "" if seed == spec.search.seed else f".seed{seed}"
    return own.derive(name=f"{spec.name}.{name}{suffix}")


def baseline_specs(spec: StudySpec) -> list[StudySpec]:
    """The specs of the methods that a spec shows beside its own.

    Args:
        spec: the spec that lists them.
    """
    return [
        study_spec(spec, variants().get(method) or Variant(method, method), spec.search.seed)
        for method in spec.baselines
    ]


def _specs(spec: StudySpec, variant: Variant, seed: int) -> tuple[StudySpec, StudySpec]:
    """The variant's method with the spec's own settings, and with those of the variant."""
    shared: dict[str, Any] = {"method": variant.method, "storage": storage_url(spec), "baselines": []}
    plain = spec.derive(**shared, search={"seed": seed})
    changes = {**variant.changes, "search": {**variant.changes.get("search", {}), "seed": seed}}
    return _searched(plain), _searched(spec.derive(**shared, **changes))


def _searched(spec: StudySpec) -> StudySpec:
    """The spec, by the default sampler from uniform points where it would descend on what has no slopes."""
    return spec.derive(search={"sampler": DEFAULT_SAMPLER, "startup": UNIFORM}) if any(without_slopes(spec)) else spec


def _is_comparable(spec: StudySpec, variant: Variant, split: Split) -> bool:
    """Whether a variant's scores on a split are of the same kind as the others'."""
    other = variant.changes.get("objective", {}).get("kind") == "agreement" != spec.objective.kind
    return not other or split == "test"


def _adds_a_row(spec: StudySpec, variant: Variant) -> bool:
    """Whether a variant goes with the spec and says something else than the row of its method."""
    try:
        plain, own = _specs(spec, variant, spec.search.seed)
    except InputError:  # upper confidence bounds for several objectives, say
        return False
    return not variant.changes or not _same(plain, own)


def _same(one: StudySpec, other: StudySpec) -> bool:
    return stated_fingerprint(one) == stated_fingerprint(other)
