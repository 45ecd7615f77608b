"""The spec: one YAML file that says what to merge, how to score it and how to search.

Unknown keys are refused.  Relative paths are relative to the spec's own folder.  docs/specs.md documents every field.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from dfmerge_studies.errors import InputError
from dfmerge_studies.tasks.settings import ChoiceTask, ClassificationTask, TaskSettings

MethodName = Literal["df-merge", "df-merge-static", "gta", "averaging", "fisher", "task-arithmetic"]
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
_ON_STEP = 1e-8  # the tolerance that Optuna uses for values of a stepped range


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ExpertSettings(_Settings):
    """One fine-tuned model."""

    model: str = Field(description="directory, Hub id, Hub id@revision, or package:MODULE/FOLDER")
    task: str | None = Field(None, description="task that its importance is estimated on; null: on all of them")


class ImportanceSettings(_Settings):
    """How the importance C_i of an expert's parameters is estimated."""

    estimator: Literal["exact", "sampled", "empirical"] = Field("exact", description="which expectation over choices")
    samples: int = Field(30, gt=0, description="validation inputs per task, drawn with the seed")
    indices: dict[str, list[int]] | str | None = Field(
        None, description="the validation rows themselves, by task, or a JSON file with that, instead of a draw"
    )
    floor: float = Field(1e-12, gt=0, description="added to every entry, so that unseen parameters fall back to C = I")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="how Fishers are stored in the cache")
    row_budget: int = Field(
        8192, gt=0, description="tokens in one chunk of rows: bounds memory; changes results by rounding only"
    )


class SearchSettings(_Settings):
    """How coefficients are proposed."""

    sampler: Literal["gp", "random"] = Field("gp", description="Gaussian process, or uniform draws")
    acquisition: Literal["ei"] = Field("ei", description="expected improvement (Optuna's logEI)")
    trials: int = Field(60, gt=0, description="total that the study should reach, over all runs")
    startup_trials: int = Field(10, ge=0, description="random trials before the Gaussian process")
    bounds: tuple[float, float] = Field((0.0, 1.0), description="range of every coefficient")
    step: float | None = Field(None, gt=0, description="propose only multiples, so that Fishers recur in the cache")
    seed: int = Field(0, ge=0, description="of everything random")
    enqueue: list[float | dict[str, float]] = Field(
        default_factory=list, description="points to try first, after 1/M: one number for all experts, or one each"
    )
    max_drop: float | None = Field(
        None, ge=0, description="no task may lose more than so many points (of 100) against its own expert"
    )

    @field_validator("bounds")
    @classmethod
    def _bounds_are_ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not value[0] < value[1]:
            raise ValueError(f"the lower bound {value[0]} must be below the upper bound {value[1]}")
        return value

    @model_validator(mode="after")
    def _step_divides_the_range(self) -> SearchSettings:
        low, high = self.bounds
        if self.step is not None and not _is_multiple(high - low, self.step):
            raise ValueError(f"step: {self.step:g} does not divide the range from {low:g} to {high:g}")
        return self


def _is_multiple(value: float, step: float) -> bool:
    return abs(value / step - round(value / step)) < _ON_STEP


class ObjectiveSettings(_Settings):
    """What makes one trial better than another."""

    kind: Literal["mean", "weighted", "min", "pareto"] = Field("mean", description="how task scores become one value")
    weights: dict[str, float] | None = Field(None, description="per task, for `weighted`")

    @model_validator(mode="after")
    def _weights_go_with_weighted(self) -> ObjectiveSettings:
        if (self.kind == "weighted") != (self.weights is not None):
            raise ValueError("'weights' and 'kind: weighted' go together")
        if self.weights is not None and (min(self.weights.values(), default=0) < 0 or not sum(self.weights.values())):
            raise ValueError("weights must not be negative, and not all zero")
        return self


