"""What the startup trials of a new study are, where its spec leaves `search.startup` open."""

from __future__ import annotations

from dataclasses import replace

from dfmerge_studies.errors import DFMergeError
from dfmerge_studies.objective.memory import has_room_for_all
from dfmerge_studies.objective.problem import Problem
from dfmerge_studies.objective.rehearsal import rehearse_
from dfmerge_studies.spec import DEFAULT_SAMPLER, DEFAULT_STARTUP, DESCENT, UNIFORM, StudySpec, has_slopes


def new_startup(spec: StudySpec) -> str | None:
    """What they are, as far as the spec alone says it; None where another sampler than `auto` proposes, or none.

    Args:
        spec: the settings.
    """
    search = spec.search
    if (search.stated_sampler or DEFAULT_SAMPLER) != "auto" or not spec.row.searches:
        return None
    if search.startup is not None:
        return search.startup
    return DEFAULT_STARTUP if has_slopes(spec) else UNIFORM


def with_startup(problem: Problem) -> Problem:
    """A loaded problem whose spec says what the startup trials are: no descent where a slope cannot be had.

    A row may have no answer that a loss could be taken of, a model no gradient, a device no memory for it.

    Args:
        problem: of a new study.
    """
    spec = problem.spec
    startup = new_startup(spec)
    if startup is None or spec.search.startup is not None:
        return problem
    decided = replace(problem, spec=spec.derive(search={"startup": startup}))
    if startup == DESCENT and not _can_descend(decided):
        return replace(problem, spec=spec.derive(search={"startup": UNIFORM}))
    return decided


def _can_descend(problem: Problem) -> bool:
    if not has_room_for_all(problem):
        return False
    try:
        rehearse_(problem, problem.spec.row)
    except DFMergeError:  # what is wrong without slopes, too, comes up again without them
        return False
    return True
