"""Merges of models that are in memory already, without a spec: `merge_models`.

base        theta_pre, a model
experts     theta_i by name, models or state dicts
importance  F_i: nothing, tensors by expert and parameter, or a function that computes them
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from dfmerge_studies import limits
from dfmerge_studies.checkpoints.in_place import InPlace
from dfmerge_studies.errors import InputError
from dfmerge_studies.importance.scale import scaled
from dfmerge_studies.merging import merge_into_
from dfmerge_studies.methods import (
    UNSCALED,
    Coefficients,
    Importance,
    Method,
    Normalise,
    Scale,
    fixed_coefficients,
    importance_coefficient,
    method_named,
)
from dfmerge_studies.params import align, changed_names, check_finite, float_parameters, task_vector
from dfmerge_studies.points import Point
from dfmerge_studies.tasks.sampling import torch_generator
from dfmerge_studies.transforms import TRANSFORMS, Prepared, start_of
from dfmerge_studies.trials.space import Space

Model = TypeVar("Model", bound=nn.Module)
Experts = Mapping[str, nn.Module | Mapping[str, Tensor]]
Fishers = Mapping[str, Mapping[str, Tensor]]
ImportanceOf = Callable[[Any, str], Mapping[str, Tensor]]

FLOOR = 1e-12


def merge_models(
    base: Model,
    experts: Experts,
    coefficients: Mapping[str, float] | float | None = None,
    *,
    importance: ImportanceOf | Fishers | None = None,
    method: str | None = None,
    parameters: Mapping[str, float] | None = None,
    exclude: Sequence[str] = (),
    floor: float = FLOOR,
    normalise: Normalise = "none",
    power: float = 1.0,
    seed: int = 0,
) -> Model:
    """Merge experts into a new model; base and experts are left as they are.

    >>> import torch
    >>> from dfmerge_studies import diagonal_fisher, merge_models
    >>> base, a, b = (torch.nn.Linear(2, 1, bias=False) for _ in range(3))
    >>> for model, weights in ((base, [0.0, 0.0]), (a, [1.0, 0.0]), (b, [0.0, 2.0])):
    ...     _ = model.weight.data.copy_(torch.tensor([weights]))
    >>> merge_models(base, {"a": a, "b": b}, {"a": 0.5, "b": 1.0}).weight.tolist()
    [[0.5, 2.0]]

    With importance, each entry is a mean that is weighed by it. Here expert a knows the first input, b the second:

    >>> inputs = {"a": torch.tensor([[1.0, 0.0]]), "b": torch.tensor([[0.0, 1.0]])}
    >>> def importance(model, expert):
    ...     return diagonal_fisher(model, lambda model, x: (model(x)[:, 0] - 3.0) ** 2, [inputs[expert]])
    >>> merged = merge_models(base, {"a": a, "b": b}, {"a": 0.5, "b": 1.0}, importance=importance)
    >>> [round(value, 4) for value in merged.weight[0].tolist()]
    [1.0, 4.0]

    Args:
        base: the model that every expert was fine-tuned from.
        experts: by name, models (a LoRA adapter as `merge_and_unload()` gives it) or their state dicts.
        coefficients: lambda per expert, or one number for all; may be left out for methods that have 1/M.
        importance: `None`; {expert: {parameter: tensor}}; or a function from a model and an expert's name to
            {parameter: tensor}, such as a call of `diagonal_fisher`. The function is called with the model at
            theta_pre + lambda * tau of the expert (`df-merge`) or at the expert (`df-merge-static`, `fisher`), with
            gradients required of the parameters that are merged.
        method: row of the method table. By default `df-merge` where `importance` is a function, `df-merge-static` where
            it is given, and `gta` without.
        parameters: of the method, such as {"drop_rate": 0.5} for `dare`.
        exclude: parameters, or modules by name, that stay the base's: heads of their own, for one.
        floor: added to every entry of an importance.
        normalise: divide an expert's importance by its mean ("expert", or "tensor" by tensor).
        power: of every entry of an importance, before it is normalised.
        seed: of what `dare` drops.

    Returns:
        A copy of `base` with merged weights, in evaluation mode.

    Raises:
        InputError: models, names, shapes, coefficients or importance do not fit each other.
        RunError: an importance or a merged weight is not finite.
    """
    how = MergeSettings(importance, method, parameters, exclude, floor, Scale(normalise, power), seed)
    merger = ModelMerger(base, experts, how)
    merger.merge_(Point(merger.coefficients(coefficients), merger.method.complete({}, "parameters")))
    return merger.released()


@dataclass(frozen=True)
class MergeSettings:
    """How models are merged: see `merge_models`; for a search, `parameters` may have lists."""

    importance: ImportanceOf | Fishers | None = None
    method: str | None = None
    parameters: Mapping[str, float | Sequence[float]] | None = None
    exclude: Sequence[str] = ()
    floor: float = FLOOR
    scale: Scale = UNSCALED
    seed: int = 0


class ModelMerger(Generic[Model]):
    """Merges the same models again and again, into one copy of the base.

    Raises:
        InputError: models, names, shapes or importance do not fit each other.
    """

    def __init__(self, base: Model, experts: Experts, how: MergeSettings) -> None:
        if not isinstance(base, nn.Module):
            what = f"found {type(base).__name__}, expected a torch.nn.Module"
            raise InputError(what, where="base", hint="Load the state dict into a model, which merges are copies of")
        if not isinstance(experts, Mapping):
            what = f"found {type(experts).__name__}, expected a mapping"
            raise InputError(what, where="experts", hint='Give them by name: {"a": model, "b": model}')
        if not experts:
            raise InputError("there are no experts to merge", where="experts")
        self.experts = list(experts)
        self.method = _method(how.method, how.importance).adjusted(how.parameters or {}, "parameters")
        self.model: Model = copy.deepcopy(base).eval()
        self._trainable = {name: p.requires_grad for name, p in base.named_parameters()}
        self.place = _in_place(base, self.model, experts, how.exclude)
        self.how = how
        self.scale = self.method.scale_for(how.scale)
        self._kept: dict[int, Mapping[str, Tensor]] = {}  # what is the same at every point
        if not callable(how.importance):
            self._kept = dict(enumerate(self._given(how.importance or {})))

    def _given(self, importance: Fishers) -> list[Mapping[str, Tensor]]:
        for expert in self.experts if importance else ():
            if expert not in importance:
                raise InputError(
                    f"nothing for the expert {expert!r}", where="importance", hint="Give all experts' or none"
                )
        return [self._checked(importance[expert], expert) for expert in self.experts if importance]

    def coefficients(self, given: Mapping[str, float] | float | None) -> dict[str, float]:
        """A coefficient for every expert.

        Args:
            given: by expert, or one for all; None for methods that have 1/M.

        Raises:
            InputError: one is missing, unknown or no number.
        """
        if given is None:
            if self.method.coefficients is not Coefficients.FIXED:
                raise InputError(
                    f"the method {self.method.name!r} needs coefficients",
                    where="coefficients",
                    hint=f"Give one for each of {', '.join(self.experts)}, or one number for all",
                )
            return fixed_coefficients(self.experts)
        point = dict(given) if isinstance(given, Mapping) else dict.fromkeys(self.experts, given)
        Space(tuple(self.experts), -limits.COEFFICIENT, limits.COEFFICIENT).check(point, where="coefficients")
        return {expert: float(point[expert]) for expert in self.experts}

    def merge_(self, point: Point) -> dict[str, float]:
        """Write the merge at a point into the model.

        Returns:
            Seconds by phase: fisher, merge.

        Raises:
            InputError: the importance function gave something else than tensors of the merged parameters.
            RunError: an importance or a merged weight is not finite.
        """
        vectors = self._transformed(point.parameters)
        importance = partial(self._importance_at, point)
        place, base = self.place, start_of(vectors, self.place.base)
        seconds = merge_into_(place.model, base, vectors, point.coefficients, importance, floor=self.how.floor)
        self.model.eval()
        return seconds

    def released(self) -> Model:
        """The model, its parameters as trainable as the base's."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._trainable.get(name, parameter.requires_grad))
        return self.model

    def _importance_at(self, point: Point, index: int) -> Mapping[str, Tensor] | None:
        if self.method.importance is Importance.UNIFORM:
            return None
        if index in self._kept:
            return self._kept[index]
        expert = self.experts[index]
        self.place.load_scaled_(index, importance_coefficient(self.method, point.coefficients[expert]))
        values = self._checked(self._computed(expert), expert)
        if not self.method.importance.at_scaled_expert:
            self._kept[index] = values
        return values

    def _computed(self, expert: str) -> Mapping[str, Tensor]:
        """What the importance function gives, with gradients required of what is merged, and of nothing else."""
        assert callable(self.how.importance)
        parameters = dict(self.model.named_parameters())
        try:
            for name in self.place.names:
                parameters[name].requires_grad_(True)
            with torch.enable_grad():
                return self.how.importance(self.model, expert)
        finally:
            for name in self.place.names:
                parameters[name].requires_grad_(False)

    def _checked(self, values: Any, expert: str) -> Mapping[str, Tensor]:
        """The importance of one expert's merged parameters, scaled."""
        where = f"importance of {expert!r}"
        if not isinstance(values, Mapping):
            raise InputError(f"{type(values).__name__}, not tensors by parameter", where=where)
        found = {}
        for name in self.place.names:
            value, shape = values.get(name), tuple(self.place.base[name].shape)
            if not isinstance(value, Tensor) or tuple(value.shape) != shape:
                what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else "nothing"
                raise InputError(
                    f"{what} for the parameter {name}, which has shape {shape}",
                    where=where,
                    hint="Give a tensor for every parameter that an expert changed, or leave it out with exclude=[...]",
                )
            if bool((value < 0).any()):
                raise InputError(f"a negative value for the parameter {name}", where=where)
            found[name] = value.detach().to(self.place.place_of(name)).float()
        return scaled(found, self.scale)

    @cached_property
    def _transformed(self) -> Prepared:
        """Phi, with what is the same at every point computed once."""
        transform = TRANSFORMS[self.method.transform]
        return transform.prepare(self.place.task_vectors, partial(torch_generator, self.how.seed))


