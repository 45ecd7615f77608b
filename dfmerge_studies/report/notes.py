"""Our own words and figures in optuna-dashboard: notes on a study and its best trials, figures, model cards.

All of it is stored with the study, so every dashboard on the storage shows it.  A note that somebody else has written
is left alone.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from optuna.trial import FrozenTrial
from optuna_dashboard import get_note, save_note, save_plotly_graph_object

from dfmerge_studies.report.expectations import expectation_text, gain_left, gain_text
from dfmerge_studies.report.figures import plotly_figures
from dfmerge_studies.report.races import pruned_text, races_of, races_text
from dfmerge_studies.report.renderings import beside_experts
from dfmerge_studies.report.standings import Scored, side_by_side
from dfmerge_studies.report.tables import bounds_text, selection_text, sentence
from dfmerge_studies.report.verdict import verdict_of
from dfmerge_studies.report.view import StudyView
from dfmerge_studies.storage import id_of
from dfmerge_studies.study.provenance import WARM_START, stored_fingerprint
from dfmerge_studies.study.value import best_first
from dfmerge_studies.study.warm_start import origin_text
from dfmerge_studies.trials.marks import COEFFICIENTS, DROPS
from dfmerge_studies.trials.reading import violation

BEST = 3  # trials that get a note
_BUILT_IN = ("importance", "slices")  # the dashboard draws these itself
_SIGNED = "*Written by dfmerge-studies; a note that you edit is yours and stays.*"
_PUBLISHED = "dfmerge:published"  # study attribute: number of results and of the winner that notes and figures show


def publish(study: optuna.Study) -> bool:
    """Bring a study's notes and figures up to its completed trials.

    Args:
        study: any study; one that this program did not make is left alone.

    Returns:
        Whether there was something new.
    """
    if stored_fingerprint(study) is None:
        return False
    view = StudyView.of(study)
    done = [len(view.trials) + len(view.pruned), view.best.number if view.best is not None else None]
    if study.user_attrs.get(_PUBLISHED) == done:
        return False
    _write_note(study, study_note(view))
    for rank, trial in enumerate(_best_trials(view), start=1):
        _write_note(optuna.Trial(study, id_of(trial)), trial_note(view, trial, rank))
    for trial in view.pruned:
        text = escape(pruned_text(trial, view.metrics("validation")))
        _write_note(optuna.Trial(study, id_of(trial)), f"{text}\n\n{_SIGNED}")
    for name, figure in plotly_figures(study).items():
        if name not in _BUILT_IN:
            figure.update_layout(height=None, width=None, autosize=True)  # the dashboard's panels have their own size
            save_plotly_graph_object(study, figure, graph_object_id=f"dfmerge-{name}")
    study.set_user_attr(_PUBLISHED, done)
    return True


def study_note(view: StudyView) -> str:
    """What a study merges, how far it is, and how to export its winner, as Markdown."""
    spec, best = view.spec, view.best
    lines = [
        f"## {escape(view.name)}",
        "",
        f"Merges {len(view.experts)} fine-tuned models into one with **{escape(view.method)}**; "
        f"{len(view.trials)} completed trials{_feasible(view)}.{_raced(view)}{_first_tried(view)}",
        "",
        *_table(
            ["expert", "model", "task"],
            [[name, _model(spec, name), task or "all tasks"] for name, task in view.experts.items()],
        ),
        *([f"Base: {escape(str(spec['base']))}", ""] if "base" in spec else []),
    ]
    if best is not None:
        lines += [
            *_verdict(view),
            f"**Best: trial {best.number}, {view.value_text(best, 2)}** ({escape(view.measure)}"
            f"{' in percent' if view.unit else ''} on validation)",
            "",
            *_named(view),
            *_table(
                ["expert", "coefficient"],
                [[name, f"{value:.4g}"] for name, value in best.user_attrs[COEFFICIENTS].items()],
            ),
            *_gain_left(view),
            *_own_best(view),
            *_way_to_the_model(view),
        ]
    return "\n".join([*lines, _SIGNED])


def _raced(view: StudyView) -> str:
    races = races_of([*view.trials, *view.pruned])
    return f" {escape(sentence(races_text(races)))}" if races is not None else ""


def _verdict(view: StudyView) -> list[str]:
    """What the study has come to so far."""
    verdict = verdict_of(view)
    lines = [] if verdict is None else list(map(sentence, verdict.lines))
    return [*(f"- {escape(line)}" for line in lines), *([""] if lines else [])]


def _first_tried(view: StudyView) -> str:
    warm = view.study.user_attrs.get(WARM_START)
    return f" First tried: {escape(origin_text(warm))}." if warm else ""


def _named(view: StudyView) -> list[str]:
    """How the winner was named."""
    if view.selection is None:
        return []
    text = selection_text(view.selection.described(), view.metrics("validation"))
    return [escape(sentence(text)), ""]


def _own_best(view: StudyView) -> list[str]:
    """What to make of the trial that the dashboard itself calls the best, where there are constraints."""
    if not any(trial.constraints for trial in view.trials):
        return []
    return ["The dashboard's own *Best Trial* does not look at constraints. The one named here does.", ""]


def _way_to_the_model(view: StudyView) -> list[str]:
    if "base" not in view.spec:
        return ["Made in Python: `optimize_merge` with the same arguments joins it and gives the merged model.", ""]
    return ["Export it with the spec that this study was made from:", "", *_export("")]


def _export(flags: str) -> list[str]:
    return ["```sh", f"dfmerge export SPEC.yaml{flags} --out merged-model", "```", ""]


def trial_note(view: StudyView, trial: FrozenTrial, rank: int) -> str:
    """A trial's score per task, beside the experts', as Markdown.

    Args:
        view: the stored study.
        trial: one of its completed trials.
        rank: 1 for the best.
    """
    metrics = view.metrics("validation")
    base = view.scores("base", "validation") or {}
    others = {**(view.scores("experts", "validation") or {}), **{t: base[t] for t in metrics.guards if t in base}}
    other = "own expert, of guards the base" if metrics.guards else "own expert"
    scored = [
        Scored("merged", {"validation": view.trial_scores(trial, "validation") or {}}),
        Scored(other, {"validation": others}, compete=False),
    ]
    found = side_by_side(scored, {"validation": metrics})["validation"]
    return "\n".join(
        [
            f"**Number {rank} of the study** (on the validation splits)",
            "",
            *_table(["task", "metric", "merged", other, "difference"], beside_experts(found)),
            *_expectation(view, trial),
            *_constraint(view, trial),
            *(_export(f" --trial {trial.number}") if "base" in view.spec else []),
            _SIGNED,
        ]
    )


def artifact_folder(workdir: Path) -> Path:
    """Where the artifacts of a spec's studies are."""
    return workdir / ".dfmerge" / "artifacts"


