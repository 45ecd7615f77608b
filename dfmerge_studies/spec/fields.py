"""The parts of a spec: experts, importance, search, objective; names and sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from dfmerge_studies import limits
from dfmerge_studies.errors import did_you_mean
from dfmerge_studies.methods import Estimator, Normalise, Scale
from dfmerge_studies.names import NAME
from dfmerge_studies.tasks.strict import Settings, one_of
from dfmerge_studies.trials.space import is_multiple

TRACED: Literal["fisher-trace"] = "fisher-trace"  # a point of `search.enqueue` that is computed from random tokens
DEFAULT_SAMPLER = "auto"  # of a new study whose spec names none; one that is there keeps its own
UNIFORM: Literal["uniform"] = "uniform"  # what `search.startup` can be
DESCENT: Literal["descent"] = "descent"
DEFAULT_STARTUP: Literal["uniform", "descent"] = DESCENT  # of a new study that `auto` searches, where there are slopes

# Searches that a spec may name instead of writing their fields.
SEARCHES: Mapping[str, Mapping[str, Any]] = {
    # arXiv 2504.18992, section 5: 10 uniform trials, then 50 by expected improvement of the mean under one process.
    "paper": {"sampler": "gp", "acquisition": "ei", "trials": 60, "startup_trials": 10, "bounds": [0.0, 1.0]},
    "per-expert": {"coefficients": "per-expert"},
    "gradient": {"sampler": "gradient", "granularity": "layers", "trials": 20},
}


def search_of(name: str) -> dict[str, Any]:
    """The fields of a search that has a name.

    Raises:
        ValueError: it has none.
    """
    if name not in SEARCHES:
        raise ValueError(did_you_mean(name, SEARCHES) or f"expected a mapping of fields, or {', '.join(SEARCHES)}")
    return dict(SEARCHES[name])


class ExpertSettings(Settings):
    """One fine-tuned model."""

    form: ClassVar[str] = "a model's directory or Hub id, or {model, task}"

    model: str = Field(description="directory, Hub id, Hub id@revision, or package:MODULE/FOLDER")
    task: str | None = Field(None, description="task that its importance is estimated on; null: on all of them")


class ImportanceSettings(Settings):
    """How the importance C_i of an expert's parameters is estimated."""

    estimator: Annotated[str, one_of("estimators", lambda: Estimator)] = Field(
        "exact",
        description="which expectation over choices (of generated texts, exact means sampled); mask-nodes: of masks "
        "on heads and neurons",
    )
    samples: int = Field(30, gt=0, le=limits.COUNT, description="validation inputs per task, drawn with the seed")
    indices: dict[str, list[int]] | str | None = Field(
        None, description="the validation rows themselves, by task, or a JSON file with that, instead of a draw"
    )
    floor: float = Field(
        1e-12,
        gt=0,
        le=limits.COEFFICIENT,
        description="added to every entry, so that unseen parameters fall back to C = I",
    )
    normalise: Normalise = Field(
        "none", description="divide an expert's importance by its mean, over all entries or tensor by tensor"
    )
    power: float = Field(1.0, gt=0, le=1, description="of every entry of an importance, before it is normalised")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="what Fishers are rounded to; auto: bfloat16, or what an older study has"
    )
    row_budget: int | None = Field(
        None,
        gt=0,
        le=limits.COUNT,
        description="tokens in one chunk of rows: bounds memory; changes results by rounding only; "
        "null: 8192, and four times as many on a GPU that has memory for them",
    )

    @property
    def scale(self) -> Scale:
        """How importances are scaled, unless the method prescribes it."""
        return Scale(self.normalise, self.power)

    @property
    def rounding(self) -> Literal["float32", "bfloat16"]:
        """What Fishers are rounded to, before they are used and kept."""
        return "bfloat16" if self.dtype == "auto" else self.dtype


