"""Trials on their way to experiment trackers: which ones, when, and what follows from a tracker that fails.

The study is in its storage, whatever becomes of a tracker: one that fails is said so once and let go, and the next run
with it sends what it lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType

import optuna
from optuna.trial import FrozenTrial

from dfmerge_studies.checkpoints.digest import json_digest
from dfmerge_studies.errors import InputError, did_you_mean, first_line
from dfmerge_studies.objective.preflight import installed
from dfmerge_studies.points import GROUPS, fine_name
from dfmerge_studies.report.trackers import TRACKERS, Record, Target, Tracker
from dfmerge_studies.report.verdict import verdict_of
from dfmerge_studies.report.view import StudyView
from dfmerge_studies.study.value import trial_value
from dfmerge_studies.trials.marks import DROPS, SECONDS, TASKS
from dfmerge_studies.trials.reading import results, violation

Wanted = tuple[str, str]  # name of a tracker, and the place of it that was named, or nothing


def wanted_trackers(texts: Sequence[str], where: str = "--tracker") -> list[Wanted]:
    """What `--tracker` asks for, refused where it cannot be had.

    Args:
        texts: each `NAME` or `NAME=PLACE`.
        where: what to name as the place at fault.

    Raises:
        InputError: there is no such tracker, its package is not installed, or one is named twice.
    """
    found: list[Wanted] = []
    for text in texts:
        name, _, place = text.partition("=")
        if name not in TRACKERS:
            near = did_you_mean(name, TRACKERS) or f"The trackers are {', '.join(TRACKERS)}"
            raise InputError(f"there is no tracker {name!r}", where=where, hint=near)
        missing = [package for package in TRACKERS[name].needs if not installed(package)]
        if missing:
            hint = f"pip install 'dfmerge-studies[{name}]'"
            raise InputError(f"{name} needs the package {' and '.join(missing)}", where=where, hint=hint)
        if "=" in text and not place:
            what = f"nothing stands behind {name}="
            raise InputError(what, where=where, hint=f"Write {TRACKERS[name].place} there, or {name} alone")
        if name in [each for each, _ in found]:
            raise InputError(f"{name!r} is named twice", where=where, hint="Name it once")
        found.append((name, place))
    return found


def check_places(wanted: Sequence[Wanted], where: str = "--tracker") -> None:
    """Refuse trackers that cannot be reached, before anything is computed.

    Args:
        wanted: from `wanted_trackers`.
        where: what to name as the place at fault.

    Raises:
        InputError: the first of them.
    """
    for name, place in wanted:
        try:
            TRACKERS[name].opened.check(place)
        except Exception as error:  # whatever its library raises
            hint = f"Name {TRACKERS[name].place} with {where} {name}=…, or leave it out"
            raise InputError(f"{name} cannot be opened: {first_line(error)}", where=where, hint=hint) from error


class Tracking:
    """The trackers of a run.

    Args:
        wanted: from `wanted_trackers`; nothing happens where there are none.
        warn: told of a tracker that fails.
    """

    def __init__(self, wanted: Sequence[Wanted], warn: Callable[[str], None]) -> None:
        self._wanted = list(wanted)
        self._warn = warn
        self._open: dict[str, tuple[optuna.Study, dict[str, Tracker]]] = {}

    def __enter__(self) -> Tracking:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for study, trackers in self._open.values():
            outcome = _outcome(study) if trackers else {}
            for name in list(trackers):
                self._attempt(trackers, name, partial(trackers[name].close, outcome))

    def follow(self, study: optuna.Study) -> None:
        """Open a study's trackers, and send what they lack of its trials.

        Args:
            study: the stored study.
        """
        if not self._wanted or study.study_name in self._open:
            return
        view, opened = StudyView.of(study), dict[str, Tracker]()
        self._open[study.study_name] = study, opened
        for name, place in list(self._wanted):

            def open_and_catch_up(name: str = name, place: str = place) -> None:
                opened[name] = TRACKERS[name].opened(place, _target(view))
                _catch_up(opened[name], view)

            self._attempt(opened, name, open_and_catch_up)

    def completed(self, name: str, number: int) -> None:
        """Send a trial.

        Args:
            name: of its study.
            number: of the trial.
        """
        if name not in self._open or not self._open[name][1]:
            return
        view = StudyView.of(self._open[name][0])
        trial = next((trial for trial in view.trials if trial.number == number), None)
        if trial is not None:
            trackers = self._open[name][1]
            for each, tracker in list(trackers.items()):
                self._attempt(trackers, each, partial(_send, tracker, view, trial))

    def _attempt(self, trackers: dict[str, Tracker], name: str, call: Callable[[], None]) -> None:
        """Ask something of a tracker; one that fails is let go."""
        try:
            call()
        except Exception as error:  # whatever its library raises
            trackers.pop(name, None)
            self._wanted = [each for each in self._wanted if each[0] != name]
            self._warn(
                f"warning: the tracker {name} failed and is left alone: {first_line(error)}. The study goes on; "
                f"run it again with --tracker {name} to send what is missing"
            )


def _target(view: StudyView) -> Target:
    identity = json_digest(dict(view.fingerprint))[:24]
    about = {
        "study": view.name,
        "method": view.method,
        "experts": ", ".join(view.experts),
        "objective": view.measure,
        "tasks": view.metrics("validation").text,
    }
    return Target(view.name, identity, about)


def _catch_up(tracker: Tracker, view: StudyView) -> None:
    known = tracker.known()
    for trial in view.trials:
        if trial.number not in known:
            tracker.add(record_of(view, trial))


def _send(tracker: Tracker, view: StudyView, trial: FrozenTrial) -> None:
    if trial.number not in tracker.known():
        tracker.add(record_of(view, trial))


def record_of(view: StudyView, trial: FrozenTrial) -> Record:
    """A completed trial as trackers show it.

    Args:
        view: the study.
        trial: one of its completed trials.
    """
    attributes = trial.user_attrs
    groups = {fine_name(e, g): value for e, own in attributes.get(GROUPS, {}).items() for g, value in own.items()}
    metrics: dict[str, float] = {"value": trial_value(trial)}
    for name, found in (("tasks", TASKS), ("drops", DROPS), ("seconds", SECONDS)):
        metrics |= {f"{name}/{key}": float(value) for key, value in attributes.get(found, {}).items()}
    if trial.constraints:
        metrics["feasible"] = float(violation(trial) == 0)
    return Record(
        trial.number,
        {**(groups or view.coefficients(trial)), **view.parameters(trial)},
        metrics,
        trial.datetime_start,
        trial.datetime_complete,
    )


def _outcome(study: optuna.Study) -> dict[str, str]:
    """The winner and the verdict, in words."""
    if not results(study):
        return {}
    view = StudyView.of(study)
    verdict = verdict_of(view)
    best = {} if view.best is None else {"winner": f"trial {view.best.number}: {view.value_text(view.best)}"}
    return {**best, **({} if verdict is None else {"verdict": "\n".join(verdict.lines)})}
