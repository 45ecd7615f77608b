"""What is stuck in a study, and how to mend it: the work of `dfmerge repair`.

Nothing here is needed in the ordinary course of things: `run` recovers what dead workers left.  This is for looking,
and for what no run touches: failed points, leftover files of processes that were killed, studies that were never begun.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from dfmerge_studies.spec import StudySpec
from dfmerge_studies.storage import storage_of, study_id_of, study_names
from dfmerge_studies.study import provenance
from dfmerge_studies.temporary import sweep
from dfmerge_studies.trials.marks import ERROR, OWNER, place_of
from dfmerge_studies.trials.outbox import Outbox, outbox_folder, outboxes
from dfmerge_studies.trials.queue import retry_failures
from dfmerge_studies.trials.reading import failures, last_sign, point_of
from dfmerge_studies.trials.recovery import recover, stale_trials

# What `write_model`, the cache and the outbox call their files until these are whole.
_LEFTOVER = re.compile(r"(?:\.(?P<name>.+)\.(?:[0-9a-f]{12}|[0-9a-f]{32})\.(?P<end>tmp|old)|.+\.[0-9a-f]{32}\.tmp)")
_IN_USE_SECONDS = 3600.0  # a younger one may belong to a process that is writing it
_BEGINNING_SECONDS = 2.0  # a first start writes what the study is about within less


@dataclass(frozen=True)
class Leftover:
    """A file or folder that a killed process left under a temporary name.

    Attributes:
        path: what is left.
        restore: where it belongs, if it is the only copy of a directory that was being replaced; else it is deleted.
    """

    path: Path
    restore: Path | None = None


@dataclass
class Report:
    """What is stuck in one study.

    Attributes:
        name: of the study.
        orphans: stale trials (running ones whose worker is gone), as JSON values.
        results: files of the outbox, as JSON values.
        failures: failed trials that may be tried again, as JSON values.
        unfinished: whether a first start was killed before it had written what the study is about.
    """

    name: str
    orphans: list[dict[str, Any]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    unfinished: bool = False


def studies_of(storage: BaseStorage, name: str) -> list[str]:
    """List the study of a name and those made beside it (baselines), as far as they are in the storage."""
    return sorted(n for n in study_names(storage) if n == name or n.startswith(f"{name}."))


def look(study: optuna.Study, outbox: Path) -> Report:
    """Find what is stuck in a study; changes nothing.

    Returns:
        What was found.
    """
    trials = study.get_trials(deepcopy=False)
    return Report(
        study.study_name,
        [{**_trial(trial), **_owner(study, trial)} for trial in stale_trials(study, trials)],
        [{"file": str(e.path), "trial": e.trial, "state": e.state} for e in Outbox(outbox, study).entries()],
        [{**_trial(trial), "error": trial.user_attrs.get(ERROR)} for trial in failures(trials)],
        provenance.is_unfinished(study),
    )


def mend(study: optuna.Study, outbox: Path, *, failures: bool = False) -> dict[str, int]:
    """Apply results, put stale trials back in the queue, and failed ones if asked.

    Args:
        study: the study.
        outbox: its folder.
        failures: whether failed coefficients are to be tried again.

    Returns:
        How many of each: "applied", "requeued", "retried".
    """
    box = Outbox(outbox, study)
    applied = box.apply()
    requeued = recover(study)
    applied += box.apply()
    return {"applied": applied, "requeued": requeued, "retried": retry_failures(study) if failures else 0}


def delete_unfinished(studies: Sequence[optuna.Study]) -> list[str]:
    """Delete studies whose first start was killed; one that is being started at this moment is left alone.

    Args:
        studies: of one storage, unfinished when they were looked at.

    Returns:
        The names of those deleted.
    """
    if studies:
        time.sleep(_BEGINNING_SECONDS)
    deleted = []
    for study in studies:
        if provenance.is_unfinished(study):
            storage_of(study).delete_study(study_id_of(study))
            deleted.append(study.study_name)
    return deleted


def leftovers(spec: StudySpec, folders: Iterable[Path]) -> list[Leftover]:
    """Find temporary files and folders that nobody has touched for an hour.

    Args:
        spec: names the cache and the outbox, which are searched.
        folders: where exports may have been written, searched without their subfolders.
    """
    places = {folder.resolve() for folder in folders} | _written(spec)
    found = []
    for place in sorted(p for p in places if p.is_dir()):
        for path in sorted(place.iterdir()):
            match = _LEFTOVER.fullmatch(path.name)
            if match is None or time.time() - path.lstat().st_mtime < _IN_USE_SECONDS:
                continue
            home = place / match["name"] if match["end"] == "old" else None
            found.append(Leftover(path, home if home is not None and not home.exists() else None))
    return found


def sweep_unfinished(spec: StudySpec) -> list[Path]:
    """Delete at once what dead processes of this machine left unfinished in the outboxes and in the cache.

    Args:
        spec: says where they are.

    Returns:
        What was deleted.
    """
    return [path for folder in _written(spec) for path in sweep(folder)]


def _written(spec: StudySpec) -> set[Path]:
    """Folders that studies write files to, but for exports: outboxes and a local cache."""
    folders = {folder for folder in outboxes(spec.workdir).resolve().glob("*") if folder.is_dir()}
    if spec.cache_place is not None and "://" not in spec.cache_place:
        folders.add((spec.workdir / Path(spec.cache_place).expanduser()).resolve())
    return folders


def clear(found: Iterable[Leftover]) -> None:
    """Delete what was left, or put it where it belongs.

    Args:
        found: from `leftovers`.

    Raises:
        OSError: one cannot be deleted or moved.
    """
    for leftover in found:
        if leftover.restore is not None:
            leftover.path.rename(leftover.restore)
        elif leftover.path.is_dir() and not leftover.path.is_symlink():
            shutil.rmtree(leftover.path)
        else:
            leftover.path.unlink(missing_ok=True)


def other_results(spec: StudySpec, url: str, names: Iterable[str]) -> list[Path]:
    """List the files in outboxes beside the studies' own: of other studies, or of other storages.

    Args:
        spec: says where outboxes are.
        url: of the storage, resolved.
        names: of the studies whose outboxes are not listed.
    """
    own = {outbox_folder(spec.workdir, url, name) for name in names}
    return [file for file in sorted(outboxes(spec.workdir).glob("*/*.json")) if file.parent not in own]


def _trial(trial: FrozenTrial) -> dict[str, Any]:
    return {"trial": trial.number, "place": place_of(trial), "coefficients": point_of(trial)}


def _owner(study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
    owner, seen = trial.user_attrs.get(OWNER, {}), last_sign(study, trial)
    return {
        "host": owner.get("host"),
        "pid": owner.get("pid"),
        "last_sign_of_life": seen.isoformat(timespec="seconds") if seen is not None else None,
    }
