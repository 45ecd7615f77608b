"""LoRA experts stay factors beside one base: what they merge to is what folding them into copies of it merges to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from dfmerge_studies import Merger, StudySpec, load_problem
from dfmerge_studies.checkpoints import resident as resident_module
from dfmerge_studies.checkpoints.factored import Factored, Factors
from dfmerge_studies.checkpoints.load import load_model
from dfmerge_studies.checkpoints.reference import Checkpoint
from dfmerge_studies.checkpoints.resident import Resident, load_resident
from dfmerge_studies.checkpoints.streamed import kept_bytes
from dfmerge_studies.errors import InputError
from dfmerge_studies.methods import METHODS
from dfmerge_studies.tasks.encoding import Kind
from tests.models import FAMILIES, save_model_directory
from tests.project import Project, make_project
from tests.test_adapters import AUTO, at, lora, save_adapter


def resident_of(base: Path, family: str, *paths: Path, dtype: torch.dtype = torch.float32) -> Resident:
    experts = {path.name: at(path) for path in paths}
    tasks = {name: name for name in experts}
    model_class = AUTO[FAMILIES[family].kind][1]
    return load_resident(at(base), experts, tasks, model_class, dtype=dtype, device=torch.device("cpu"))


@pytest.fixture
def folding(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From when it is called, every adapter is folded into a copy of the base, as those that are no plain LoRA are."""
    return lambda: monkeypatch.setattr(resident_module, "keep_factors", lambda *_, **__: None)


def scaled(resident: Resident, coefficients: Sequence[float]) -> Iterator[dict[str, Tensor]]:
    """The parameters of each expert at its coefficient."""
    for index, coefficient in enumerate(coefficients):
        resident.load_scaled_(index, coefficient)
        yield {name: p.detach().clone() for name, p in resident.model.named_parameters()}


def factors(resident: Resident) -> set[str]:
    """The parameters that some expert keeps as factors."""
    found = [vector.deltas.entries for vector in resident.task_vectors if isinstance(vector.deltas, Factored)]
    return {name for entries in found for name, entry in entries.items() if isinstance(entry, Factors)}


