"""What all settings of a spec share: no changes, no unknown keys, no boolean for a number or a text."""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from dfmerge_studies.errors import did_you_mean

BOOLEAN = "misplaced_boolean"  # type of the error; its context has what to write instead as `mend`


class Settings(BaseModel):
    """Settings do not change, and keys that are not known are refused.

    So is a boolean where a number or a text is meant: pydantic takes it for 0 or 1, and YAML reads yes, no, on and off
    as one.

    Attributes:
        form: what they may be written as, for messages; empty for a mapping of fields alone.
        words: the texts among that.
    """

    form: ClassVar[str] = ""
    words: ClassVar[tuple[str, ...]] = ()

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _booleans_only_where_meant(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        errors = [
            InitErrorDetails(type=_error(value, meant), loc=(name, *place), input=value)
            for name, field in cls.model_fields.items()
            for place, value, meant in _misplaced(data.get(name), field.annotation)
        ]
        if errors:
            raise ValidationError.from_exception_data(cls.__name__, errors)
        return data


@dataclass(frozen=True)
class Also:
    """A form that a text may have besides the names that there are.

    Attributes:
        form: in words.
        pattern: what such texts match as a whole.
    """

    form: str
    pattern: str


@dataclass(frozen=True)
class _OneOf(AfterValidator):
    """A check that a JSON schema shows as the names that there are."""

    names: Callable[[], Iterable[str]]
    also: Also | None = None

    def __get_pydantic_json_schema__(self, schema: Any, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        named = {**handler(schema), "enum": [str(name) for name in self.names()]}
        if self.also is None:
            return named
        return {"anyOf": [named, {"type": "string", "pattern": f"^{self.also.pattern}$"}]}


def one_of(what: str, names: Callable[[], Iterable[str]], also: Also | None = None) -> AfterValidator:
    """A check of a text field: it names a row of a table, as the table is when the check is made.

    Args:
        what: the rows are, for messages.
        names: of them.
        also: another form that the text may have.
    """

    def check(name: str) -> str:
        known = list(names())
        if name not in known and not (also is not None and re.fullmatch(also.pattern, name)):
            near = did_you_mean(name, known)
            form = f", or {also.form}" if also is not None else ""
            raise ValueError(near[0].lower() + near[1:] if near else f"the {what} are {', '.join(known)}{form}")
        return name

    return _OneOf(check, names, also)


def _misplaced(value: Any, annotation: Any) -> Iterator[tuple[tuple[str | int, ...], bool, list[Any]]]:
    """Where a value has booleans that its type does not allow: their place, they, and the types meant there.

    What settings hold that are a class of their own is left to that class.
    """
    kinds = members(annotation)
    if isinstance(value, bool) and bool not in kinds and Any not in kinds:
        yield (), value, kinds
    elif isinstance(value, Mapping):
        for inner in (get_args(kind)[1] for kind in kinds if get_origin(kind) is dict):
            yield from (((str(key),), key, [str]) for key in value if isinstance(key, bool))
            for key, each in value.items():
                yield from (((str(key), *place), boolean, meant) for place, boolean, meant in _misplaced(each, inner))
    elif isinstance(value, (list, tuple)):
        for inner in (get_args(kind)[0] for kind in kinds if get_origin(kind) in (list, tuple)):
            for index, each in enumerate(value):
                yield from (((index, *place), boolean, meant) for place, boolean, meant in _misplaced(each, inner))


def members(annotation: Any) -> list[Any]:
    """The types that a union allows, or the type itself.

    Args:
        annotation: of a field.
    """
    origin = get_origin(annotation)
    if origin is Annotated:
        return members(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [kind for member in get_args(annotation) for kind in members(member)]
    return [annotation]


def _error(value: bool, meant: list[Any]) -> PydanticCustomError:
    origins = {get_origin(kind) or kind for kind in meant}
    words = [
        *(["a number"] if origins & {int, float} else []),
        *(["a text in quotes, such as 'yes'"] if origins & {str, Literal} else []),
        *(["a list"] if origins & {list, tuple} else []),
        *(["null for none"] if types.NoneType in origins else []),
    ]
    return PydanticCustomError(
        BOOLEAN,
        "found {found}; YAML reads yes, no, on and off as true and false",
        {"found": str(value).lower(), "mend": f"Write {', or '.join(words) or 'a mapping of fields'}"},
    )
