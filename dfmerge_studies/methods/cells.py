"""Any cell of the method table: a choice of Phi, C and lambda that no row may have made yet.

    TRANSFORM_IMPORTANCE_COEFFICIENTS    what a cell is called where a method has a name, such as
                                         `ties_fisher-at-scaled-expert_per-expert`

A cell that a row of the table is has that row's name.  Phi is called by the first row that has it: `dare`, `ties`, ….
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, TypeVar

from dfmerge_studies.errors import InputError, did_you_mean
from dfmerge_studies.methods.choices import Coefficients, Importance
from dfmerge_studies.methods.row import Method
from dfmerge_studies.methods.table import IMPORTANCE_PARAMETERS, METHODS

IDENTITY = "identity"
FIELDS = ("transform", "importance", "coefficients")
_PLAIN = "task-arithmetic"  # whose grid a transform without one has

Word = TypeVar("Word", Importance, Coefficients)


def transform_words() -> dict[str, str]:
    """Phi as a spec may call it, to its name in `transforms.TRANSFORMS`: a method that has it, or that name itself."""
    rows = [row for row in METHODS.values() if row.transform != IDENTITY]
    return {IDENTITY: IDENTITY, **{row.name: row.transform for row in rows}, **{r.transform: r.transform for r in rows}}


def find_method(name: str) -> Method | None:
    """The row of a name, or the cell of one; None where there is neither."""
    if name in METHODS:
        return METHODS[name]
    parts = name.rsplit("_", 2)
    try:
        return cell_of(dict(zip(FIELDS, parts, strict=True)))
    except ValueError:
        return None


def method_named(name: str, where: str | None = None) -> Method:
    """The row of a name, or the cell of one.

    Args:
        name: of the method.
        where: what to name as the place at fault.

    Raises:
        InputError: there is neither.
    """
    found = find_method(name)
    if found is None:
        hint = did_you_mean(name, METHODS) or f"Use one of {', '.join(METHODS)}"
        raise InputError(f"there is no method {name!r}", where=where, hint=hint)
    return found


def cell_of(words: Mapping[str, Any]) -> Method:
    """The method of a cell.

    Args:
        words: its `transform` (`identity` if left out), `importance` (`uniform`) and `coefficients` (`per-expert`).

    Raises:
        ValueError: a word is not known.
    """
    for name in words:
        if name not in FIELDS:
            near = did_you_mean(str(name), FIELDS)
            raise ValueError(f"a method has no {name!r}. {near or 'It has ' + ', '.join(FIELDS)}")
    known = transform_words()
    transform = words.get("transform", IDENTITY)
    if not isinstance(transform, str) or transform not in known:
        raise ValueError(_unknown("transform", transform, known))
    importance = _word("importance", words.get("importance", Importance.UNIFORM.word), Importance)
    coefficients = _word("coefficients", words.get("coefficients", Coefficients.PER_EXPERT.word), Coefficients)
    return _cell(known[transform], importance, coefficients)


def with_coefficients(row: Method, coefficients: Coefficients) -> Method:
    """A row with another policy for lambda.

    Args:
        row: of the table.
        coefficients: the policy.
    """
    return row if row.coefficients is coefficients else _cell(row.transform, row.importance, coefficients)


def per_expert(row: Method) -> Method:
    """A row, with a coefficient per expert that is searched where it has one shared value on a grid.

    Args:
        row: of the table.
    """
    shared = row.coefficients is Coefficients.SHARED_GRID
    return with_coefficients(row, Coefficients.PER_EXPERT) if shared else row


def _cell(transform: str, importance: Importance, coefficients: Coefficients) -> Method:
    for row in METHODS.values():
        plain = row.estimator is None and row.scale is None
        if plain and (row.transform, row.importance, row.coefficients) == (transform, importance, coefficients):
            return row
    owner = next((row for row in METHODS.values() if row.transform == transform != IDENTITY), METHODS[_PLAIN])
    word = IDENTITY if transform == IDENTITY else owner.name
    shared = coefficients is Coefficients.SHARED_GRID
    return Method(
        f"{word}_{importance.word}_{coefficients.word}",
        importance,
        coefficients,
        owner.paper,
        transform=transform,
        shared=(owner.shared or METHODS[_PLAIN].shared) if shared else (),
        parameters=(
            *(each.under(coefficients) for each in (owner.parameters if word != IDENTITY else ())),
            *IMPORTANCE_PARAMETERS.get(importance, ()),
        ),
        phi=word,
    )


def _word(what: str, found: Any, words: type[Word]) -> Word:
    known = {each.word: each for each in words}
    if not isinstance(found, str) or found not in known:
        raise ValueError(_unknown(what, found, known))
    return known[found]


def _unknown(what: str, found: Any, known: Mapping[str, Enum | str]) -> str:
    near = did_you_mean(str(found), known)
    return f"there is no {what} {found!r}. {near or 'It is one of ' + ', '.join(known)}"
