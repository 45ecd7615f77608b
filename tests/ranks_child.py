"""What the tests of several ranks do on every rank.

Rank 0 writes `result.json` into the folder; commands of these tests reach the other ranks as the package's own do.
"""

from __future__ import annotations

import hashlib
import json
import resource
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import torch
from safetensors.torch import save_file

from dfmerge_studies.errors import DFMergeError
from dfmerge_studies.methods import METHODS
from dfmerge_studies.objective.derive import derive_problem
from dfmerge_studies.objective.loading import load_problem
from dfmerge_studies.objective.merger import Merger
from dfmerge_studies.objective.problem import Problem
from dfmerge_studies.objective.slopes import Sample
from dfmerge_studies.points import Point
from dfmerge_studies.ranks import Group
from dfmerge_studies.spec import StudySpec
from dfmerge_studies.study.session import open_study
from dfmerge_studies.trials.reading import results
from dfmerge_studies.trials.results import Event

ESTIMATORS = ("exact", "sampled", "empirical", "mask-nodes")
POINT = {"red": 0.7, "blue": 0.25}


def weights(problem: Problem) -> str:
    """Digest of the merged parameters in the resident model, bit by bit."""
    digest, parameters = hashlib.sha256(), dict(problem.resident.model.named_parameters())
    for name in problem.resident.names:
        digest.update(name.encode() + parameters[name].detach().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class SameWeights:
    """Compares the weights of all ranks."""

    def __call__(self, memory: dict[str, Any]) -> list[str]:
        return memory["ranks"].agreed(lambda: weights(memory["problem"]))


@dataclass(frozen=True)
class LoadOther:
    """Loads another spec than the leader."""

    file: str

    def __call__(self, memory: dict[str, Any]) -> None:
        load_problem(StudySpec.from_yaml(self.file), ranks=memory["ranks"])


@dataclass(frozen=True)
class RunOut:
    """Lets forward passes of this rank run into a limit of the process's memory, really, down to that of one input."""

    def __call__(self, memory: dict[str, Any]) -> None:
        former = resource.getrlimit(resource.RLIMIT_AS)

        def hog(_: Any, __: Any, inputs: dict[str, Any]) -> None:
            if len(inputs["decoder_input_ids"]) == 1:  # more than that would be halved
                handle.remove()
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, former[1]))
            try:
                torch.empty(2**30)
            finally:
                resource.setrlimit(resource.RLIMIT_AS, former)

        handle = memory["problem"].resident.model.register_forward_pre_hook(hog, with_kwargs=True)


@dataclass(frozen=True)
class Stumble:
    """Fails on this rank at a place where the others have nothing to agree on."""

    def __call__(self, memory: dict[str, Any]) -> None:
        raise KeyError("a defect")


def with_estimator(spec: StudySpec, estimator: str) -> StudySpec:
    """In float64, so that what is left of differences comes from the sums."""
    return spec.derive(dtype="float64", importance={**spec.importance.model_dump(), "estimator": estimator})


def reseeded(spec: StudySpec) -> StudySpec:
    return spec.derive(search={**spec.search.model_dump(), "seed": 5})


def message(call: Any) -> str:
    try:
        call()
    except DFMergeError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def measured(folder: Path, family: str, group: Group) -> dict[str, Any]:
    """Fishers by every estimator into files, and the trials of a study."""
    spec = StudySpec.from_yaml(folder / family / "spec.yaml")
    out: dict[str, Any] = {"weights": []}
    loaded = load_problem(with_estimator(spec, ESTIMATORS[0]), ranks=group)
    for estimator in ESTIMATORS:
        problem = derive_problem(loaded, with_estimator(spec, estimator))
        values, _ = Merger(problem, METHODS["df-merge"], None).importance(0, 0.7)
        kept = {name: value.contiguous() for name, value in values.items()}
        save_file(kept, folder / family / f"{estimator}.safetensors")
    session = open_study(spec, splits=("validation", "test"), ranks=group)
    for method, parameters, problem in (
        ("df-merge", {}, session.problem),
        ("gta", {}, session.problem),
        ("dare", {"drop_rate": 0.3}, derive_problem(session.problem, reseeded(spec))),
    ):
        Merger(problem, METHODS[method], None).merge_(Point(POINT, parameters))
        memory = {"ranks": group, "problem": problem}
        out["weights"] += [group.everywhere(SameWeights(), partial(SameWeights(), memory))]
    session.run()
    best = session.best()
    assert best is not None
    return {
        **out,
        "trials": [
            [t.params, t.values, t.user_attrs["tasks"], t.user_attrs["fishers"]] for t in results(session.study)
        ],
        "test": session.trial_scores(best, "test"),
        "experts": session.reference_scores("experts", "test"),
    }


def faults(folder: Path, family: str, group: Group) -> dict[str, Any]:
    """Errors on rank 1 alone, and what rank 0 makes of them; the study goes on."""
    spec = StudySpec.from_yaml(folder / family / "spec.yaml").derive(name="faults")
    swapped = spec.derive(experts={"red": spec.experts["blue"], "blue": spec.experts["blue"]})
    other = folder / family / "other.yaml"
    other.write_text(json.dumps(swapped.model_dump(mode="json")))
    found = {
        "other": message(lambda: group.everywhere(LoadOther(str(other)), lambda: load_problem(spec, ranks=group))),
        "defect": message(lambda: group.everywhere(Stumble(), lambda: None)),
    }
    session = open_study(spec, ranks=group)
    session.reference_scores("experts", "validation")
    group.everywhere(RunOut(), lambda: None)
    events: list[Event] = []
    session.run(on_event=events.append)
    return {
        **found,
        "failed": [event.message for event in events if event.kind == "failed"],
        "complete": len(results(session.study)),
    }


def gloo_threads() -> list[str]:
    """Threads of this process that carry out collective operations; only Linux says."""
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").glob("*")]
    return [name for name in names if "gloo" in name]


def main(folder: Path, families: list[str]) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    group = Group("cpu")
    if group.leader:
        found = {family: measured(folder, family, group) for family in families}
        found["faults"] = faults(folder, families[0], group)
        (folder / "result.json").write_text(json.dumps(found))
    else:
        group.follow()
    group.leave()
    (folder / f"threads-{group.rank}.json").write_text(json.dumps(gloo_threads()))


def slopes(folder: Path, point: Point, sample: Sample) -> None:
    """One rank of a slope; the leader writes it into the folder."""
    group = Group("cpu")
    if not group.leader:
        group.follow()
        return
    problem = load_problem(StudySpec.from_yaml(folder / "spec.yaml"), ranks=group)
    found = Merger(problem, problem.spec.row, None).run(point, sample=sample).slope
    assert found is not None
    (folder / "slopes.json").write_text(json.dumps({"loss": found.loss, "slopes": dict(found.slopes)}))
    group.leave()


def study(folder: Path) -> None:
    """One rank of a whole study; the leader writes the points of its trials into the folder."""
    group = Group("cpu")
    if not group.leader:
        group.follow()
        return
    session = open_study(StudySpec.from_yaml(folder / "spec.yaml"), ranks=group)
    session.run()
    (folder / "points.json").write_text(json.dumps([trial.params for trial in results(session.study)]))
    group.leave()
