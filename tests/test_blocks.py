"""Importance in blocks: factors against loops over rows and tokens, merges against dense solves, both in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfmerge_studies import StudySpec, load_problem, merge, merge_models
from dfmerge_studies.blocks import Block, merged_step
from dfmerge_studies.errors import InputError
from dfmerge_studies.importance.cache import open_cache
from dfmerge_studies.importance.factors import INPUTS, OUTPUTS, TOKENS, block_names, blocks_of, reached_positions
from dfmerge_studies.importance.task_fisher import task_fisher
from dfmerge_studies.merging import WeightedSum
from dfmerge_studies.methods import METHODS
from dfmerge_studies.objective.merger import Merger
from dfmerge_studies.params import TaskVector
from dfmerge_studies.study.validate import memory_estimate
from dfmerge_studies.tasks.batches import make_rows
from dfmerge_studies.tasks.encoding import Encoded, Kind
from dfmerge_studies.tasks.scoring import continuation_losses, head_outputs, probabilities
from scripts.counting import counting, here, move_
from tests.models import FAMILIES, make_examples, make_model

M, SHAPE = 3, (4, 5)
SIDES: dict[str, Callable[[Tensor, Tensor], Block]] = {
    "both": Block,
    "left": lambda left, right: Block(left, None),
    "right": lambda left, right: Block(None, right),
}


def moments(size: int, generator: torch.Generator, samples: int = 40) -> Tensor:
    drawn = torch.randn(samples, size, generator=generator, dtype=torch.float64)
    return drawn.T @ drawn / samples


def dense(block: Block, shape: tuple[int, int]) -> Tensor:
    """C as a matrix over the row-wise entries of X."""
    left = torch.eye(shape[0], dtype=torch.float64) if block.left is None else block.left
    right = torch.eye(shape[1], dtype=torch.float64) if block.right is None else block.right
    return torch.kron(left, right)


@pytest.fixture(params=SIDES)
def blocks(request: pytest.FixtureRequest) -> list[Block]:
    generator = torch.Generator().manual_seed(4)
    pairs = [(moments(SHAPE[0], generator), moments(SHAPE[1], generator)) for _ in range(M)]
    return [SIDES[request.param](left, right) for left, right in pairs]


def test_a_block_is_a_kronecker_product(blocks: list[Block]):
    matrix = torch.randn(SHAPE, dtype=torch.float64)
    for block in blocks:
        expected = (dense(block, SHAPE) @ matrix.flatten()).reshape(SHAPE)
        torch.testing.assert_close(block(matrix), expected)
        torch.testing.assert_close(block.diagonal(matrix), dense(block, SHAPE).diagonal().reshape(SHAPE))


def test_a_merge_in_blocks_is_the_dense_solve_of_the_equation(blocks: list[Block]):
    generator = torch.Generator().manual_seed(5)
    taus = [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(M)]
    base, lam = torch.randn(SHAPE, generator=generator, dtype=torch.float64), [0.2, 0.9, 0.5]
    total = WeightedSum(["w"], floor=1e-12)
    for index in range(M):
        total.add(TaskVector(f"expert{index}", {"w": taus[index]}), lam[index], {"w": blocks[index]})
    parameter = nn.Parameter(torch.empty(SHAPE, dtype=torch.float64))
    total.write_into_({"w": parameter}, {"w": base})
    matrices = [dense(block, SHAPE) for block in blocks]
    right_hand = sum(M * x * (c @ tau.flatten()) for c, tau, x in zip(matrices, taus, lam, strict=True))
    expected = base + torch.linalg.solve(sum(matrices), right_hand).reshape(SHAPE)
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=1e-5)  # of the residual: 1e-6


def test_experts_that_are_equal_are_merged_into_themselves_whatever_their_blocks(blocks: list[Block]):
    tau = torch.randn(SHAPE, dtype=torch.float64)
    right_hand = torch.stack([block(tau) for block in blocks]).sum(0)  # M * 1/M
    torch.testing.assert_close(merged_step(blocks, right_hand, tau), tau)


@pytest.mark.parametrize("sides", ["both", "right"])
def test_features_that_no_input_reaches_fall_back_to_the_step_under_uniform_importance(sides: str):
    generator = torch.Generator().manual_seed(6)
    taus = [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(2)]
    found = []
    for _ in taus:
        seen = moments(SHAPE[1], generator)
        seen[2] = seen[:, 2] = 0.0
        found.append(SIDES[sides](moments(SHAPE[0], generator), seen))
    start = 0.3 * taus[0] + 0.8 * taus[1]
    step = merged_step(found, 2 * (0.3 * found[0](taus[0]) + 0.8 * found[1](taus[1])), start)
    torch.testing.assert_close(step[:, 2], start[:, 2])
    assert not torch.allclose(step[:, 1], start[:, 1])


def test_fewer_inputs_than_features_still_give_a_step_that_fits():
    generator = torch.Generator().manual_seed(7)
    taus = [torch.randn(30, 40, generator=generator) for _ in range(2)]
    found = [Block(moments(30, generator, 4).float(), moments(40, generator, 5).float()) for _ in taus]
    right_hand = found[0](taus[0]) + found[1](taus[1])
    step = merged_step(found, right_hand, (taus[0] + taus[1]) / 2)
    assert bool(step.isfinite().all())
    assert (found[0](step) + found[1](step) - right_hand).norm() < 1e-3 * right_hand.norm()


def seen_by(model: Any, name: str, run: Callable[[], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What a run gives, and the input and the output of the layer that owns a weight, of one row."""
    seen: list[tuple[Tensor, Tensor]] = []
    module = model.get_submodule(name.rpartition(".")[0])
    handle = module.register_forward_hook(lambda m, args, output: seen.append((args[0], output)))
    result = run()
    handle.remove()
    return result, seen[0][0][0].detach(), seen[0][1]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_factors_of_a_causal_model_are_moments_over_choices_by_their_probability(family: str):
    model, examples = make_model(family, torch.float64), make_examples(family)[:3]
    known = list(block_names(model, [n for n, _ in model.named_parameters()]))
    names = [known[0], known[3]]
    found = task_fisher(model, Kind.CAUSAL, examples, pad_id=0, names=names, blocks="kfac").values
    for name in names:
        inputs, outputs, count = 0.0, 0.0, 0.0
        for example in examples:
            rows = make_rows([example], model.device)
            weights = probabilities(continuation_losses(model, [example], rows, 0).detach()[None])[0]
            for choice, weight in zip(example.choices, weights, strict=True):
                alone = [Encoded(0, example.input_ids, (choice,), 0)]
                one = make_rows(alone, model.device)
                loss, a, output = seen_by(model, name, lambda a=alone, o=one: continuation_losses(model, a, o, 0)[0])
                g = torch.autograd.grad(loss, output)[0][0]
                reached = a[reached_positions(g[None])[0]]  # of a first query, say, only rounding is left
                inputs, count = inputs + weight * reached.T @ reached, count + weight * len(reached)
                outputs = outputs + weight * g.T @ g
        torch.testing.assert_close(found[name + INPUTS] / found[name + TOKENS], inputs / count, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(found[name + OUTPUTS], outputs / len(examples), rtol=1e-5, atol=1e-7)


def test_factors_of_a_classifier_are_moments_over_classes_by_their_probability_and_padding_does_not_count():
    model, examples = make_model("bert", torch.float64), make_examples("bert")[:3]
    names = [n for n in block_names(model, [n for n, _ in model.named_parameters()]) if "layer.0.attention" in n][:2]
    found = task_fisher(model, Kind.CLASSIFICATION, examples, pad_id=0, names=names, blocks="kfac").values
    for name in names:
        inputs, outputs, count = 0.0, 0.0, 0
        for example in examples:
            logits, a, output = seen_by(
                model, name, lambda e=example: head_outputs(model, Kind.CLASSIFICATION, [e], 0)[0]
            )
            for c, p in enumerate(logits.softmax(-1).detach()):
                loss = -logits.log_softmax(-1)[c]
                g = torch.autograd.grad(loss, output, retain_graph=True)[0][0]
                outputs = outputs + p * g.T @ g
            inputs, count = inputs + a.T @ a, count + len(a)
        torch.testing.assert_close(found[name + INPUTS] / found[name + TOKENS], inputs / count, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(found[name + OUTPUTS], outputs / len(examples), rtol=1e-5, atol=1e-7)


def test_the_diagonal_of_other_parameters_is_that_of_df_merge():
    model, examples = make_model("bert"), make_examples("bert")
    names = [n for n, _ in model.named_parameters()]
    found = task_fisher(model, Kind.CLASSIFICATION, examples, pad_id=0, names=names, blocks="kfac").values
    plain = task_fisher(model, Kind.CLASSIFICATION, examples, pad_id=0, names=names).values
    others = set(names) - set(block_names(model, names))
    assert any("LayerNorm" in name for name in others)
    assert any("embeddings" in name for name in others)
    for name in others:
        torch.testing.assert_close(found[name], plain[name])


@pytest.mark.parametrize("family", ["t5", "gpt2", "bert"])
def test_the_trace_of_the_factors_is_of_the_size_of_the_fisher_s(family: str):
    """A row's positions are not independent, and inputs and gradients neither: so it is near, and not the same."""
    model, examples = make_model(family, torch.float64), make_examples(family)
    names = list(block_names(model, [n for n, _ in model.named_parameters()]))
    kind, pad = FAMILIES[family].kind, FAMILIES[family].pad_id
    values = task_fisher(model, kind, examples, pad_id=pad, names=names, blocks="kfac").values
    plain = task_fisher(model, kind, examples, pad_id=pad, names=names).values
    for name, block in blocks_of(model, values, names).items():
        assert isinstance(block, Block)
        assert block.left is not None
        assert block.right is not None
        assert 0.1 < float(block.left.trace() * block.right.trace() / plain[name].sum()) < 30, name


@pytest.mark.parametrize("blocks", ["gram", "kfac"])
@pytest.mark.parametrize("family", ["t5", "gpt2", "bert"])
def test_factors_on_an_accelerator_are_those_on_a_cpu(family: str, blocks: Any):
    model, examples = make_model(family, torch.float64), make_examples(family)
    names = list(block_names(model, [n for n, _ in model.named_parameters()]))
    # Queries and keys of a decoder have no gradient but rounding where a choice has one token.
    rounding = ("SelfAttention.q.weight", "SelfAttention.k.weight")
    names = [n for n in names if not (n.startswith("decoder") and n.endswith(rounding))]
    kind, pad = FAMILIES[family].kind, FAMILIES[family].pad_id
    expected = task_fisher(model, kind, examples, pad_id=pad, names=names, blocks=blocks).values
    with counting():
        move_(model)
        found = here(task_fisher(model, kind, examples, pad_id=pad, names=names, blocks=blocks).values)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_tied_weights_and_embeddings_have_no_block():
    names = [n for n, _ in make_model("llama-tied").named_parameters()]
    assert not any("embed" in name or "norm" in name for name in block_names(make_model("llama-tied"), names))
    assert "lm_head.weight" in block_names(make_model("llama"), ["lm_head.weight"])
    assert set(block_names(make_model("gpt2"), ["transformer.h.0.mlp.c_fc.weight"]).values()) == {True}


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_regmean_is_its_closed_form_for_linear_layers_and_the_mean_for_others(project_of, family: str):
    spec = StudySpec.from_yaml(project_of(family).file)
    problem = load_problem(spec.derive(dtype="float64", parameters={"regmean": {"alpha": 0.7}}))
    merge(problem, method="regmean")
    merged = {n: p.detach().clone() for n, p in problem.resident.model.named_parameters()}
    names = list(problem.resident.base)
    left = block_names(problem.resident.model, names)
    assert len(left) > 3
    grams = [Merger(problem, METHODS["regmean"], None).importance(i, 1.0)[0] for i in range(2)]
    compared = 0
    for name in names:
        thetas = [problem.resident.base[name] + v.deltas.get(name, 0.0) for v in problem.resident.task_vectors]
        if name not in left:
            torch.testing.assert_close(merged[name], sum(thetas) / 2)
            continue
        shrunk = []
        for gram in grams:
            inputs = (gram[name + INPUTS] / gram[name + TOKENS]).double()
            shrunk.append(0.7 * inputs + 0.3 * torch.diag(inputs.diagonal()))
        weights = [theta if left[name] else theta.T for theta in thetas]
        if torch.linalg.cond(sum(shrunk)) > 1e5:
            continue  # inputs of few positions: moments in float32 do not decide all of the solution
        compared += 1
        expected = torch.linalg.solve(sum(shrunk), sum(g @ w for g, w in zip(shrunk, weights, strict=True)))
        torch.testing.assert_close(merged[name], expected if left[name] else expected.T, rtol=1e-3, atol=1e-4)
    assert compared > len(left) // 2


@pytest.mark.slow
def test_a_search_with_kronecker_factors_runs_and_finds_them_in_the_cache_under_their_own_keys(project, tmp_path):
    project.write(method="df-merge-kfac", search={"trials": 3, "startup_trials": 2, "sampler": "gp", "step": 0.5})
    assert project.json("run", "spec.yaml", "--no-test")["trials"]["complete"] == 3
    problem, cache = load_problem(StudySpec.from_yaml(project.file)), open_cache(str(tmp_path / "kept"), tmp_path)
    point = {"red": 0.5, "blue": 1.0}
    first = merge(problem, point, method="df-merge-kfac", cache=cache)
    again = merge(problem, point, method="df-merge-kfac", cache=cache)
    assert (first.computed, again.computed, again.cached) == (2, 0, 2)
    assert first.tasks == again.tasks
    assert merge(problem, point, method="df-merge", cache=cache).computed == 2
    static = merge(problem, {"red": 1.0, "blue": 1.0}, method="identity_kfac-at-expert_per-expert", cache=cache)
    assert static.cached == 1  # blue's
    assert merge(problem, method="regmean", cache=cache).computed == 2


def test_blocks_go_with_transforms_and_with_coefficients_of_layers(project):
    problem = load_problem(StudySpec.from_yaml(project.file))
    point = {"red": 0.5, "blue": 1.0}
    assert merge(problem, point, method="ties_kfac-at-scaled-expert_per-expert").computed == 2
    assert merge(problem, method="identity_gram-at-expert_fisher-trace").computed == 2
    assert merge(problem, point, method="lore_gram-at-expert_per-expert", alpha=0.5).computed == 2


@pytest.mark.parametrize(
    ("importance", "words"),
    [
        ({"estimator": "mask-nodes"}, "has no blocks of mask nodes"),
        ({"normalise": "expert"}, "has no mean or power of a block's entries"),
    ],
)
def test_what_blocks_do_not_have_is_refused_by_name(project, importance: dict[str, str], words: str):
    project.write(method="df-merge-kfac", importance={"samples": 6, **importance})
    assert words in project.cli("run", "spec.yaml", "--no-test", check=2).stderr


def test_models_in_memory_have_no_blocks():
    with pytest.raises(InputError, match="from the tasks of a spec"):
        merge_models(nn.Linear(2, 2), {"a": nn.Linear(2, 2)}, method="regmean")


def test_the_memory_estimate_counts_the_factors_of_all_experts(project):
    spec = StudySpec.from_yaml(project.file)
    usual = memory_estimate(load_problem(spec))
    blocks = memory_estimate(load_problem(spec.derive(method="df-merge-kfac")))
    assert blocks.fisher_bytes > usual.fisher_bytes
    assert blocks.peak_bytes - usual.peak_bytes >= 2 * blocks.fisher_bytes
