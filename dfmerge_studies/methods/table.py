"""The method table: every way to merge is a choice of importance C, coefficients lambda, and transform Phi.

A new method is a new row here, and a function in `transforms` if its Phi is new.  What the spec accepts, the flags of
`merge`, what is searched, stored, shown and compared follow from the row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dfmerge_studies import limits
from dfmerge_studies.methods.choices import Coefficients, Estimator, Importance, Scale
from dfmerge_studies.methods.parameter import Parameter
from dfmerge_studies.methods.row import Method


def _tenths(first: int, last: int, step: int = 1) -> tuple[float, ...]:
    """Grid values by their tenths, both ends included."""
    return tuple(tenth / 10 for tenth in range(first, last + 1, step))


_DROP_RATE = Parameter(
    "drop_rate",
    "share of a task vector's entries that are set to zero",
    low=0.0,
    high=1.0,
    below_high=True,
    grid=_tenths(1, 9, 2),
)
_DENSITY = Parameter("density", "share of a task vector's entries that are kept", low=0.0, high=1.0, default=0.2)
_SPARSITY = Parameter("density", "share of each tensor's entries that are kept", low=0.0, high=1.0, default=0.15)
_OUTLIERS = Parameter(
    "gamma",
    "share of each tensor's entries, the largest, that are set to zero",
    low=0.0,
    high=1.0,
    below_high=True,
    default=0.007,
)
_WINDOW = Parameter(
    "window_size", "drop rate of a row's smallest entry less that of its largest", low=0.0, high=1.0, default=0.14
)
_THRESHOLD = Parameter("mu", "by how much singular values are lowered", low=0.0, high=limits.COEFFICIENT, default=0.01)
_SHRINK = Parameter(
    "alpha", "factor of the off-diagonal entries of inputs' Gram matrices", low=0.0, high=1.0, default=0.9
)
IMPORTANCE_PARAMETERS: Mapping[Importance, tuple[Parameter, ...]] = {Importance.GRAM_AT_EXPERT: (_SHRINK,)}

_DF_MERGE = "https://arxiv.org/abs/2504.18992"
_FISHER = "https://arxiv.org/abs/2111.09832"
_FISHER_NODES = "https://arxiv.org/abs/2403.09891"
_TASK_ARITHMETIC = "https://arxiv.org/abs/2212.04089"

METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("averaging", Importance.UNIFORM, Coefficients.FIXED, "https://arxiv.org/abs/2203.05482"),
        Method(
            "task-arithmetic", Importance.UNIFORM, Coefficients.SHARED_GRID, _TASK_ARITHMETIC, shared=_tenths(0, 10)
        ),
        Method("gta", Importance.UNIFORM, Coefficients.PER_EXPERT, _DF_MERGE),
        Method("fisher", Importance.AT_EXPERT, Coefficients.FIXED, _FISHER),
        Method(
            "dare",
            Importance.UNIFORM,
            Coefficients.SHARED_GRID,
            "https://arxiv.org/abs/2311.03099",
            transform="drop-and-rescale",
            shared=_tenths(0, 10),
            parameters=(_DROP_RATE,),
        ),
        # The agreement mask is part of Phi: see `transforms.trim_and_elect`.
        Method(
            "ties",
            Importance.UNIFORM,
            Coefficients.SHARED_GRID,
            "https://arxiv.org/abs/2306.01708",
            transform="trim-and-elect",
            shared=_tenths(8, 18),
            parameters=(_DENSITY,),
        ),
        Method(
            "breadcrumbs",
            Importance.UNIFORM,
            Coefficients.SHARED_GRID,
            "https://arxiv.org/abs/2312.06795",
            transform="mask-extremes",
            shared=_tenths(0, 10),
            parameters=(_SPARSITY, _OUTLIERS),
        ),
        Method(
            "della",
            Importance.UNIFORM,
            Coefficients.SHARED_GRID,
            "https://arxiv.org/abs/2406.11617",
            transform="drop-by-rank-and-elect",
            shared=_tenths(8, 18),
            parameters=(_DROP_RATE, _WINDOW),
        ),
        # Its Phi moves the base, too: see `transforms.low_rank`.
        Method(
            "lore",
            Importance.UNIFORM,
            Coefficients.SHARED_GRID,
            "https://arxiv.org/abs/2502.10749",
            transform="low-rank",
            shared=_tenths(0, 10),
            parameters=(_THRESHOLD,),
        ),
        Method("fisher-nodes", Importance.AT_EXPERT, Coefficients.FIXED, _FISHER_NODES, estimator=Estimator.MASK_NODES),
        Method("df-merge-static", Importance.AT_EXPERT, Coefficients.PER_EXPERT, _DF_MERGE),
        Method("df-merge", Importance.AT_SCALED_EXPERT, Coefficients.PER_EXPERT, _DF_MERGE),
        Method(
            "regmean",
            Importance.GRAM_AT_EXPERT,
            Coefficients.FIXED,
            "https://arxiv.org/abs/2212.09849",
            parameters=IMPORTANCE_PARAMETERS[Importance.GRAM_AT_EXPERT],
        ),
        # Ours: df-merge with the Fisher of MaTS.
        Method(
            "df-merge-kfac",
            Importance.KFAC_AT_SCALED_EXPERT,
            Coefficients.PER_EXPERT,
            "https://arxiv.org/abs/2312.04339",
        ),
        Method("fim", Importance.UNIFORM, Coefficients.FISHER_TRACE, "https://arxiv.org/abs/2603.21705"),
        # Ours: df-merge, but for the scale of the importance.
        Method(
            "df-merge-scaled",
            Importance.AT_SCALED_EXPERT,
            Coefficients.PER_EXPERT,
            _DF_MERGE,
            scale=Scale(normalise="expert", power=0.5),
        ),
    )
}


STRENGTH = Parameter(
    "strength", "share of a step along protected directions that is taken away", low=0.0, high=1.0, default=1.0
)


def protected(row: Method) -> Method:
    """A row whose step is damped along directions of a protected task: with a parameter for it.

    Args:
        row: of the table.
    """
    return replace(row, parameters=(*row.parameters, STRENGTH))


def all_parameters() -> dict[str, dict[str, Parameter]]:
    """Every method's parameters, by name of the parameter and then of the method; and what any has under `protect`."""
    found: dict[str, dict[str, Parameter]] = {STRENGTH.name: {"protect": STRENGTH}}
    for method in METHODS.values():
        for parameter in method.parameters:
            found.setdefault(parameter.name, {})[method.name] = parameter
    return found
