"""The public Fisher function: any model under a loss of one's own, against a loop over single rows in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from dfmerge_studies import InputError, RunError, diagonal_fisher
from dfmerge_studies.importance.task_fisher import task_fisher
from tests.models import FAMILIES, make_examples, make_model

TOLERANCE = 1e-6  # relative L2; T5's and Llama's norms and rotations round to float32 even in a float64 model

Batch = dict[str, Tensor]
Forward = Callable[[Any, Any], Tensor]


def loop(model: nn.Module, forward: Forward, batch: Batch, weights: Tensor | None = None) -> dict[str, Tensor]:
    """The definition: one row at a time, one loss at a time, plain autograd; weights (R,) or (R, C)."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    mass = 0.0
    for r in range(len(next(iter(batch.values())))):
        losses = forward(model, {key: value[r : r + 1] for key, value in batch.items()})[0].reshape(-1)
        for c, loss in enumerate(losses):
            weight = 1.0 if weights is None else float(weights.reshape(len(weights), -1)[r, c])
            found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
            for name, gradient in zip(parameters, found, strict=True):
                total[name] += 0 if gradient is None else weight * gradient**2
            mass += weight
    return {name: value / mass for name, value in total.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value.max() < 1e-20:  # biases of keys: attention does not depend on them
            assert found[name].max() < 1e-20
            continue
        error = (found[name] - value).norm() / value.norm()
        assert error < tolerance, f"{name}: relative error {error:.1e}"


def cut(batch: Batch, *sizes: int) -> list[Batch]:
    """Rows in batches of the given sizes."""
    parts = {key: value.split(list(sizes)) for key, value in batch.items()}
    return [{key: value[k] for key, value in parts.items()} for k in range(len(sizes))]


def tokens(rows: int = 5, length: int = 9) -> Batch:
    """Padded texts of different lengths, and how many tokens each has."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([length - r % 4 for r in range(rows)])
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"ids": torch.randint(5, 150, (rows, length), generator=generator) * mask, "mask": mask}


def next_token(model: Any, batch: Batch) -> Tensor:
    """A language model's summed loss on a whole text."""
    logits = model(input_ids=batch["ids"], attention_mask=batch["mask"], use_cache=False).logits
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), batch["ids"][:, 1:], reduction="none")
    return (losses * batch["mask"][:, 1:]).sum(1)


def preference(model: Any, batch: Batch) -> Tensor:
    """A loss of two passes through the model: the first text should be likelier than the same text turned round."""
    turned = {"ids": batch["ids"].flip(1) * batch["mask"], "mask": batch["mask"]}
    return F.softplus(next_token(model, batch) - next_token(model, turned))


def translation(model: Any, batch: Batch) -> Tensor:
    """A text-to-text model's mean loss on a target, with label smoothing."""
    labels = batch["ids"][:, :4].contiguous()
    logits = model(input_ids=batch["ids"], attention_mask=batch["mask"], labels=labels).logits
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", label_smoothing=0.1).mean(1)


def all_classes(model: Any, batch: Batch) -> Tensor:
    return -model(input_ids=batch["ids"], attention_mask=batch["mask"]).logits.log_softmax(-1)


def confidence(model: Any, batch: Batch) -> Tensor:
    """No likelihood at all: the squared margin of a classifier's first two classes."""
    logits = model(input_ids=batch["ids"], attention_mask=batch["mask"]).logits
    return (logits[:, 0] - logits[:, 1]).square()