def _method(name: str | None, importance: ImportanceOf | Fishers | None) -> Method:
    """The row of a merge, which must go with the importance that is there."""
    if name is None:
        name = "gta" if importance is None else "df-merge" if callable(importance) else "df-merge-static"
    method = method_named(name, "method")
    if method.estimator is not None or method.importance.blocks is not None:
        raise InputError(
            f"{name!r} computes its importance from the tasks of a spec", where="method", hint="Use fisher, or a spec"
        )
    if method.coefficients is Coefficients.FISHER_TRACE:
        raise InputError(
            f"{name!r} computes its coefficients from the tokens of a spec's models", where="method", hint="Use a spec"
        )
    if method.importance is Importance.UNIFORM and importance is not None:
        raise InputError(f"the method {name!r} has no importance", where="importance", hint="Leave one of them out")
    if method.importance is not Importance.UNIFORM and importance is None:
        raise InputError(
            f"the method {name!r} needs an importance",
            where="importance",
            hint="Give a function from a model and an expert's name to a call of diagonal_fisher",
        )
    if method.importance.at_scaled_expert and not callable(importance):
        raise InputError(
            f"the method {name!r} computes its importance anew at every coefficient",
            where="importance",
            hint="Give a function, or use df-merge-static",
        )
    return method


def _in_place(base: nn.Module, model: nn.Module, experts: Experts, exclude: Sequence[str]) -> InPlace:
    theta_pre = {n: p.detach() for n, p in float_parameters(base).items()}
    left_out = {name for name in theta_pre if _is_among(name, exclude)}
    for pattern in exclude:
        if not any(_is_among(name, [pattern]) for name in theta_pre):
            raise InputError(f"the base has no parameter and no module {pattern!r}", where="exclude")
    theta_pre = {name: tensor for name, tensor in theta_pre.items() if name not in left_out}
    for name, tensor in theta_pre.items():
        check_finite(tensor, name, where="base")
    vectors = []
    for expert, given in experts.items():
        theta = {n: t for n, t in _parameters(given, expert, base).items() if not _is_among(n, exclude)}
        try:
            align(theta_pre, theta, base_file="in memory", expert_file=f"expert {expert!r}")
        except InputError as error:
            hint = f"{error.hint}. Heads that every expert has for itself are left out with exclude=[...]"
            raise InputError(error.what, where=error.where, hint=hint) from None
        vectors.append(task_vector(expert, theta_pre, theta))
    names = changed_names(vectors, theta_pre)
    if not names:
        raise InputError("no expert differs from the base", where="experts", hint="Give the fine-tuned models")
    model.requires_grad_(False)
    return InPlace(model, {name: theta_pre[name] for name in names}, vectors, names)


