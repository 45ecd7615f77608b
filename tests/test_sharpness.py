"""scripts/sharpness.py: sharpness-aware steps against plain loops on tiny models, and through finetune's command."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call
from transformers import AutoModel, AutoModelForSequenceClassification

from dfmerge_studies.errors import InputError
from dfmerge_studies.importance.task_fisher import task_fisher
from dfmerge_studies.tasks.encoding import Encoded
from scripts import finetune
from scripts.sharpness import Perturbation, Sharpness, check_processes
from scripts.trainee import Trainee
from tests.models import FAMILIES, make_examples, make_model
from tests.project import Project, load_parameters
from tests.test_finetune import train, trainable

SAM: dict[str, Any] = {"kind": "sam", "rho": 0.5}
FSAM: dict[str, Any] = {"kind": "fsam", "rho": 0.5, "keep_ratio": 0.2, "mask_every": 2, "mask_rows": 3}


@pytest.fixture
def own_accelerate() -> Iterator[None]:
    """Accelerate keeps the first precision of a process; here it may be another, as in a process of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def trainee_of(family: str, dtype: torch.dtype = torch.float64) -> tuple[Trainee, list[tuple[str, Encoded]]]:
    """A tiny model without dropout in training, and rows of one task."""
    spec = FAMILIES[family]
    trainee = Trainee(make_model(family, dtype).eval(), spec.kind, spec.pad_id, {})
    return trainee, [("red", row) for row in make_examples(family)]


def mean_loss(trainee: Trainee, rows: list[tuple[str, Encoded]], weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean loss of rows at any weights."""
    return functional_call(trainee, weights, ({"red": [row for _, row in rows]},))


def gradients(
    trainee: Trainee, rows: list[tuple[str, Encoded]], weights: dict[str, torch.Tensor]
) -> list[torch.Tensor]:
    """Gradient of the mean loss at any weights, 0 where the loss does not depend on one."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in weights.items()}
    found = torch.autograd.grad(mean_loss(trainee, rows, leaves), list(leaves.values()), allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves.values(), strict=True)]


@pytest.mark.parametrize("family", ["t5", "bert", "gpt2"])
@pytest.mark.parametrize("settings", [SAM, FSAM], ids=["sam", "fsam"])
def test_a_step_has_the_gradient_at_the_worst_weights_nearby_and_leaves_the_weights(
    family: str, settings: dict[str, Any]
) -> None:
    trainee, rows = trainee_of(family)
    weights = {name: p.detach().clone() for name, p in trainee.named_parameters()}
    g = gradients(trainee, rows, weights)
    masks = [torch.ones_like(each) for each in g]
    if settings is FSAM:
        squares = [
            sum(s) for s in zip(*([x**2 for x in gradients(trainee, [r], weights)] for r in rows[:3]), strict=True)
        ]
        everything = torch.cat([each.flatten() for each in squares]).sort(descending=True).values
        masks = [(each >= everything[int(0.2 * len(everything)) - 1]).double() for each in squares]
    length = torch.cat([each.flatten() for each in g]).norm()
    moved = {n: w + 0.5 * m * x / length for (n, w), m, x in zip(weights.items(), masks, g, strict=True)}
    expected = gradients(trainee, rows, moved)

    def gradient() -> float:
        loss = trainee({"red": [row for _, row in rows]})
        loss.backward()
        return float(loss.detach())

    loss = Sharpness(trainee, Accelerator(cpu=True), settings).gradient_(1, rows, gradient)
    assert loss == pytest.approx(float(mean_loss(trainee, rows, weights)), rel=1e-12)
    for (name, p), value in zip(trainee.named_parameters(), expected, strict=True):
        found = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-12, msg=name)
        assert torch.equal(p, weights[name])
    apart = max(float((a - b).abs().max()) for a, b in zip(expected, g, strict=True))
    assert apart > 1e-4  # the radius is large enough to tell the two gradients apart


@pytest.mark.parametrize("family", ["t5", "distilbert"])
def test_the_mask_is_where_the_packages_empirical_fisher_is_largest(family: str) -> None:
    trainee, rows = trainee_of(family, torch.float32)
    sharpness = Sharpness(trainee, Accelerator(cpu=True), FSAM)
    fishers = sharpness.fishers(rows)
    three, names = [row for _, row in rows[:3]], [name for name, _ in trainee.model.named_parameters()]
    expected = task_fisher(trainee.model, trainee.kind, three, pad_id=trainee.pad_id, estimator="empirical").values
    for name, found in zip(names, fishers, strict=True):
        torch.testing.assert_close(found / 3, expected[name], rtol=1e-3, atol=1e-8)
    sharpness.perturbation.choose_(fishers)
    assert sharpness.perturbation.masks is not None
    inside = torch.cat([f[m] for f, m in zip(fishers, sharpness.perturbation.masks, strict=True)])
    outside = torch.cat([f[~m] for f, m in zip(fishers, sharpness.perturbation.masks, strict=True)])
    assert len(inside) == int(0.2 * (len(inside) + len(outside)))
    assert inside.min() >= outside.max()


def test_a_mask_lasts_for_as_many_steps_as_asked() -> None:
    trainee, rows = trainee_of("bert")
    sharpness = Sharpness(trainee, Accelerator(cpu=True), FSAM)
    seen = []
    for step in (1, 2, 3):
        sharpness.gradient_(step, rows[step - 1 :], lambda: 0.0)
        seen.append(sharpness.perturbation.masks)
    assert seen[0] is seen[1] is not seen[2]


