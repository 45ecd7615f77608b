"""Scores of a model as it was written, beside those of the merge in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dfmerge_studies.tasks.metrics import Metrics, TaskScore
from dfmerge_studies.tasks.uncertainty import Difference, difference

ROUNDING = 0.5  # points up to which a difference is not worth a word, however certain it is


@dataclass(frozen=True)
class Checked:
    """What was written, scored again on the validation rows.

    Attributes:
        form: what it was written as: `bfloat16`, an adapter.
        metrics: what the scores are.
        written: by task, of the files.
        merged: by task, of the merge in memory.
    """

    form: str
    metrics: Metrics
    written: Mapping[str, TaskScore]
    merged: Mapping[str, TaskScore]

    @property
    def scores(self) -> dict[str, float]:
        """Of the files, by task."""
        return {task: found.score for task, found in self.written.items()}

    def only(self, task: str) -> Checked:
        """The same of one task."""
        return Checked(self.form, self.metrics.only([task]), {task: self.written[task]}, {task: self.merged[task]})

    def differences(self) -> dict[str, Difference]:
        """By task, what the files score more than the merge in memory, row by row where the metric allows it."""
        return {
            task: difference({task: found}, {task: self.merged[task]}, self.metrics)
            for task, found in self.written.items()
        }

    def warnings(self) -> list[str]:
        """A line for every task whose score differs by more than rounding explains, which errs to both sides alike."""
        lines = []
        for task, found in self.differences().items():
            metric = self.metrics[task]
            points = 100 * found.value / metric.span
            if found.clear is not False and abs(points) >= ROUNDING:
                lines.append(
                    f"as {self.form}, {task} scores {metric.shown(self.written[task].score)} instead of "
                    f"{metric.shown(self.merged[task].score)}, which is more than noise on "
                    f"{self.written[task].n} rows"
                )
        return lines

    def line(self) -> str:
        """The scores before and after in one line."""
        each = [
            f"{task} {self.metrics[task].shown(found.score)} ({self.metrics[task].shown(self.merged[task].score)})"
            for task, found in self.written.items()
        ]
        return f"as {self.form} (and before): {', '.join(each)}; {self.metrics.heading} on the validation rows"

    def described(self) -> dict[str, Any]:
        """The same for JSON."""
        differences = self.differences()
        return {
            "form": self.form,
            "tasks": {
                task: {
                    "score": found.score,
                    "merged": self.merged[task].score,
                    "n": found.n,
                    "difference": differences[task].value,
                    "standard_error": differences[task].error,
                }
                for task, found in self.written.items()
            },
            "warnings": self.warnings(),
        }
