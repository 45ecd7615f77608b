"""Fisher information of mask nodes against explicit masks, one input at a time; its spread over weights; studies."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

from dfmerge_studies.errors import InputError
from dfmerge_studies.importance.cache import load_fisher
from dfmerge_studies.importance.nodes import spread
from dfmerge_studies.importance.passes import Job
from dfmerge_studies.importance.task_fisher import sampling_draws, share_of_sum, task_fisher
from dfmerge_studies.methods import Estimator
from dfmerge_studies.objective.loading import load_problem
from dfmerge_studies.objective.once import merge
from dfmerge_studies.spec import StudySpec
from dfmerge_studies.tasks.encoding import Encoded, Kind
from dfmerge_studies.tasks.sampling import seeded_generator
from tests.models import FAMILIES, VOCABULARY, Family, make_examples, make_model, randomise_
from tests.project import Project, make_project
from tests.test_fisher import TOLERANCE, loop_losses

# Last projections by family, as patterns of module names: of attentions with their heads, of feed-forward parts.
GATES: dict[str, tuple[str, int, str]] = {
    "t5": (r"\.o$", 3, r"\.wo$"),
    "t5-v1.1": (r"\.o$", 3, r"\.wo$"),
    "mt5": (r"\.o$", 3, r"\.wo$"),
    "gpt2": (r"attn\.c_proj$", 2, r"mlp\.c_proj$"),
    "llama-tied": (r"o_proj$", 4, r"down_proj$"),
    "llama": (r"o_proj$", 4, r"down_proj$"),
    "bert": (r"attention\.output\.dense$", 2, r"\d\.output\.dense$"),
    "distilbert": (r"out_lin$", 2, r"lin2$"),
    "roberta": (r"attention\.output\.dense$", 2, r"\d\.output\.dense$"),
}
_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_FEW_KEYS = {**_SMALL, "num_attention_heads": 4, "num_key_value_heads": 1, "tie_word_embeddings": False}
# Further classes of layers: a family whose inputs they take, and how to build them.
FURTHER: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "xlm-roberta": (
        "roberta",
        lambda: XLMRobertaForSequenceClassification(
            XLMRobertaConfig(**{**_SMALL, "pad_token_id": 1}, num_attention_heads=2, num_labels=3)
        ),
    ),
    "electra": (
        "bert",
        lambda: ElectraForSequenceClassification(
            ElectraConfig(**_SMALL, embedding_size=8, num_attention_heads=2, num_labels=3)
        ),
    ),
    "mistral": ("llama", lambda: MistralForCausalLM(MistralConfig(**_FEW_KEYS, head_dim=4, sliding_window=None))),
    "qwen2": ("llama", lambda: Qwen2ForCausalLM(Qwen2Config(**_FEW_KEYS))),
    "qwen3": ("llama", lambda: Qwen3ForCausalLM(Qwen3Config(**_FEW_KEYS, head_dim=6))),
}


def loop_nodes(family: str, model: nn.Module, examples: list[Encoded], draws: Tensor) -> dict[str, Tensor]:
    """The definition: masks of ones multiplied into the activations, one input and one loss at a time."""
    attention, heads, feed = GATES[family]
    masks, handles, total = {}, [], {}
    for name, module in model.named_modules():
        if not (is_attention := bool(re.search(attention, name))) and not re.search(feed, name):
            continue
        weight = module.weight
        features = weight.shape[0] if type(module).__name__ == "Conv1D" else weight.shape[1]
        units = heads if is_attention else features
        mask = masks[name] = torch.ones(units, dtype=torch.float64, requires_grad=True)

        def multiply(_: nn.Module, args: Any, mask: Tensor = mask, width: int = features // units) -> Any:
            return (args[0] * mask.repeat_interleave(width), *args[1:])

        handles.append(module.register_forward_pre_hook(multiply))
        total[name] = torch.zeros(units, dtype=torch.float64)
    for draw, example in zip(draws, examples, strict=True):
        losses = loop_losses(model, FAMILIES[family].kind, example)
        chosen = int((torch.softmax(-losses.detach(), dim=0).cumsum(0) <= draw).sum())
        for name, gradient in zip(masks, torch.autograd.grad(losses[chosen], list(masks.values())), strict=True):
            total[name] += gradient**2 / len(examples)
    for handle in handles:
        handle.remove()
    return total


def nodes_of(family: str, model: nn.Module, examples: list[Encoded], **options: Any) -> dict[str, Tensor]:
    """What the engine finds."""
    options = {"compact": True, "pad_id": FAMILIES[family].pad_id} | options
    generator = torch.Generator().manual_seed(3)
    return task_fisher(
        model, FAMILIES[family].kind, examples, estimator="mask-nodes", generator=generator, **options
    ).values


def draws_of(examples: list[Encoded]) -> Tensor:
    return sampling_draws(len(examples), torch.Generator().manual_seed(3))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape
        error = (found[name] - value).norm() / value.norm()
        assert error < tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_masks_of_every_family_have_the_fisher_of_explicit_masks_one_input_at_a_time(family: str) -> None:
    model, examples = make_model(family, torch.float64), make_examples(family)
    expected = loop_nodes(family, model, examples, draws_of(examples))
    assert len(expected) == (10 if FAMILIES[family].kind is Kind.TEXT_TO_TEXT else 4)
    assert_same(nodes_of(family, model, examples), expected)


@pytest.mark.parametrize("name", FURTHER)
def test_so_have_the_masks_of_further_classes_of_layers(name: str) -> None:
    family, build = FURTHER[name]
    model = build().double().eval()
    randomise_(model, torch.Generator().manual_seed(0))
    examples = make_examples(family, inputs=4)
    alike = {"xlm-roberta": "roberta", "electra": "bert"}.get(name, "llama")
    assert_same(nodes_of(family, model, examples), loop_nodes(alike, model, examples, draws_of(examples)))
    spread(model, nodes_of(family, model, examples), [parameter for parameter, _ in model.named_parameters()])


@pytest.mark.parametrize("family", ["t5", "gpt2", "llama", "bert"])
def test_neither_the_size_of_chunks_nor_what_pads_them_changes_the_masks(family: str) -> None:
    model, examples = make_model(family, torch.float64), make_examples(family)
    together = nodes_of(family, model, examples, row_budget=100_000)
    assert_same(nodes_of(family, model, examples, row_budget=1), together)
    assert_same(nodes_of(family, model, examples, row_budget=100_000, pad_id=7), together)


def test_shares_of_the_inputs_add_up_before_and_after_spreading() -> None:
    model, examples = make_model("t5", torch.float64), make_examples("t5")
    draws, names = draws_of(examples), [name for name, _ in model.named_parameters()]
    job = Job(model, Kind.TEXT_TO_TEXT, examples, 0, Estimator.MASK_NODES, draws)
    parts = (range(3), range(3, len(examples)), range(0))
    shares = [share_of_sum(job, part, names) for part in parts]
    total = {name: sum(share[name] for share in shares) / len(examples) for name in shares[0]}
    assert_same(total, nodes_of("t5", model, examples))  # type: ignore[arg-type]
    spread_shares = [spread(model, share, names) for share in shares]
    assert_same(
        {name: sum(share[name] for share in spread_shares) / len(examples) for name in names},  # type: ignore[misc]
        nodes_of("t5", model, examples, compact=False),
    )


def test_the_model_is_left_as_it_was_and_the_wanted_names_do_not_change_the_values() -> None:
    model, examples = make_model("bert", torch.float64), make_examples("bert")
    model.train()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    everything = nodes_of("bert", model, examples, compact=False)
    assert model.training
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    some = [name for name in everything if ".layer.1." in name]
    assert_same(nodes_of("bert", model, examples, compact=False, names=some), {name: everything[name] for name in some})


# --- over the weights ------------------------------------------------------------------------------------------------


def heads(mask: Tensor, width: int) -> Tensor:
    """Each head's value for its `width` features."""
    return torch.tensor([float(mask[feature // width]) for feature in range(len(mask) * width)], dtype=mask.dtype)


def pairs(mask: Tensor, width: int) -> Tensor:
    """As `heads`, for keys that two heads share."""
    return heads((mask[0::2] + mask[1::2]) / 2, width)


def overall(nodes: dict[str, Tensor]) -> Tensor:
    return torch.stack([mask.mean() for mask in nodes.values()]).mean()


_ENCODER, _DECODER = "encoder.block.1.layer", "decoder.block.1.layer"
_LLAMA, _GPT2, _BERT, _DISTIL = (
    "model.layers.1",
    "transformer.h.1",
    "bert.encoder.layer.1",
    "distilbert.transformer.layer.1",
)
# (family, parameter, importance of its rows, columns or all of it, from the masks n)
SPREAD: list[tuple[str, str, Callable[[dict[str, Tensor]], Tensor]]] = [
    ("t5", f"{_ENCODER}.0.SelfAttention.q.weight", lambda n: heads(n[f"{_ENCODER}.0.SelfAttention.o"], 4)[:, None]),
    ("t5", f"{_DECODER}.1.EncDecAttention.k.weight", lambda n: heads(n[f"{_DECODER}.1.EncDecAttention.o"], 4)[:, None]),
    ("t5", f"{_DECODER}.1.EncDecAttention.v.weight", lambda n: n[f"{_DECODER}.1.EncDecAttention.o"].mean()),
    ("t5", f"{_DECODER}.1.EncDecAttention.o.weight", lambda n: n[f"{_DECODER}.1.EncDecAttention.o"].mean()),
    ("t5", f"{_DECODER}.1.layer_norm.weight", lambda n: n[f"{_DECODER}.1.EncDecAttention.o"].mean()),
    ("t5", f"{_DECODER}.2.DenseReluDense.wi.weight", lambda n: n[f"{_DECODER}.2.DenseReluDense.wo"][:, None]),
    ("t5", f"{_ENCODER}.1.DenseReluDense.wo.weight", lambda n: n[f"{_ENCODER}.1.DenseReluDense.wo"].mean()),
    (
        "t5",
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        lambda n: n["decoder.block.0.layer.0.SelfAttention.o"].mean(),
    ),
    ("t5", "shared.weight", overall),
    ("t5", "encoder.final_layer_norm.weight", overall),
    ("t5-v1.1", f"{_ENCODER}.1.DenseReluDense.wi_0.weight", lambda n: n[f"{_ENCODER}.1.DenseReluDense.wo"][:, None]),
    ("mt5", f"{_ENCODER}.1.DenseReluDense.wi_1.weight", lambda n: n[f"{_ENCODER}.1.DenseReluDense.wo"][:, None]),
    ("llama", "lm_head.weight", overall),
    (
        "gpt2",
        f"{_GPT2}.attn.c_attn.weight",
        lambda n: torch.cat([*[heads(n[f"{_GPT2}.attn.c_proj"], 8)] * 2, n[f"{_GPT2}.attn.c_proj"].mean().expand(16)]),
    ),
    (
        "gpt2",
        f"{_GPT2}.attn.c_attn.bias",
        lambda n: torch.cat([*[heads(n[f"{_GPT2}.attn.c_proj"], 8)] * 2, n[f"{_GPT2}.attn.c_proj"].mean().expand(16)]),
    ),
    ("gpt2", f"{_GPT2}.ln_1.bias", lambda n: n[f"{_GPT2}.attn.c_proj"].mean()),
    ("gpt2", f"{_GPT2}.mlp.c_fc.weight", lambda n: n[f"{_GPT2}.mlp.c_proj"][None, :]),
    ("gpt2", f"{_GPT2}.mlp.c_fc.bias", lambda n: n[f"{_GPT2}.mlp.c_proj"]),
    ("gpt2", f"{_GPT2}.mlp.c_proj.weight", lambda n: n[f"{_GPT2}.mlp.c_proj"].mean()),
    ("gpt2", "transformer.wpe.weight", overall),
    ("llama", f"{_LLAMA}.self_attn.q_proj.weight", lambda n: heads(n[f"{_LLAMA}.self_attn.o_proj"], 4)[:, None]),
    ("llama", f"{_LLAMA}.self_attn.k_proj.weight", lambda n: pairs(n[f"{_LLAMA}.self_attn.o_proj"], 4)[:, None]),
    ("llama", f"{_LLAMA}.self_attn.v_proj.weight", lambda n: n[f"{_LLAMA}.self_attn.o_proj"].mean()),
    ("llama", f"{_LLAMA}.input_layernorm.weight", lambda n: n[f"{_LLAMA}.self_attn.o_proj"].mean()),
    ("llama", f"{_LLAMA}.post_attention_layernorm.weight", lambda n: n[f"{_LLAMA}.mlp.down_proj"].mean()),
    ("llama", f"{_LLAMA}.mlp.gate_proj.weight", lambda n: n[f"{_LLAMA}.mlp.down_proj"][:, None]),
    ("llama", f"{_LLAMA}.mlp.up_proj.weight", lambda n: n[f"{_LLAMA}.mlp.down_proj"][:, None]),
    ("llama-tied", "model.embed_tokens.weight", overall),
    ("bert", f"{_BERT}.attention.self.query.weight", lambda n: heads(n[f"{_BERT}.attention.output.dense"], 8)[:, None]),
    ("bert", f"{_BERT}.attention.self.key.bias", lambda n: heads(n[f"{_BERT}.attention.output.dense"], 8)),
    ("bert", f"{_BERT}.attention.self.value.bias", lambda n: n[f"{_BERT}.attention.output.dense"].mean()),
    ("bert", f"{_BERT}.attention.output.LayerNorm.weight", lambda n: n[f"{_BERT}.attention.output.dense"].mean()),
    ("bert", f"{_BERT}.intermediate.dense.weight", lambda n: n[f"{_BERT}.output.dense"][:, None]),
    ("bert", f"{_BERT}.intermediate.dense.bias", lambda n: n[f"{_BERT}.output.dense"]),
    ("bert", f"{_BERT}.output.LayerNorm.bias", lambda n: n[f"{_BERT}.output.dense"].mean()),
    ("bert", "bert.pooler.dense.weight", overall),
    ("bert", "bert.embeddings.word_embeddings.weight", overall),
    ("distilbert", f"{_DISTIL}.attention.k_lin.bias", lambda n: heads(n[f"{_DISTIL}.attention.out_lin"], 8)),
    ("distilbert", f"{_DISTIL}.sa_layer_norm.weight", lambda n: n[f"{_DISTIL}.attention.out_lin"].mean()),
    ("distilbert", f"{_DISTIL}.ffn.lin1.weight", lambda n: n[f"{_DISTIL}.ffn.lin2"][:, None]),
    ("distilbert", f"{_DISTIL}.output_layer_norm.bias", lambda n: n[f"{_DISTIL}.ffn.lin2"].mean()),
]


@pytest.mark.parametrize(("family", "parameter", "rule"), SPREAD, ids=[f"{case[0]} {case[1]}" for case in SPREAD])
def test_a_weight_has_the_importance_of_the_units_that_it_makes_or_the_mean_of_its_part(
    family: str, parameter: str, rule: Callable[[dict[str, Tensor]], Tensor]
) -> None:
    model, examples = make_model(family, torch.float64), make_examples(family)
    nodes = loop_nodes(family, model, examples[:3], draws_of(examples)[:3])
    found = spread(model, nodes, [parameter])[parameter]
    shape = dict(model.named_parameters())[parameter].shape
    assert found.shape == shape
    torch.testing.assert_close(found, rule(nodes).expand(shape))


@pytest.mark.parametrize("family", FAMILIES)
def test_changing_what_belongs_to_a_unit_changes_that_unit_alone(family: str) -> None:
    model, examples = make_model(family, torch.float64), make_examples(family)
    parameters = dict(model.named_parameters())
    found = nodes_of(family, model, examples[:1])
    for gate in list(found)[:2]:  # the attention and the feed-forward part of the first layer, or two attentions
        mask = 4.0 ** torch.arange(1, len(found[gate]) + 1, dtype=torch.float64)
        nodes = {name: mask if name == gate else torch.zeros_like(other) for name, other in found.items()}
        layer = gate[: re.search(r"\.\d+\.", gate).end()]  # type: ignore[union-attr]
        before, seen = inputs_of(gate, model, family, examples[0]), set()
        for name, value in spread(model, nodes, [name for name in parameters if name.startswith(layer)]).items():
            for own in set(value.unique().tolist()) - {0.0, float(mask.mean())}:
                # A sum of powers of 4, or half of one, says whose it is: 4^(u + 1) is bit 2u + 2, its half bit 2u + 1.
                units = {(bit + 1) // 2 - 1 for bit in range(2 * len(mask) + 2) if int(own) >> bit & 1}
                shift = torch.linspace(0.5, 1, value.numel()).view_as(value) * (value == own)
                with torch.no_grad():
                    parameters[name].add_(shift)
                    after = inputs_of(gate, model, family, examples[0])
                    parameters[name].sub_(shift)
                difference = (after - before).abs().flatten(0, -2).amax(0).view(len(mask), -1).amax(1)
                changed = set((difference > 1e-8).nonzero().flatten().tolist())
                assert changed <= units, f"{name}: units {changed} changed, not {units} alone"
                seen |= changed
        assert len(seen) > len(mask) / 2


def inputs_of(gate: str, model: nn.Module, family: str, example: Encoded) -> Tensor:
    """Input of a module when the model answers one input."""
    seen: list[Tensor] = []
    handle = model.get_submodule(gate).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    with torch.no_grad():
        loop_losses(model, FAMILIES[family].kind, example)
    handle.remove()
    return seen[0]


# --- refusals --------------------------------------------------------------------------------------------------------


def _neox(_: int, layers: int) -> Any:
    sizes = {**_SMALL, "num_hidden_layers": layers, "num_attention_heads": 2}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, bos_token_id=0, eos_token_id=0))


def test_layers_without_a_row_are_refused_by_name() -> None:
    model, examples = _neox(0, 2), make_examples("gpt2", inputs=2)
    with pytest.raises(InputError, match=r"its layers are GPTNeoXLayer"):
        nodes_of("gpt2", model, examples)


def test_a_layer_with_a_part_that_is_not_known_is_refused() -> None:
    config = BertConfig(**_SMALL, num_attention_heads=2, num_labels=3, is_decoder=True, add_cross_attention=True)
    with pytest.raises(InputError, match=r"crossattention\S+ belongs to no part"):
        nodes_of("bert", BertForSequenceClassification(config), make_examples("bert", inputs=2))


def test_a_layer_that_runs_twice_is_refused() -> None:
    model = make_model("bert")
    model.bert.encoder.layer[1] = model.bert.encoder.layer[0]
    with pytest.raises(InputError, match="runs more than once"):
        nodes_of("bert", model, make_examples("bert", inputs=2))


def test_unknown_names_and_a_missing_generator_are_refused() -> None:
    model, examples = make_model("bert"), make_examples("bert", inputs=2)
    with pytest.raises(InputError, match="no parameter nothing"):
        nodes_of("bert", model, examples, names=["nothing"])
    with pytest.raises(InputError, match="generator"):
        task_fisher(model, Kind.CLASSIFICATION, examples, pad_id=0, estimator="mask-nodes")


@pytest.mark.slow
def test_an_architecture_without_a_row_is_refused_before_a_study_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "neox", Family(Kind.CAUSAL, _neox, FAMILIES["gpt2"].tokenizer, 0))
    project = make_project(tmp_path / "project", "neox")
    project.write(importance={"samples": 4, "estimator": "mask-nodes"})
    done = project.cli("run", project.file, check=2)
    assert "GPTNeoXLayer" in done.stderr
    assert "mask-nodes" in done.stderr
    assert not (project.folder / "colours.db").exists()
    assert "GPTNeoXLayer" in project.cli("validate", project.file, "--json", check=2).stdout
    project.write(method="averaging", importance={"samples": 4, "estimator": "mask-nodes"})  # needs no importance
    project.cli("run", project.file)


# --- merging and studies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["t5", "bert", "llama"])
def test_fisher_nodes_is_the_mean_of_the_experts_weighed_by_their_masks(
    family: str, project_of: Callable[[str], Project]
) -> None:
    project = project_of(family)
    problem = load_problem(StudySpec.from_yaml(project.file, ["importance.dtype=float32"]))
    resident = problem.resident
    thetas, weights = [], []
    for index, expert in enumerate(problem.experts):
        resident.load_scaled_(index, 1.0)
        resident.use_head_(expert)
        thetas.append({name: p.detach().clone() for name, p in resident.model.named_parameters()})
        seed = int(seeded_generator(0, "sampled", expert).integers(2**62))
        weights.append(
            task_fisher(
                resident.model,
                problem.kinds[expert],
                problem.tasks[expert].fisher,
                pad_id=problem.pad_id,
                estimator="mask-nodes",
                generator=torch.Generator().manual_seed(seed),
            ).values
        )
    merge(problem, {"red": 0.5, "blue": 0.5}, method="fisher-nodes")
    for name, p in resident.model.named_parameters():
        if name in resident.names:
            total = sum(w[name] + 1e-12 for w in weights)
            expected = sum((w[name] + 1e-12) * theta[name] for w, theta in zip(weights, thetas, strict=True)) / total
            torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", "bert"])
def test_df_merge_runs_on_mask_nodes_with_a_cache_that_holds_masks(
    family: str, project_of: Callable[[str], Project]
) -> None:
    project = project_of(family)
    project.write(importance={"samples": 6, "estimator": "mask-nodes"}, cache="all")
    first = project.json("run", project.file, "--trials", 2)
    assert first["trials"]["complete"] == 2
    entries = project.json("cache", "ls", project.file)
    assert len(entries) == 4
    assert {entry["estimator"] for entry in entries} == {"mask-nodes"}
    estimate = project.json("validate", project.file)["estimate"]
    assert estimate["fisher_bytes"] == 2 * {"t5": 3 * 3 + 2 * 24, "bert": 2 * 26}[family]
    assert max(entry["bytes"] for entry in entries) < estimate["changed_parameters"]
    again = project.json("run", project.file, "--trials", 2, "--storage", "sqlite:///again.db")
    assert again["best"] == first["best"]
    assert len(project.json("cache", "ls", project.file)) == 4
    other = project.cli("run", project.file, "--set", "importance.estimator=sampled", check=2).stderr
    assert "importance.estimator" in other


def test_the_fisher_command_writes_every_parameter_and_finds_it_again(project: Project) -> None:
    project.write(method="fisher-nodes")
    out = project.folder / "red.safetensors"
    found = project.json("fisher", project.file, "--expert", "red", "--out", out)
    assert (found["estimator"], found["cached"]) == ("mask-nodes", False)
    values, metadata = load_fisher(out)
    assert {name: tuple(value.shape) for name, value in values.items()} == {
        name: tuple(p.shape) for name, p in make_model("t5", layers=1).named_parameters()
    }
    assert metadata["estimator"] == "mask-nodes"
    assert project.json("fisher", project.file, "--expert", "red", "--out", out, "--force")["cached"]
    again, _ = load_fisher(out)
    assert all(torch.equal(again[name], value) for name, value in values.items())


@pytest.mark.slow
def test_fisher_nodes_is_a_study_whose_estimator_is_its_own(project: Project) -> None:
    project.write(method="fisher-nodes")
    first = project.json("run", project.file)
    assert (first["method"], first["trials"]["complete"]) == ("fisher-nodes", 1)
    assert first["best"]["coefficients"] == {"red": 0.5, "blue": 0.5}
    # The spec's estimator does not matter to this method, so it may change.
    project.write(method="fisher-nodes", importance={"samples": 4, "estimator": "empirical"})
    assert project.json("run", project.file)["best"] == first["best"]
