"""A whole small project on disk, as a user has it: a base, experts, data, a spec; and the command line on it."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import alembic.util
import pytest
import torch
import yaml
from transformers import AutoModel

from dfmerge_studies import StudySpec
from dfmerge_studies.cli.app import main
from dfmerge_studies.study.session import open_study
from dfmerge_studies.tasks.encoding import Kind
from tests.models import CHOICES, FAMILIES, LABELS, TEXTS, make_model
from tests.processes import Forked, command, command_with_forked_workers, free_port

EXPERTS = ("red", "blue")
# Optuna has thirty migrations compiled whenever it opens a database; once a process is enough.
alembic.util.load_python_file = functools.cache(alembic.util.load_python_file)


@dataclass(frozen=True)
class Done:
    """What a command left: its exit code and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def _checked(done: Done, expected: int | None) -> Done:
    if expected is not None and done.returncode != expected:
        raise AssertionError(f"exit {done.returncode}, expected {expected}\n{done.stdout}\n{done.stderr}")
    return done


@dataclass
class Project:
    """A folder with `base/`, `red/`, `blue/`, their data and `spec.yaml`."""

    folder: Path
    family: str
    spec: dict[str, Any] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        return self.folder / "spec.yaml"

    def write(self, **changes: Any) -> Path:
        """Write the spec with some fields changed; `None` removes a field."""
        content = {**self.spec, **changes}
        self.file.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}, sort_keys=False))
        return self.file

    def cli(self, *arguments: str | Path, check: int | None = 0, **environment: str) -> Done:
        """Run the command line in the folder; the exit code must be `check`, unless that is None.

        In this process, since importing torch anew for every call would take most of the suite's time; `process` does
        the same in a process of its own.
        """
        out, err, code = io.StringIO(), io.StringIO(), 0
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            patch.setenv("COLUMNS", "200")
            patch.delenv("DFMERGE_STORAGE", raising=False)
            for name, value in environment.items():
                patch.setenv(name, value)
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    main(list(map(str, arguments)))
                except SystemExit as stop:
                    code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        return _checked(Done(code, out.getvalue(), err.getvalue()), check)

    def start(self, *arguments: str | Path, leader: bool = False, anew: bool = False, **environment: str) -> Forked:
        """Start the command line in the folder, in a process of its own; its workers are forked, too, or start anew."""
        words = list(map(str, arguments))
        target = command if anew else command_with_forked_workers
        return Forked(target, words, folder=self.folder, environment=cli_environment(**environment), leader=leader)

    def process(self, *arguments: str | Path, check: int | None = 0, **environment: str) -> Done:
        """Run the command line in the folder to its end, in a process of its own."""
        process = self.start(*arguments, **environment)
        output, errors = process.communicate(timeout=500)
        return _checked(Done(process.wait(), output, errors), check)

    def json(self, *arguments: str | Path) -> Any:
        """What a command prints with `--json`."""
        return json.loads(self.cli(*arguments, "--json").stdout)

    def files(self) -> dict[str, Any]:
        """The content of every file of the folder, for comparing before and after; of a database, its rows."""
        found = [f for f in sorted(self.folder.rglob("*")) if f.is_file() and not f.name.endswith(("-wal", "-shm"))]
        return {str(f.relative_to(self.folder)): _content(f) for f in found}


def _content(file: Path) -> Any:
    if file.suffix != ".db":
        return file.read_bytes()
    with contextlib.suppress(sqlite3.DatabaseError), contextlib.closing(sqlite3.connect(file)) as database:
        return list(database.iterdump())
    return file.read_bytes()


