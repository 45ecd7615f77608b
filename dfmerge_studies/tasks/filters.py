"""What is made of a text that a model wrote before it is scored: `filter_list`, as lm-evaluation-harness writes it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import Field, model_validator

from dfmerge_studies.tasks.strict import Settings, one_of
from dfmerge_studies.tasks.written import numbers_in

INVALID = "[invalid]"
GSM8K = r"#### (\-?[0-9\.\,]+)"  # the harness's default, made for that data set


def checked_regex(pattern: str) -> str:
    """A regular expression of Python.

    Raises:
        ValueError: it is none.
    """
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
    return pattern


class Step(Settings):
    """One step of a filter: from a text to a text."""

    function: Annotated[str, one_of("filters", lambda: FILTERS)] = Field(description="what the step does")
    regex_pattern: str = Field(GSM8K, description="of regex: a regular expression of Python")
    group_select: int = Field(0, description="of regex: which match counts, from 0; -1 is the last")
    fallback: str = Field(INVALID, description="of regex, first_number, last_number: the text where there is no match")
    mapping_dict: dict[str, str] | None = Field(None, description="of map: texts by text")
    default_value: str = Field(INVALID, description="of map: the text for one that mapping_dict lacks")

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> Self:
        row = FILTERS[self.function]
        for name, field in type(self).model_fields.items():
            if name not in ("function", *row.fields) and getattr(self, name) != field.default:
                raise ValueError(f"function: {self.function} has no use for {name!r}")
        for name in row.required:
            if getattr(self, name) is None:
                raise ValueError(f"function: {self.function} needs {name!r}")
        checked_regex(self.regex_pattern)
        return self

    def __call__(self, text: str) -> str:
        """The text that the step makes of one."""
        return FILTERS[self.function].apply(self, text)


class Filter(Settings):
    """Steps, one after the other."""

    name: str = Field("", description="for the reader")
    filter: list[Step] = Field(description="the steps, in their order")

    def __call__(self, text: str) -> str:
        """The text that all steps make of one."""
        for step in self.filter:
            text = step(text)
        return text


@dataclass(frozen=True)
class _Row:
    """One row of the table.

    Attributes:
        apply: from the step's settings and a text to a text.
        fields: of the settings that it uses.
        required: those of them that must be there.
    """

    apply: Callable[[Step, str], str]
    fields: tuple[str, ...] = ()
    required: tuple[str, ...] = ()


def _matched(step: Step, text: str) -> str:
    """A match without blanks around it: of an expression with several groups the first group that is not empty."""
    found = re.findall(step.regex_pattern, text)
    if not -len(found) <= step.group_select < len(found):
        return step.fallback
    match = found[step.group_select]
    if isinstance(match, tuple):
        match = next(filter(None, match), step.fallback)
    return str(match).strip()


def _number(index: int) -> Callable[[Step, str], str]:
    return lambda step, text: numbers[index] if (numbers := numbers_in(text)) else step.fallback


# The harness's names where it has them; `take_first` is for models that answer several times, which these do not.
FILTERS: Mapping[str, _Row] = {
    "regex": _Row(_matched, ("regex_pattern", "group_select", "fallback")),
    "first_number": _Row(_number(0), ("fallback",)),
    "last_number": _Row(_number(-1), ("fallback",)),
    "strip": _Row(lambda step, text: text.strip()),
    "remove_whitespace": _Row(lambda step, text: text.strip()),
    "lowercase": _Row(lambda step, text: text.lower()),
    "uppercase": _Row(lambda step, text: text.upper()),
    "map": _Row(
        lambda step, text: (step.mapping_dict or {}).get(text, step.default_value),
        ("mapping_dict", "default_value"),
        ("mapping_dict",),
    ),
    "take_first": _Row(lambda step, text: text),
}