@pytest.mark.parametrize("sizes", [(5,), (2, 3)], ids=["one-batch", "two-batches"])
@pytest.mark.parametrize(
    ("family", "forward"),
    [
        ("gpt2", next_token),
        ("llama", preference),
        ("t5", translation),
        ("bert", confidence),
        ("distilbert", confidence),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_transformers_under_losses_of_one_s_own_have_the_fisher_of_the_loop(
    family: str, forward: Forward, sizes: tuple[int, ...]
) -> None:
    model, batch = make_model(family, torch.float64), tokens()
    model.requires_grad_(True)
    found = diagonal_fisher(model, forward, cut(batch, *sizes))
    assert all(value.dtype == torch.float64 for value in found.values())
    assert_same(found, loop(model, forward, batch))


def test_weights_are_a_function_of_losses_and_batch_or_a_number_per_loss() -> None:
    model, batch = make_model("gpt2", torch.float64), tokens()
    model.requires_grad_(True)
    given = torch.tensor([0.5, 0.0, 2.0, 1.0, 3.0], dtype=torch.float64)
    expected = loop(model, next_token, batch, given)
    batch = {**batch, "weight": given}
    assert_same(diagonal_fisher(model, next_token, cut(batch, 2, 3), given), expected)
    assert_same(diagonal_fisher(model, next_token, cut(batch, 2, 3), given.tolist()), expected)
    by_batch = diagonal_fisher(model, next_token, cut(batch, 1, 4), lambda losses, rows: rows["weight"])
    assert_same(by_batch, expected)
    by_loss = diagonal_fisher(model, next_token, cut(batch, 1, 4), lambda losses, rows: losses.square())
    squares = torch.stack([next_token(model, row)[0].detach() ** 2 for row in cut(batch, 1, 1, 1, 1, 1)])
    assert_same(by_loss, loop(model, next_token, batch, squares))


def test_losses_of_all_classes_weighed_by_their_probability_are_the_exact_fisher_of_the_spec_s_tasks() -> None:
    model, examples = make_model("bert", torch.float64), make_examples("bert")
    model.requires_grad_(True)
    texts = [
        {"ids": torch.tensor([e.input_ids]), "mask": torch.ones(1, len(e.input_ids), dtype=torch.long)}
        for e in examples
        if e.token_type_ids is None
    ]
    plain = [example for example in examples if example.token_type_ids is None]
    assert len(plain) > 2
    found = diagonal_fisher(model, all_classes, texts, lambda losses, _: (-losses).exp())
    assert_same(found, task_fisher(model, FAMILIES["bert"].kind, plain, pad_id=0).values)
    batch = tokens()
    p = (-all_classes(model, batch)).exp().detach()
    joint = diagonal_fisher(model, all_classes, [batch], lambda losses, _: (-losses).exp())
    assert_same(joint, loop(model, all_classes, batch, p))


class Pixels(nn.Module):
    """A convolution, which has no formula, a norm over channels, and a dense layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.norm = nn.GroupNorm(1, 3)
        self.drop = nn.Dropout(0.5)
        self.mix = nn.Linear(3, 3)
        self.out = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        channels = self.norm(torch.tanh(self.conv(x))).mean((2, 3))
        return self.out(self.drop(self.mix(torch.tanh(self.mix(channels)))))[:, 0]


def regression(model: Any, batch: Batch) -> Tensor:
    return F.huber_loss(model(batch["x"]), batch["y"], reduction="none")


@pytest.fixture
def pixels() -> Iterator[tuple[Pixels, Batch]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield Pixels().double().eval(), {"x": torch.randn(6, 1, 5, 5).double(), "y": torch.randn(6).double()}


def test_a_model_that_is_no_transformer_is_left_in_training_mode_and_has_the_fisher_without_dropout(
    pixels: tuple[Pixels, Batch],
) -> None:
    model, batch = pixels
    expected = loop(model, regression, batch)
    model.train()
    assert_same(diagonal_fisher(model, regression, cut(batch, 4, 2)), expected)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_data_loader_gives_the_inputs_and_a_known_number_of_rows_saves_a_pass(pixels: tuple[Pixels, Batch]) -> None:
    model, batch = pixels
    calls = []

    def counted(model: Any, pair: list[Tensor]) -> Tensor:
        calls.append(len(pair[0]))
        return regression(model, {"x": pair[0], "y": pair[1]})

    loader = DataLoader(TensorDataset(batch["x"], batch["y"]), batch_size=4)
    expected = loop(model, regression, batch)
    assert_same(diagonal_fisher(model, counted, loader, rows=lambda pair: len(pair[0])), expected)
    assert calls == [4, 2]
    assert_same(diagonal_fisher(model, counted, loader), expected)
    assert calls == [4, 2, 4, 4, 2, 2]


def test_parameters_that_are_frozen_or_not_named_are_left_out(pixels: tuple[Pixels, Batch]) -> None:
    model, batch = pixels
    everything = diagonal_fisher(model, regression, [batch])
    model.conv.requires_grad_(False)
    assert set(diagonal_fisher(model, regression, [batch])) == {n for n in everything if not n.startswith("conv")}
    assert_same(
        diagonal_fisher(model, regression, [batch], names=["conv.weight"]), {"conv.weight": everything["conv.weight"]}
    )
    model.requires_grad_(False)
    with pytest.raises(InputError, match="no parameter of the model requires a gradient"):
        diagonal_fisher(model, regression, [batch])


def _without_gradient(model: Any, batch: Batch) -> Tensor:
    with torch.no_grad():
        return regression(model, batch)


@pytest.mark.parametrize(
    ("forward", "weights", "message"),
    [
        (lambda model, batch: regression(model, batch).mean(), None, r"shape \(\), not one loss per row"),
        (lambda model, batch: regression(model, batch).tolist(), None, "list, not one loss per row"),
        (_without_gradient, None, "carry no gradient"),
        (lambda model, batch: regression(model, batch).repeat(2), None, "not one row per input"),
        (regression, [1.0] * 5, r"weights of shape \(1,\) for losses of shape \(2,\)"),
        (regression, [1.0] * 7, "7 weights for 6 losses"),
        (regression, lambda losses, batch: -losses, "negative"),
        (regression, lambda losses, batch: losses.sum(), r"weights of shape \(\)"),
        (regression, lambda losses, batch: 0 * losses, "weights are 0"),
    ],
)
def test_what_cannot_be_a_loss_or_a_weight_of_rows_is_refused(
    pixels: tuple[Pixels, Batch], forward: Forward, weights: Any, message: str
) -> None:
    model, batch = pixels
    with pytest.raises(InputError, match=message):
        diagonal_fisher(model, forward, cut(batch, 4, 2), weights)


def test_no_inputs_and_losses_that_overflow_are_errors(pixels: tuple[Pixels, Batch]) -> None:
    model, batch = pixels
    used_up = iter([batch])
    list(used_up)
    for nothing in ([], used_up):
        with pytest.raises(InputError, match="there are no rows"):
            diagonal_fisher(model, regression, nothing)
    with pytest.raises(RunError, match="row 2 of a batch"):
        diagonal_fisher(model, regression, [{**batch, "y": batch["y"].index_fill(0, torch.tensor([2]), torch.nan)}])
