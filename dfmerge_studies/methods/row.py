"""What one row of the method table says, and what follows from it: a space, a point, a grid.

point   what a trial of a method has: a coefficient per expert (or more, see `points.py`), and a value of each
        parameter that the method has
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dfmerge_studies.errors import InputError, did_you_mean
from dfmerge_studies.methods.choices import Coefficients, Estimator, Importance, Scale
from dfmerge_studies.methods.parameter import Parameter, label
from dfmerge_studies.points import GROUPS, Coefficient, Point, fine_name
from dfmerge_studies.trials.space import Space

SHARED = "lambda"  # name, on a grid, of the one coefficient that all experts share


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: as the spec writes it.
        importance: C.
        coefficients: the policy for lambda.
        paper: where it is from.
        transform: Phi, by its name in `transforms.TRANSFORMS`.
        shared: values of the shared coefficient, for `SHARED_GRID`.
        parameters: what else a merge depends on.
        estimator: of the importance, where the method prescribes one.
        scale: of the importance, where the method prescribes one.
        phi: the row whose transform and parameters a cell has, by its name; none of a row.
    """

    name: str
    importance: Importance
    coefficients: Coefficients
    paper: str
    transform: str = "identity"
    shared: tuple[float, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    estimator: Estimator | None = None
    scale: Scale | None = None
    phi: str | None = None

    @property
    def searches(self) -> bool:
        """Whether a sampler proposes its points; otherwise the method itself says how many trials there are."""
        return self.coefficients is Coefficients.PER_EXPERT

    @property
    def grid(self) -> dict[str, tuple[float, ...]]:
        """Values by name, for `SHARED_GRID`; nothing for other policies."""
        if self.coefficients is not Coefficients.SHARED_GRID:
            return {}
        return {SHARED: self.shared, **{each.name: each.grid for each in self.parameters if each.grid}}

    @property
    def searched(self) -> list[Parameter]:
        """The parameters in which trials differ."""
        return [each for each in self.parameters if each.searched]

    def check_whole(self, where: str) -> None:
        """Refuse a method of which a trial would not know what a parameter is.

        Args:
            where: what to name as the place at fault.

        Raises:
            InputError: a parameter is neither searched nor has a value.
        """
        for each in self.parameters:
            if not each.searched and each.default is None:
                raise InputError(
                    f"the method {self.name!r} has one trial and no value of the {each.label}",
                    where=where,
                    hint=f"Give one, such as {{{self.name}: {{{each.name}: 0.5}}}}, or let coefficients be searched",
                )

    def estimator_for(self, stated: str) -> str:
        """The estimator of the importance: the method's own, or else the spec's."""
        return self.estimator or stated

    def scale_for(self, stated: Scale) -> Scale:
        """The scale of the importance: the method's own, or else the spec's."""
        return self.scale or stated

    def adjusted(self, given: Mapping[str, float | Sequence[float]], where: str | None = None) -> Method:
        """The same row with a user's values of its parameters.

        Args:
            given: by name a number that fixes the parameter, or a list: the values to try where the coefficients are on
                a grid, the two ends of the range where they are searched.
            where: what to name as the place at fault.

        Raises:
            InputError: the method has no such parameter, or the parameter cannot have these values.
        """
        self._check_names(given, where)
        changed = [
            self._adjusted(each, given[each.name], where) if each.name in given else each for each in self.parameters
        ]
        return replace(self, parameters=tuple(changed))

    def _adjusted(self, parameter: Parameter, value: float | Sequence[float], where: str | None) -> Parameter:
        values = tuple(map(float, value)) if isinstance(value, Sequence) else (float(value),)
        for each in values:
            parameter.check(each, where)
        if len(values) == 1:
            return replace(parameter, default=values[0], grid=(), bounds=None)
        if self.coefficients is Coefficients.SHARED_GRID and len(set(values)) == len(values) > 0:
            return replace(parameter, grid=values, bounds=None)
        if self.searches and len(values) == 2 and values[0] < values[1]:
            middle = parameter.default if parameter.default is not None else sum(values) / 2
            return replace(parameter, grid=(), bounds=values, default=min(max(middle, values[0]), values[1]))
        ways = {
            Coefficients.FIXED: "a number",
            Coefficients.FISHER_TRACE: "a number",
            Coefficients.SHARED_GRID: "a number, or a list of different values to try",
            Coefficients.PER_EXPERT: "a number, or the two ends of a range in rising order",
        }
        raise InputError(
            f"the {parameter.label} of {self.name!r} cannot be {list(values)}",
            where=where,
            hint=f"Give {ways[self.coefficients]}",
        )

    def complete(
        self, given: Mapping[str, float], where: str | None = None, *, flags: bool = False
    ) -> dict[str, float]:
        """A value of every parameter for one merge.

        Args:
            given: by name; what is missing has its default.
            where: what to name as the place at fault.
            flags: name a parameter's flag as the place instead.

        Raises:
            InputError: one is unknown or out of range, or is missing and has no default.
        """
        self._check_names(given, where, flags=flags)
        found = {}
        for each in self.parameters:
            value, place = given.get(each.name, each.default), each.flag if flags else where
            if value is None:
                raise InputError(
                    f"the method {self.name!r} needs a {each.label}", where=place, hint="Give one, such as 0.5"
                )
            each.check(value, place)
            found[each.name] = float(value)
        return found

    def _check_names(self, given: Mapping[str, object], where: str | None, *, flags: bool = False) -> None:
        known = [each.name for each in self.parameters]
        for name in given:
            if name not in known:
                hint = did_you_mean(name, known) or (f"It has: {', '.join(known)}" if known else "Leave it out")
                place = "--" + name.replace("_", "-") if flags else where
                raise InputError(f"the method {self.name!r} has no {label(name)}", where=place, hint=hint)

    def space(
        self, experts: Sequence[str], bounds: tuple[float, float], step: float | None, groups: Sequence[str] = ()
    ) -> Space:
        """What the trials of a study of this method differ in.

        Args:
            experts: their names.
            bounds: of every coefficient, where they are searched.
            step: distance between coefficients, where they are searched.
            groups: of parameters that have a coefficient each, where they are searched.
        """
        if self.coefficients is Coefficients.SHARED_GRID:
            ranges = {name: (min(values), max(values)) for name, values in self.grid.items()}
            return Space(tuple(ranges), *ranges.pop(SHARED), own=ranges)
        if not self.coefficients.chosen:
            return Space(tuple(experts))
        own = {each.name: each.bounds for each in self.parameters if each.bounds is not None}
        tied = {fine_name(expert, group): expert for expert in experts for group in groups}
        return Space((*(tied or experts), *own), *bounds, step, own, tied)

    def point(self, values: Mapping[str, float], experts: Sequence[str], groups: Sequence[str] = ()) -> Point:
        """The point of a trial.

        Args:
            values: what the sampler proposed, by name of the space.
            experts: names of the experts.
            groups: of parameters that have a coefficient each.
        """
        parameters = self.complete({each.name: values[each.name] for each in self.searched})
        if groups:
            fine = {expert: {group: values[fine_name(expert, group)] for group in groups} for expert in experts}
            return Point.grouped(fine, parameters)
        shared = self.coefficients is Coefficients.SHARED_GRID
        return Point({expert: values[SHARED if shared else expert] for expert in experts}, parameters)

    def stored_point(self, coefficients: Mapping[str, float], attributes: Mapping[str, Any]) -> Point:
        """The point of a trial that is stored.

        Args:
            coefficients: per expert.
            attributes: of the trial.
        """
        return Point(dict(coefficients), self.stored_parameters(attributes), attributes.get(GROUPS, {}))

    def stored_parameters(self, attributes: Mapping[str, Any]) -> dict[str, float]:
        """The parameters of a trial; those that an earlier version did not store had their default.

        Args:
            attributes: of the trial; each parameter has its own name there.
        """
        values = {each.name: attributes.get(each.name, each.default) for each in self.parameters}
        return {name: float(value) for name, value in values.items() if value is not None}


def fixed_coefficients(experts: Sequence[str]) -> dict[str, float]:
    """1/M for every expert."""
    return dict.fromkeys(experts, 1.0 / len(experts))


def coefficient_range(method: Method, bounds: tuple[float, float]) -> tuple[float, float]:
    """Coefficients that a merge may be asked for: those that a study of the method could have."""
    values = (*bounds, *method.shared)
    return min(values), max(values)


def importance_coefficient(method: Method, coefficient: Coefficient) -> Coefficient:
    """The lambda at which an expert's Fisher information is estimated."""
    return coefficient if method.importance.at_scaled_expert else 1.0