def cli_environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("DFMERGE_")}
    return {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200", **more}


def start_ranks(target: Callable[..., None], *arguments: Any, folder: Path, **environment: str) -> list[Forked]:
    """Two processes, ranks 0 and 1, with the environment that `torchrun` and its like give to those that they start."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [cli_environment(RANK=rank, LOCAL_RANK=rank, **shared, **environment) for rank in ("0", "1")]
    return [Forked(target, *arguments, folder=folder, environment=rank) for rank in ranks]


def run_cut_at(spec: StudySpec, *places: int) -> None:
    """Run a study that is interrupted as it starts the trials of these places, and resumed after each but the last."""
    stop = set(places)

    def interrupt(event: Any) -> None:
        if event.kind == "started" and event.place in stop:
            stop.discard(event.place)
            raise KeyboardInterrupt

    for _ in places:
        with pytest.raises(KeyboardInterrupt):
            open_study(spec).run(on_event=interrupt)


def make_project(
    folder: Path, family: str = "t5", *, rows: int = 24, samples: int = 6, trials: int = 4, layers: int = 2
) -> Project:
    """Write a project of one family.

    The experts differ from the base by a small random change of all weights; of a classifier, the base has no head.
    """
    folder.mkdir(parents=True, exist_ok=True)
    base = sharpened(make_model(family, layers=layers))
    tokenizer = FAMILIES[family].tokenizer()
    classification = FAMILIES[family].kind is Kind.CLASSIFICATION
    (base.base_model if classification else base).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for number, name in enumerate(EXPERTS):
        labels = LABELS - number if classification else LABELS
        expert = perturbed(family, seed=number + 1, labels=labels, layers=layers)
        expert.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        for split, shift in (("validation", 0), ("test", 5)):
            lines = [_row(i + shift + 11 * number, classification, LABELS - number) for i in range(rows)]
            (folder / f"{name}.{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    project = Project(folder, family, _spec(classification, samples, trials))
    project.write()
    return project


def copied(project: Project, folder: Path) -> Project:
    """A copy of a project, and of all that was made in it, at another place."""
    shutil.copytree(project.folder, folder)
    return Project(folder, project.family, copy.deepcopy(project.spec))


def perturbed(family: str, *, seed: int, labels: int = LABELS, size: float = 0.1, layers: int = 2) -> Any:
    """The base's weights with small random changes; a head keeps its own size."""
    expert = sharpened(make_model(family, num_labels=labels, layers=layers))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return expert


def sharpened(model: Any) -> Any:
    """The model with larger inner matrices, so that its answers depend on the text and not on the choice alone."""
    outer = ("embed", "shared", "wte", "wpe", "bias", "lm_head", "classifier", "out_proj")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and not any(part in name for part in outer):
                parameter.mul_(3)
    return model


def load_parameters(directory: Path, auto: Any = AutoModel) -> dict[str, torch.Tensor]:
    """Parameters of a model directory, by name."""
    return {name: p.detach() for name, p in auto.from_pretrained(directory).named_parameters()}


def _row(number: int, classification: bool, labels: int) -> dict[str, Any]:
    text = f"{TEXTS[number % len(TEXTS)]} {number}"
    if classification:
        return {"input": text, "label": number % labels}
    choices = list(CHOICES[: 2 + number % 3])
    return {"input": text, "choices": choices, "label": number % len(choices)}


def _spec(classification: bool, samples: int, trials: int) -> dict[str, Any]:
    def task(name: str) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "type": "classification" if classification else "choice",
            "dataset": {
                "path": "json",
                "data_files": {"validation": f"{name}.validation.jsonl", "test": f"{name}.test.jsonl"},
            },
            "doc_to_text": "input",
            "doc_to_target": "label",
            "test_split": "test",
            "max_length": 32,
        }
        return fields if classification else {**fields, "doc_to_choice": "choices"}

    return {
        "name": "colours",
        "base": "base",
        "experts": {"red": {"model": "red", "task": "red"}, "blue": "blue"},
        "tasks": {name: task(name) for name in EXPERTS},
        "importance": {"samples": samples},
        "search": {"trials": trials, "startup_trials": 2, "sampler": "gp"},  # a tenth of the time of `auto`
        "device": "cpu",
    }
