"""What to make of a study, first and in a few lines: from its storage alone.

s[m, t]   score of model m on task t; the merge is the study's winner, on test where all that is compared was scored on
          it, else on the validation rows that chose it
V[m]      what m is worth under the study's objective: a weighted mean of s[m, t], or s of the worst task

Two models are compared row by row where the study keeps their rows (`tasks/uncertainty.py`).  One that is better by no
more than one standard error of the difference is called no better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dfmerge_studies.methods import Coefficients
from dfmerge_studies.report.view import StudyView
from dfmerge_studies.study.value import task_weights, trial_value
from dfmerge_studies.tasks.metrics import Guarded, Metrics, TaskScore, guarded, largest_drop
from dfmerge_studies.tasks.splits import SPLITS, Split
from dfmerge_studies.tasks.uncertainty import Difference, difference, standard_error

FEW = 2.5  # points of standard error from which on a task's rows are few
_BEST = 5  # trials of which is asked whether a task tells them apart
_EDGE = 0.01  # share of the range that is its edge

Scores = Mapping[str, TaskScore]


@dataclass(frozen=True)
class Against:
    """The merge compared with another one.

    Attributes:
        method: of the other.
        difference: by how much the merge is worth more, in the metric's own unit.
        standard_error: of that; None where it is not known.
        paired: whether it was taken row by row.
        better: whether it is more than one standard error; None where that is not known.
        clear: whether it is more than two, in either direction.
    """

    method: str
    difference: float
    standard_error: float | None
    paired: bool
    better: bool | None
    clear: bool | None

    @classmethod
    def of(cls, method: str, found: Difference) -> Against:
        """What was found against a method."""
        return cls(method, found.value, found.error, found.paired, found.beats, found.clear)


@dataclass(frozen=True)
class Verdict:
    """What a study has come to.

    Attributes:
        text: one line.
        trial: number of the trial that it is about.
        split: whose scores.
        kept: the merge's mean as a share of the experts' mean; None where there is no such share.
        largest_drop: the task that loses most against its own expert, and its points; None where none has one.
        against: the merge compared with every other method of the storage, the best first.
        notes: what else to know, one line each.
        guards: how the merge stands to each guard that both it and the base were scored on.
    """

    text: str
    trial: int
    split: Split
    kept: float | None
    largest_drop: tuple[str, float] | None
    against: Sequence[Against]
    notes: Sequence[str]
    guards: Mapping[str, Guarded] = field(default_factory=dict)

    @property
    def lines(self) -> list[str]:
        """All of it."""
        return [self.text, *self.notes]

    def described(self) -> dict[str, Any]:
        """The same for `--json`."""
        drop = self.largest_drop
        return {
            "text": self.text,
            "split": self.split,
            "kept": self.kept,
            "largest_drop": None if drop is None else {"task": drop[0], "points": drop[1]},
            "against": [asdict(each) for each in self.against],
            "notes": list(self.notes),
            **({"guards": {task: each.described() for task, each in self.guards.items()}} if self.guards else {}),
        }


def verdict_of(view: StudyView) -> Verdict | None:
    """What a study has come to; None while no trial has completed.

    Args:
        view: the stored study.
    """
    if view.best is None:
        return None
    rivals = {name: other for name, other in view.baselines.items() if other.best is not None}
    split = _split(view, list(rivals.values()))
    merge, metrics = _results(view, split), view.metrics(split)
    experts = view.results("experts", split) or {}
    others = {name: _results(other, split) for name, other in rivals.items() if view.scores_alike(other, split)}
    found = [Against.of(name, _against(view, metrics, merge, other)) for name, other in others.items()]
    found.sort(key=lambda each: each.difference)
    kept = _kept(merge, experts, metrics)
    drop = largest_drop(_plain(merge), _plain(experts), metrics) if experts else None
    where = "test" if split == "test" else "validation, which chose it"
    parts = [_kept_text(merge, experts, metrics, kept, where), _drop_text(drop), _against_text(found, metrics)]
    text = "; ".join(part for part in parts if part)
    guards, guard_notes = _guards(view, split)
    notes = [
        *guard_notes,
        *_expert_notes(view, split),
        *_row_notes(view),
        *_edge_notes(view),
    ]
    return Verdict(text, view.best.number, split, kept, drop, found, notes, guards)


def _split(view: StudyView, rivals: Sequence[StudyView]) -> Split:
    """Test where the merge, its rivals and the experts were scored on it, since no trial was chosen by it."""
    scored = [each.best is not None and each.results(each.best, "test") for each in (view, *rivals)]
    return "test" if all(scored) and view.results("experts", "test") else "validation"


def _results(view: StudyView, split: Split) -> Scores:
    assert view.best is not None
    return view.results(view.best, split) or {}


def _plain(scores: Scores) -> dict[str, float]:
    return {task: found.score for task, found in scores.items()}


def _against(view: StudyView, metrics: Metrics, merge: Scores, other: Scores) -> Difference:
    weights = (_weights(view, metrics, merge), _weights(view, metrics, other))
    return difference(merge, other, metrics, weights)


def _weights(view: StudyView, metrics: Metrics, scores: Scores) -> dict[str, float]:
    """Of every task in what a model is worth."""
    return task_weights(view.objective, metrics.worths_of_aims(_plain(scores)))


def _kept(merge: Scores, experts: Scores, metrics: Metrics) -> float | None:
    """The merge's mean as a share of the experts', over the tasks that have one; only of scores that begin at 0."""
    tasks = [task for task in experts if task in merge]
    if not tasks or any(not metrics[task].higher_is_better or metrics[task].low != 0 for task in tasks):
        return None
    theirs = sum(experts[task].score for task in tasks)
    return sum(merge[task].score for task in tasks) / theirs if theirs > 0 else None


def _kept_text(merge: Scores, experts: Scores, metrics: Metrics, kept: float | None, where: str) -> str:
    tasks = [task for task in experts if task in merge]
    if not tasks:
        shown = metrics.mean.shown(metrics.mean_of(_plain(merge)))
        return f"a mean of {shown} on {where}"
    some = metrics.only(tasks)
    ours, theirs = (some.mean_of({task: each[task].score for task in tasks}) for each in (merge, experts))
    if kept is not None:
        both = f"{some.mean.shown(ours)} of {some.mean.shown(theirs)}"
        return f"keeps {100 * kept:.0f}% of the experts' mean ({both} on {where})"
    return f"a mean of {some.mean.shown(ours)} where the experts have {some.mean.shown(theirs)}, on {where}"


def _drop_text(drop: tuple[str, float] | None) -> str:
    if drop is None:
        return ""
    task, points = drop
    return f"{task} loses most, {points:.1f} points" if points > 0 else "no task loses against its own expert"


def _against_text(found: Sequence[Against], metrics: Metrics) -> str:
    """Against the best of the other methods; and which of them the merge is not better than."""
    if not found:
        return "no other method to compare it with: list baselines in the spec"
    best, percent = found[0], metrics.mean.percent
    digits, unit = (1, " points") if percent else (3, "")
    by = f"{metrics.mean.factor * best.difference:+.{digits}f}{unit}"
    if best.standard_error is None:
        return f"compared with {best.method}, the best of the others, {by}, of a standard error that is not known"
    error = f"{metrics.mean.factor * best.standard_error:.{digits}f}"
    how = f"{by}, standard error {error}{'' if best.paired else ' without pairs of rows'}"
    unbeaten = [each.method for each in found if each.better is False]
    if unbeaten:
        return f"no better than {_names(unbeaten)} ({how}{f', against {best.method}' if len(unbeaten) > 1 else ''})"
    return f"better than {best.method}, the best of the others ({how}{'' if best.clear else ', so not certain'})"


def _names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _guards(view: StudyView, split: Split) -> tuple[dict[str, Guarded], list[str]]:
    """What the merge has lost or kept of what no expert stands for; on validation where a guard has no test split."""
    guards: dict[str, Guarded] = {}
    notes: list[str] = []
    for where in dict.fromkeys((split, *SPLITS)):
        merge, base, metrics = _results(view, where), view.results("base", where) or {}, view.metrics(where)
        found = guarded(_plain(merge), _plain(base), metrics)
        new = {task: each for task, each in found.items() if task not in guards}
        guards |= new
        notes += _guard_notes(new, merge, base, metrics, "" if where == split else f" on {where}")
    return guards, notes


def _guard_notes(guards: Mapping[str, Guarded], merge: Scores, base: Scores, metrics: Metrics, where: str) -> list[str]:
    notes = []
    for task, found in guards.items():
        metric = metrics[task]
        moved = "as good as" if abs(found.drop) < 0.05 else f"{abs(found.drop):.1f} points {_way(found.drop)}"
        state = "kept" if found.kept else "NOT kept"
        notes.append(
            f"the guard {task} is {state}: {metric.shown(merge[task].score)} {metric.name}{where}, {moved} the base's "
            f"{metric.shown(base[task].score)}, where {found.allowed:g} points worse is allowed"
        )
    return notes


def _way(drop: float) -> str:
    return "worse than" if drop > 0 else "better than"


def _expert_notes(view: StudyView, split: Split) -> list[str]:
    """Experts that are worse than the base on their own task."""
    experts, base = view.results("experts", split), view.results("base", split)
    notes = []
    for task in experts or {}:
        if experts is None or base is None or task not in base:
            continue
        metric = view.metrics(split)[task]
        found = difference({task: experts[task]}, {task: base[task]}, view.metrics(split))
        if found.value < 0:
            owner = next((name for name, own in view.experts.items() if own == task), task)
            sure = "" if found.clear else ", within noise"
            notes.append(
                f"the expert {owner} is worse than the base on its own task {task}: "
                f"{metric.shown(experts[task].score)} against {metric.shown(base[task].score)}{sure}"
            )
    return notes


def _row_notes(view: StudyView) -> list[str]:
    """Tasks whose rows are so few that they tell none of the best trials from the winner."""
    best = view.best
    assert best is not None
    others = sorted((trial for trial in view.trials if trial is not best), key=lambda trial: -trial_value(trial))[
        :_BEST
    ]
    winner, metrics = view.results(best, "validation") or {}, view.metrics("validation")
    notes = []
    for task, score in winner.items():
        if task in metrics.guards:
            continue
        error = standard_error(score, metrics[task])
        points = None if error is None else 100 * error / metrics[task].span
        if not others or points is None or points < FEW:
            continue
        found = [_on(task, winner, view.results(trial, "validation") or {}, metrics) for trial in others]
        if not any(each.clear for each in found if each is not None):
            notes.append(
                f"the {score.n} rows of {task} do not tell the best {len(others) + 1} trials apart: the standard error "
                f"of its score is {points:.1f} points"
            )
    return notes


def _on(task: str, a: Scores, b: Scores, metrics: Metrics) -> Difference | None:
    return difference({task: a[task]}, {task: b[task]}, metrics.only([task])) if task in b else None


def _edge_notes(view: StudyView) -> list[str]:
    """Coefficients of the winner at the edge of what the search could choose."""
    bounds = view.fingerprint.get("search.bounds")
    if view.best is None or view.policy is not Coefficients.PER_EXPERT or not bounds:
        return []
    low, high = map(float, bounds)
    margin = _EDGE * (high - low)
    at: dict[float, list[str]] = {}
    for name, value in view.coefficients(view.best).items():
        edge = low if value <= low + margin else high if value >= high - margin else None
        if edge is not None:
            at.setdefault(edge, []).append(name)
    return [
        f"at the edge of search.bounds, {edge:g}: the coefficient{'s' * (len(names) > 1)} of {_names(names)}; wider "
        "bounds may hold a better merge"
        for edge, names in at.items()
    ]
