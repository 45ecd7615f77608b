"""`memory`: what it does not hold at a time is merged part by part, with the same result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dfmerge_studies import Merger, StudySpec, load_problem
from dfmerge_studies.checkpoints.in_place import InPlace
from dfmerge_studies.checkpoints.streamed import Streamed, kept_bytes
from dfmerge_studies.errors import InputError
from dfmerge_studies.importance.cache import Shelf
from dfmerge_studies.methods import METHODS
from dfmerge_studies.objective.live_bytes import LiveBytes
from dfmerge_studies.objective.memory import Activations, activations_of, memory_of
from dfmerge_studies.objective.problem import Problem, split_names
from dfmerge_studies.study.fingerprint import stated_fingerprint
from dfmerge_studies.study.fishers import spec_cache
from tests import models
from tests.project import Project, make_project

EXACT = {"samples": 3, "dtype": "float32"}  # rounded to 16 bits, the last bit of a weight may show


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """An encoder whose parameters take far more memory than the activations of one short input."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"hidden_size": 96, "intermediate_size": 384}.items():
            patch.setitem(models._BERT, name, value)
        return make_project(tmp_path_factory.mktemp("deep") / "project", "bert", rows=8, samples=3, layers=6)


def loaded(project: Project, **fields: Any) -> Problem:
    project.write(**fields)
    return load_problem(StudySpec.from_yaml(project.file))


def in_parts(problem: Problem, parts: int) -> Problem:
    """The same, merged in so many parts or more: as a smaller memory would have it."""
    problem.part_entries = sum(problem.sizes.values()) // parts
    assert len(problem.parts()) >= parts
    return problem


def merged(problem: Problem, cache: Any = None, method: str | None = None) -> tuple[dict[str, Tensor], Any]:
    row = problem.spec.row if method is None else METHODS[method]
    merger = Merger(problem, row, cache)
    experts = problem.experts
    outcome = merger.run({name: 0.3 + 0.4 * i for i, name in enumerate(experts)})
    return {name: p.detach().clone() for name, p in problem.resident.model.named_parameters()}, outcome


@pytest.mark.parametrize("family", ["t5", "bert", "llama"])
@pytest.mark.parametrize("estimator", ["exact", "sampled", "empirical"])
def test_a_merge_in_parts_is_the_merge_in_one(
    project_of: Callable[[str], Project], family: str, estimator: str
) -> None:
    project = project_of(family)
    importance = {**EXACT, "estimator": estimator}
    one = loaded(project, importance=importance)
    parts = in_parts(loaded(project, importance=importance), 3)
    assert len(one.parts()) == 1
    expected, reference = merged(one)
    found, outcome = merged(parts)
    assert (outcome.computed, outcome.cached) == (reference.computed, reference.cached) == (2, 0)
    assert outcome.tasks == pytest.approx(reference.tasks)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["gta", "ties", "fisher", "df-merge-static", "df-merge-scaled", "fim"])
def test_other_methods_are_merged_in_parts(project_of: Callable[[str], Project], method: str) -> None:
    project = project_of("t5")
    one = loaded(project, method="df-merge", importance=EXACT)
    parts = in_parts(loaded(project, method="df-merge", importance=EXACT), 4)

    def weights(problem: Problem) -> dict[str, Tensor]:
        merger = Merger(problem, METHODS[method], None)
        given = dict.fromkeys(problem.experts, 0.5) if METHODS[method].coefficients.chosen else None
        merger.merge_(merger.point(given, METHODS[method].complete({}), "here"))
        return {name: p.detach().clone() for name, p in problem.resident.model.named_parameters()}

    expected, found = weights(one), weights(parts)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def test_sums_and_importances_of_one_part_are_in_memory_at_a_time(project_of: Callable[[str], Project]) -> None:
    project = project_of("bert")
    one = loaded(project, importance={**EXACT, "row_budget": 1})
    parts = in_parts(loaded(project, importance={**EXACT, "row_budget": 1}), 6)
    peaks = []
    for problem in (one, parts):
        merger = Merger(problem, problem.spec.row, None)
        merger.merge_(dict.fromkeys(problem.experts, 0.5))  # what is looked up once is looked up
        with LiveBytes() as alive:
            merger.merge_(dict.fromkeys(problem.experts, 0.3))
        peaks.append(alive.peak)
    changed = sum(one.sizes.values())
    largest = max(sum(parts.sizes[name] for name in part) for part in parts.parts())
    saved = 12 * (changed - largest) - 4 * changed  # merged values wait
    assert peaks[0] - peaks[1] >= 0.8 * saved > 0


