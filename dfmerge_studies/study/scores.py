"""Scores that are computed once and then kept in their study: of the base, the experts, single trials, other models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial

from dfmerge_studies.checkpoints.digest import Contents, file_digest, json_digest
from dfmerge_studies.checkpoints.reference import resolve
from dfmerge_studies.checkpoints.write import HEADS
from dfmerge_studies.spec import StudySpec
from dfmerge_studies.study.rows import rows_attribute, unpacked
from dfmerge_studies.tasks.metrics import TaskScore
from dfmerge_studies.tasks.splits import Split
from dfmerge_studies.trials.marks import ROWS, TASKS

if TYPE_CHECKING:
    from dfmerge_studies.objective.problem import Problem

_SCORES = "dfmerge:scores"  # study attribute, followed by row and split
_MULTI_TASK = "dfmerge:multi_task"  # study attribute: row of the multi-task model that it was last compared with


@dataclass(frozen=True)
class KeptScores:
    """Scores in a study's attributes, each with the digests of the data that it was computed on.

    Attributes:
        study: where they are kept.
        problem: the models and data in memory.
    """

    study: optuna.Study
    problem: Problem

    def stored(self, row: str, split: Split) -> dict[str, float] | None:
        """Scores that were computed on the data as it is now, None if there are none."""
        kept = self.study.user_attrs.get(f"{_SCORES}:{row}:{split}")
        if kept is None or kept["data"] != self.problem.data_digests(split):
            return None
        return dict(kept["scores"])

    def kept(self, row: str, split: Split, compute: Callable[[], Mapping[str, TaskScore]]) -> dict[str, float]:
        """Scores that the study has, or gets now.

        Args:
            row: what is scored.
            split: of the tasks' data.
            compute: scores it, where the study does not have it.
        """
        scores = self.stored(row, split)
        if scores is None:
            found = compute()
            scores = {task: result.score for task, result in found.items()}
            kept = {
                "data": self.problem.data_digests(split),
                "scores": scores,
                "n": {task: result.n for task, result in found.items()},
                **rows_attribute({task: result.rows for task, result in found.items() if result.rows is not None}),
            }
            self.study.set_user_attr(f"{_SCORES}:{row}:{split}", kept)
        return scores

    def shared(self, row: str, split: Split, compute: Callable[[], Mapping[str, TaskScore]]) -> dict[str, float]:
        """Scores of what is the same in every study of these models: once per process is enough for all of them.

        Args:
            row: what is scored, named by what decides its scores.
            split: of the tasks' data.
            compute: scores it, where neither the study nor the process has it.
        """
        known = self.problem.reference_scores

        scores = self.kept(row, split, lambda: known[row, split] if (row, split) in known else compute())
        if (row, split) not in known and (kept := results_in(self.study.user_attrs, row, split)) is not None:
            known[row, split] = kept
        return scores


def scores_attribute(row: str, split: Split, scores: Mapping[str, float]) -> dict[str, Any]:
    """Scores as an attribute of a study, where no data that they are of is known.

    Args:
        row: "base" or "experts".
        split: that they are of.
        scores: by task.
    """
    return {f"{_SCORES}:{row}:{split}": {"data": {}, "scores": dict(scores)}}


def stored_scores(study: optuna.Study, row: str | FrozenTrial, split: Split) -> dict[str, float] | None:
    """Scores that a study keeps, whatever the data is now.

    Args:
        study: from its storage.
        row: "base", "experts", that of another model, or a completed trial.
        split: of the tasks' data.
    """
    return scores_in(study.user_attrs, row, split)


def scores_in(attributes: Mapping[str, Any], row: str | FrozenTrial, split: Split) -> dict[str, float] | None:
    """`stored_scores`, from the attributes of a study."""
    kept = attributes.get(f"{_SCORES}:{row if isinstance(row, str) else trial_row(row)}:{split}")
    return dict(kept["scores"]) if kept is not None else None


def results_in(attributes: Mapping[str, Any], row: str | FrozenTrial, split: Split) -> dict[str, TaskScore] | None:
    """Scores that a study keeps with the rows that they rest on, as far as it keeps these too.

    Args:
        attributes: of the study.
        row: "base", "experts", that of another model, or a completed trial.
        split: of the tasks' data.
    """
    kept: Mapping[str, Any] | None
    if isinstance(row, FrozenTrial) and split == "validation":
        kept = {"scores": row.user_attrs[TASKS], "n": _numbers(attributes, split), ROWS: row.user_attrs.get(ROWS, {})}
    else:
        kept = attributes.get(f"{_SCORES}:{row if isinstance(row, str) else trial_row(row)}:{split}")
    if kept is None:
        return None
    rows, numbers = unpacked(kept.get(ROWS, {})), kept.get("n", {})
    return {
        task: TaskScore(score, "", len(rows.get(task, ())) or numbers.get(task, 0), rows.get(task))
        for task, score in kept["scores"].items()
    }


def results_by_split(
    study: optuna.Study, row: str | FrozenTrial, splits: Iterable[Split]
) -> dict[Split, dict[str, TaskScore]]:
    """`results_in` of those of some splits that a study keeps.

    Args:
        study: from its storage.
        row: as there.
        splits: of the tasks' data.
    """
    attributes = study.user_attrs
    found = {split: results_in(attributes, row, split) for split in splits}
    return {split: results for split, results in found.items() if results is not None}


def _numbers(attributes: Mapping[str, Any], split: Split) -> dict[str, int]:
    """How many rows of each task are scored, as far as the study says it of some model."""
    found: dict[str, int] = {}
    for name, kept in attributes.items():
        if name.startswith(f"{_SCORES}:") and name.endswith(f":{split}"):
            found.update(kept.get("n", {}))
    return found


def multi_task_row(study: optuna.Study) -> str | None:
    """Under which name the scores of the multi-task model are kept that a study was last compared with, if any."""
    return study.user_attrs.get(_MULTI_TASK)


def keep_multi_task_row(study: optuna.Study, row: str) -> None:
    """Note the multi-task model that a study is compared with.

    Args:
        study: one of a comparison.
        row: from `find_model`.
    """
    if multi_task_row(study) != row:
        study.set_user_attr(_MULTI_TASK, row)


def trial_row(trial: FrozenTrial) -> str:
    """Under which name a trial's scores are kept."""
    return f"trial {trial.number}"


def find_model(spec: StudySpec, reference: str, contents: Contents | None = None) -> tuple[Path, str]:
    """Where a model other than base and experts is, and under which name its scores are kept: its content decides.

    Args:
        spec: whose folder relative paths start from.
        reference: directory, Hub id or adapter.
        contents: is told what its files hold, so that another read of them can be compared.

    Raises:
        InputError: nothing is there.
    """
    contents = contents or Contents()
    trust = spec.trust_remote_code
    found = resolve(reference, root=spec.root, where=spec.where("multi_task"), trust_remote_code=trust)
    heads = {file: file_digest(file) for file in (found.path / HEADS).glob("*.safetensors")}
    for file, digest in heads.items():
        contents.add(file, digest)
    content = [contents.digest(found), {file.name: digest for file, digest in heads.items()}]
    return found.path, f"model {json_digest(content)[:32]}"
