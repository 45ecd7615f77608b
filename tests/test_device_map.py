"""`device_map`: a model whose layers stand on two devices gives what it gives on one, and nothing mixes the two.

The devices are places of `scripts/counting.py`: their tensors hold values of the CPU and refuse to meet those of
another place, as CUDA's do.  Accelerate's own hooks move what passes between layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfmerge_studies import Merger, StudySpec, load_problem
from dfmerge_studies.checkpoints import resident as resident_module
from dfmerge_studies.checkpoints.factored import Factored, Factors
from dfmerge_studies.checkpoints.spread import devices_of, layer_map, place_of, shares_of_devices, spread_
from dfmerge_studies.errors import InputError
from dfmerge_studies.importance import ways
from dfmerge_studies.importance.norms import neutral_weight
from dfmerge_studies.importance.task_fisher import task_fisher
from dfmerge_studies.methods import METHODS
from dfmerge_studies.objective import cards, spreading
from dfmerge_studies.objective.cards import check_device_map, room_on, weight_budgets
from dfmerge_studies.objective.evaluate import evaluate_model
from dfmerge_studies.objective.loading import choose_device
from dfmerge_studies.objective.memory import Activations, memory_of
from dfmerge_studies.objective.problem import Problem
from dfmerge_studies.objective.slopes import Sample
from dfmerge_studies.params import stacked
from dfmerge_studies.ranks import Ranks
from dfmerge_studies.report.export import Form, Merged, export_merge
from dfmerge_studies.study.fingerprint import stated_fingerprint
from dfmerge_studies.study.fishers import spec_cache
from dfmerge_studies.study.session import open_study
from dfmerge_studies.tasks import replay
from dfmerge_studies.tasks.evaluate import choice_losses
from dfmerge_studies.tasks.generation import Writer, write_tokens
from scripts.counting import counting, elsewhere, here, move_
from tests.models import FAMILIES, make_examples, make_model
from tests.project import Project, make_project
from tests.test_generation import ending

FIRST, SECOND = torch.device("meta:0"), torch.device("meta:1")
# To and fro, so that what is passed on goes both ways; tied parameters stay together.
PLACES: dict[str, dict[str, torch.device]] = {
    "t5": {
        **dict.fromkeys(["shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"], FIRST),
        "encoder.block.0": FIRST,
        "encoder.block.1": SECOND,
        **dict.fromkeys(["encoder.final_layer_norm", "encoder.dropout"], SECOND),
        "decoder.block.0": SECOND,
        "decoder.block.1": FIRST,
        **dict.fromkeys(["decoder.final_layer_norm", "decoder.dropout"], FIRST),
    },
    "bert": {
        **dict.fromkeys(["bert.embeddings", "bert.encoder.layer.0"], FIRST),
        **dict.fromkeys(["bert.encoder.layer.1", "bert.pooler", "dropout", "classifier"], SECOND),
    },
    "llama": {
        **dict.fromkeys(["model.embed_tokens", "model.layers.0"], FIRST),
        **dict.fromkeys(["model.layers.1", "model.norm", "model.rotary_emb", "lm_head"], SECOND),
    },
}
PROJECTS = {"t5": "t5-deep", "bert": "bert", "llama": "llama"}  # with two layers each
FAMILIES_HERE = tuple(PLACES)
EXACT = {"samples": 3, "dtype": "float32"}
NewProject = Callable[[str], Project]


def loaded(project: Project, **fields: Any) -> Problem:
    project.write(**{"dtype": "float64", "importance": EXACT, "device": "auto", **fields})
    return load_problem(StudySpec.from_yaml(project.file))


def spread(problem: Problem, family: str, *, host: bool = False) -> Problem:
    """The same on two places; to be called inside of `counting`."""
    problem.resident.spread_(PLACES[family])
    problem.resident.keep_on_(host=host)
    assert devices_of(problem.resident.model) == [FIRST, SECOND]
    return problem


def point(problem: Problem) -> dict[str, float]:
    return {name: 0.3 + 0.4 * i for i, name in enumerate(problem.experts)}


def weights(problem: Problem) -> dict[str, Tensor]:
    """What is merged; a head is whatever task's was scored last."""
    parameters = dict(problem.resident.model.named_parameters())
    return here({name: parameters[name] for name in problem.resident.names})


def assert_alike(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-6) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        size = float(tensor.abs().max())  # of biases of keys it is rounding: no loss depends on them
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance * size + 1e-12)


