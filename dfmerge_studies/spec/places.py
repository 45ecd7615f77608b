"""Several problems of a spec as one."""

from __future__ import annotations

from collections.abc import Sequence

from dfmerge_studies.errors import InputError


def the_first(problems: Sequence[InputError]) -> InputError:
    """The first of some problems, with a word on the others."""
    first, *others = problems
    if not others:
        return first
    return InputError(
        first.what,
        where=first.where,
        hint=f"{first.hint}. {len(others)} more problem{'s' * (len(others) > 1)}: `dfmerge validate` lists all",
    )