def _is_among(name: str, exclude: Sequence[str]) -> bool:
    return any(name == each or name.startswith(f"{each}.") for each in exclude)


def _parameters(given: nn.Module | Mapping[str, Tensor], expert: str, base: nn.Module) -> dict[str, Tensor]:
    """An expert's parameters by name; of a state dict, what the base has as buffers or tied copies is left out."""
    if isinstance(given, nn.Module):
        if hasattr(given, "peft_config") and hasattr(given, "merge_and_unload"):
            raise InputError(
                "a model with adapters", where=f"expert {expert!r}", hint="Give what its merge_and_unload() returns"
            )
        return {name: p.detach() for name, p in float_parameters(given).items()}
    ours = float_parameters(base)
    others = base.state_dict().keys() - ours.keys()
    return {name: tensor.detach() for name, tensor in given.items() if name not in others}


def finite_scores(found: Any, where: str = "score") -> dict[str, float]:
    """What a scoring function gave, by task; a single number is the score of one task, `score`.

    Args:
        found: a mapping of tasks to numbers, or a number.
        where: what to name as the place at fault.

    Raises:
        InputError: it is something else.
    """
    if isinstance(found, (int, float)) or (isinstance(found, Tensor) and found.numel() == 1):
        found = {"score": found}
    if not isinstance(found, Mapping) or not found:
        raise InputError(f"{found!r} is not a number per task", where=where, hint='Return {"task": number, ...}')
    scores = {}
    for task, value in found.items():
        try:
            scores[str(task)] = float(value)
        except (TypeError, ValueError):
            raise InputError(f"{value!r} is no number", where=f"{where} of {task!r}") from None
    return scores


def not_finite(scores: Mapping[str, float]) -> str | None:
    """The first task whose score is not finite, if there is one."""
    return next((task for task, value in scores.items() if not math.isfinite(value)), None)