# --- the places ------------------------------------------------------------------------------------------------------


def test_tensors_of_two_places_do_not_mix_and_can_be_moved() -> None:
    with counting():
        a = elsewhere({"a": torch.ones(3)})["a"].to(FIRST)
        b = a.to(SECOND)
        assert (a.device, b.device, (b + b).device) == (FIRST, SECOND, SECOND)
        for mixed in (lambda: a + b, lambda: torch.cat([a, b]), lambda: a[b.long()], lambda: a.sum() * b):
            with pytest.raises(RuntimeError, match="two devices"):
                mixed()
        assert (a + b.to(FIRST)).tolist() == [2.0, 2.0, 2.0]


def test_numbers_of_several_places_are_stacked_in_their_order() -> None:
    with counting():
        numbers = [torch.tensor(float(i), device=(FIRST, SECOND, FIRST)[i % 3]) for i in range(7)]
        assert stacked(numbers).device == FIRST
        assert stacked(numbers).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


# --- a spread model --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["exact", "sampled", "empirical", "mask-nodes"])
@pytest.mark.parametrize("family", FAMILIES_HERE)
def test_importance_and_losses_are_those_of_one_device(family: str, estimator: str) -> None:
    row, examples = FAMILIES[family], make_examples(family)
    model = make_model(family, torch.float64)

    def fisher() -> dict[str, Tensor]:
        draws = torch.Generator().manual_seed(0)
        return task_fisher(model, row.kind, examples, pad_id=row.pad_id, estimator=estimator, generator=draws).values

    expected, losses = fisher(), choice_losses(model, row.kind, examples, pad_id=row.pad_id)
    ways._batched.pop(model, None)
    with counting():
        spread_(model, PLACES[family])
        found = fisher()
        assert all(value.device == place_of(model, name) for name, value in found.items())
        found_losses = choice_losses(model, row.kind, examples, pad_id=row.pad_id)
    if estimator != "mask-nodes":  # which has no second way
        assert set(ways._batched[model].values()) == {True}  # hooks are not in the way of the formulas
    assert_alike(here(found), expected)
    for one, other in zip(found_losses, losses, strict=True):
        assert one == pytest.approx(other, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES_HERE)
def test_a_trial_is_that_of_one_device_with_its_scores_and_slopes(family: str, project_of: NewProject) -> None:
    project = project_of(PROJECTS[family])
    outcomes, merges = [], []
    for two in (False, True):
        problem = loaded(project)
        sample = Sample(dict.fromkeys(problem.tasks, (0, 1, 2)), dict.fromkeys(problem.tasks, 0.5))
        with counting():
            resident = spread(problem, family).resident if two else problem.resident
            outcomes.append(Merger(problem, problem.spec.row, None).run(point(problem), sample=sample))
            merges.append(weights(problem))
            for name in resident.names:
                belongs = [resident.base, *(v.deltas for v in resident.task_vectors if name in v.deltas)]
                assert {each[name].device for each in belongs} == {resident.place_of(name)}
    one, other = outcomes
    assert other.tasks == pytest.approx(one.tasks, rel=1e-6)
    assert one.slope is not None
    assert other.slope is not None
    assert other.slope.loss == pytest.approx(one.slope.loss, rel=1e-6)
    assert dict(other.slope.slopes) == pytest.approx(dict(one.slope.slopes), rel=1e-6)
    assert_alike(merges[1], merges[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    ["gta", "ties", "dare", "della", "breadcrumbs", "lore", "regmean", "df-merge-kfac", "fim", "fisher-nodes",
     "df-merge-scaled"],
)  # fmt: skip
@pytest.mark.parametrize("family", ["bert"])
def test_other_methods_merge_what_they_merge_on_one_device(family: str, method: str, project_of: NewProject) -> None:
    project, row = project_of(PROJECTS[family]), METHODS[method]
    parameters = row.complete({"drop_rate": 0.5} if "drop_rate" in {each.name for each in row.parameters} else {})
    merges = []
    for two in (False, True):
        problem = loaded(project, method=method, baselines=None)
        with counting():
            if two:
                spread(problem, family)
            else:
                move_(problem.resident.model)
                problem.resident.heads = {t: elsewhere(head) for t, head in problem.resident.heads.items()}
                problem.resident.keep_on_(host=False)
            merger = Merger(problem, row, None)
            given = point(problem) if row.coefficients.chosen else None
            merger.merge_(merger.point(given, parameters, "here"))
            merges.append(weights(problem))
    assert_alike(merges[1], merges[0])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES_HERE)
