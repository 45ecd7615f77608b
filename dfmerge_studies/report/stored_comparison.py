"""Scores as `run` and `compare --seeds` have left them in a storage: nothing is loaded, run or scored for them."""

from __future__ import annotations

from collections.abc import Iterable

from dfmerge_studies.report.standings import BASE, EXPERTS, Scored, Standings, side_by_side
from dfmerge_studies.report.view import StudyView
from dfmerge_studies.study.comparison import FINE_TUNED, MULTI_TASK, ZERO_SHOT, ComparedStudy, Comparison, Scores
from dfmerge_studies.study.scores import multi_task_row
from dfmerge_studies.tasks.metrics import TaskScore
from dfmerge_studies.tasks.splits import SPLITS, Split


def stored_standings(view: StudyView) -> dict[Split, Standings]:
    """What a study keeps, by split: base, experts, the best of other methods in its storage, its own best last."""
    rows = [
        Scored(
            name,
            {split: view.scores(key, split) or {} for split in SPLITS},
            compete=False,
            results={split: view.results(key, split) or {} for split in SPLITS},
        )
        for name, key in ((BASE, "base"), (EXPERTS, "experts"))
    ]
    rows += [Scored(name, _alike(view, each), results=_results(each)) for name, each in view.baselines.items()]
    if view.best is not None:
        rows.append(Scored(f"{view.method} (trial {view.best.number})", _alike(view, view), results=_results(view)))
    return side_by_side(rows, {split: view.metrics(split) for split in SPLITS}, view.name)


def _alike(view: StudyView, other: StudyView) -> dict[Split, dict[str, float]]:
    """Scores of the best trial of another study, on the splits on which they may stand beside the view's."""
    return {split: _best_scores(other, split) or {} for split in SPLITS if view.scores_alike(other, split)}


def _results(view: StudyView) -> dict[Split, dict[str, TaskScore]]:
    """Scores of a study's best trial with their rows, by split."""
    assert view.best is not None
    return {split: view.results(view.best, split) or {} for split in SPLITS}


def stored_comparison(view: StudyView) -> Comparison | None:
    """The methods in a study's storage over their seeds, on test where all of them have been scored on it.

    Methods whose scores on the split are of another kind (agreement beside accuracy) are left out.

    Args:
        view: the study that the others are named after.

    Returns:
        Scores of one split, or None where no method has several seeds.
    """
    if not any(len(by_seed) > 1 for by_seed in view.variants.values()):
        return None
    everything = [each for by_seed in view.variants.values() for each in by_seed.values()]
    split: Split = "test" if all(_best_scores(each, "test") for each in everything) else "validation"
    alike = {
        variant: {seed: each for seed, each in by_seed.items() if view.scores_alike(each, split)}
        for variant, by_seed in view.variants.items()
    }
    entries = [_entry(variant, each, split) for variant, by_seed in alike.items() for each in by_seed.values()]
    return Comparison(
        study=view.name,
        storage="",
        tasks=tuple(view.tasks),
        variants=tuple(variant for variant, by_seed in alike.items() if by_seed),
        seeds=tuple(sorted({entry.seed for entry in entries})),
        splits=(split,),
        metrics={split: view.metrics(split)},
        entries=tuple(entries),
        references=_references(view, [each for by_seed in alike.values() for each in by_seed.values()], split),
    )


def _best_scores(view: StudyView, split: Split) -> dict[str, float] | None:
    assert view.best is not None  # variants have a result
    return view.trial_scores(view.best, split)


def _entry(variant: str, view: StudyView, split: Split) -> ComparedStudy:
    assert view.best is not None
    scores = {split: _best_scores(view, split) or {}}
    return ComparedStudy.of(
        variant,
        view.seed,
        view.name,
        view.best,
        among=view.trials,
        scores=scores,
        results=_results(view),
        selection=view.selection,
    )


def _references(view: StudyView, everything: Iterable[StudyView], split: Split) -> dict[str, dict[int, Scores]]:
    """Of each whole model, the scores that some study keeps at every seed."""
    studies = list(everything)
    # Studies that were compared at other times may name other multi-task models: the study's own word goes first.
    named = (multi_task_row(each.study) for each in (view, *studies))
    multi_task = next((row for row in named if row is not None), None)
    rows = {ZERO_SHOT: "base", FINE_TUNED: "experts", **({MULTI_TASK: multi_task} if multi_task is not None else {})}
    found: dict[str, dict[int, Scores]] = {}
    for name, row in rows.items():
        for each in studies:
            scores = each.scores(row, split)
            if scores:
                found.setdefault(name, {}).setdefault(each.seed, {split: scores})
    return found
