"""What the startup trials of a new study are, where its spec leaves `search.startup` open."""

from __future__ import annotations

from dataclasses import replace

from dfmerge_studies.checkpoints.spread import devices_of
from dfmerge_studies.errors import DFMergeError
from dfmerge_studies.objective.cards import free_bytes, own_bytes
from dfmerge_studies.objective.memory import Activations, has_room_for_all, held_bytes, memory_of
from dfmerge_studies.objective.problem import Problem
from dfmerge_studies.objective.rehearsal import rehearse_
from dfmerge_studies.spec import DESCENT, UNIFORM
from dfmerge_studies.study.proposals import new_startup
from dfmerge_studies.study.room import host_room


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
    least = memory_of(problem, Activations()).device.total
    if not has_room_for_all(problem) or least > available_bytes(problem):
        return False
    try:
        rehearse_(problem, problem.spec.row)
    except DFMergeError:  # what is wrong without slopes, too, comes up again without them
        return False
    return True


def available_bytes(problem: Problem) -> int:
    """Bytes of the device that computes that are free or held by this process; of several on it, the share of one.

    Of a spread model, those of all its devices.

    Args:
        problem: what is loaded.
    """
    device = problem.resident.device
    if problem.share is not None:
        return problem.share
    if device.type == "cuda":
        return sum(free_bytes(each) + own_bytes(each) for each in devices_of(problem.resident.model))
    return host_room().free + held_bytes(problem)