class StudySpec(_Settings):
    """A whole spec."""

    name: str = Field(description="name of the study")
    base: str = Field(description="model that every expert was fine-tuned from")
    experts: dict[str, ExpertSettings] = Field(description="the fine-tuned models by name")
    tasks: dict[str, TaskSettings] = Field(description="what merged models are scored on, by name")
    method: MethodName = Field("df-merge", description="row of the method table")
    importance: ImportanceSettings = ImportanceSettings.model_validate({})
    search: SearchSettings = SearchSettings.model_validate({})
    objective: ObjectiveSettings = ObjectiveSettings.model_validate({})
    baselines: list[MethodName] = Field(
        default_factory=list, description="methods that `run` shows beside this one, each as a study NAME.METHOD"
    )
    storage: str = Field("", description="Optuna storage URL; default sqlite:///NAME.db beside the spec")
    cache: str | None = Field(".dfmerge/fishers", description="folder of the Fisher cache; null: none")
    cache_limit: str | None = Field(None, description="size that the cache may reach, e.g. 20GB; oldest go first")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = Field("float32", description="of weights in memory")
    token_budget: int = Field(
        16384, gt=0, description="tokens in one evaluation batch: bounds memory; changes results by rounding only"
    )
    trust_remote_code: bool = Field(False, description="let code that comes with a checkpoint run")

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

    def where(self, field: str) -> str:
        """File and field, for messages."""
        return f"{self._file}: {field}"

    def derive(self, **changes: Any) -> StudySpec:
        """A validated copy with other values, same file and folders.

        Args:
            **changes: fields to replace.
        """
        copy = StudySpec.model_validate({**self.model_dump(), **changes})
        copy._file, copy._workdir = self._file, self._workdir
        return copy

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
        data = _read_yaml(path)
        for override in overrides:
            _override(data, override)
        try:
            spec = cls.model_validate(data)
        except ValidationError as error:
            raise _explain(error, path) from error
        spec._file, spec._workdir = path.resolve(), workdir
        _check_references(spec)
        return spec

    @field_validator("name")
    @classmethod
    def _name_is_harmless(cls, value: str) -> str:
        if not _NAME.fullmatch(value):
            raise ValueError("a name is 1 to 100 letters, digits, '.', '_' or '-', and does not start with '.'")
        return value

    @field_validator("experts", mode="before")
    @classmethod
    def _short_experts(cls, value: Any) -> Any:
        """`name: path` means `name: {model: path, task: name}`; a long form without `task` too."""
        if not isinstance(value, Mapping):
            return value
        full = {}
        for name, entry in value.items():
            if isinstance(entry, str):
                full[name] = {"model": entry, "task": name}
            elif isinstance(entry, Mapping):
                full[name] = {"task": name, **entry}
            else:
                full[name] = entry
        return full

    @field_validator("tasks", mode="before")
    @classmethod
    def _default_type(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {n: {"type": "choice", **t} if isinstance(t, Mapping) else t for n, t in value.items()}

    @field_validator("objective", mode="before")
    @classmethod
    def _short_objective(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @field_validator("device")
    @classmethod
    def _device_has_a_known_form(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
            raise ValueError("expected auto, cpu, cuda, cuda:N or mps")
        return value

    @field_validator("cache_limit")
    @classmethod
    def _limit_is_a_size(cls, value: str | None) -> str | None:
        if value is not None:
            parse_size(value)
        return value


def parse_size(text: str) -> int:
    """Bytes of a size such as 500MB or 20GB (powers of 1000) or 2GiB (powers of 1024)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kKMGT])(i?))?B?\s*", text)
    if match is None:
        raise ValueError(f"{text!r} is no size; write 500MB, 20GB or 2GiB")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index((prefix or " ").upper()))


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice."""


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, (str, int, float, bool)):
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} given twice", key_node.start_mark)
            seen.add(key)
    loader.flatten_mapping(node)
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError("no such spec", where=str(path), mend="Give the path of a YAML file") from error
    except IsADirectoryError as error:
        raise InputError("this is a folder, not a spec", where=str(path), mend="Name a YAML file") from error
    except (OSError, UnicodeDecodeError) as error:
        what = error.strerror if isinstance(error, OSError) else "this is not UTF-8 text"
        raise InputError(f"cannot be read: {what}", where=str(path), mend="Give a YAML text file") from error
    try:
        data = yaml.load(text, Loader=_Loader)  # a subclass of SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that there is not
        raise InputError(
            f"not valid YAML: {_masked(' '.join(str(error).split()))}", where=str(path), mend="Correct it"
        ) from error
    if not isinstance(data, dict):
        found = "the file is empty" if data is None else f"found {type(data).__name__}"
        raise InputError(
            f"{found}; expected a mapping of fields", where=str(path), mend="See docs/specs.md for a whole spec"
        )
    return data


def _masked(found: Any) -> Any:
    """A value for a message, without the password of any URL in it."""
    return re.sub(r"//[^@/\s]*@", "//***@", found) if isinstance(found, str) else found


def _override(data: dict[str, Any], override: str) -> None:
    key, sign, value = override.partition("=")
    if not sign or not key.strip():
        raise InputError(
            f"{_masked(override)!r} is not key=value", where="--set", mend="Write e.g. --set search.trials=20"
        )
    *parents, leaf = key.strip().split(".")
    target = data
    for parent in parents:
        inner = target.get(parent, {})
        if isinstance(inner, str) and parents == ["experts", parent]:
            inner = {"model": inner}
        if not isinstance(inner, dict):
            raise InputError(f"{parent!r} in {key!r} holds no fields", where="--set", mend="Correct the key")
        target[parent] = dict(inner)  # a copy: a YAML alias may share it with other fields
        target = target[parent]
    try:
        target[leaf] = yaml.load(value, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(
            f"the value of {_masked(override)!r} is not valid YAML", where="--set", mend="Quote it"
        ) from error


_FIELDS_AT: Mapping[str, Sequence[type[BaseModel]]] = {
    "": [StudySpec],
    "experts": [ExpertSettings],
    "tasks": [ChoiceTask, ClassificationTask],
    "importance": [ImportanceSettings],
    "search": [SearchSettings],
    "objective": [ObjectiveSettings],
}


_UNION_MEMBERS = ("choice", "classification", "float", "int", "str", "list[str]", "dict[str,float]")


def _explain(error: ValidationError, path: Path) -> InputError:
    """The first problem of a validation as one sentence."""
    first = error.errors()[0]
    # Pydantic names the member of a union, too, which is no field.
    location = [str(part) for index, part in enumerate(first["loc"]) if index < 2 or part not in _UNION_MEMBERS]
    field = ".".join(location) or "spec"
    found = first.get("input")
    if first["type"] == "extra_forbidden":
        classes = _FIELDS_AT.get(location[0] if len(location) > 1 else "", [])
        known = sorted({name for model in classes for name in model.model_fields})
        near = difflib.get_close_matches(location[-1], known, n=1)
        mend = f"Did you mean {near[0]!r}?" if near else f"Known fields: {', '.join(known)}"
        return InputError("unknown key", where=f"{path}: {field}", mend=mend)
    if first["type"] == "missing":
        return InputError("this field is required", where=f"{path}: {field}", mend="Add it")
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if isinstance(found, (str, int, float, bool)) or found is None:
        message = f"found {_masked(found)!r}; {message}"
    return InputError(message, where=f"{path}: {field}", mend="Correct the value; docs/specs.md describes every field")


def _check_references(spec: StudySpec) -> None:
    """Names inside the spec that must match each other."""
    if not spec.experts:
        raise InputError("no experts", where=spec.where("experts"), mend="Name at least one fine-tuned model")
    if not spec.tasks:
        raise InputError("no tasks", where=spec.where("tasks"), mend="Name at least one task to score on")
    for kind, names in (("experts", spec.experts), ("tasks", spec.tasks)):
        for name in names:
            if not _NAME.fullmatch(name):
                raise InputError(
                    f"{name!r} is no usable name", where=spec.where(kind), mend="Use letters, digits, '.', '_' and '-'"
                )
    for name, expert in spec.experts.items():
        if expert.task is not None and expert.task not in spec.tasks:
            raise InputError(
                f"the expert has no task: {expert.task!r} is not among the tasks ({', '.join(spec.tasks)})",
                where=spec.where(f"experts.{name}"),
                mend="Name its task, or write 'task: null' to weigh it by all tasks",
            )
    types = {task.type for task in spec.tasks.values()}
    if len(types) > 1:
        raise InputError(
            "tasks of type choice and classification cannot be mixed: one model answers them all",
            where=spec.where("tasks"),
            mend="Use one type",
        )
    _check_points(spec)
    _check_baselines(spec)
    for field, named in (
        ("objective.weights", spec.objective.weights),
        ("importance.indices", spec.importance.indices),
    ):
        if isinstance(named, dict) and (odd := sorted(set(named) - set(spec.tasks))):
            raise InputError(
                f"unknown task {odd[0]!r}", where=spec.where(field), mend=f"The tasks are {', '.join(spec.tasks)}"
            )


def _check_baselines(spec: StudySpec) -> None:
    for baseline in spec.baselines:
        if spec.baselines.count(baseline) > 1 or baseline == spec.method:
            raise InputError(
                f"{baseline!r} is {'the method itself' if baseline == spec.method else 'named twice'}",
                where=spec.where("baselines"),
                mend="Name every other method once",
            )
        if not _NAME.fullmatch(f"{spec.name}.{baseline}"):
            raise InputError(
                f"the name is too long for a baseline's study {spec.name}.{baseline}",
                where=spec.where("name"),
                mend="Choose a shorter one",
            )


def _check_points(spec: StudySpec) -> None:
    step, low = spec.search.step, spec.search.bounds[0]
    for point in spec.search.enqueue:
        given = dict.fromkeys(spec.experts, point) if isinstance(point, float) else point
        for name, value in check_coefficients(spec, given, "search.enqueue").items():
            if step is not None and not _is_multiple(value - low, step):
                raise InputError(
                    f"the coefficient of {name!r} is {value:g}, not {low:g} plus a multiple of the step {step:g}",
                    where=spec.where("search.enqueue"),
                    mend="Choose a value on the step, or leave search.step out",
                )


def check_coefficients(spec: StudySpec, point: Mapping[str, float], field: str) -> dict[str, float]:
    """A coefficient for every expert, each inside the bounds, in the order of the experts.

    Raises:
        InputError: an unknown or missing expert, or a value outside the bounds.
    """
    low, high = spec.search.bounds
    for name, value in point.items():
        if name not in spec.experts:
            near = difflib.get_close_matches(name, spec.experts, n=1)
            raise InputError(
                f"unknown expert {name!r}",
                where=spec.where(field) if field[0] != "-" else field,
                mend=f"Did you mean {near[0]!r}?" if near else f"The experts are {', '.join(spec.experts)}",
            )
        if not low <= value <= high:
            raise InputError(
                f"the coefficient of {name!r} is {value}, outside the bounds [{low:g}, {high:g}]",
                where=spec.where(field) if field[0] != "-" else field,
                mend="Choose a value inside, or widen search.bounds",
            )
    missing = [name for name in spec.experts if name not in point]
    if missing:
        raise InputError(
            f"no coefficient for the expert {missing[0]!r}",
            where=spec.where(field) if field[0] != "-" else field,
            mend="Give one for every expert",
        )
    return {name: float(point[name]) for name in spec.experts}
