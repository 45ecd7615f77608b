"""Races in words and numbers: how many trials were stopped on a part of their rows, what one was worth there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from optuna.trial import FrozenTrial, TrialState

from dfmerge_studies.tasks.metrics import Metrics
from dfmerge_studies.trials.marks import RACED


def races_of(trials: Sequence[FrozenTrial]) -> dict[str, int] | None:
    """How much of the rows the trials of a study were scored on.

    Args:
        trials: of one study, in whatever order.

    Returns:
        `stopped`: trials that were stopped early; `rows_scored` by all trials that have ended, and the `rows` that
        there were to score; None where trials are not raced.
    """
    raced = [trial for trial in trials if RACED in trial.user_attrs and trial.state.is_finished()]
    if not raced:
        return None
    return {
        "stopped": sum(trial.state == TrialState.PRUNED for trial in raced),
        "rows_scored": sum(trial.user_attrs[RACED]["scored"] for trial in raced),
        "rows": sum(trial.user_attrs[RACED]["of"] for trial in raced),
    }


def races_text(races: Mapping[str, int]) -> str:
    """The same in a few words.

    Args:
        races: from `races_of`.
    """
    stopped, scored, rows = races["stopped"], races["rows_scored"], races["rows"]
    plural = "s were" if stopped != 1 else " was"
    return f"{stopped} trial{plural} stopped early; {scored} of {rows} rows scored ({100 * scored / rows:.0f} %)"


def pruned_text(trial: FrozenTrial, metrics: Metrics) -> str:
    """What a stopped trial was worth by the rows that it was scored on, in a sentence.

    Args:
        trial: a pruned one.
        metrics: of the scores.
    """
    raced, mean = trial.user_attrs[RACED], metrics.mean
    value, error = raced["value"]
    shown = f"{mean.shown(mean.worth(value))} ± {mean.shown(error)}"
    return (
        f"Stopped after {raced['scored']} of {raced['of']} rows, since it could not win against trial "
        f"{raced['against']}. Estimated on all rows: {shown}."
    )
