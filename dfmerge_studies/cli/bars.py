"""Progress of trials: a bar for each study with the best value so far and the time left; lines where nobody watches."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dfmerge_studies.cli import common
from dfmerge_studies.cli.pulse import Pulse

if TYPE_CHECKING:
    import optuna
    from rich.progress import TaskID

    from dfmerge_studies.report.tracking import Tracking
    from dfmerge_studies.spec import StudySpec
    from dfmerge_studies.trials.results import Event

_WORTH_A_LINE = ("failed", "recovered", "applied", "interrupted", "superseded")


@dataclass
class _Followed:
    study: optuna.Study
    spec: StudySpec
    total: int
    bar: TaskID
    stopped: bool = False
    done: int = 0  # when it was last read
    best: str = ""

    def shown(self, values: Sequence[float] | None) -> str:
        return self.spec.metrics("validation").value_text(values) if values else ""


class TrialBars:
    """Draws what happens to the trials of some studies, until the context ends.

    Args:
        tracking: told of studies and completed trials, too.
    """

    def __init__(self, tracking: Tracking | None = None) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.watched = sys.stderr.isatty()
        self._tracking = tracking
        self._console = common.messages()
        self._bars = Progress(
            TextColumn("{task.description:<24}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[best]}", markup=False),
            console=self._console,
            disable=not self.watched,
        )
        self._pulse = Pulse(self._print, on=not self.watched)
        self._studies: dict[str, _Followed] = {}
        self._phases: dict[str, TaskID] = {}

    def __enter__(self) -> TrialBars:
        self._bars.__enter__()
        self._pulse.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._pulse.__exit__()
        for bar in self._phases.values():
            self._bars.update(bar, visible=False)
        self._bars.__exit__(*exception)

    def follow(self, study: optuna.Study, spec: StudySpec, total: int) -> None:
        """Show a study; one that is shown is read from this handle from now on.

        Args:
            study: the stored study.
            spec: what its trials are judged by.
            total: the trials that it should reach.
        """
        if study.study_name in self._studies:
            self._studies[study.study_name].study = study
        else:
            bar = self._bars.add_task(study.study_name, total=total, best="")
            self._studies[study.study_name] = _Followed(study, spec, total, bar)
            self._refresh(study.study_name)
            if self._tracking is not None:
                self._tracking.follow(study)

    @property
    def studies(self) -> list[optuna.Study]:
        """The studies that are shown."""
        return [shown.study for shown in self._studies.values()]

    def event(self, name: str, event: Event, who: str = "") -> None:
        """Show what has happened to a trial.

        Args:
            name: of the study.
            event: what has happened.
            who: the worker's name, where there are several.
        """
        if event.kind == "started":
            return
        if event.kind == "stopped":
            self._stopped(name, event)
            return
        done, best = self._refresh(name)
        if self._tracking is not None and event.kind in ("completed", "applied"):
            self._tracking.completed(name, event.number)
        if event.kind in _WORTH_A_LINE:
            text = f"trial {event.number} {event.kind}"
            self.message(f"{text}: {event.message}" if event.message else text, who)
        elif event.kind == "completed" and not self.watched:
            shown = self._studies[name]
            text = f"{name}: {done}/{shown.total}  trial {event.number} {shown.shown(event.values)}  {best}"
            self.message(text, who)
        elif event.kind == "pruned" and not self.watched:
            shown = self._studies[name]
            text = f"trial {event.number} stopped early, about {shown.shown(event.values)}"
            self.message(f"{name}: {done}/{shown.total}  {text}  {best}", who)

    def _stopped(self, name: str, event: Event) -> None:
        """Say once, whichever worker tells it, that a study has stopped; its bar ends there."""
        shown = self._studies[name]
        if not shown.stopped:
            shown.stopped = True
            self.message(f"{name} stopped after {event.number} of {shown.total} trials: {event.message}")
            shown.total, _ = self._refresh(name)
            self._bars.update(shown.bar, total=shown.total)

    def message(self, text: str, who: str = "") -> None:
        """Print a line above the bars.

        Args:
            text: the line.
            who: the worker's name, where there are several.
        """
        self._print(f"{who}: {text}" if who else text)
        self._pulse.said()

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def phase(self, what: str, done: int, total: int, who: str = "") -> None:
        """Show how far a trial is.

        Args:
            what: is being done.
            done: how much of it.
            total: of how much.
            who: the worker's name, where there are several.
        """
        if who not in self._phases:
            self._phases[who] = self._bars.add_task("", total=None, best="")
        self._pulse.doing(f"{who}: {what}" if who else what, done, total)
        label = f"  {who}: {what}" if who else f"  {what}"
        self._bars.update(self._phases[who], description=label, completed=done, total=total, visible=True)

    def _refresh(self, name: str) -> tuple[int, str]:
        """Look at a study once: how many trials have ended, and the best of those that are complete.

        A storage that does not answer leaves what was seen last: who needs it says so.
        """
        from dfmerge_studies.storage import STORAGE_FAILURES
        from dfmerge_studies.study.totals import stored_total
        from dfmerge_studies.study.value import best_trial
        from dfmerge_studies.trials.reading import counts_of, ended, results_of

        shown = self._studies[name]
        unreadable: tuple[type[Exception], ...] = (*STORAGE_FAILURES, KeyError)  # KeyError: a file without the study
        try:
            trials = shown.study.get_trials(deepcopy=False)
            completed, done = results_of(trials), ended(counts_of(trials))
            if done >= shown.total:  # somebody may have raised it meanwhile
                shown.total = max(shown.total, stored_total(shown.study))
        except unreadable:
            return shown.done, shown.best
        best = best_trial(completed, shown.spec.objective)
        metric = shown.spec.metrics("validation").short
        text = f"best {shown.shown(best.values)} {metric} (trial {best.number})" if best is not None else ""
        shown.done, shown.best = done, text
        self._bars.update(shown.bar, completed=done, total=shown.total, best=text)
        return done, text
