"""Coefficients that somebody gives: per expert, or finer, as a point of a loaded problem."""

from __future__ import annotations

from collections.abc import Mapping

from dfmerge_studies.errors import InputError
from dfmerge_studies.methods import Method, coefficient_range
from dfmerge_studies.objective.groups import FIELD
from dfmerge_studies.objective.problem import Problem
from dfmerge_studies.points import Point, fine_name
from dfmerge_studies.spec import check_coefficients
from dfmerge_studies.trials.space import Space

Given = Mapping[str, float | Mapping[str, float]]


def flat(given: Given) -> dict[str, float]:
    """Coefficients by name: of an expert, or EXPERT.GROUP.

    Args:
        given: by such a name, or by expert and then by group.
    """
    found: dict[str, float] = {}
    for name, value in given.items():
        if isinstance(value, Mapping):
            found.update({fine_name(name, group): number for group, number in value.items()})
        else:
            found[name] = value
    return found


def point_of(problem: Problem, row: Method, given: Given, parameters: Mapping[str, float], where: str) -> Point:
    """The point of coefficients that were given; an expert that has one has it in all its groups.

    Args:
        problem: the loaded spec, whose `search.granularity` says which groups there are.
        row: of the method table.
        given: see `flat`.
        parameters: of the method.
        where: what to name as the place at fault: a field of the spec, or a flag with its dashes.

    Raises:
        InputError: a coefficient is missing, unknown, given twice or outside the bounds.
    """
    spec, values = problem.spec, flat(given)
    bounds = coefficient_range(row, spec.search.bounds)
    if all(name in spec.experts for name in values):
        return Point(check_coefficients(spec, values, where, bounds=bounds), parameters)
    place = where if where.startswith("-") else spec.where(where)
    groups = problem.groups if row.searches else {}
    if not groups:
        odd = next(name for name in values if name not in spec.experts)
        hint = f"The experts are {', '.join(spec.experts)}"
        if row.searches:
            hint += f"; {FIELD} gives their groups coefficients of their own"
        raise InputError(f"unknown name {odd!r}", where=place, hint=hint)
    fine: dict[str, float] = {}
    for name, value in values.items():
        for each in [fine_name(name, group) for group in groups] if name in spec.experts else [name]:
            if each in fine:
                raise InputError(f"{each!r} has two coefficients", where=place, hint="Give it one")
            fine[each] = value
    Space(tuple(fine_name(expert, group) for expert in spec.experts for group in groups), *bounds).check(
        fine, where=place
    )
    by_expert = {expert: {group: float(fine[fine_name(expert, group)]) for group in groups} for expert in spec.experts}
    return Point.grouped(by_expert, parameters)