KEPT: dict[str, tuple[str, Callable[[], peft.PeftConfig]]] = {
    "dense layers of a decoder": ("llama", lambda: lora(target_modules="all-linear")),
    "of a tied one": ("llama-tied", lambda: lora(target_modules=["q_proj", "down_proj"])),
    "ranks and scales by pattern": (
        "llama",
        lambda: lora(
            target_modules=["q_proj", "v_proj"],
            rank_pattern={"q_proj": 2},
            alpha_pattern={"v_proj": 9},
            use_rslora=True,
        ),
    ),
    "one layer": ("llama", lambda: lora(target_modules=["q_proj"], layers_to_transform=[1])),
    "transposed layers": ("gpt2", lambda: lora(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
    "biases": ("gpt2", lambda: lora(target_modules=["c_attn"], fan_in_fan_out=True, bias="lora_only")),
    "positions": ("gpt2", lambda: lora(target_modules=["wpe"])),
    "untied embeddings": ("llama", lambda: lora(target_modules=["embed_tokens", "lm_head"])),
    "saved norms and output": ("llama", lambda: lora(target_modules=["q_proj"], modules_to_save=["norm", "lm_head"])),
    "an encoder-decoder": ("t5", lambda: lora(target_modules=["q", "v", "wi", "wo", "relative_attention_bias"])),
    "a classifier with its head": ("bert", lambda: lora(target_modules=["query", "value"], bias="all")),
    "a head that is factors": (
        "bert",
        lambda: lora(target_modules=["query", "classifier"], modules_to_save=["pooler"]),
    ),
}


@pytest.mark.parametrize("case", KEPT)
def test_kept_factors_are_the_folded_adapter_at_every_coefficient(
    tmp_path: Path, folding: Callable[[], None], case: str
) -> None:
    family, config = KEPT[case]
    base = save_model_directory(tmp_path / "base", family)
    live = save_adapter(base, FAMILIES[family].kind, config(), tmp_path / "red")
    ours = resident_of(base, family, tmp_path / "red")
    assert factors(ours)
    assert next(scaled(ours, [0.0])).keys() == dict(ours.model.named_parameters()).keys()
    folding()
    reference = resident_of(base, family, tmp_path / "red")
    assert not factors(reference)
    assert ours.names == reference.names == list(ours.base)
    assert (ours.base_digest, ours.expert_digests) == (reference.base_digest, reference.expert_digests)
    for coefficient in (0.3, 1.0):
        (a,), (b,) = scaled(ours, [coefficient]), scaled(reference, [coefficient])
        for name, tensor in b.items():
            torch.testing.assert_close(a[name], tensor, rtol=1e-6, atol=1e-6)
    for head, other in zip(ours.heads.values(), reference.heads.values(), strict=True):
        assert head.keys() == other.keys()
        for name, tensor in other.items():
            torch.testing.assert_close(head[name], tensor, rtol=1e-6, atol=1e-6)
    ours.load_scaled_(0, 1.0)
    ours.use_head_("red")
    ids = torch.tensor([[5, 6, 100, 101, 2, 40]])
    more = {"decoder_input_ids": ids[:, :4]} if FAMILIES[family].kind is Kind.TEXT_TO_TEXT else {}
    with torch.no_grad():
        torch.testing.assert_close(
            ours.model(input_ids=ids, **more).logits, live(input_ids=ids, **more).logits, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("case", KEPT)
def test_the_base_is_bit_for_bit_what_its_files_hold(tmp_path: Path, case: str) -> None:
    family, config = KEPT[case]
    base = save_model_directory(tmp_path / "base", family)
    for seed in (0, 1):
        save_adapter(base, FAMILIES[family].kind, config(), tmp_path / f"expert{seed}", seed=seed)
    resident = resident_of(base, family, tmp_path / "expert0", tmp_path / "expert1")
    model_class = AUTO[FAMILIES[family].kind][1]
    plain = load_model(at(base), model_class, dtype=torch.float32).model
    found = dict(resident.model.named_parameters())
    assert [*found] == [name for name, _ in plain.named_parameters()]
    for name, parameter in plain.named_parameters():
        assert torch.equal(found[name], parameter), name
    assert str(resident.model) == str(plain)  # no module of peft is left
    resident.load_scaled_(1, 0.7)
    resident.load_base_()
    assert all(torch.equal(found[name], parameter) for name, parameter in plain.named_parameters())


def test_the_base_is_read_once_however_many_adapters_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_model_directory(tmp_path / "base", "llama")
    for seed in range(3):
        save_adapter(base, Kind.CAUSAL, lora(target_modules=["q_proj"]), tmp_path / f"expert{seed}", seed=seed)
    reads: list[Path] = []

    def counted(checkpoint: Checkpoint, *arguments: Any, **keywords: Any) -> Any:
        reads.append(checkpoint.path)
        return load_model(checkpoint, *arguments, **keywords)

    monkeypatch.setattr(resident_module, "load_model", counted)
    monkeypatch.setattr("dfmerge_studies.checkpoints.adapters.load_model", counted)
    resident_of(base, "llama", *(tmp_path / f"expert{seed}" for seed in range(3)))
    assert reads == [base]


@pytest.mark.parametrize(("stored", "width"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_an_expert_keeps_its_factors_and_no_matrix(tmp_path: Path, stored: torch.dtype, width: int) -> None:
    base = save_model_directory(tmp_path / "base", "llama")
    live = save_adapter(base, Kind.CAUSAL, lora(target_modules=["q_proj", "up_proj"]), tmp_path / "red")
    live.to(stored).save_pretrained(tmp_path / "red")
    resident = resident_of(base, "llama", tmp_path / "red")
    (vector,) = resident.task_vectors
    entries = sum(p.numel() for name, p in live.named_parameters() if "lora_" in name)
    assert kept_bytes(vector.deltas) == (width * entries, 0)
    assert sum(delta.numel() for delta in vector.deltas.values()) == sum(p.numel() for p in resident.base.values())


def test_in_bfloat16_kept_factors_are_nearer_to_the_adapter_than_a_fold(
    tmp_path: Path, folding: Callable[[], None]
) -> None:
    base = save_model_directory(tmp_path / "base", "llama", dtype=torch.bfloat16)
    save_adapter(base, Kind.CAUSAL, lora(target_modules="all-linear"), tmp_path / "red")
    ours = resident_of(base, "llama", tmp_path / "red", dtype=torch.bfloat16)
    exact = resident_of(base, "llama", tmp_path / "red", dtype=torch.float32)
    folding()
    fold = resident_of(base, "llama", tmp_path / "red", dtype=torch.bfloat16)

    def error(resident: Resident) -> float:
        (found,), (wanted,) = scaled(resident, [0.3]), scaled(exact, [0.3])
        return sum(float((found[name].double() - wanted[name].double()).square().sum()) for name in exact.names)

    assert 0 < error(ours) < error(fold)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", lora(target_modules=["q_proj"], use_dora=True)),
        ("llama", lora(target_modules=["q_proj"], trainable_token_indices=[5, 100])),
        ("llama", lora(target_modules=["q_proj"], init_lora_weights="orthogonal", r=4)),
        ("llama-tied", lora(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)),
        ("llama", peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
        ("bert", peft.LoHaConfig(r=3, target_modules=["query"])),
    ],
    ids=["DoRA", "tokens", "orthogonal", "tied embeddings", "IA3", "LoHa"],
)
def test_what_is_more_than_factors_is_folded_as_before(tmp_path: Path, family: str, config: peft.PeftConfig) -> None:
    base = save_model_directory(tmp_path / "base", family)
    save_adapter(base, FAMILIES[family].kind, config, tmp_path / "red")
    resident = resident_of(base, family, tmp_path / "red")
    assert resident.names
    assert not factors(resident)


def test_a_classifier_of_other_classes_than_the_bases_keeps_factors_and_brings_its_head(tmp_path: Path) -> None:
    base = save_model_directory(tmp_path / "base", "bert", num_labels=3)
    save_adapter(
        base,
        FAMILIES["bert"].kind,
        lora(target_modules=["query"]),
        tmp_path / "red",
        num_labels=5,
        ignore_mismatched_sizes=True,
    )
    resident = resident_of(base, "bert", tmp_path / "red")
    assert factors(resident) == set(resident.names)
    assert resident.heads["red"]["classifier.weight"].shape == (5, 16)
    assert dict(resident.model.named_parameters())["classifier.weight"].shape == (3, 16)


def test_factors_under_which_the_base_answers_otherwise_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    base = save_model_directory(tmp_path / "base", "llama")
    save_adapter(base, Kind.CAUSAL, lora(target_modules=["q_proj", "up_proj"]), tmp_path / "red")
    monkeypatch.setattr(Factors, "dense", lambda self: 1.1 * self.scale * (self.left @ self.right))
    with pytest.raises(InputError, match="the adapter answers otherwise than live"):
        resident_of(base, "llama", tmp_path / "red")


def test_a_factor_that_is_not_finite_is_refused_by_name(tmp_path: Path) -> None:
    base = save_model_directory(tmp_path / "base", "llama")
    live = save_adapter(base, Kind.CAUSAL, lora(target_modules=["up_proj"]), tmp_path / "red")
    with torch.no_grad():
        next(p for name, p in live.named_parameters() if "layers.1" in name and "lora_B" in name)[0, 0] = torch.nan
    live.save_pretrained(tmp_path / "red")
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight holds \d+ values that are NaN"):
        resident_of(base, "llama", tmp_path / "red")


def test_an_adapter_that_changes_nothing_keeps_nothing(tmp_path: Path) -> None:
    base = save_model_directory(tmp_path / "base", "llama")
    config = lora(target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "red")  # B = 0
    resident = resident_of(base, "llama", tmp_path / "red")
    assert not list(resident.names)
    assert kept_bytes(resident.task_vectors[0].deltas) == (0, 0)


def _with_adapters(folder: Path, family: str) -> Project:
    """A project whose experts are adapters instead of whole models."""
    project = make_project(folder, family, rows=8, samples=3)
    targets = {"t5": ["q", "wo"], "bert": ["query", "output.dense"], "llama": ["q_proj", "down_proj"]}[family]
    labels = {"bert": {"red": 3, "blue": 2}}.get(family, {})
    for seed, name in enumerate(("red", "blue")):
        extra = {"num_labels": labels[name], "ignore_mismatched_sizes": True} if labels else {}
        live = save_adapter(
            project.folder / "base",
            FAMILIES[family].kind,
            lora(target_modules=targets),
            folder / f"{name}-lora",
            seed=seed,
            **extra,
        )
        live.config.save_pretrained(folder / f"{name}-lora")
    return project


@pytest.mark.parametrize("family", ["t5", "bert", "llama"])
@pytest.mark.parametrize("method", ["df-merge", "ties", "lore"])
def test_merges_and_scores_are_those_of_folded_adapters(
    tmp_path: Path, folding: Callable[[], None], family: str, method: str
) -> None:
    project = _with_adapters(tmp_path / "project", family)
    experts = {name: {"model": str(tmp_path / "project" / f"{name}-lora"), "task": name} for name in ("red", "blue")}
    exact = {"samples": 3, "dtype": "float32"}  # rounded to 16 bits, the last bit of a weight may show
    project.write(method=method, experts=experts, importance=exact)

    def merged() -> tuple[dict[str, Tensor], dict[str, float], bool]:
        problem = load_problem(StudySpec.from_yaml(project.file))
        merger = Merger(problem, METHODS[method], None)
        outcome = merger.run(dict.fromkeys(problem.experts, 0.6))
        weights = {name: p.detach().clone() for name, p in problem.resident.model.named_parameters()}
        return weights, outcome.tasks, bool(factors(problem.resident))

    ours, scores, kept = merged()
    folding()
    reference, expected, folded = merged()
    assert (kept, folded) == (True, False)
    assert scores == pytest.approx(expected)
    for name, tensor in reference.items():
        # Where no input moves an entry, both importances are near the floor, and their ratio shows their rounding.
        assert float((ours[name] - tensor).norm() / tensor.norm()) < (1e-4 if method == "df-merge" else 1e-6), name
