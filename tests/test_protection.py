"""Steps damped along directions of a protected task: the algebra, and studies with a guard."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dfmerge_studies import StudySpec, load_problem, merge
from dfmerge_studies.blocks import Block
from dfmerge_studies.errors import InputError
from dfmerge_studies.objective.merger import Merger
from dfmerge_studies.objective.protection import directions_, leading
from dfmerge_studies.study.fingerprint import differences, stated_fingerprint
from tests.project import Project
from tests.test_blocks import moments

POINT = {"red": 0.4, "blue": 0.9}


def block(seed: int = 1) -> Block:
    generator = torch.Generator().manual_seed(seed)
    return Block(moments(4, generator), moments(6, generator))


@pytest.mark.parametrize("rank", [1, 5, 24, 99])
def test_the_directions_are_the_leading_eigenvectors_of_the_kronecker_product(rank: int):
    given = block()
    assert given.left is not None
    assert given.right is not None
    found = leading(given, rank)
    values, vectors = torch.linalg.eigh(torch.kron(given.left, given.right))
    count = min(rank, 24)
    ours = torch.stack([torch.outer(u, v).flatten() for u, v in zip(found.left.T, found.right.T, strict=True)]).double()
    theirs = vectors[:, -count:].T
    assert len(ours) == count
    torch.testing.assert_close(ours.T @ ours, theirs.T @ theirs, rtol=0, atol=1e-5)  # the same projection
    sizes = torch.stack([each @ torch.kron(given.left, given.right) @ each for each in ours])
    torch.testing.assert_close(sizes, values.flip(0)[:count], rtol=1e-5, atol=1e-6)


def test_strength_zero_changes_nothing_and_full_strength_leaves_nothing_of_the_protected_part():
    found, step = leading(block(), 5), torch.randn(4, 6)
    assert torch.equal(found.damped(step, 0.0), step)
    assert found.shares(step).abs().min() > 1e-3
    assert found.shares(found.damped(step, 1.0)).abs().max() < 1e-6
    torch.testing.assert_close(found.shares(found.damped(step, 0.25)), 0.75 * found.shares(step))


def test_the_fisher_s_norm_of_a_step_falls_by_exactly_the_shares_that_are_damped():
    given = block()
    assert given.left is not None
    assert given.right is not None
    found, step, fisher = leading(given, 5), torch.randn(4, 6, dtype=torch.float64), torch.kron(given.left, given.right)

    def norm(d: Tensor) -> Tensor:
        return d.flatten() @ fisher @ d.flatten()

    shares = found.shares(step.float()).double()
    values = torch.linalg.eigvalsh(fisher).flip(0)[:5]
    lost = (1 - (1 - 0.6) ** 2) * (values * shares**2).sum()
    torch.testing.assert_close(norm(found.damped(step, 0.6)), norm(step) - lost, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "method"), [("t5", "df-merge"), ("bert", "ties"), ("gpt2", "averaging")])
def test_a_merge_has_no_step_along_protected_directions_at_full_strength(project_of, family: str, method: str):
    spec = StudySpec.from_yaml(project_of(family).file).derive(dtype="float64")
    point = None if method == "averaging" else POINT

    def weights(strength: float | None) -> dict[str, Tensor]:
        protect = None if strength is None else {"task": "red", "rank": 4, "strength": strength}
        problem = load_problem(spec.derive(protect=protect))
        merge(problem, point, method=method)
        return {name: p.detach().clone() for name, p in problem.resident.model.named_parameters()}

    plain, zero, half, full = weights(None), weights(0.0), weights(0.5), weights(1.0)
    assert all(torch.equal(plain[name], zero[name]) for name in plain)
    problem = load_problem(spec.derive(protect={"task": "red", "rank": 4}))
    directions, base = directions_(problem), problem.resident.base
    for name in plain:
        if name not in directions:
            assert torch.equal(plain[name], full[name])
            continue
        shares, own = directions[name].shares, plain[name] - base.get(name, plain[name])
        assert shares(full[name] - base[name]).abs().max() < 1e-5 * max(1.0, float(own.norm()))
        torch.testing.assert_close(shares(half[name] - base[name]), 0.5 * shares(own), rtol=1e-3, atol=1e-5)
    moved = [float(directions[name].shares(plain[name] - base[name]).norm()) for name in directions]
    assert max(moved) > 1e-2


def guarded(project: Project, **protect: Any) -> Project:
    """The project with a guard on the base's own answers, which is protected."""
    tasks = {**project.spec["tasks"], "general": {**project.spec["tasks"]["red"], "guard": True, "max_drop": 50}}
    project.spec.update(tasks=tasks, protect={"task": "general", **protect})
    project.write()
    return project


@pytest.mark.slow
def test_a_guard_is_protected_and_the_strength_is_searched_stored_shown_and_merged_again(project):
    guarded(project, rank=3, strength=[0.0, 1.0])
    project.write(method="gta", search={"trials": 3, "startup_trials": 2, "sampler": "gp"})
    printed = project.json("run", "spec.yaml", "--no-test")
    best = printed["best"]
    assert 0.0 <= best["strength"] <= 1.0
    assert f"strength {best['strength']:g}" in project.cli("run", "spec.yaml", "--no-test").stdout
    exported = project.json("export", "spec.yaml", "--out", "merged")
    assert exported["strength"] == best["strength"]
    card = (project.folder / "merged/README.md").read_text()
    assert f"--strength {best['strength']!r}" in card
    lam = ",".join(f"{name}={value!r}" for name, value in exported["coefficients"].items())
    again = ["merge", "spec.yaml", "--out", "again", "--coefficients", lam, "--strength", best["strength"]]
    assert project.json(*again)["digest"] == exported["digest"]
    project.cli("report", "spec.yaml")
    refused = project.cli("run", "spec.yaml", "--set", "protect.rank=4", check=2).stderr
    assert "protect: the study has {'task': 'general', 'rank': 3}" in refused


def test_what_is_protected_is_part_of_what_a_study_is_about_and_old_studies_have_nothing(project):
    spec = StudySpec.from_yaml(project.file)
    stored = stated_fingerprint(spec)
    other = stated_fingerprint(spec.derive(protect={"task": "red", "strength": 0.5}))
    lines = differences(stored, other)
    assert [line.split(":")[0] for line in lines] == ["parameters", "protect"]


@pytest.mark.parametrize(
    ("protect", "words"),
    [
        ({"task": "rd"}, ["protect.task", "unknown task 'rd'", "Did you mean 'red'?"]),
        ({"task": "red", "rank": 0}, ["protect.rank"]),
        ({"task": "red", "strength": 1.5}, ["protect.strength", "the strength is 1.5, outside [0, 1]"]),
        ({"task": "red", "strength": [0.9, 0.1]}, ["protect.strength", "the two ends of a range"]),
        ({"task": "red", "strenght": 1}, ["protect.strenght", "unknown key", "'strength'"]),
        ({"rank": 3}, ["protect.task", "required"]),
    ],
)
def test_what_cannot_be_protected_is_refused_by_name(project, protect: dict[str, Any], words: list[str]):
    project.write(protect=protect)
    with pytest.raises(InputError) as caught:
        StudySpec.from_yaml(project.file)
    for word in words:
        assert word in str(caught.value)


def test_a_method_has_no_strength_where_nothing_is_protected(project):
    problem = load_problem(StudySpec.from_yaml(project.file))
    with pytest.raises(InputError, match="has no strength"):
        merge(problem, POINT, method="gta", strength=0.5)
    assert not Merger(problem, problem.spec.row, None)._protected
