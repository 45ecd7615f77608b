"""Norms are known by what they compute, and their Fisher information is that of one row at a time."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from dfmerge_studies.importance.layers import Call, parts
from dfmerge_studies.importance.norms import neutral_weight
from dfmerge_studies.tasks.encoding import Kind
from tests.models import make_examples, make_model
from tests.test_fisher import assert_same, engine, loop_fisher


def of(model: str, name: str) -> Callable[[int], nn.Module]:
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    return lambda size: getattr(module, name)(size)


class Scale(nn.Module):
    """As LayerScale of vision models: no norm at all."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Shifted(Scale):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return (1 + self.weight) * torch.tanh(x) + self.bias


NORMS: dict[str, tuple[Callable[[int], nn.Module], float]] = {
    "t5": (of("t5", "T5LayerNorm"), 1.0),
    "mt5": (of("mt5", "MT5LayerNorm"), 1.0),
    "llama": (of("llama", "LlamaRMSNorm"), 1.0),
    "mistral": (of("mistral", "MistralRMSNorm"), 1.0),
    "qwen2": (of("qwen2", "Qwen2RMSNorm"), 1.0),
    "qwen3": (of("qwen3", "Qwen3RMSNorm"), 1.0),
    "phi3": (of("phi3", "Phi3RMSNorm"), 1.0),
    "olmo2": (of("olmo2", "Olmo2RMSNorm"), 1.0),
    "gemma": (of("gemma", "GemmaRMSNorm"), 0.0),
    "gemma2": (of("gemma2", "Gemma2RMSNorm"), 0.0),
    "gemma3": (of("gemma3", "Gemma3RMSNorm"), 0.0),
    "a scale": (Scale, 1.0),
    "a scale of its own with a shift": (Shifted, 0.0),
}


class Mean(Scale):
    """Uses all of its weight everywhere."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.mean() + self.weight


class Squared(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.square()


class AcrossRows(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x - x.mean(0, keepdim=True))


class Gated(Scale):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return self.weight * (x if gate is None else x * gate)


class ChannelsFirst(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[:, None] if x.dim() == 4 else x * self.weight


class Buffered(Scale):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.register_buffer("mean", torch.zeros(size))


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_is_known_by_what_it_computes(name: str) -> None:
    make, weight = NORMS[name]
    for dims in (2, 3, 4):
        assert neutral_weight(make(6), dims) == weight


@pytest.mark.parametrize("kind", [Mean, Squared, AcrossRows, Gated, Buffered, nn.Tanh, nn.PReLU])
def test_what_is_not_scaled_entry_by_entry_is_not_taken_for_a_norm(kind: type[nn.Module]) -> None:
    module = kind() if kind in (nn.Tanh, nn.PReLU) else kind(6)
    assert neutral_weight(module, 3) is None


def test_a_module_that_scales_another_dimension_of_a_larger_input_is_known_only_where_it_scales_the_last() -> None:
    module = ChannelsFirst(6)
    assert (neutral_weight(module, 3), neutral_weight(module, 4)) == (1.0, None)


def test_a_class_or_an_instance_whose_forward_was_replaced_is_tried_anew() -> None:
    module = Scale(6)
    module.forward = lambda x: x  # type: ignore[method-assign]  # as hooks that move weights between devices do
    assert neutral_weight(module, 3) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [(), (5,), (5, 2)], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_the_gradients_of_each_row_are_those_of_one_row_at_a_time(
    name: str, tokens: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    module = NORMS[name][0](6).to(dtype)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape))
    x, g = torch.randn(4, *tokens, 6, dtype=dtype), torch.randn(4, *tokens, 6, dtype=dtype)
    wanted = {name: f"odd.{name}" for name, _ in module.named_parameters()}
    call = Call(module, "odd", wanted, 4, (x,), {}, arrived={0: g})
    assert call.formula is not None
    found = parts(call, torch.arange(3), torch.tensor([0, 2, 3]))
    for name, path in wanted.items():
        for row, place in enumerate((0, 2, 3)):
            own = {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters()}
            functional_call(module, own, (x[place : place + 1],)).backward(g[place : place + 1])
            expected = own[name].grad.to(found[path].gradients.dtype)
            # In float64 models norms compute in float32, Gemma's gradients too; bfloat16 rounds after each token.
            close = {torch.float64: 1e-6, torch.float32: 2e-6, torch.bfloat16: 0.05}[dtype]
            torch.testing.assert_close(found[path].gradients[row], expected, rtol=close, atol=close)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_no_norm_of_a_real_model_is_run_again_row_by_row(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("run again")

    monkeypatch.setattr("dfmerge_studies.importance.layers._run_again", refuse)
    model = make_model(family).double()
    kind = {"t5": Kind.TEXT_TO_TEXT, "llama": Kind.CAUSAL}[family]
    examples = make_examples(family)
    assert_same(engine(family, model, examples).values, loop_fisher(model, kind, examples))