def keep_card(study: optuna.Study, card: Path, workdir: Path) -> str:
    """Keep an exported model's card as an artifact of its study.

    Args:
        study: where the model is from.
        card: the card's file.
        workdir: of the spec.

    Returns:
        The artifact's id.
    """
    folder = artifact_folder(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    return upload_artifact(artifact_store=FileSystemArtifactStore(folder), file_path=str(card), study_or_trial=study)


def escape(text: str) -> str:
    """A text that Markdown and HTML take as it is."""
    return re.sub(r"([\\`*_{}\[\]()#+!|~-])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _best_trials(view: StudyView) -> list[FrozenTrial]:
    named = [view.best] if view.best is not None else []
    others = [trial for trial in view.trials if trial not in named]
    return [*named, *best_first(others, view.objective)][:BEST]


def _feasible(view: StudyView) -> str:
    if not view.allowed:
        return ""
    kept = sum(violation(trial) == 0 for trial in view.trials)
    return f", {kept} of them with every task within {bounds_text(view.allowed, view.metrics('validation').guards)}"


def _constraint(view: StudyView, trial: FrozenTrial) -> list[str]:
    """Whether a trial keeps every task within `max_drop`: optuna-dashboard does not show constraints of Optuna 5."""
    drops = {task: drop for task, drop in trial.user_attrs.get(DROPS, {}).items() if task in view.allowed}
    if not drops:
        return []
    worst = max(drops, key=lambda task: drops[task] - view.allowed[task])
    verdict = "kept" if violation(trial) == 0 else "violated"
    whose = f"{escape(worst)}{', against the base' if worst in view.metrics('validation').guards else ''}"
    text = f"largest drop {drops[worst]:.1f} points, allowed {view.allowed[worst]:g} ({whose})"
    return [f"Constraint {verdict}: {text}.", ""]


def _expectation(view: StudyView, trial: FrozenTrial) -> list[str]:
    text = expectation_text(trial, view.metrics("validation"))
    return [escape(text), ""] if text is not None else []


def _gain_left(view: StudyView) -> list[str]:
    left = gain_left(view.trials)
    return [] if left is None else [f"Gain to come: {escape(gain_text(left, view.metrics('validation')))}.", ""]


def _model(spec: Mapping[str, Any], expert: str) -> str:
    entry = spec.get("experts", {}).get(expert, {})
    return str(entry.get("model", "") if isinstance(entry, Mapping) else entry)


def _table(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header)]
    body = [[escape(cell) for cell in row] for row in rows]
    return [f"| {' | '.join(cells)} |" for cells in (*lines, *body)] + [""]


def _write_note(target: optuna.Study | optuna.Trial, text: str) -> None:
    present = get_note(target)
    if present != text and (not present or _SIGNED in present):
        save_note(target, text)
