"""On a CUDA card: the same numbers as on the CPU, the same ones twice; memory that runs out costs a trial.

Skipped where there is none; `docs/PERFORMANCE.md` says where these were run last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dfmerge_studies import StudySpec, load_problem
from dfmerge_studies.importance.task_fisher import task_fisher
from dfmerge_studies.methods import METHODS
from dfmerge_studies.objective.merger import Merger
from dfmerge_studies.study.session import stored_study
from dfmerge_studies.tasks import replay
from dfmerge_studies.tasks.encoding import Kind
from dfmerge_studies.tasks.evaluate import choice_losses
from tests.models import FAMILIES, make_examples, make_model
from tests.project import Project, make_project
from tests.zoo import SUPPORTED, UNUSED, ZOO, family_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CARD = torch.device("cuda")
# Their own backward passes add in the order in which threads come.
NOT_REPRODUCIBLE = ("longformer", "led")
NewProject = Callable[..., Project]


def fisher(model: torch.nn.Module, family: str, estimator: str = "exact") -> dict[str, Tensor]:
    examples, draws = make_examples(family), torch.Generator().manual_seed(0)
    values = task_fisher(
        model, FAMILIES[family].kind, examples, pad_id=FAMILIES[family].pad_id, estimator=estimator, generator=draws
    ).values
    return {name: value.cpu() for name, value in values.items()}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    apart = sum(float((found[n] - e).double().square().sum()) for n, e in expected.items())
    return float((apart / sum(float(e.double().square().sum()) for e in expected.values())) ** 0.5)


@pytest.mark.parametrize("estimator", ["exact", "sampled", "empirical", "mask-nodes"])
@pytest.mark.parametrize("family", FAMILIES)
def test_importance_is_that_of_the_cpu_and_the_same_twice(family: str, estimator: str) -> None:
    expected = fisher(make_model(family), family, estimator)
    once, twice = (fisher(make_model(family).to(CARD), family, estimator) for _ in range(2))
    assert distance(once, expected) < 1e-4
    assert all(torch.equal(once[name], twice[name]) for name in once)


@pytest.mark.parametrize("name", SUPPORTED)
def test_importance_of_other_architectures_is_that_of_the_cpu_and_the_same_twice(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, name, family_of(name))
    like = ZOO[name].like
    models = [make_model(name) for _ in range(3)]
    examples, family = make_examples(like), FAMILIES[name]
    names = [n for n, _ in models[0].named_parameters() if not any(word in n for word in UNUSED.get(name, ()))]

    def of(model: torch.nn.Module) -> dict[str, Tensor]:
        values = task_fisher(model, family.kind, examples, pad_id=family.pad_id, names=names).values
        return {n: v.cpu() for n, v in values.items()}

    expected, once, twice = of(models[0]), of(models[1].to(CARD)), of(models[2].to(CARD))
    assert distance(once, expected) < 2e-4
    assert all(torch.equal(once[n], twice[n]) for n in once) or name in NOT_REPRODUCIBLE


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_the_cpu_and_the_same_twice(family: str) -> None:
    examples, row = make_examples(family), FAMILIES[family]
    expected = choice_losses(make_model(family), row.kind, examples, pad_id=row.pad_id)
    model = make_model(family).to(CARD)
    once, twice = (choice_losses(model, row.kind, examples, pad_id=row.pad_id) for _ in range(2))
    assert once == twice
    for losses, wanted in zip(once, expected, strict=True):
        assert losses == pytest.approx(wanted, rel=1e-4)


def merged(project: Project, method: str, device: str, *more: str) -> tuple[dict[str, Tensor], Any]:
    overrides = [f"device={device}", "compute=float32", "importance.dtype=float32", *more]
    spec = StudySpec.from_yaml(project.file, overrides)
    problem = load_problem(spec)
    outcome = Merger(problem, METHODS[method], None).run({n: 0.3 + 0.4 * i for i, n in enumerate(problem.experts)})
    return {n: p.detach().cpu() for n, p in problem.resident.model.named_parameters()}, outcome


@pytest.mark.parametrize("family", ["t5", "bert", "llama"])
def test_a_df_merge_is_that_of_the_cpu(family: str, project_of: NewProject) -> None:
    project = project_of(family)
    expected, scores = merged(project, "df-merge", "cpu")
    found, there = merged(project, "df-merge", "cuda")
    # No loss depends on a bias of keys, so that its importance is rounding on either device.
    assert distance(found, {n: value for n, value in expected.items() if not n.endswith("key.bias")}) < 1e-5
    assert there.tasks == scores.tasks


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("method", ["df-merge", "gta"])
@pytest.mark.parametrize("family", ["t5", "bert", "llama"])
def test_a_merge_over_two_cards_is_that_of_the_cpu(family: str, method: str, tmp_path: Path) -> None:
    project = make_project(tmp_path / family, family, rows=8, samples=3, layers=5)
    expected, scores = merged(project, method, "cpu")
    found, there = merged(project, method, "auto", "device_map=auto")
    problem = load_problem(StudySpec.from_yaml(project.file, ["device=auto", "device_map=auto"]))
    assert len({parameter.device for parameter in problem.resident.model.parameters()}) >= 2
    shared = {n: expected[n] for n in problem.resident.names if not n.endswith("key.bias")}
    assert distance(found, shared) < 1e-5
    assert there.tasks == scores.tasks


@pytest.mark.parametrize("method", ["df-merge", "df-merge-scaled", "gta", "regmean", "df-merge-kfac"])
@pytest.mark.parametrize("family", ["t5", "bert"])
def test_a_study_that_is_cut_and_resumed_on_the_card_has_the_trials_of_an_uncut_one(
    family: str, method: str, project_of: NewProject
) -> None:
    project = project_of(family)

    def trials(storage: str, *totals: int) -> list[tuple[dict[str, Any], list[float]]]:
        search = {"startup_trials": 3}
        project.write(method=method, device="cuda", baselines=[], search=search, storage=f"sqlite:///{storage}")
        for total in totals:
            project.cli("run", "spec.yaml", "--trials", str(total))
        return [(trial.params, trial.values) for trial in stored_study(StudySpec.from_yaml(project.file)).trials]

    assert trials("cut.db", 2, 4, 6) == trials("whole.db", 6)


@pytest.mark.parametrize("compute", ["tf32", "bf16"])
@pytest.mark.parametrize("family", ["t5", "bert", "llama"])
def test_with_fewer_digits_a_model_takes_the_same_choices_but_for_near_ties(
    family: str, compute: str, project_of: NewProject
) -> None:
    file = project_of(family).file

    def losses(compute: str) -> list[list[float]]:
        spec = StudySpec.from_yaml(file, ["device=cuda", f"compute={compute}"])
        problem = load_problem(spec)
        merger = Merger(problem, METHODS["gta"], None)
        problem.resident.load_scaled_(0, 0.5)
        return [row for task in problem.tasks for row in merger.given(task, "validation")]

    exact, rounded = losses("float32"), losses(compute)
    clear = [sorted(one)[1] - min(one) > 0.05 * min(one) for one in exact]
    same = [one.index(min(one)) == other.index(min(other)) for one, other in zip(exact, rounded, strict=True)]
    assert all(alike for alike, apart in zip(same, clear, strict=True) if apart)


@pytest.fixture
def little_memory() -> Iterator[Callable[[int], None]]:
    """A function that leaves this process so many bytes of the card beyond what it holds."""
    total = torch.cuda.get_device_properties(CARD).total_memory

    def leave(size: int) -> None:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + size) / total)

    yield leave
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_batch_that_the_card_refuses_is_halved_and_the_losses_are_the_same(little_memory) -> None:
    model, row = make_model("llama").to(CARD), FAMILIES["llama"]
    examples = make_examples("llama") * 400
    whole = choice_losses(model, Kind.CAUSAL, examples, pad_id=row.pad_id, token_budget=1 << 22)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    choice_losses(model, Kind.CAUSAL, examples, pad_id=row.pad_id, token_budget=1 << 22)
    little_memory((torch.cuda.max_memory_reserved() - torch.cuda.memory_allocated()) // 3)
    halved = choice_losses(model, Kind.CAUSAL, examples, pad_id=row.pad_id, token_budget=1 << 22)
    for losses, wanted in zip(halved, whole, strict=True):
        assert losses == pytest.approx(wanted, rel=1e-4)


def test_a_trial_that_the_card_has_no_memory_for_fails_and_the_study_goes_on(
    project: Project, little_memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, trials = Merger.run, list[int]()

    def crowded(merger: Merger, *point: Any) -> Any:
        trials.append(len(trials))
        if len(trials) == 2:  # what another program takes of the card
            little_memory(0)
            hoard: list[Tensor] = []
            try:
                while True:
                    hoard.append(torch.empty(256, dtype=torch.uint8, device=CARD))
            except torch.OutOfMemoryError:
                pass
            try:
                return run(merger, *point)
            finally:
                hoard.clear()
                torch.cuda.set_per_process_memory_fraction(1.0)
        return run(merger, *point)

    monkeypatch.setattr(Merger, "run", crowded)
    done = project.cli("run", "spec.yaml", "--trials", "4", "--device", "cuda")
    assert "out of memory" in done.stderr
    states = project.json("status", "spec.yaml")["trials"]
    assert (states["complete"], states["failed"]) == (4, 1)


def test_two_workers_share_a_card(project: Project) -> None:
    project.process("run", "spec.yaml", "--trials", "6", "--workers", "2", "--device", "cuda")
    assert project.json("status", "spec.yaml")["trials"]["complete"] == 6


def test_a_merged_model_of_the_card_loads_and_scores_as_its_trial_did(project: Project, tmp_path: Path) -> None:
    project.cli("run", "spec.yaml", "--trials", "4", "--device", "cuda", "--set", "compute=float32")
    out = project.cli("export", "spec.yaml", "--out", str(tmp_path / "merged"), "--device", "cpu")
    assert (tmp_path / "merged" / "config.json").exists(), out.stdout


@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_passes_follow_the_weights_and_give_what_is_computed(family: str) -> None:
    examples, row, model = make_examples(family), FAMILIES[family], make_model(family).to(CARD)

    def losses() -> list[list[float]]:
        return choice_losses(model, row.kind, examples, pad_id=row.pad_id)

    def scaled(factor: float) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(factor)

    computed = {factor: (scaled(factor), losses())[1] for factor in (1.0, 1.1)}
    replay.allow_replays_(model)
    scaled(1 / 1.1)
    first = losses()
    scaled(1.1)
    second, third = losses(), losses()
    assert second == third != first
    assert replay._allowed[model].recordings, "nothing was recorded"
    for found, expected in ((first, computed[1.0]), (second, computed[1.1])):
        for one, other in zip(found, expected, strict=True):
            assert one == pytest.approx(other, rel=1e-3)


def test_a_model_whose_weights_have_moved_is_not_replayed_from_where_they_were() -> None:
    examples, row, model = make_examples("bert"), FAMILIES["bert"], make_model("bert").to(CARD)
    replay.allow_replays_(model)
    choice_losses(model, row.kind, examples, pad_id=row.pad_id)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = 2 * parameter.data  # elsewhere
    found = choice_losses(model, row.kind, examples, pad_id=row.pad_id)
    replay.forget_replays_(model)
    expected = choice_losses(model, row.kind, examples, pad_id=row.pad_id)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_a_study_on_the_card_replays_what_it_scores(project: Project) -> None:
    problem = load_problem(StudySpec.from_yaml(project.write(device="cuda")))
    assert problem.roomy
    Merger(problem, METHODS["gta"], None).run(dict.fromkeys(problem.experts, 0.5))
    assert replay._allowed[problem.resident.model].recordings