def test_weights_come_back_to_the_bit_also_after_an_error() -> None:
    values = [torch.tensor([1.0, -0.0, 1e-30]), torch.tensor([3.0]), torch.tensor([5.0])]
    weights = [nn.Parameter(value.clone()) for value in values]
    weights[0].grad, weights[2].grad = torch.tensor([1e4, 1.0, 0.3]), torch.zeros(1)  # the second had none this step
    perturbation = Perturbation(weights, rho=7.0)
    with perturbation.applied() as moved:
        assert moved
        assert not torch.equal(weights[0], values[0])
        assert torch.equal(weights[1], values[1])
    with pytest.raises(KeyboardInterrupt), perturbation.applied():
        raise KeyboardInterrupt
    for weight, value in zip(weights, values, strict=True):
        assert torch.equal(weight.view(torch.int32), value.view(torch.int32))  # the sign of zero too


@pytest.mark.parametrize("gradient", [0.0, float("inf"), float("nan")])
def test_a_gradient_without_direction_moves_nothing_and_is_left_to_the_optimizer(gradient: float) -> None:
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.tensor([gradient, 0.0, 0.0])
    with Perturbation([weight], rho=0.1).applied() as moved:
        assert not moved
        assert torch.equal(weight, torch.ones(3))
    assert weight.grad is not None


def test_frozen_weights_are_neither_moved_nor_counted() -> None:
    trainee, rows = trainee_of("bert")
    frozen = next(iter(trainee.parameters())).requires_grad_(False)
    sharpness = Sharpness(trainee, Accelerator(cpu=True), {**FSAM, "keep_ratio": 0.5})
    assert all(weight is not frozen for weight in sharpness.perturbation.weights)
    assert len(sharpness.fishers(rows)) == len(list(trainee.parameters())) - 1


def parameters_after(project: Project, out: str, *more: str) -> dict[str, torch.Tensor]:
    """Three steps of a classifier with dropout through the command; all trained weights."""
    train(project, "--task", "red", "--steps", "3", "--micro-batch", "5", *more, out=out)
    return load_parameters(project.folder / out, AutoModelForSequenceClassification)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_radius_of_zero_is_plain_training_and_a_mask_of_everything_is_sam_to_the_bit(tmp_path: Path) -> None:
    project = trainable(tmp_path, "bert")
    plain = parameters_after(project, "plain")
    still = parameters_after(project, "still", "--sharpness-aware", "sam", "--rho", "0")
    sam = parameters_after(project, "sam", "--sharpness-aware", "sam", "--rho", "1")
    whole = parameters_after(project, "whole", "--sharpness-aware", "fsam", "--rho", "1", "--keep-ratio", "1")
    fsam = parameters_after(project, "fsam", "--sharpness-aware", "fsam", "--rho", "1", "--mask-every", "2")
    assert same(plain, still)
    assert same(sam, whole)
    assert not same(plain, sam)
    assert not same(sam, fsam)


@pytest.mark.usefixtures("own_accelerate")
def test_a_multi_task_model_in_mixed_precision_learns_and_its_settings_are_recorded(tmp_path: Path) -> None:
    project = trainable(tmp_path, "bert")
    words = ("--sharpness-aware", "fsam", "--keep-ratio", "0.3", "--precision", "bf16")
    record = train(project, "--multi-task", "--steps", "40", *words, out="both")
    assert record["validation_loss"] < (math.log(3) + math.log(2)) / 2  # that of guesses among the tasks' classes
    expected = {"kind": "fsam", "rho": 0.05, "keep_ratio": 0.3, "mask_every": 100, "mask_rows": 32}
    assert json.loads((tmp_path / "both" / "training.json").read_text())["settings"]["sharpness_aware"] == expected
    assert all(torch.isfinite(value).all() for value in load_parameters(tmp_path / "both", AutoModel).values())


def test_of_a_lora_expert_the_factors_alone_are_perturbed(tmp_path: Path) -> None:
    project = trainable(tmp_path, "llama")
    lora = ("--task", "red", "--steps", "2", "--lora", "2", "--lora-targets", "q_proj")
    train(project, *lora, out="plain")
    train(project, *lora, "--sharpness-aware", "fsam", "--rho", "1", out="fsam")
    plain, fsam = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "fsam"))
    assert plain.keys() == fsam.keys()
    assert not same(plain, fsam)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--rho", "0.1"), "--rho belongs to --sharpness-aware sam or fsam"),
        (("--sharpness-aware", "sam", "--keep-ratio", "0.5"), "--keep-ratio belongs to --sharpness-aware fsam"),
        (("--sharpness-aware", "sam", "--rho", "-1"), "--rho must be a number from 0 on"),
        (("--sharpness-aware", "sam", "--rho", "nan"), "--rho must be a number from 0 on"),
        (("--sharpness-aware", "fsam", "--keep-ratio", "0"), "--keep-ratio must be above 0"),
        (("--sharpness-aware", "fsam", "--mask-every", "0"), "--mask-every must be at least 1"),
        (("--sharpness-aware", "asam"), "invalid choice: 'asam'"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    words: tuple[str, ...], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        finetune.read_arguments(["spec.yaml", "--task", "red", "--out", "new", *words])
    assert stop.value.code == 2
    assert part in capsys.readouterr().err


@pytest.mark.parametrize("how", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_processes_that_share_the_weights_out_are_refused(how: DistributedType) -> None:
    with pytest.raises(InputError, match=how.value):
        check_processes(SimpleNamespace(distributed_type=how))
    check_processes(Accelerator(cpu=True))
