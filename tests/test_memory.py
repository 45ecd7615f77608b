"""What a merge keeps in memory beside weights and task vectors, counted, and what `validate` says of it."""

from __future__ import annotations

import pytest

from dfmerge_studies import Merger, StudySpec, load_problem
from dfmerge_studies.methods import METHODS
from dfmerge_studies.study.validate import memory_estimate
from tests import models
from tests.memory import LiveBytes
from tests.project import Project, make_project

DEEP = {"hidden_size": 96, "intermediate_size": 384}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """An encoder whose parameters take far more memory than the activations of one short input."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in DEEP.items():
            patch.setitem(models._BERT, name, value)
        return make_project(tmp_path_factory.mktemp("deep") / "project", "bert", rows=8, samples=3, layers=8)


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
