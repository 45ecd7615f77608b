"""Experiment trackers that trials are sent to: MLflow, TensorBoard, Weights & Biases, each through its own library.

Optuna's callbacks for them are deprecated since optuna-integration 4.9 and go in 6.0 (that of TensorBoard needs
TensorFlow); they also know nothing of task scores.

Each keeps one study: an experiment of MLflow with a run per trial, a folder of TensorBoard with a run per trial, a run
of Weights & Biases with a step per trial.  What it has already is asked of the tracker itself.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Record:
    """A completed trial as trackers show it.

    Attributes:
        number: Optuna's number of the trial.
        parameters: what it chose: coefficients by expert or EXPERT.GROUP, the method's own parameters.
        metrics: `value`, `tasks/TASK`, `drops/TASK`, `seconds/PHASE`, `feasible`.
        begun: when it was started.
        ended: when it was completed.
    """

    number: int
    parameters: Mapping[str, float]
    metrics: Mapping[str, float]
    begun: datetime | None = None
    ended: datetime | None = None


class Tracker(Protocol):
    """Where the trials of one study are shown."""

    @classmethod
    def check(cls, place: str) -> None:
        """Raise whatever its library raises where the place cannot be reached."""

    def known(self) -> set[int]:
        """Numbers of the trials that it has already."""

    def add(self, record: Record) -> None:
        """Show a trial."""

    def close(self, outcome: Mapping[str, str]) -> None:
        """Show what the study has come to, and let go."""


@dataclass(frozen=True)
class Target:
    """A study that is to be tracked.

    Attributes:
        name: of the study.
        identity: text that is the same for the same study only.
        about: what it is about, in words.
    """

    name: str
    identity: str
    about: Mapping[str, str] = field(default_factory=dict)


class MLflowTracker:
    """An experiment named after the study, with a run for each trial.

    Args:
        place: a tracking URI, or a folder, which gets a database; empty for MLflow's own default.
        target: the study.
    """

    def __init__(self, place: str, target: Target) -> None:
        self._client = self._client_of(place)
        found = self._client.get_experiment_by_name(target.name)
        self._experiment = found.experiment_id if found else self._client.create_experiment(target.name)
        for key, text in target.about.items():
            self._client.set_experiment_tag(self._experiment, f"dfmerge.{key}", text)

    @staticmethod
    def _client_of(place: str) -> Any:
        # A server that is gone must not hold up a search for minutes, as MLflow's own seven retries do.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        from mlflow import MlflowClient

        if place and "://" not in place and place != "databricks":
            Path(place).mkdir(parents=True, exist_ok=True)
            place = f"sqlite:///{Path(place).resolve() / 'mlflow.db'}"
        return MlflowClient(tracking_uri=place or None)

    @classmethod
    def check(cls, place: str) -> None:
        """Ask the server, or the database, for anything."""
        cls._client_of(place).search_experiments(max_results=1)

    def known(self) -> set[int]:
        """Numbers that runs have as a tag."""
        found: set[int] = set()
        token: str | None = None
        while True:
            page = self._client.search_runs([self._experiment], max_results=1000, page_token=token)
            found |= {int(run.data.tags["dfmerge.trial"]) for run in page if "dfmerge.trial" in run.data.tags}
            token = page.token
            if not token:
                return found

    def add(self, record: Record) -> None:
        """A run with parameters and metrics, begun and ended when the trial was."""
        from mlflow.entities import Metric, Param, RunTag

        begun, ended = _milliseconds(record.begun), _milliseconds(record.ended)
        run = self._client.create_run(self._experiment, start_time=begun, run_name=f"trial {record.number}").info.run_id
        self._client.log_batch(
            run,
            metrics=[Metric(name, value, ended or 0, record.number) for name, value in record.metrics.items()],
            params=[Param(name, repr(value)) for name, value in record.parameters.items()],
            tags=[RunTag("dfmerge.trial", str(record.number))],
        )
        self._client.set_terminated(run, end_time=ended)

    def close(self, outcome: Mapping[str, str]) -> None:
        """Tags of the experiment."""
        for key, text in outcome.items():
            self._client.set_experiment_tag(self._experiment, f"dfmerge.{key}", text[:5000])


class TensorBoardTracker:
    """A folder named after the study: curves over the trials, and a run with hyperparameters for each.

    Args:
        place: folder above it; empty for TENSORBOARD_LOGGING_DIR, or `runs`.
        target: the study.
    """

    def __init__(self, place: str, target: Target) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = self._above(place) / target.name
        self._writer = SummaryWriter(str(self._folder))
        if not self.known():
            lines = "\n\n".join(f"**{key}**: {text}" for key, text in target.about.items())
            self._writer.add_text("study", lines, 0)

    @staticmethod
    def _above(place: str) -> Path:
        return Path(place or os.environ.get("TENSORBOARD_LOGGING_DIR") or "runs")

    @classmethod
    def check(cls, place: str) -> None:
        """Make the folder."""
        cls._above(place).mkdir(parents=True, exist_ok=True)

    def known(self) -> set[int]:
        """Numbers that folders have."""
        names = [each.name.removeprefix("trial-") for each in self._folder.glob("trial-*")]
        return {int(name) for name in names if name.isdigit()}

    def add(self, record: Record) -> None:
        """A point of every curve, and a run with the trial's parameters."""
        for name, value in record.metrics.items():
            self._writer.add_scalar(name, value, record.number)
        for name, value in record.parameters.items():
            self._writer.add_scalar(f"parameters/{name}", value, record.number)
        final = {f"final/{name}": value for name, value in record.metrics.items()}
        self._writer.add_hparams(dict(record.parameters), final, run_name=f"trial-{record.number}")
        self._writer.flush()

    def close(self, outcome: Mapping[str, str]) -> None:
        """A text."""
        for key, text in outcome.items():
            self._writer.add_text(key, text, 0)
        self._writer.close()


