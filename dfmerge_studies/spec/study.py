"""The whole spec."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, ValidationError, field_validator, model_validator

from dfmerge_studies import limits
from dfmerge_studies.errors import InputError
from dfmerge_studies.methods import STRENGTH, Method, method_named, per_expert, protected
from dfmerge_studies.names import NAME
from dfmerge_studies.spec.checks import labels_lacking, odd_parameters, reference_problems
from dfmerge_studies.spec.examine import Examined, examine_
from dfmerge_studies.spec.fields import (
    ExpertSettings,
    ImportanceSettings,
    ObjectiveSettings,
    ProtectSettings,
    SearchSettings,
    parse_size,
    spread_over_all,
)
from dfmerge_studies.spec.known import KnownMethod
from dfmerge_studies.spec.messages import Wrong, explained, odd_values, the_first
from dfmerge_studies.spec.reading import read_fields
from dfmerge_studies.spec.short import full_experts, full_objective, full_search, full_tasks
from dfmerge_studies.tasks.metrics import AGREEMENT, METRICS, Metric, Metrics, agrees, is_own
from dfmerge_studies.tasks.own import named_metric
from dfmerge_studies.tasks.settings import TaskSettings, metric_of
from dfmerge_studies.tasks.splits import Split
from dfmerge_studies.tasks.strict import Settings

TRUST_VARIABLE = "DFMERGE_TRUST_REMOTE_CODE"
CACHE_FOLDER = ".dfmerge/fishers"


class StudySpec(Settings):
    """A whole spec."""

    name: str = Field(description="name of the study")
    base: str = Field(description="model that every expert was fine-tuned from")
    experts: dict[str, ExpertSettings] = Field(description="the fine-tuned models by name")
    tokenizer: Literal["base", "union"] = Field(
        "base", description="of the merge: the base's, or union: with every expert's added tokens and their own rows"
    )
    tasks: dict[str, TaskSettings] = Field(description="what merged models are scored on, by name")
    method: KnownMethod = Field("df-merge", description="row of the method table, or a cell of it")
    parameters: dict[KnownMethod, dict[str, float | list[float]]] = Field(
        default_factory=dict,
        description="values of methods' own parameters, by method: a number, or a list of what is tried or searched",
    )
    importance: ImportanceSettings = ImportanceSettings.model_validate({})
    search: SearchSettings = SearchSettings.model_validate({})
    objective: ObjectiveSettings = ObjectiveSettings.model_validate({})
    protect: ProtectSettings | None = Field(
        None, description="a task along whose directions at the base merges are damped: {task, rank, strength}"
    )
    baselines: list[KnownMethod] = Field(
        default_factory=list, description="methods that `run` shows beside this one, each as a study NAME.METHOD"
    )
    multi_task: str | None = Field(
        None, description="a model fine-tuned on all tasks together, for `compare` to show beside the methods"
    )
    storage: str = Field("", description="Optuna storage URL; default sqlite:///NAME.db beside the spec")
    cache: str | None = Field(
        "auto", description="auto, all or none; or the Fisher cache's place, a folder or an fsspec URL, which keeps all"
    )
    cache_keep: Literal["auto", "all"] | None = Field(
        None, description="what a place named by `cache` keeps; auto: what will be asked for again"
    )
    cache_limit: str | None = Field(
        "auto", description="size that the cache may reach, e.g. 20GB; oldest go first; null: no limit"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1")
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = Field(
        None, description="how accelerate spreads a model's layers over all CUDA devices; null: one device"
    )
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = Field("float32", description="of weights in memory")
    memory: str = Field(
        "auto",
        description="that a run may take of its device, e.g. 16GiB; auto: what a GPU has free, of several "
        "workers on a device their share of what is free. Where it is too little, importances are computed part by "
        "part: changes results by rounding only",
    )
    compute: Literal["auto", "float32", "tf32", "bf16"] = Field(
        "auto", description="of matrix products when float32 weights are scored; auto: bf16 where the hardware has it"
    )
    token_budget: int | None = Field(
        None,
        gt=0,
        le=limits.COUNT,
        description="tokens in one evaluation batch: bounds memory; changes results by rounding only; "
        "null: 16384, and four times as many on a GPU that has memory for them",
    )
    trust_remote_code: bool = Field(
        False,
        description="let code that comes with a checkpoint run; the command line or the environment must agree",
    )

    _full_experts = field_validator("experts", mode="before")(full_experts)
    _full_tasks = field_validator("tasks", mode="before")(full_tasks)
    _full_objective = field_validator("objective", mode="before")(full_objective)
    _spread_over_all = field_validator("device_map")(spread_over_all)
    _full_search = field_validator("search", mode="before")(full_search)

    _file: Path = PrivateAttr(Path("spec.yaml"))
    _workdir: Path | None = PrivateAttr(None)

    @property
    def file(self) -> Path:
        """The YAML file that this was read from."""
        return self._file

    @property
    def root(self) -> Path:
        """Folder that relative paths of models and data start from."""
        return self._file.parent

    @property
    def workdir(self) -> Path:
        """Folder that relative paths of what is written start from: storage, cache, outbox."""
        return self._workdir if self._workdir is not None else self.root

    @property
    def storage_url(self) -> str:
        """The storage as the spec writes it, or the default."""
        return self.storage or f"sqlite:///{self.name}.db"

    @property
    def cache_place(self) -> str | None:
        """Where Fishers are kept: a folder, an fsspec URL, or None for nowhere."""
        if self.cache in (None, "none"):
            return None
        return CACHE_FOLDER if self.cache in ("auto", "all") else self.cache

    @property
    def cache_policy(self) -> Literal["auto", "all"]:
        """Which Fishers are kept there."""
        return self.cache_keep or ("auto" if self.cache == "auto" else "all")

    @property
    def row(self) -> Method:
        """The row of the method table, with the spec's values of its parameters."""
        return self.row_of(self.method)

    def row_of(self, method: str) -> Method:
        """A row of the method table, with the spec's values of its parameters, searched as the spec has it.

        Args:
            method: its name; a cell has the parameters that the row of its transform is given, and its own before them.

        Raises:
            InputError: the method has no such parameter, or it cannot have that value.
        """
        row = method_named(method, self.where("method"))
        if self.search.coefficients == "per-expert":
            row = per_expert(row)
        for name in dict.fromkeys(each for each in (row.phi, row.name, method) if each in self.parameters):
            row = row.adjusted(self.parameters[name], self.where(f"parameters.{name}"))
        if self.protect is not None:
            row = protected(row).adjusted({STRENGTH.name: self.protect.strength}, self.where("protect.strength"))
        return row

    @property
    def aims(self) -> list[str]:
        """Names of the tasks that the objective is about: all but guards."""
        return [name for name, task in self.tasks.items() if not task.guard]

    @property
    def untested(self) -> list[str]:
        """Tasks that keep the test split from being scored: those of the objective that have none."""
        return [name for name in self.aims if self.tasks[name].test_split is None]

    def tasks_on(self, split: Split) -> list[str]:
        """Tasks that have a split: all of them, but guards may lack a test split.

        Args:
            split: of the tasks' data.
        """
        return [name for name, task in self.tasks.items() if split != "test" or task.test_split or not task.guard]

    @property
    def allowed(self) -> dict[str, float]:
        """Points that each task may lose, of those that have a bound: against its expert, a guard against the base."""
        own = {n: self.search.max_drop if task.max_drop is None else task.max_drop for n, task in self.tasks.items()}
        return {name: points for name, points in own.items() if points is not None}

    def needs_labels(self, task: str) -> bool:
        """Whether the validation inputs of a task must have labels.

        Args:
            task: its name.
        """
        agreement = self.objective.kind == AGREEMENT and not self.tasks[task].guard
        return not agreement or self.importance.estimator == "empirical"

    def metrics(self, split: Split) -> Metrics:
        """What the scores of a split are, by task: the task's own metric, or agreement with the task's expert.

        Args:
            split: of the tasks' data.
        """
        agreement = self.objective.kind == AGREEMENT
        return Metrics(
            {
                name: METRICS[AGREEMENT]
                if agreement and not task.guard and agrees(split, task.doc_to_target)
                else self._metric(name)
                for name, task in self.tasks.items()
            },
            {name: points for name, points in self.allowed.items() if self.tasks[name].guard},
        )

    def _metric(self, task: str) -> Metric:
        settings = self.tasks[task]
        if not is_own(settings.metric):
            return metric_of(settings)
        where = self.where(f"tasks.{task}.metric")
        return named_metric(settings.metric, str(self.root), trusted=self.trust_remote_code, where=where)

    def where(self, field: str) -> str:
        """File and field, for messages.

        Args:
            field: dotted name of the field.
        """
        return f"{self._file}: {field}"

    def derive(self, **changes: Any) -> StudySpec:
        """A validated copy with other values, same file and folders.

        Args:
            **changes: fields to replace; of `importance`, `search` and `objective`, a mapping replaces those it names.

        Raises:
            InputError: a value is not allowed.
        """
        fields = self.model_dump()
        for name, value in changes.items():
            inner = isinstance(value, Mapping) and isinstance(getattr(self, name, None), Settings)
            fields[name] = {**fields[name], **value} if inner else value
        try:
            copy = StudySpec.model_validate(fields)
        except ValidationError as error:
            raise explained(error, self._file, StudySpec)[0].problem from error
        copy._file, copy._workdir = self._file, self._workdir
        for field, what, hint in labels_lacking(copy):
            raise InputError(what, where=copy.where(field), hint=hint)
        for _, problem in odd_parameters(copy):
            raise problem
        return copy

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], *, file: Path, workdir: Path | None) -> StudySpec:
        """The spec that another process has read and checked.

        Args:
            fields: its `model_dump`.
            file: the YAML file that it came from.
            workdir: where relative outputs go, if not beside it.
        """
        spec = cls.model_validate(fields)
        spec._file, spec._workdir = file, workdir
        return spec

    @classmethod
    def from_yaml(cls, file: Path | str, overrides: Sequence[str] = (), *, workdir: Path | None = None) -> StudySpec:
        """Read and validate a spec.

        Args:
            file: the YAML file.
            overrides: `dotted.key=value` texts, applied before validation; values are YAML.
            workdir: where relative outputs go, if not beside the spec.

        Raises:
            InputError: naming file, field, what was found, what was expected.
        """
        path = Path(file)
        spec, wrong = cls._validated(read_fields(path, overrides), path)
        if spec is None:
            raise the_first([each.problem for each in wrong])
        spec = _as_trusted(spec, overrides)
        spec._file, spec._workdir = path.resolve(), workdir
        if problems := [problem for _, problem in reference_problems(spec)]:
            raise the_first(problems)
        return spec

    @classmethod
    def examine(
        cls, file: Path | str, overrides: Sequence[str] = (), *, workdir: Path | None = None
    ) -> Examined[StudySpec]:
        """Read a spec and find everything that is wrong with it.

        Args:
            file: the YAML file.
            overrides: `dotted.key=value` texts, applied before validation; values are YAML.
            workdir: where relative outputs go, if not beside the spec.
        """
        path, found = Path(file), Examined[StudySpec]()
        try:
            data = read_fields(path, overrides)
        except InputError as error:
            found.problems.append(error)
            return found
        examine_(found, data, lambda fields: cls._validated(fields, path))
        if found.spec is not None:
            found.spec = _as_trusted(found.spec, overrides)
            found.spec._file, found.spec._workdir = path.resolve(), workdir
            found.problems += [p for field, p in reference_problems(found.spec) if found.is_sound(field)]
        return found

    @classmethod
    def _validated(cls, data: Mapping[str, Any], path: Path) -> tuple[StudySpec | None, list[Wrong]]:
        """The spec that a mapping means, or the places and messages of what is wrong."""
        if wrong := list(odd_values(data, path)):
            return None, wrong
        try:
            return cls.model_validate(data), []
        except ValidationError as error:
            return None, explained(error, path, StudySpec)

    @field_validator("name")
    @classmethod
    def _name_is_harmless(cls, value: str) -> str:
        if not NAME.fullmatch(value):
            raise ValueError("a name is 1 to 100 letters, digits, '.', '_' or '-', and does not start with '.'")
        return value

    @model_validator(mode="after")
    def _kept_in_one_way(self) -> StudySpec:
        if self.cache_keep is not None and self.cache in (None, "none", "auto", "all"):
            raise ValueError(f"cache: {self.cache or 'null'} says what is kept; cache_keep goes with a folder or URL")
        return self

    @model_validator(mode="after")
    def _compute_is_of_float32_weights(self) -> StudySpec:
        if self.compute != "auto" and self.dtype != "float32":
            raise ValueError(f"compute: {self.compute} goes with dtype: float32; {self.dtype} weights use their own")
        return self

    @model_validator(mode="after")
    def _ucb_has_one_objective(self) -> StudySpec:
        if self.search.acquisition == "ucb" and self.objective.kind == "pareto":
            raise ValueError("acquisition: ucb has one objective; use ei with objective: pareto")
        return self

    @model_validator(mode="after")
    def _expected_gain_has_one_objective(self) -> StudySpec:
        if self.search.stop == "gain" and self.objective.kind == "pareto":
            raise ValueError("stop: gain has one objective; use patience with objective: pareto")
        return self

    @model_validator(mode="after")
    def _races_have_one_objective(self) -> StudySpec:
        if self.search.race is not None and self.objective.kind == "pareto":
            raise ValueError("racing has one objective: with pareto a trial that is worse in one task may be kept")
        return self

    @field_validator("device")
    @classmethod
    def _device_has_a_known_form(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", value):
            raise ValueError("expected auto, cpu, cuda, cuda:N or mps")
        return value

    @field_validator("memory")
    @classmethod
    def _memory_is_a_size(cls, value: str) -> str:
        if value != "auto" and parse_size(value) < 1:
            raise ValueError("expected auto or a size such as 16GiB")
        return value

    @field_validator("cache_limit")
    @classmethod
    def _limit_is_a_size(cls, value: str | None) -> str | None:
        if value not in (None, "auto"):
            parse_size(value)
        return value


def _as_trusted(spec: StudySpec, overrides: Sequence[str]) -> StudySpec:
    """The spec, in which foreign code runs only if whoever uses the spec says so: its author may be somebody else."""
    stated = any(override.partition("=")[0].strip() == "trust_remote_code" for override in overrides)
    agreed = os.environ.get(TRUST_VARIABLE, "").lower() in ("1", "true", "yes", "on")
    return spec if stated or agreed else spec.model_copy(update={"trust_remote_code": False})
