"""Names of methods as a spec may write them: a row of the method table by its name, or a cell of it by its choices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator

from dfmerge_studies.errors import did_you_mean
from dfmerge_studies.methods import METHODS, Coefficients, Importance, cell_of, find_method
from dfmerge_studies.methods.cells import FIELDS, transform_words


class _MethodName(BeforeValidator):
    """A check that a JSON schema shows as the names that there are, and the form of a cell's name."""

    def __get_pydantic_json_schema__(self, schema: Any, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        choices = ["|".join(each.word for each in words) for words in (Importance, Coefficients)]
        return {
            **handler(schema),
            "anyOf": [{"enum": list(METHODS)}, {"pattern": f"^.+_({choices[0]})_({choices[1]})$"}],
        }


def _named(found: Any) -> Any:
    """The name of the method that a field means; what is neither text nor mapping is left to the type."""
    if isinstance(found, Mapping):
        return cell_of(found).name
    if isinstance(found, str) and find_method(found) is None:
        near = did_you_mean(found, METHODS)
        raise ValueError(near[0].lower() + near[1:] if near else f"the methods are {', '.join(METHODS)}")
    return found


KnownMethod = Annotated[str, _MethodName(_named)]


def cell_schema() -> dict[str, Any]:
    """What an editor knows of a cell."""
    known = (list(transform_words()), [each.word for each in Importance], [each.word for each in Coefficients])
    fields = {name: {"enum": words} for name, words in zip(FIELDS, known, strict=True)}
    return {
        "type": "object",
        "properties": fields,
        "additionalProperties": False,
        "description": "any cell of the table",
    }