def test_the_cache_has_whole_fishers_in_parts_and_in_one(project_of: Callable[[str], Project]) -> None:
    project = project_of("t5")
    one = loaded(project, importance=EXACT)
    parts = in_parts(loaded(project, importance=EXACT), 3)
    cache = spec_cache(parts.spec)
    assert cache is not None
    _, first = merged(parts, Shelf(cache))
    expected, second = merged(one, Shelf(cache))
    found, third = merged(parts, Shelf(cache))
    assert [(each.computed, each.cached) for each in (first, second, third)] == [(2, 0), (0, 2), (0, 2)]
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_whole_fisher_is_put_together_from_its_parts(project_of: Callable[[str], Project]) -> None:
    project = project_of("bert")
    one = loaded(project, importance=EXACT)
    parts = in_parts(loaded(project, importance=EXACT), 3)
    names = Merger(one, one.spec.row, None).all_names()
    expected, _ = Merger(one, one.spec.row, None).importance(0, 0.5, names=names)
    found, hit = Merger(parts, parts.spec.row, None).importance(0, 0.5, names=names)
    assert not hit
    assert list(found) == list(expected) == names
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"method": "df-merge-kfac"}, "keeps the blocks of all layers"),
        ({"method": "regmean"}, "keeps the blocks of all layers"),
        ({"method": "fisher-nodes"}, "mask-nodes"),
        ({"protect": {"task": "red"}}, "`protect` keeps factors"),
    ],
)
def test_what_needs_all_parameters_at_a_time_is_refused_by_name(
    project_of: Callable[[str], Project], fields: dict[str, Any], what: str
) -> None:
    project = project_of("bert")
    parts = in_parts(loaded(project, importance=EXACT, **fields), 4)
    spec = parts.spec
    with pytest.raises(InputError, match=what) as caught:
        Merger(parts, spec.row, None)
    assert str(caught.value.where).endswith("memory")


@pytest.mark.parametrize("method", ["df-merge", "df-merge-scaled"])
def test_memory_decides_how_many_parameters_are_merged_at_a_time(deep: Project, method: str) -> None:
    fields = {"method": method, "importance": {"samples": 3, "row_budget": 1}, "token_budget": 1, "cache": "none"}
    problem = loaded(deep, **fields)
    found = activations_of(problem)
    whole = memory_of(problem, found).device
    enough = loaded(deep, **fields, memory=str(whole.total))
    assert len(enough.parts()) == 1
    little = whole.total - whole.sums // (2 if method == "df-merge" else 8)  # importances wait for their mean
    parts = loaded(deep, **fields, memory=str(little))
    assert len(parts.parts()) > 1
    needs = memory_of(parts, activations_of(parts)).device
    assert 0.7 * little < needs.total <= little
    for problem, most in ((enough, whole.total), (parts, little)):
        merger = Merger(problem, problem.spec.row, None)
        merger.run(dict.fromkeys(problem.experts, 0.5))  # what is looked up once is looked up
        held = memory_of(problem, Activations()).device
        with LiveBytes() as alive:
            merger.run(dict.fromkeys(problem.experts, 0.3))
        assert alive.peak + held.model + held.base + held.vectors <= 1.02 * most


def test_too_little_memory_is_refused_with_the_least_that_is_needed(project_of: Callable[[str], Project]) -> None:
    with pytest.raises(InputError, match=r"10kB is too little: a trial needs \d+\.\d+ GB at least") as caught:
        loaded(project_of("bert"), memory="10kB")
    assert str(caught.value.where).endswith("memory")


@pytest.mark.parametrize("size", ["much", "-1GB", "0", "16 elephants"])
def test_a_memory_that_is_no_size_is_refused(project_of: Callable[[str], Project], size: str) -> None:
    project = project_of("bert")
    project.write(memory=size)
    with pytest.raises(InputError, match=r"memory|size"):
        StudySpec.from_yaml(project.file)


def test_memory_is_no_part_of_what_a_study_is_about(project_of: Callable[[str], Project]) -> None:
    project = project_of("bert")
    project.write()
    plain = stated_fingerprint(StudySpec.from_yaml(project.file))
    project.write(memory="4GiB")
    assert stated_fingerprint(StudySpec.from_yaml(project.file)) == plain


def test_parts_are_in_order_whole_and_no_larger_than_is_allowed() -> None:
    entries = {"a": 5, "b": 40, "c": 3, "d": 3, "e": 9, "f": 1}
    parts = split_names(entries, 10)
    assert [name for part in parts for name in part] == list(entries)
    assert all(len(part) == 1 or sum(entries[name] for name in part) <= 10 for part in parts)
    assert split_names(entries, 61) == [list(entries)]


def test_what_stays_on_the_host_is_copied_when_it_is_used(project_of: Callable[[str], Project]) -> None:
    resident = loaded(project_of("t5")).resident
    kept = [kept_bytes(resident.base), *(kept_bytes(v.deltas) for v in resident.task_vectors)]
    expected = dict(resident.base), [dict(v.deltas) for v in resident.task_vectors]
    InPlace.keep_on_(resident, host=True)
    assert isinstance(resident.base, Streamed)
    assert [kept_bytes(resident.base), *(kept_bytes(v.deltas) for v in resident.task_vectors)] == [
        (there_after, there) for there, there_after in kept
    ]
    for found, wanted in zip(
        (resident.base, *(v.deltas for v in resident.task_vectors)), (expected[0], *expected[1]), strict=True
    ):
        assert list(found) == list(wanted)
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.gpu
def test_on_a_gpu_merges_in_parts_from_the_host_are_the_same(project_of: Callable[[str], Project]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    project = project_of("t5")
    one = loaded(project, importance=EXACT, device="cuda")
    parts = in_parts(loaded(project, importance=EXACT, device="cuda"), 3)
    parts.resident.keep_on_(host=True)
    expected, _ = merged(one)
    found, _ = merged(parts)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)
