"""What the sampler expected of proposed trials, as they keep it: the value, the gain, the trust region, the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial

from dfmerge_studies.descent import FROM
from dfmerge_studies.tasks.metrics import Metrics
from dfmerge_studies.trials.marks import GRADIENT, PROPOSAL, place_of


def expected_of(trial: FrozenTrial) -> Mapping[str, Any]:
    """What was expected of a trial's point; nothing of one that was not proposed, or that an earlier version made."""
    found: Mapping[str, Any] = trial.user_attrs.get(PROPOSAL, {})
    return found


def is_step(trial: FrozenTrial) -> bool:
    """Whether a trial's point is a step down the loss from earlier ones."""
    return FROM in expected_of(trial)


def gain_left(trials: Sequence[FrozenTrial]) -> dict[str, Any] | None:
    """The largest gain that was expected when a point was last proposed.

    Args:
        trials: of one study, in whatever order.

    Returns:
        The `trial` and its `gain`, in the unit of values; None where none was.
    """
    proposed = [trial for trial in trials if "gain" in expected_of(trial)]
    if not proposed:
        return None
    last = max(proposed, key=place_of)
    return {"trial": last.number, "gain": float(expected_of(last)["gain"])}


def gain_text(left: Mapping[str, Any], metrics: Metrics) -> str:
    """That gain in a few words.

    Args:
        left: from `gain_left`.
        metrics: of the scores.
    """
    mean = metrics.mean
    points = " points" if mean.percent else ""
    return f"{mean.shown(left['gain'], 2)}{points} at most, when trial {left['trial']} was proposed"


def descent_of(trials: Sequence[FrozenTrial]) -> dict[str, Any] | None:
    """How far a descent, of a study or of its startup, has come: the loss of the rows of its first and its last slope.

    Args:
        trials: of one study, in whatever order.

    Returns:
        `first` and `last`, each a `trial` and its `loss`; None for other studies.
    """
    sloped = sorted((trial for trial in trials if GRADIENT in trial.user_attrs), key=place_of)
    if not sloped:
        return None
    ends = {"first": sloped[0], "last": sloped[-1]}
    return {name: {"trial": t.number, "loss": float(t.user_attrs[GRADIENT]["loss"])} for name, t in ends.items()}


def descent_text(descent: Mapping[str, Any]) -> str:
    """That in a few words.

    Args:
        descent: from `descent_of`.
    """
    first, last = (f"{end['loss']:.3f} in trial {end['trial']}" for end in (descent["first"], descent["last"]))
    return f"{first}, {last}, of other rows each"


def expectation_text(trial: FrozenTrial, metrics: Metrics) -> str | None:
    """What was expected of a trial and where it was looked for, in a sentence; None where nothing was.

    Args:
        trial: a completed one.
        metrics: of the scores.
    """
    expected, mean = expected_of(trial), metrics.mean
    if GRADIENT in trial.user_attrs:
        return f"Loss of the rows that its slope was taken of: {trial.user_attrs[GRADIENT]['loss']:.3f}."
    if "mean" not in expected:
        return None
    text = f"Expected {mean.shown(mean.worth(expected['mean']))} ± {mean.shown(expected['deviation'])}"
    text += f", found {mean.shown(mean.worth(trial.values[0]))}"
    region = expected.get("region")
    if region is None:
        return f"{text}."
    where = (
        "the whole space"
        if region["centre"] is None
        else f"half width {region['half_width']:g} of the range around "
        + ", ".join(f"{name} {value:.2f}" for name, value in region["centre"].items())
    )
    return f"{text}; trust region {region['number']}: {where}."