class WandbTracker:
    """A run for the study, with a point for each trial.

    Args:
        place: project; empty for WANDB_PROJECT, or `dfmerge`.
        target: the study.
    """

    def __init__(self, place: str, target: Target) -> None:
        import wandb

        self._run = wandb.init(
            project=place or os.environ.get("WANDB_PROJECT") or "dfmerge",
            name=target.name,
            id=f"dfmerge-{target.identity}",
            resume="allow",
            reinit="create_new",  # baselines are runs of the same process
            settings=wandb.Settings(silent=True),
        )
        self._run.config.update(dict(target.about), allow_val_change=True)
        self._run.define_metric("*", step_metric="trial")  # trials do not end in the order of their numbers
        self._known = set(map(int, self._run.config.get("tracked", [])))

    @classmethod
    def check(cls, place: str) -> None:
        """Log in, unless nothing is sent."""
        import wandb

        if os.environ.get("WANDB_MODE") not in ("offline", "disabled", "dryrun") and not wandb.login():
            raise RuntimeError("nobody is logged in: run wandb login, or set WANDB_API_KEY or WANDB_MODE=offline")

    def known(self) -> set[int]:
        """Numbers that the run's configuration has, which comes back when the run is resumed."""
        return set(self._known)

    def add(self, record: Record) -> None:
        """A point of every curve."""
        parameters = {f"parameters/{name}": value for name, value in record.parameters.items()}
        self._run.log({"trial": record.number, **record.metrics, **parameters})
        self._known.add(record.number)
        self._run.config.update({"tracked": sorted(self._known)}, allow_val_change=True)

    def close(self, outcome: Mapping[str, str]) -> None:
        """The run's summary."""
        for key, text in outcome.items():
            self._run.summary[key] = text
        self._run.finish()


@dataclass(frozen=True)
class TrackerRow:
    """One row of the table.

    Attributes:
        opened: from a place and a study to its tracker.
        needs: packages that must be installed; the extra has the tracker's name.
        place: what may stand behind `=`.
    """

    opened: Any
    needs: Sequence[str]
    place: str


TRACKERS: Mapping[str, TrackerRow] = {
    "wandb": TrackerRow(WandbTracker, ("wandb",), "a project"),
    "mlflow": TrackerRow(MLflowTracker, ("mlflow",), "a tracking URI or a folder"),
    "tensorboard": TrackerRow(TensorBoardTracker, ("tensorboard",), "a folder"),
}


def _milliseconds(when: datetime | None) -> int | None:
    return None if when is None else int(when.timestamp() * 1000)