def test_in_parts_and_from_the_host_the_merge_is_the_same_and_the_cache_too(
    family: str, project_of: NewProject, tmp_path: Path
) -> None:
    project = project_of(PROJECTS[family])
    expected = loaded(project)
    Merger(expected, expected.spec.row, None).merge_(point(expected))
    problem = loaded(project, cache=str(tmp_path / "fishers"))
    with counting():
        spread(problem, family, host=True)
        problem.part_entries = sum(problem.sizes.values()) // 3
        assert len(problem.parts()) >= 3
        cache = spec_cache(problem.spec)
        first = Merger(problem, problem.spec.row, cache).merge_(point(problem))
        merged = weights(problem)
        problem.part_entries = None
        second = Merger(problem, problem.spec.row, cache).merge_(point(problem))
        again = weights(problem)
    assert [(each.computed, each.cached) for each in (first, second)] == [(2, 0), (0, 2)]
    assert_alike(merged, weights(expected))
    assert_alike(again, weights(expected))


@pytest.mark.slow
def test_cached_importances_in_blocks_and_of_masks_go_to_their_layers(project_of: NewProject, tmp_path: Path) -> None:
    project = project_of("bert")
    for method in ("df-merge-kfac", "fisher-nodes"):
        problem = loaded(project, method=method, cache=str(tmp_path / method))
        with counting():
            spread(problem, "bert")
            merges = []
            for _ in range(2):
                merger = Merger(problem, problem.spec.row, spec_cache(problem.spec))
                given = point(problem) if problem.spec.row.coefficients.chosen else None
                outcome = merger.merge_(merger.point(given, problem.spec.row.complete({}), "here"))
                merges.append(weights(problem))
        assert outcome.cached == 2
        assert_alike(merges[1], merges[0])


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_spread_model_writes_the_texts_that_it_writes_on_one_device(family: str) -> None:
    row, examples = FAMILIES[family], make_examples(family)
    model, writer = ending(family).double(), Writer(row.tokenizer(), 6)

    def tokens() -> list[tuple[int, ...]]:
        return write_tokens(model, row.kind, examples, writer, pad_id=row.pad_id)

    expected = tokens()
    with counting():
        spread_(model, PLACES[family])
        assert tokens() == expected
    assert max(map(len, expected)) > 1


@pytest.mark.slow
def test_an_export_of_a_spread_model_is_that_of_one_device(project_of: NewProject, tmp_path: Path) -> None:
    for family in FAMILIES_HERE:
        project = project_of(PROJECTS[family])
        folders = []
        for two in (False, True):
            problem = loaded(project, method="gta", dtype="float32")
            folders.append(tmp_path / f"{family}-{two}")
            with counting():
                if two:
                    spread(problem, family)
                merger = Merger(problem, problem.spec.row, None)
                merged = Merged(method="gta", point=merger.point(point(problem), {}, "here"))
                export_merge(merger, problem.spec, merged, folders[-1], Form(split_heads=family == "bert"))
        files = [
            {f.relative_to(folder): f.read_bytes() for f in folder.rglob("*") if f.is_file()} for folder in folders
        ]
        assert files[0] == files[1]
        assert any(name.suffix == ".safetensors" for name in files[0])


def test_hooks_hide_no_norm_and_a_forward_of_its_own_is_none() -> None:
    with counting():
        model: Any = make_model("llama")
        spread_(model, PLACES["llama"])
        norm = model.model.layers[1].input_layernorm
        assert neutral_weight(norm, 3) == 1.0
    other: Any = make_model("llama").model.norm
    other.forward = lambda x: x + 1
    assert neutral_weight(other, 3) is None


def test_factors_go_where_their_matrix_is() -> None:
    with counting():
        pair = Factors(torch.ones(3, 1), torch.ones(1, 2), 0.5)
        moved = Factored({"a": pair, "b": torch.ones(2)}).to({"a": SECOND, "b": FIRST}.__getitem__)
        assert (moved["a"].device, moved["b"].device) == (SECOND, FIRST)


def test_passes_of_a_spread_model_are_not_recorded() -> None:
    with counting():
        model = make_model("t5")
        spread_(model, PLACES["t5"])
        replay.allow_replays_(model)
        assert replay.state_of(model) is None


