"""Columns and Jinja2 templates: from a document of a data set to a value or a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from dfmerge_studies.errors import InputError, did_you_mean

_TEMPLATES = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)

Renderer = Callable[[Mapping[str, Any], int], Any]


def renderer(source: str | int, columns: Sequence[str], where: str) -> Renderer:
    """A function from a document and its row to a column's value or to a rendered template.

    Args:
        source: a column, a template, or a number that is the same for all rows.
        columns: of the data.
        where: file and field, for messages.

    Raises:
        InputError: the source is neither a column nor a valid template.
    """
    if isinstance(source, int):
        return lambda _document, _index: source
    if source in columns:
        return lambda document, _index: document[source]
    if "{{" not in source and "{%" not in source:
        raise InputError(
            f"{source!r} is neither a column ({', '.join(columns)}) nor a template",
            where=where,
            mend=did_you_mean(source, columns) or "Name a column, or write a template such as '{{text}}'",
        )
    try:
        template = _TEMPLATES.from_string(source)
    except TemplateError as error:
        raise InputError(f"not a valid Jinja2 template: {error}", where=where, mend="Correct the template") from error

    def render(document: Mapping[str, Any], index: int) -> str:
        try:
            return template.render(**document)
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise InputError(
                f"the template fails on row {index}: {error} (columns: {', '.join(columns)})",
                where=where,
                mend="Use only columns that the data has",
            ) from error

    return render


def is_there(source: str | int | None, columns: Sequence[str]) -> bool:
    """Whether a source is anything but the name of a column that the data lacks.

    Args:
        source: a column, a template, or a number.
        columns: of the data.
    """
    return not isinstance(source, str) or source in columns or "{{" in source or "{%" in source
