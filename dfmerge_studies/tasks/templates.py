"""Columns and Jinja2 templates: from a document of a data set to a value or a text."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinja2.exceptions import SecurityError

from dfmerge_studies.boundary import reading
from dfmerge_studies.errors import InputError, did_you_mean, first_line
from dfmerge_studies.tasks.sandbox import BoundedEnvironment

CSV_HINT = "; if a CSV file has NA, None or null as texts, add keep_default_na: false to dataset"
_BARE = re.compile(r"\{\{-?\s*([^\W\d]\w*)\s*-?\}\}")

Renderer = Callable[[Mapping[str, Any], int], Any]


class EmptyCell(Exception):
    """A template writes a cell that has no value.

    Args:
        column: where the cell is.
    """

    def __init__(self, column: str) -> None:
        self.column = column
        super().__init__(column)


class Empty:
    """A cell without a value, for templates: false, equal to none, and not to be written as the text "None".

    Args:
        column: where the cell is.
    """

    def __init__(self, column: str) -> None:
        self._column = column

    def __bool__(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return other is None or isinstance(other, Empty)

    def __hash__(self) -> int:
        return hash(None)

    def __str__(self) -> str:
        raise EmptyCell(self._column)

    __repr__ = __str__


def _environment() -> BoundedEnvironment:
    environment = BoundedEnvironment()
    environment.tests["none"] = lambda value: value is None or isinstance(value, Empty)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": True, "default": _null}
    return environment


def _null(value: Any) -> None:
    """What `tojson` makes of what is no JSON."""
    if not isinstance(value, Empty):
        raise TypeError(f"{type(value).__name__} is no JSON")


_TEMPLATES = _environment()


def is_missing(value: Any) -> bool:
    """Whether a cell has no value: null, or the number NaN that tables write for it."""
    return value is None or (isinstance(value, float) and value != value)


def empty_cell(column: str, index: int, where: str) -> InputError:
    """The error of a cell without a value where a text is needed."""
    return InputError(
        f"row {index}: the cell of the column {column!r} is empty",
        where=where,
        hint=f"Fill it, or write {{{{ {column} or '' }}}} where it may be empty{CSV_HINT}",
    )


def _marked(value: Any, column: str) -> Any:
    """A cell with `Empty` in place of every missing value in it."""
    if is_missing(value):
        return Empty(column)
    if isinstance(value, Mapping):
        return {key: _marked(each, column) for key, each in value.items()}
    if isinstance(value, list):
        return [_marked(each, column) for each in value]
    return value


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
            hint=did_you_mean(source, columns) or "Name a column, or write a template such as '{{text}}'",
        )
    with reading(where, "not a valid Jinja2 template", "Correct the template"):
        template = _TEMPLATES.template(source)

    def render(document: Mapping[str, Any], index: int) -> str:
        try:
            values = {column: _marked(value, column) for column, value in document.items()}
            return _TEMPLATES.render(template, values)
        except EmptyCell as error:
            raise empty_cell(error.column, index, where) from error
        except Exception as error:  # whatever the template's operations and filters raise
            empty = [column for column, value in document.items() if is_missing(value)]
            also = f"; empty on this row: {', '.join(empty)}" if empty else ""
            hint = "Write a simpler one" if isinstance(error, SecurityError) else "Use only columns that the data has"
            raise InputError(
                f"the template fails on row {index}: {first_line(error)} (columns: {', '.join(columns)}{also})",
                where=where,
                hint=hint,
            ) from error

    return render


def text_renderer(source: str | None, columns: Sequence[str], where: str) -> Callable[[Mapping[str, Any], int], str]:
    """A function from a document and its row to a text that may also stand in the spec itself.

    Args:
        source: a column, a template, the text itself, or None for no text.
        columns: of the data.
        where: file and field, for messages.

    Raises:
        InputError: the template is not valid.
    """
    if source is None or (source not in columns and "{{" not in source and "{%" not in source):
        return lambda _document, _index: source or ""
    render = renderer(source, columns, where)

    def text(document: Mapping[str, Any], index: int) -> str:
        value = render(document, index)
        if is_missing(value):
            raise empty_cell(source, index, where)
        return str(value)

    return text


def as_list(value: Any) -> list[Any] | None:
    """A cell that holds a list, or the text of a list, as a template renders one; None for anything else.

    Args:
        value: of a column or a template.
    """
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):  # the last two: nested deeply
            return None
    return list(value) if isinstance(value, (list, tuple)) else None


def bare_column(source: str | int | None, columns: Sequence[str]) -> str | None:
    """The column that a source is, be it named or written as a template of nothing else; None for any other source.

    Args:
        source: a column, a template, or a number.
        columns: of the data.
    """
    if not isinstance(source, str) or source in columns:
        return source if isinstance(source, str) else None
    match = _BARE.fullmatch(source)
    return match[1] if match and match[1] in columns else None


def is_there(source: str | int | None, columns: Sequence[str]) -> bool:
    """Whether a source is anything but the name of a column that the data lacks.

    Args:
        source: a column, a template, or a number.
        columns: of the data.
    """
    return not isinstance(source, str) or source in columns or "{{" in source or "{%" in source