# --- which layer goes where ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Project]:
    """A function from a family to a project whose layers take more than its embeddings."""
    folder = tmp_path_factory.mktemp("deep")
    made: dict[str, Project] = {}

    def project(family: str) -> Project:
        if family not in made:
            made[family] = make_project(folder / family, family, rows=6, samples=3, layers=5)
        return made[family]

    return project


@contextmanager
def two_cards(monkeypatch: pytest.MonkeyPatch, free: int | list[int]) -> Iterator[None]:
    """Two places instead of two CUDA devices, with so many bytes free; what is loaded is on the host until then."""
    each, entered = free if isinstance(free, list) else [free, free], ExitStack()

    def on_places(model: nn.Module, places: Mapping[str, Any]) -> None:
        entered.enter_context(counting())
        spread_(model, {path: torch.device("meta", number) for path, number in places.items()})

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(spreading, "idle_bytes", lambda number: each[number])
    for module in (spreading, resident_module):
        monkeypatch.setattr(module, "spread_", on_places)
    with entered:
        yield


@pytest.mark.slow
@pytest.mark.parametrize("way", ["auto", "sequential"])
@pytest.mark.parametrize("family", FAMILIES_HERE)
def test_a_spec_with_a_device_map_is_loaded_over_all_devices(
    family: str, way: str, deep: NewProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = deep(family)
    expected = loaded(project)
    outcome = Merger(expected, expected.spec.row, None).run(point(expected))
    needs = memory_of(expected, Activations()).device
    with two_cards(monkeypatch, int(0.9 * (needs.total + needs.model))):  # of what a trial takes: one does not hold it
        problem = loaded(project, device_map=way)
        assert len(devices_of(problem.resident.model)) == 2
        found = Merger(problem, problem.spec.row, None).run(point(problem))
        merged = weights(problem)
    assert found.tasks == pytest.approx(outcome.tasks, rel=1e-6)
    assert_alike(merged, weights(expected))


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {
            "search": {
                "trials": 4,
                "startup_trials": 2,
                "sampler": "auto",
                "startup": "descent",
                "granularity": "layers",
            }
        },
        {"search": {"trials": 3, "startup_trials": 2, "sampler": "gp"}, "protect": {"task": "red"}},
    ],
)
def test_a_study_over_two_devices_has_the_trials_of_one(
    fields: dict[str, Any], deep: NewProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = deep("llama")
    common = {"dtype": "float64", "importance": EXACT, "device": "auto", **fields}
    name = f"sqlite:///{fields['search']['sampler']}"
    project.write(**common, storage=f"{name}-one.db")
    one = open_study(StudySpec.from_yaml(project.file))
    one.run()
    needs = memory_of(one.problem, Activations()).device
    with two_cards(monkeypatch, int(0.9 * (needs.total + needs.model))):
        project.write(**common, storage=f"{name}-two.db", device_map="auto")
        two = open_study(StudySpec.from_yaml(project.file))
        assert len(devices_of(two.problem.resident.model)) == 2
        two.run()
    studies = [[(trial.params, trial.values) for trial in session.study.trials] for session in (one, two)]
    assert len(studies[0]) == fields["search"]["trials"]
    for (ours, values), (theirs, others) in zip(*studies, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-6)
        assert others == pytest.approx(values, rel=1e-6)


@pytest.mark.slow
def test_a_directory_is_scored_by_a_spread_model(deep: NewProject, monkeypatch: pytest.MonkeyPatch) -> None:
    project = deep("bert")
    spec = loaded(project).spec
    scores = evaluate_model(spec, str(project.folder / "red"), "validation")
    with two_cards(monkeypatch, 100_000):
        found = evaluate_model(spec.derive(device_map="auto"), str(project.folder / "red"), "validation")
    assert {t: s.score for t, s in found.items()} == pytest.approx({t: s.score for t, s in scores.items()})


def device_in(places: Mapping[str, int], name: str) -> int:
    return next(device for path, device in places.items() if not path or f"{name}.".startswith(f"{path}."))


def test_weights_leave_the_room_that_the_rest_of_a_trial_takes_on_each_device() -> None:
    model = make_model("llama", layers=12)
    sizes = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
    whole = sum(sizes.values())
    for trial in (2 * whole, 7 * whole):
        for free in ([2 * trial, 2 * trial], [trial, 3 * trial], [trial, trial, trial]):
            budgets = weight_budgets(free, whole, trial)
            for way in ("auto", "balanced_low_0", "sequential"):
                places = layer_map(model, way, budgets, where="here")
                assert places is not None
                for number, there in enumerate(free):
                    own = sum(size for name, size in sizes.items() if device_in(places, name) == number)
                    assert trial * own / whole <= 0.9 * there


def test_a_named_memory_bounds_all_devices_together() -> None:
    assert weight_budgets([1000, 3000], 10, 20) == {0: 450, 1: 1350}
    assert weight_budgets([1000, 3000], 10, 20, memory="1800") == {0: 225, 1: 675}
    assert weight_budgets([1000, 3000], 10, 20, memory="1GB") == {0: 450, 1: 1350}


def test_the_fullest_device_decides_what_a_trial_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "free_bytes", {FIRST: 1000, SECOND: 500}.__getitem__)
    assert room_on({FIRST: 1.0}, 200) == 200 + 900
    assert room_on({FIRST: 0.5, SECOND: 0.5}, 200) == 200 + 900
    assert room_on({FIRST: 0.9, SECOND: 0.1}, 200) == 200 + 1000
    with counting():
        model = make_model("bert")
        spread_(model, PLACES["bert"])
        shares = shares_of_devices(model)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares[FIRST] > shares[SECOND] > 0


