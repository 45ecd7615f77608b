"""The outbox: a local folder that keeps each result from the moment it exists until the storage has it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from dfmerge_studies.storage import id_of, storage_identity, storage_of
from dfmerge_studies.temporary import token
from dfmerge_studies.trials.marks import DISCARDED, OWNER, RETRY_OF, mark, place_of
from dfmerge_studies.trials.owner import is_dead
from dfmerge_studies.trials.reading import pending_retries, point_of
from dfmerge_studies.trials.results import Event, OnEvent, Superseded, TrialResult, ignore, tell

EntryState = Literal["ready", "its worker is alive", "of another study or storage", "damaged"]


@dataclass(frozen=True)
class PendingResult:
    """A file of an outbox.

    Attributes:
        path: the file.
        state: what `Outbox.apply` would make of it; only a "ready" one can be applied.
        trial: Optuna's number of the trial, None for a damaged file.
    """

    path: Path
    state: EntryState
    trial: int | None = None


def outbox_folder(workdir: Path, url: str, name: str) -> Path:
    """Where the results of a study wait; one folder per study and storage.

    Args:
        workdir: where a spec's relative outputs go.
        url: of the storage, resolved.
        name: of the study.
    """
    return outboxes(workdir) / hashlib.sha256(f"{storage_identity(url)}\n{name}".encode()).hexdigest()[:16]


def outboxes(workdir: Path) -> Path:
    """The folder of all outboxes.

    Args:
        workdir: where a spec's relative outputs go.
    """
    return workdir / ".dfmerge" / "outbox"


@dataclass(frozen=True)
class _Record:
    number: int
    owner: Mapping[str, Any]
    result: TrialResult
    point: Mapping[str, tuple[float, str]] = field(default_factory=dict)


def _read(path: Path) -> _Record:
    """Read a file of an outbox; ValueError, KeyError or TypeError if it is damaged."""
    record = json.loads(path.read_text(encoding="utf-8"))
    result = TrialResult(
        tuple(record["values"]),
        record["attributes"],
        tuple(record["constraints"]),
        pruned=bool(record.get("pruned", False)),
        intermediate={int(step): float(value) for step, value in record.get("intermediate", {}).items()},
    )
    return _Record(int(record["number"]), dict(record["owner"]), result, record.get("point", {}))


class Outbox:
    """A folder that keeps results from the moment they exist until the storage has them.

    Args:
        folder: created when the first result is written; None keeps nothing.
        study: whose results; several studies may share the folder.
    """

    def __init__(self, folder: Path | None, study: optuna.Study) -> None:
        self._folder = folder
        self._study = study
        self._prefix = hashlib.sha256(study.study_name.encode()).hexdigest()[:16]

    def write(
        self,
        number: int,
        owner: Mapping[str, Any],
        result: TrialResult,
        point: Mapping[str, tuple[float, BaseDistribution]] | None = None,
    ) -> Path | None:
        """Keep a result.

        Args:
            number: Optuna's number of the trial.
            owner: the process that ran it, as stored on the trial; its "worker" is part of the file's name.
            result: what evaluating gave.
            point: the trial's parameters with their ranges, for a storage that has been written again without them.

        Returns:
            Its file; None without a folder, or if it cannot be written (the storage may still take the result).
        """
        if self._folder is None:
            return None
        record = {
            "number": number,
            "owner": dict(owner),
            "values": list(result.values),
            "constraints": list(result.constraints),
            "attributes": dict(result.attributes),
            "pruned": result.pruned,
            "intermediate": dict(result.intermediate),
            "point": {name: (value, distribution_to_json(each)) for name, (value, each) in (point or {}).items()},
        }
        path = self._folder / f"{self._prefix}-{number}-{owner['worker']}.json"
        temporary = path.with_suffix(f".{token()}.tmp")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(record, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            return None
        return path

    def apply(self, on_event: OnEvent = ignore) -> int:
        """Tell the study the results that earlier workers could not.

        Args:
            on_event: told "applied" of every result that the study took.

        Returns:
            The number of results that it took.

        Raises:
            storage.STORAGE_FAILURES: the storage failed.
        """
        if self._folder is None or not self._folder.is_dir():
            return 0
        return sum(self._apply(path, on_event) for path in sorted(self._folder.glob(f"{self._prefix}-*.json")))

    def entries(self) -> list[PendingResult]:
        """List what is in the folder for this study, files set aside as damaged included."""
        if self._folder is None or not self._folder.is_dir():
            return []
        trials, found = self._study.get_trials(deepcopy=False), []
        for path in sorted(self._folder.glob(f"{self._prefix}-*")):
            if path.suffix == ".json":
                with contextlib.suppress(FileNotFoundError):
                    try:
                        record = _read(path)
                        found.append(PendingResult(path, _state(trials, record), record.number))
                    except (ValueError, KeyError, TypeError):
                        found.append(PendingResult(path, "damaged"))
            elif path.suffix == ".damaged":
                found.append(PendingResult(path, "damaged"))
        return found

    def _apply(self, path: Path, on_event: OnEvent) -> bool:
        try:
            record = _read(path)
        except FileNotFoundError:
            return False  # another worker has just applied it
        except (ValueError, KeyError, TypeError):
            path.replace(path.with_suffix(".damaged"))
            return False
        trials, owner, result = self._study.get_trials(deepcopy=False), record.owner, record.result
        if _state(trials, record) != "ready":
            return False
        trial = _latest(trials, trials[record.number])
        if trial.state == TrialState.FAIL and pending_retries([*trials]):
            return False  # its successor is not in the queue yet: `retry_vacated` comes first
        if trial.state == TrialState.WAITING and not self._start(trial, owner):
            return False  # another worker was faster
        mine = storage_of(self._study).get_trial(id_of(trial))
        ours = mine.state == TrialState.RUNNING and mine.user_attrs[OWNER]["worker"] == owner["worker"]
        if ours:
            try:
                self._complete(mine, record)
                tell(self._study, id_of(trial), result)
            except Superseded:
                return False  # put back in the queue a moment ago: the next start applies the result to the retry
        path.unlink(missing_ok=True)
        if ours:
            on_event(Event("applied", trial.number, place_of(trial), point_of(trial) or {}, result.values))
        return ours

    def _complete(self, trial: FrozenTrial, record: _Record) -> None:
        """Store parameters that a running trial lacks: a lost storage was written again as it was before."""
        for name, (value, text) in record.point.items():
            if name not in trial.params:
                each = json_to_distribution(text)
                storage_of(self._study).set_trial_param(id_of(trial), name, each.to_internal_repr(value), each)

    def _start(self, trial: FrozenTrial, owner: Mapping[str, Any]) -> bool:
        """Take a waiting retry for the result at hand, and store its coefficients; False if it has been taken."""
        storage, trial_id = storage_of(self._study), id_of(trial)
        try:
            mark(self._study, trial_id, {OWNER: dict(owner)})
            if not storage.set_trial_state_values(trial_id, TrialState.RUNNING):
                return False
            self._suggest(trial, trial_id)
        except UpdateFinishedTrialError:
            return False
        return True

    def _suggest(self, trial: FrozenTrial, trial_id: int) -> None:
        live = optuna.Trial(self._study, trial_id)
        earlier = self._study.get_trials(deepcopy=False)[int(trial.user_attrs[RETRY_OF])]
        for name, distribution in earlier.distributions.items():
            if isinstance(distribution, optuna.distributions.FloatDistribution):
                live.suggest_float(name, distribution.low, distribution.high, step=distribution.step)


def _state(trials: Sequence[FrozenTrial], record: _Record) -> EntryState:
    worker = record.owner.get("worker")
    if record.number >= len(trials) or trials[record.number].user_attrs.get(OWNER, {}).get("worker") != worker:
        return "of another study or storage"  # one with a study of this name, usually
    return "its worker is alive" if is_dead(record.owner) is False else "ready"


def _latest(trials: Sequence[FrozenTrial], trial: FrozenTrial) -> FrozenTrial:
    """Follow the retries of a trial to the last one."""
    after = {t.user_attrs[RETRY_OF]: t for t in trials if RETRY_OF in t.user_attrs and DISCARDED not in t.user_attrs}
    while trial.number in after:
        trial = after[trial.number]
    return trial