class WarmStart(Settings):
    """Another study, whose best points are tried first."""

    form: ClassVar[str] = "a study's name, or {study, storage, points}"

    study: str = Field(description="its name")
    storage: str | None = Field(None, description="its storage, an Optuna URL; null: the storage of this study")
    points: int = Field(5, gt=0, le=limits.TRIALS, description="how many of its points are tried at most")


class Granularity(Settings):
    """Coefficients that are finer than an expert's whole model; one of the three ways."""

    form: ClassVar[str] = "model, layers, {blocks: K} or {groups: {NAME: REGEX}}"
    words: ClassVar[tuple[str, ...]] = ("model", "layers")

    each: Literal["layer"] | None = Field(None, description="layer: every layer, as the short form `layers` has it")
    blocks: int | None = Field(None, gt=0, le=limits.LAYERS, description="so many runs of consecutive layers")
    groups: dict[str, str] | None = Field(None, description="regular expressions of parameters' names, by group")

    @model_validator(mode="after")
    def _one_of_three(self) -> Granularity:
        if (self.each, self.blocks, self.groups).count(None) != 2:
            raise ValueError("write model, layers, {blocks: K} or {groups: {NAME: REGEX, ...}}")
        return self

    @field_validator("groups")
    @classmethod
    def _groups_have_names_and_expressions(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        if value is not None and not value:
            raise ValueError("there is no group; write model")
        for name, text in (value or {}).items():
            if not NAME.fullmatch(name) or "." in name or name == "rest":
                raise ValueError(f"{name!r} is no usable name of a group: use letters, digits, '_' and '-', not 'rest'")
            try:
                re.compile(text)
            except re.error as error:
                raise ValueError(f"{text!r} is no regular expression: {error}") from None
        return value


class Racing(Settings):
    """Trials that cannot win are stopped on a part of their rows."""

    form: ClassVar[str] = "{error: NUMBER}"

    error: float = Field(0.1, gt=0, le=0.5, description="bound on the rate at which a trial that would win is stopped")


class SearchSettings(Settings):
    """How coefficients are proposed."""

    form: ClassVar[str] = f"a mapping of fields, or {', '.join(SEARCHES)}"

    coefficients: Literal["method", "per-expert"] = Field(
        "method", description="per-expert: search one per expert, also where the method has one shared value on a grid"
    )
    sampler: Literal["auto", "gp", "random", "gradient"] | None = Field(
        None,
        description="auto: one Gaussian process per task in a trust region; gp: Optuna's; random: uniform draws; "
        "gradient: steps down the loss of validation rows, best with granularity: layers; "
        f"null: what the study has, of a new one {DEFAULT_SAMPLER}",
    )
    rate: float = Field(
        0.05, gt=0, le=1, description="of gradient and descent: length of a step, as a share of the bounds' range"
    )
    gradient_rows: int = Field(
        32,
        gt=0,
        le=limits.COUNT,
        description="of gradient and descent: validation rows per task, drawn anew for each trial",
    )
    acquisition: Literal["ei", "ucb"] = Field(
        "ei", description="expected improvement (Optuna's logEI), or upper confidence bound (needs the extra ucb)"
    )
    kappa: float = Field(
        2.576, ge=0, le=limits.COEFFICIENT, description="of ucb: weight of the deviation against the mean"
    )
    trials: int = Field(60, gt=0, le=limits.TRIALS, description="total that the study should reach, over all runs")
    startup: Literal["uniform", "descent"] | None = Field(
        None,
        description="of auto: what its startup trials are, uniform draws, or steps down the loss from the best given "
        f"point; null: what the study has, of a new one {DEFAULT_STARTUP} where there are slopes",
    )
    startup_trials: int = Field(10, ge=0, le=limits.TRIALS, description="trials before the Gaussian process proposes")
    bounds: tuple[float, float] = Field((0.0, 1.0), description="range of every coefficient")
    step: float | None = Field(None, gt=0, description="propose only multiples, so that Fishers recur in the cache")
    seed: int = Field(0, ge=0, le=limits.SEED, description="of everything random")
    granularity: Granularity | None = Field(
        None,
        description="what has a coefficient of its own: model, every expert; layers, {blocks: K} or "
        "{groups: {NAME: REGEX}}, every group of an expert's parameters",
    )
    holdout: int | float | None = Field(
        None,
        ge=0,
        le=limits.COUNT,
        description="validation rows per task (count, or fraction below 1) that the search does not see, on which the "
        "winner is chosen; null: those that `limit` leaves over",
    )
    enqueue: list[float | Literal["fisher-trace"] | dict[str, float]] = Field(
        default_factory=list,
        description="points to try first, after 1/M: one number for all experts, or one each; of groups also "
        "fisher-trace, the coefficients of `fim`",
    )
    warm_start: WarmStart | None = Field(
        None, description="another study whose best points are tried first: its name, or {study, storage, points}"
    )
    patience: int | None = Field(
        None, gt=0, le=limits.TRIALS, description="stop after so many trials without a gain above the noise"
    )
    stop: Literal["none", "gain"] = Field(
        "none", description="gain: stop when the Gaussian process expects no gain above the noise any more"
    )
    racing: bool | Racing = Field(
        False,
        description="stop a trial as soon as rows that the best trial was scored on too say that it cannot win: true, "
        "or {error: 0.05}",
    )
    max_drop: float | None = Field(
        None,
        ge=0,
        description="no task may lose more points than this against its own expert: hundredths of its metric's range",
    )

    @field_validator("warm_start", mode="before")
    @classmethod
    def _short_warm_start(cls, value: Any) -> Any:
        return {"study": value} if isinstance(value, str) else value

    @field_validator("bounds")
    @classmethod
    def _bounds_are_ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not value[0] < value[1]:
            raise ValueError(f"the lower bound {value[0]} must be below the upper bound {value[1]}")
        if max(map(abs, value)) > limits.COEFFICIENT:
            raise ValueError(f"no coefficient can be larger than {limits.COEFFICIENT}")
        return value

    @field_validator("granularity", mode="before")
    @classmethod
    def _model_is_the_usual(cls, value: Any) -> Any:
        return {"model": None, "layers": {"each": "layer"}}.get(value, value) if isinstance(value, str) else value

    @field_validator("holdout")
    @classmethod
    def _holdout_is_a_count_or_a_fraction(cls, value: float | None) -> float | None:
        if isinstance(value, float) and not 0 < value < 1:
            raise ValueError("a fraction must lie in (0, 1); write a count as an integer")
        return value

    @field_validator("racing")
    @classmethod
    def _races_have_an_error(cls, value: bool | Racing) -> bool | Racing:
        return Racing.model_validate({}) if value is True else value

    @property
    def race(self) -> Racing | None:
        """How trials are raced, None where they are not."""
        return self.racing if isinstance(self.racing, Racing) else None

    @model_validator(mode="after")
    def _raced_trials_teach_the_model(self) -> SearchSettings:
        if self.race is not None and (self.sampler in ("gp", "gradient") or self.acquisition == "ucb"):
            raise ValueError(
                "racing needs sampler: auto or random; gp and ucb learn nothing from trials that were stopped, and "
                "would propose their points again, and gradient needs the slope of every trial"
            )
        return self

    @model_validator(mode="after")
    def _startups_are_those_of_auto(self) -> SearchSettings:
        if self.startup == DESCENT and self.stated_sampler not in (None, "auto"):
            raise ValueError(f"startup: descent goes with sampler: auto, and {self._model_text} does not start by it")
        if self.startup == UNIFORM and self.sampler == "gradient":
            raise ValueError("startup: uniform goes with sampler: auto, and gradient descends from its first trial on")
        return self

    @model_validator(mode="after")
    def _ucb_has_a_model(self) -> SearchSettings:
        if self.acquisition == "ucb" and self.sampler not in (None, "gp"):
            raise ValueError("acquisition: ucb needs sampler: gp")
        return self

    @model_validator(mode="after")
    def _gains_are_expected_by_a_model(self) -> SearchSettings:
        if self.stop == "gain" and (self.acquisition == "ucb" or self.sampler in ("random", "gradient")):
            raise ValueError("stop: gain needs the expected improvement of sampler: auto or gp; patience needs none")
        return self

    @model_validator(mode="after")
    def _steps_have_any_length(self) -> SearchSettings:
        if self.descends and self.step is not None:
            raise ValueError(f"{self.descent_text} takes steps of any length; leave step out")
        return self

    @property
    def descends(self) -> bool:
        """Whether trials, all of them or those of the startup, are steps down the loss, and need its slopes."""
        return self.sampler == "gradient" or self.startup == DESCENT

    @property
    def descent_text(self) -> str:
        """The setting that makes them such steps, as a spec writes it."""
        return "sampler: gradient" if self.sampler == "gradient" else "startup: descent"

    @property
    def _model_text(self) -> str:
        return "acquisition: ucb" if self.acquisition == "ucb" else f"sampler: {self.sampler}"

    @property
    def stops(self) -> dict[str, Any]:
        """What may stop the search before its total."""
        return {"patience": self.patience, "stop": self.stop}

    @property
    def stated_sampler(self) -> str | None:
        """The sampler, as far as these settings say: confidence bounds are those of one process of the objective."""
        return "gp" if self.acquisition == "ucb" else self.sampler

    @model_validator(mode="after")
    def _step_divides_the_range(self) -> SearchSettings:
        low, high = self.bounds
        if self.step is not None and (self.step > high - low or not is_multiple(high - low, self.step)):
            raise ValueError(f"step: {self.step:g} does not divide the range from {low:g} to {high:g}")
        if self.step is not None and high - low > self.step * limits.STEPS:
            raise ValueError(f"step: {self.step:g} makes more than {limits.STEPS} steps; leave it out")
        return self


class ProtectSettings(Settings):
    """A task whose directions at the base a merge does not move along."""

    form: ClassVar[str] = "{task, rank, strength}"

    task: str = Field(description="name of the task, best a guard")
    rank: int = Field(8, gt=0, le=limits.COUNT, description="directions of each linear layer")
    strength: float | list[float] = Field(
        1.0, description="share of the step along them that is taken away; a list is tried or searched"
    )


class ObjectiveSettings(Settings):
    """What makes one trial better than another."""

    form: ClassVar[str] = "a kind such as mean, or {kind, weights}"

    kind: Literal["mean", "weighted", "min", "pareto", "agreement"] = Field(
        "mean",
        description="how task scores become one value; agreement: the mean of scores without labels",
    )
    weights: dict[str, float] | None = Field(None, description="per task, for `weighted`")

    @model_validator(mode="after")
    def _weights_go_with_weighted(self) -> ObjectiveSettings:
        if (self.kind == "weighted") != (self.weights is not None):
            raise ValueError("'weights' and 'kind: weighted' go together")
        if self.weights is not None and (min(self.weights.values(), default=0) < 0 or not sum(self.weights.values())):
            raise ValueError("weights must not be negative, and not all zero")
        if self.weights is not None and max(self.weights.values()) > limits.COUNT:
            raise ValueError(f"no weight can be larger than {limits.COUNT}")
        return self


def spread_over_all(value: str | None, info: ValidationInfo) -> str | None:
    """A `device_map` is over all CUDA devices, so the spec's `device` cannot be one of them, or none."""
    device = info.data.get("device", "auto")
    if value is not None and device not in ("auto", "cuda"):
        raise ValueError(
            f"{value} spreads a model over all CUDA devices, and device: {device} is a single one; "
            "leave out one of the two"
        )
    return value


def parse_size(text: str) -> int:
    """Bytes of a size such as 500MB or 20GB (powers of 1000) or 2GiB (powers of 1024).

    Args:
        text: a number, decimals allowed, and a unit; without a unit, bytes.

    Raises:
        ValueError: the text has another form.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*(?:([kKMGT])(i?))?B?\s*", text)
    if match is None:
        raise ValueError(f"{text!r} is no size; write 500MB, 20GB or 2GiB")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index((prefix or " ").upper()))
