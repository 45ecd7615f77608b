"""What one row of the method table says, and what follows from it: a space, a point, a grid.

point   what a trial of a method has: a coefficient per expert (or more, see `points.py`), and a value of each
        parameter that the method has
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, StrEnum
from typing import Any, Literal

from dfmerge_studies.errors import InputError, did_you_mean
from dfmerge_studies.points import GROUPS, Coefficient, Point, fine_name
from dfmerge_studies.trials.space import Space

SHARED = "lambda"  # name, on a grid, of the one coefficient that all experts share


Blocks = Literal["gram", "kfac"]


class Importance(Enum):
    """Where the importance of an expert's parameters is estimated."""

    UNIFORM = "C = I"
    AT_EXPERT = "F(theta_i)"
    AT_SCALED_EXPERT = "F(theta_pre + lambda_i tau_i)"
    GRAM_AT_EXPERT = "Gram matrices of inputs at theta_i"
    KFAC_AT_EXPERT = "Kronecker factors of F(theta_i)"
    KFAC_AT_SCALED_EXPERT = "Kronecker factors of F(theta_pre + lambda_i tau_i)"

    @property
    def at_scaled_expert(self) -> bool:
        """Whether it depends on lambda."""
        return self in (Importance.AT_SCALED_EXPERT, Importance.KFAC_AT_SCALED_EXPERT)

    @property
    def blocks(self) -> Blocks | None:
        """What it has instead of a diagonal for linear layers."""
        if self is Importance.GRAM_AT_EXPERT:
            return "gram"
        return "kfac" if self in (Importance.KFAC_AT_EXPERT, Importance.KFAC_AT_SCALED_EXPERT) else None

    @property
    def word(self) -> str:
        """What a spec calls it."""
        return _IMPORTANCE_WORDS[self]


class Estimator(StrEnum):
    """Which choices of an input count for Fisher information; `importance.task_fisher` has the formulas."""

    EXACT = "exact"
    SAMPLED = "sampled"
    EMPIRICAL = "empirical"
    MASK_NODES = "mask-nodes"

    @property
    def draws(self) -> bool:
        """Whether the one choice of an input that counts is drawn, so that a generator is needed."""
        return self in (Estimator.SAMPLED, Estimator.MASK_NODES)

    @property
    def of_texts(self) -> Estimator:
        """What it is for texts that a model writes: they have no finite set of choices to take the mean over."""
        return Estimator.SAMPLED if self is Estimator.EXACT else self


Normalise = Literal["none", "expert", "tensor"]


@dataclass(frozen=True)
class Scale:
    """How importances are scaled before they are compared across experts; `importance.scale` has the formula.

    Attributes:
        normalise: over what each expert's mean is taken that its importance is divided by.
        power: of every entry, before that.
    """

    normalise: Normalise = "none"
    power: float = 1.0


UNSCALED = Scale()


class Coefficients(Enum):
    """Who chooses lambda."""

    FIXED = "1/M"
    SHARED_GRID = "one shared value on a grid"
    PER_EXPERT = "one per expert, Bayesian"
    FISHER_TRACE = "one per expert and layer, from the trace of the Fisher information on random tokens"

    @property
    def chosen(self) -> bool:
        """Whether trials choose among several; otherwise there is one trial."""
        return self in (Coefficients.SHARED_GRID, Coefficients.PER_EXPERT)

    @property
    def word(self) -> str:
        """What a spec calls it."""
        return _COEFFICIENT_WORDS[self]


_IMPORTANCE_WORDS = {
    Importance.UNIFORM: "uniform",
    Importance.AT_EXPERT: "fisher-at-expert",
    Importance.AT_SCALED_EXPERT: "fisher-at-scaled-expert",
    Importance.GRAM_AT_EXPERT: "gram-at-expert",
    Importance.KFAC_AT_EXPERT: "kfac-at-expert",
    Importance.KFAC_AT_SCALED_EXPERT: "kfac-at-scaled-expert",
}
_COEFFICIENT_WORDS = {
    Coefficients.FIXED: "fixed",
    Coefficients.SHARED_GRID: "shared",
    Coefficients.PER_EXPERT: "per-expert",
    Coefficients.FISHER_TRACE: "fisher-trace",
}


@dataclass(frozen=True)
class Parameter:
    """A number that a method has besides the coefficients.

    Attributes:
        name: in specs, in a trial's attributes and in JSON; with dashes it is a flag of `merge`.
        meaning: what it says, for `--help`.
        low: smallest value that it can have.
        high: largest value that it can have.
        below_high: whether `high` itself is too large.
        default: its value where it is not searched; None: a merge must be told.
        grid: values to try, of a method whose coefficients are on a grid.
        bounds: range to search, of a method whose coefficients are searched.
    """

    name: str
    meaning: str
    low: float
    high: float
    below_high: bool = False
    default: float | None = None
    grid: tuple[float, ...] = ()
    bounds: tuple[float, float] | None = None

    @property
    def label(self) -> str:
        """Its name as a text has it."""
        return label(self.name)

    @property
    def flag(self) -> str:
        """Its flag of `merge`."""
        return "--" + self.name.replace("_", "-")

    @property
    def searched(self) -> bool:
        """Whether trials differ in it."""
        return bool(self.grid) or self.bounds is not None

    def under(self, coefficients: Coefficients) -> Parameter:
        """The same parameter of a method with another policy: a grid and a range stand for each other.

        Args:
            coefficients: the policy.
        """
        values = self.grid or self.bounds or ()
        if not values:
            return self
        middle = self.default if self.default is not None else values[len(values) // 2]
        if coefficients is Coefficients.SHARED_GRID:
            return self if self.grid else replace(self, bounds=None)
        if coefficients is Coefficients.PER_EXPERT:
            return replace(self, grid=(), bounds=(min(values), max(values)), default=middle)
        return replace(self, grid=(), bounds=None)

    def check(self, value: float, where: str | None = None) -> None:
        """Refuse a value that it cannot have.

        Args:
            value: the value.
            where: what to name as the place at fault, such as a flag.

        Raises:
            InputError: it is out of range.
        """
        if not self.low <= value <= self.high or (self.below_high and value == self.high):
            close = ")" if self.below_high else "]"
            raise InputError(
                f"the {self.label} is {value}, outside [{self.low:g}, {self.high:g}{close}",
                where=where,
                hint="Choose one inside",
            )


def label(name: str) -> str:
    """A parameter's name as a text has it: `drop rate`."""
    return name.replace("_", " ")


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
