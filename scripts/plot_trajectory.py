"""Draw a study's trajectory: score of every trial, the best so far, and the coefficients under it.

    pip install dfmerge-studies
    python scripts/plot_trajectory.py sqlite:///quickstart.db quickstart --out docs/quickstart.png

Studies named NAME.METHOD in the same storage are drawn as level lines: the baselines.
"""

from __future__ import annotations

import argparse

import matplotlib
import optuna

matplotlib.use("Agg")

from itertools import accumulate

import matplotlib.pyplot as plt

from dfmerge_studies.study.attributes import results
from dfmerge_studies.study.value import COEFFICIENTS, TASKS, mean_score


def draw(storage: str, name: str, out: str) -> None:
    """Write the figure.

    Args:
        storage: Optuna storage URL.
        name: name of the study.
        out: file to write, PNG or SVG by its ending.
    """
    trials = results(optuna.load_study(study_name=name, storage=storage))
    scores = [100 * mean_score(trial.user_attrs[TASKS]) for trial in trials]
    numbers = [trial.number for trial in trials]
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8.6, 5.6), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    top.plot(
        numbers,
        list(accumulate(scores, max)),
        color="#1f5fa8",
        linewidth=2,
        label="best so far",
        drawstyle="steps-post",
    )
    top.plot(numbers, scores, "o", color="#1f5fa8", markersize=4, alpha=0.6, label="trial")
    others = [n for n in optuna.get_all_study_names(storage) if n.startswith(f"{name}.")]
    for other, style in zip(others, ("--", ":", "-."), strict=False):
        best = max(
            mean_score(t.user_attrs[TASKS]) for t in results(optuna.load_study(study_name=other, storage=storage))
        )
        top.axhline(100 * best, color="0.45", linestyle=style, linewidth=1.2, label=other.removeprefix(f"{name}."))
    top.set_ylabel("mean validation accuracy, %")
    top.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
    for expert in trials[0].user_attrs[COEFFICIENTS]:
        values = [trial.user_attrs[COEFFICIENTS][expert] for trial in trials]
        bottom.plot(numbers, values, marker="o", markersize=3, linewidth=1, label=expert)
    bottom.set_ylim(-0.05, 1.05)
    bottom.set_ylabel("coefficient")
    bottom.set_xlabel("trial")
    bottom.xaxis.get_major_locator().set_params(integer=True)
    bottom.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
    figure.savefig(out, dpi=120)


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("storage", help="Optuna storage URL")
    parser.add_argument("study", help="name of the study")
    parser.add_argument("--out", default="trajectory.png", help="file to write")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    draw(arguments.storage, arguments.study, arguments.out)


if __name__ == "__main__":
    main()
