"""What a merge keeps in memory beside weights and task vectors, counted, and what `validate` says of it."""

from __future__ import annotations

import gc
import json

import psutil
import pytest

from dfmerge_studies import Merger, StudySpec, load_problem
from dfmerge_studies.methods import METHODS
from dfmerge_studies.objective.live_bytes import LiveBytes
from dfmerge_studies.study.session import open_study
from dfmerge_studies.study.validate import memory_estimate
from dfmerge_studies.trials.results import Event
from tests import models
from tests.processes import Forked
from tests.project import Project, make_project

DEEP = {"hidden_size": 96, "intermediate_size": 384}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """An encoder whose parameters take far more memory than the activations of one short input."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in DEEP.items():
            patch.setitem(models._BERT, name, value)
        return make_project(tmp_path_factory.mktemp("deep") / "project", "bert", rows=8, samples=3, layers=4)


@pytest.mark.parametrize(("method", "most"), [("gta", 4), ("df-merge", 12), ("df-merge-scaled", 12)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merge_needs_two_sums_and_one_importance_at_its_peak(
    deep: Project, method: str, most: float, dtype: str
) -> None:
    deep.write(method=method, importance={"samples": 3, "dtype": dtype, "row_budget": 1})
    problem = load_problem(StudySpec.from_yaml(deep.file))
    merger = Merger(problem, METHODS[method], None)
    merger.merge_(dict.fromkeys(problem.experts, 0.5))  # what is looked up once is looked up
    with LiveBytes() as alive:
        merger.merge_(dict.fromkeys(problem.experts, 0.3))
    resident = problem.resident
    changed = sum(value.numel() for value in resident.base.values())
    assert alive.peak == pytest.approx(most * changed, rel=0.1)
    vectors = sum(delta.numel() for vector in resident.task_vectors for delta in vector.deltas.values())
    weights = sum(parameter.numel() for parameter in resident.model.parameters()) + changed + vectors
    waiting = memory_estimate(problem).fisher_bytes * len(problem.experts) if most > 4 else 0  # to be written
    assert memory_estimate(problem).peak_bytes == pytest.approx(4 * weights + alive.peak + waiting, rel=0.1)


def _run_200_trials(file: str) -> None:
    """Print the resident bytes of this process after every 20 trials."""
    session, resident = open_study(StudySpec.from_yaml(file)), {}

    def look(event: Event) -> None:
        if event.kind == "completed" and (event.number + 1) % 20 == 0:
            gc.collect()
            resident[event.number + 1] = psutil.Process().memory_info().rss

    session.run(on_event=look)
    print(json.dumps(resident), flush=True)


@pytest.mark.slow
def test_memory_is_flat_over_two_hundred_trials(tmp_path) -> None:
    with pytest.MonkeyPatch.context() as patch:  # half a megabyte: to keep one model of a trial would be seen
        for name, value in DEEP.items():
            patch.setitem(models._BERT, name, value)
        project = make_project(tmp_path / "project", "bert", rows=8, samples=2, layers=1)
    search = {"trials": 200, "startup_trials": 2, "sampler": "random", "step": None}  # no two trials are alike
    project.write(search=search)
    child = Forked(_run_200_trials, str(project.file), folder=project.folder)
    output, errors = child.communicate(timeout=900)
    assert child.wait() == 0, errors
    resident = {int(trials): size / 1e6 for trials, size in json.loads(output).items()}
    assert list(resident) == list(range(20, 201, 20))
    assert resident[200] - resident[60] < 5, resident  # Optuna keeps about 10 kB of a trial, 1.4 MB