@pytest.mark.slow
def test_where_devices_do_not_hold_all_of_a_trial_the_model_is_spread_all_the_same(
    deep: NewProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = deep("llama")
    needs = memory_of(loaded(project), Activations()).device
    with two_cards(monkeypatch, 3 * needs.model):
        problem = loaded(project, device_map="auto")
        assert {device.index for device in devices_of(problem.resident.model)} == {0, 1}
    with two_cards(monkeypatch, needs.model // 2), pytest.raises(InputError, match="does not fit on the 2") as told:
        loaded(project, device_map="auto")
    assert str(told.value.where).endswith("device_map")
    assert "use more devices" in str(told.value.hint)


# --- refusals --------------------------------------------------------------------------------------------------------


def refused(project: Project, **fields: Any) -> InputError:
    project.write(**{"device_map": "auto", "device": "auto", **fields})
    with pytest.raises(InputError) as told:
        choose_device(StudySpec.from_yaml(project.file))
    assert str(project.file) in str(told.value.where)
    assert str(told.value.where).endswith("device_map")
    return told.value


@pytest.mark.parametrize("device", ["cpu", "cuda:1", "mps"])
def test_a_single_device_beside_it_is_refused(device: str, project: Project) -> None:
    found = refused(project, device=device)
    assert f"device: {device} is a single one" in found.what


@pytest.mark.parametrize(("count", "there"), [(0, "no CUDA device is there"), (1, "one CUDA device is there")])
def test_fewer_than_two_cuda_devices_are_refused(
    count: int, there: str, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    found = refused(project)
    assert there in found.what
    assert found.hint == "Leave it out"


def test_several_processes_are_refused(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.write(device_map="auto", device="auto")
    spec = StudySpec.from_yaml(project.file)

    class Two(Ranks):
        size = 2

    with pytest.raises(InputError, match="2 processes, which have a whole model each") as told:
        check_device_map(spec, Two())
    assert str(told.value.where).endswith("device_map")
    alone = project.cli("run", "spec.yaml", "--workers", "2", check=2)
    assert "--workers 2 asks for 2 models" in " ".join(alone.stderr.split())
    launched = project.cli("run", "spec.yaml", check=2, RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost")
    assert "without accelerate launch or torchrun" in " ".join(launched.stderr.split())


def test_a_model_that_does_not_say_what_stays_whole_is_refused() -> None:
    with pytest.raises(InputError, match="DistilBertForSequenceClassification does not say") as told:
        layer_map(make_model("distilbert"), "auto", {0: 10**9, 1: 10**9}, where="spec.yaml: device_map")
    assert told.value.where == "spec.yaml: device_map"


def test_it_is_no_part_of_what_a_study_is_about(project: Project) -> None:
    project.write(device="auto")
    spec = StudySpec.from_yaml(project.file)
    assert spec.device_map is None
    assert stated_fingerprint(spec) == stated_fingerprint(spec.derive(device_map="auto"))
    with pytest.raises(InputError, match="device_map"):
        spec.derive(device_map="everywhere")
