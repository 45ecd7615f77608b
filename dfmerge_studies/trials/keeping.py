"""Results stay in the outbox until a newcomer can read them in the storage; a file that is lost is written again.

What a storage has taken may still be lost: its file may be deleted, replaced or cut short while it is in use.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from dfmerge_studies.errors import RunError
from dfmerge_studies.storage import (
    STORAGE_FAILURES,
    Known,
    SQLiteWatch,
    read_study,
    storage_errors,
    watch_of,
    write_study,
)
from dfmerge_studies.storage.watch import beside
from dfmerge_studies.trials.reading import WITH_RESULT


class StorageLost(RunError):
    """The storage's file is not the one any more that results were told to."""


class Keeper:
    """Looks after what one worker tells a study.

    Args:
        study: the study.
    """

    def __init__(self, study: optuna.Study) -> None:
        self._study = study
        self._watch = watch_of(study)
        self._told: dict[int, Path | None] = {}  # numbers of trials, and their files in the outbox
        self._attributes: dict[str, Any] = {}  # of the study, as they were read with its trials
        if self._watch is not None:
            self._known = Known(study.study_name, study.directions, study.metric_names)
            self.learn()

    def told(self, number: int, kept: Path | None) -> None:
        """Note that the storage has taken a result."""
        self._told[number] = kept
        if self._watch is None:
            self._release()

    def read(self) -> Sequence[FrozenTrial]:
        """Read the study's trials, and with them what else is written where the file is lost."""
        if self._watch is None:
            return self._study.get_trials(deepcopy=False)
        trials, self._attributes = read_study(self._study)
        return trials

    def check(self, trials: Sequence[FrozenTrial] | None = None) -> None:
        """Look whether the storage has what it was told; what it has need not be kept any longer.

        Args:
            trials: the study's, if `read` has read them just now.

        Raises:
            StorageLost: its file was deleted, replaced or damaged; says where the results are.
            storage.STORAGE_FAILURES: the storage failed.
        """
        if (lost := self.lost()) is not None:
            raise lost
        self._release()
        self.learn(trials)
        if self._watch is not None and trials is not None:
            self._known.attributes = self._attributes

    def check_place(self) -> None:
        """Look whether the file is still where it was, without reading it.

        Whatever was written to it before is then in every copy that another worker will make of it.

        Raises:
            StorageLost: it was deleted or replaced; says where the results are.
        """
        if self._watch is not None and (how := self._watch.gone()) is not None:
            raise self._rescued(how)

    def lost(self) -> StorageLost | None:
        """The error to raise where the file is lost, after it was written again; None if it is not lost."""
        how = None if self._watch is None else self._watch.lost(self._study.study_name, self._told)
        return None if how is None else self._rescued(how)

    def learn(self, trials: Sequence[FrozenTrial] | None = None) -> None:
        """Take in what the study is now: it is what is written where nothing else is left.

        Args:
            trials: the study's, if they were read just now.

        Raises:
            storage.STORAGE_FAILURES: the storage failed.
        """
        if self._watch is None:
            return
        if trials is not None:
            self._known.trials = list(trials)
            return
        trials, self._known.attributes = read_study(self._study)
        self._known.trials = list(trials)

    def _release(self) -> None:
        for number, kept in self._told.items():
            if kept is not None:
                kept.unlink(missing_ok=True)
                self._told[number] = None

    def _rescued(self, how: str) -> StorageLost:
        assert self._watch is not None
        path, copy = self._watch.path, self._copy()
        kept = [file for file in self._told.values() if file is not None and file.exists()]
        if copy == path:
            hint = "All results that were known have been written there again: run the same command to go on"
        elif copy is not None:
            hint = f"All results that were known are in {copy}: put it in that place, and run again to go on"
        else:
            hint = "Put a copy of it back and run again"
        if kept:
            hint += f". The results of this run are also in {kept[0].parent}"
        return StorageLost(f"the study's file {how} while it was in use", where=str(path), hint=hint)

    def _copy(self) -> Path | None:
        """Write the file again, from what is still open or else from what this process knows."""
        assert self._watch is not None
        whole, known = beside(self._watch.path), self._known
        numbers = {*self._told, *(t.number for t in known.trials if t.state in WITH_RESULT)}
        try:
            if not (self._watch.copy(whole) and self._watch.holds(whole, known.name, numbers)):
                whole.unlink(missing_ok=True)
                write_study(known, whole, journal=not isinstance(self._watch, SQLiteWatch))
            return self._watch.restore(whole, known.name, numbers)
        except STORAGE_FAILURES:
            return None
        finally:
            for left in whole.parent.glob(f"{whole.name}*"):
                with contextlib.suppress(OSError):
                    left.unlink()


def check_all(keepers: Iterable[Keeper]) -> None:
    """Look whether the storages still have all that they were told.

    Raises:
        StorageLost: a file was deleted, replaced or damaged; says where the results are.
    """
    with storage_errors():
        for keeper in keepers:
            keeper.check()
