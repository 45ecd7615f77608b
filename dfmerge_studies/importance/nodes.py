"""Fisher information of mask nodes, and how it is spread over the weights that the masks gate.

    m        mask of a sublayer, all ones: (units,)
    units    heads of an attention, intermediate neurons of a feed-forward part
    a        input of the sublayer's last projection: (rows, T, units * width), width features per unit
    g        gradient of a row's loss with respect to a, same shape
    r        a row: one (input, choice) pair, as in `fisher`

A mask multiplies the units' outputs before the projection that mixes them, so that for every row

    dl/dm[u] = sum over positions t and features j of unit u of  a[t, u, j] g[t, u, j]
    F[u]     = 1/N  sum over rows of (dl/dm[u])^2,    one row per input: a choice drawn from p(.|x), as in `sampled`

and no mask has to be put into the model.  Weights take their importance from the masks of their sublayer: the rows that
make queries and keys of a head, or a neuron, have the unit's own, the rest of the sublayer the mean of its units, and
what belongs to no layer the mean of the sublayers' means (Thennal D K et al. 2024, arXiv 2403.09891).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from dfmerge_studies.errors import InputError
from dfmerge_studies.importance.capture import Capture, check_names
from dfmerge_studies.params import at_least_float32, stacked


@dataclass(frozen=True, slots=True)
class Sublayer:
    """How the sublayers of a class of layers are built; all paths start at the layer.

    Attributes:
        scope: modules that belong to the sublayer, norms included.
        gate: the last projection, whose input the mask multiplies.
        rows: projections whose output features belong to units; those that are not there are left out.
        heads: attribute that holds the number of heads; None for a feed-forward part, where every feature is a unit.
        fused: thirds of the output features of `rows` are query, key and value.
    """

    scope: tuple[str, ...]
    gate: str
    rows: tuple[str, ...]
    heads: str | None = None
    fused: bool = False


_BERT = (
    Sublayer(
        ("attention",),
        "attention.output.dense",
        ("attention.self.query", "attention.self.key"),
        "attention.self.num_attention_heads",
    ),
    Sublayer(("intermediate", "output"), "output.dense", ("intermediate.dense",)),
)
_DISTILBERT = (
    Sublayer(
        ("attention", "sa_layer_norm"),
        "attention.out_lin",
        ("attention.q_lin", "attention.k_lin"),
        "attention.n_heads",
    ),
    Sublayer(("ffn", "output_layer_norm"), "ffn.lin2", ("ffn.lin1",)),
)
_GPT2 = (
    Sublayer(("attn", "ln_1"), "attn.c_proj", ("attn.c_attn",), "attn.num_heads", fused=True),
    Sublayer(("mlp", "ln_2"), "mlp.c_proj", ("mlp.c_fc",)),
)
_LLAMA = (
    Sublayer(
        ("self_attn", "input_layernorm"),
        "self_attn.o_proj",
        ("self_attn.q_proj", "self_attn.k_proj"),
        "self_attn.config.num_attention_heads",
    ),
    Sublayer(("mlp", "post_attention_layernorm"), "mlp.down_proj", ("mlp.gate_proj", "mlp.up_proj")),
)


def _t5_attention(scope: str, name: str) -> Sublayer:
    path = f"{scope}.{name}"
    return Sublayer((scope,), f"{path}.o", (f"{path}.q", f"{path}.k"), f"{path}.n_heads")


def _t5_feed(scope: str) -> Sublayer:
    path = f"{scope}.DenseReluDense"
    return Sublayer((scope,), f"{path}.wo", (f"{path}.wi", f"{path}.wi_0", f"{path}.wi_1"))


# A layer of the encoder has two parts and one of the decoder three, the feed-forward part last in both.
_T5 = (
    _t5_attention("layer.0", "SelfAttention"),
    _t5_attention("layer.1", "EncDecAttention"),
    _t5_feed("layer.1"),
    _t5_feed("layer.2"),
)

# Layers by module file and class of transformers; parts whose gate a layer does not have are left out.
LAYERS: Mapping[str, tuple[Sublayer, ...]] = {
    "modeling_bert.BertLayer": _BERT,
    "modeling_roberta.RobertaLayer": _BERT,
    "modeling_xlm_roberta.XLMRobertaLayer": _BERT,
    "modeling_electra.ElectraLayer": _BERT,
    "modeling_distilbert.TransformerBlock": _DISTILBERT,
    "modeling_t5.T5Block": _T5,
    "modeling_mt5.MT5Block": _T5,
    "modeling_gpt2.GPT2Block": _GPT2,
    "modeling_llama.LlamaDecoderLayer": _LLAMA,
    "modeling_mistral.MistralDecoderLayer": _LLAMA,
    "modeling_qwen2.Qwen2DecoderLayer": _LLAMA,
    "modeling_qwen3.Qwen3DecoderLayer": _LLAMA,
}


@dataclass(frozen=True, slots=True)
class Mask:
    """The mask of one attention or feed-forward part of a loaded model.

    Attributes:
        layer: path of its layer in the model.
        part: how it is built.
        gate: path of its last projection in the model, the name of its mask.
        units: length of the mask.
        width: features per unit.
    """

    layer: str
    part: Sublayer
    gate: str
    units: int
    width: int


def masks_of(model: nn.Module) -> list[Mask]:
    """The masks of a model, in its order.

    Raises:
        InputError: the model has layers of a class without a row in `LAYERS`, or built otherwise than its row says.
    """
    found: list[Mask] = []
    known: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(layer) for layer in known):
            continue
        if (parts := LAYERS.get(_class_of(module))) is not None:
            known.append(f"{path}.")
            found += _layer(path, module, parts)
        elif isinstance(module, nn.ModuleList):
            for child in module:
                if _class_of(child) not in LAYERS:
                    raise _refusal(model, f"its layers are {type(child).__name__}", path)
    if not found:
        raise _refusal(model, "no layers were found in it", type(model).__name__)
    return found


def _layer(path: str, layer: nn.Module, parts: Sequence[Sublayer]) -> list[Mask]:
    """The parts of one layer; each of its parameters must belong to one of them."""
    modules = dict(layer.named_modules())
    found = []
    for part in (part for part in parts if part.gate in modules):
        features = _features(modules[part.gate])[0]
        units = features if part.heads is None else int(attrgetter(part.heads)(layer))
        outputs = [_features(modules[row])[1] // (3 if part.fused else 1) for row in part.rows if row in modules]
        width = features // units
        # Fewer keys than heads are shared by groups of heads of equal size.
        if width * units != features or not outputs or any(n % width or units % (n // width) for n in outputs):
            raise _refusal(layer, f"{part.gate} has {features} inputs for {units} units of {outputs} features", path)
        found.append(Mask(path, part, f"{path}.{part.gate}", units, width))
    scopes = tuple(f"{scope}." for mask in found for scope in mask.part.scope)
    for name, _ in layer.named_parameters():
        if not name.startswith(scopes):
            raise _refusal(layer, f"{name} belongs to no part of it that is known", path)
    return found


def _class_of(module: nn.Module) -> str:
    """File and class of a module, such as `modeling_bert.BertLayer`."""
    return f"{type(module).__module__.rpartition('.')[2]}.{type(module).__name__}"


def _features(module: nn.Module) -> tuple[int, int]:
    """Input and output features of a dense layer."""
    weight: Any = module.weight
    rows, columns = weight.shape
    return (rows, columns) if _transposed(module) else (columns, rows)


def _transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"  # GPT-2's dense layer, whose weight is (in, out)


def _refusal(module: nn.Module, why: str, where: str) -> InputError:
    names = sorted({name.rpartition(".")[2] for name in LAYERS})
    return InputError(
        f"the mask nodes of {type(module).__name__} are not known: {why}",
        where=f"module {where}",
        hint=f"Use the estimator exact or sampled; mask-nodes knows the layers {', '.join(names)}",
    )


# --- Fisher of the masks ---------------------------------------------------------------------------------------------


class NodeCapture(Capture):
    """Sum of squared per-row gradients of a model's masks; the same stages and passes as for parameters.

    Args:
        model: the model.
        names: names of the parameters that the masks are wanted for; only checked, since all masks count for the means.

    Raises:
        InputError: a name that the model does not have, or layers that are not known.
    """

    def __init__(self, model: nn.Module, names: Collection[str]) -> None:
        check_names(model, names)
        super().__init__(model, ())
        self._masks = masks_of(model)
        self._modules = dict(model.named_modules())
        self._watch = False  # for parameters that are used outside their modules
        for mask in self._masks:
            weight = next(self._modules[mask.gate].parameters())
            self.sums[mask.gate] = torch.zeros(mask.units, dtype=at_least_float32(weight), device=weight.device)

    @contextmanager
    def attached(self) -> Iterator[Capture]:
        """Hooks on, weights without gradients, evaluation mode; afterwards all as before, also after an error."""
        with super().attached():
            handles = [
                self._modules[mask.gate].register_forward_pre_hook(partial(self._gate, mask)) for mask in self._masks
            ]
            try:
                yield self
            finally:
                for handle in handles:
                    handle.remove()

    def _gate(self, mask: Mask, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        stage = self._stage
        if stage is None:
            return None
        a: Tensor = args[0]
        if a.dim() < 3 or a.shape[0] != stage.batch or a.shape[-1] != mask.units * mask.width:
            why = f"an input of shape {tuple(a.shape)} has not one row per input and choice"
            raise _refusal(module, why, mask.gate)
        stage.uses[mask.gate] += 1
        if stage.uses[mask.gate] + self._uses[mask.gate] > 1:
            raise _refusal(module, "it runs more than once for a row", mask.gate)
        if a.requires_grad:
            a = a.view_as(a)  # the gradient through this use alone
        else:
            a = a.detach().requires_grad_()
            stage.roots.append(a)
        a.register_hook(partial(self._gate_arrived, mask, a.detach(), a._version))  # type: ignore[no-untyped-call]  # torch's own
        return (a, *args[1:])

    def _gate_arrived(self, mask: Mask, a: Tensor, version: int, g: Tensor) -> None:
        current = self._pass
        if current is None:
            return
        if a._version != version:
            raise _refusal(self._modules[mask.gate], "the model overwrites its input in place", mask.gate)
        if current.live is not None:
            live = current.live.to(g.device)
            a, g = a.index_select(0, live), g.index_select(0, live)
        total = self.sums[mask.gate]
        shares = a.to(total.dtype) * g.to(total.dtype)
        gradients = shares.reshape(len(g), -1, mask.units, mask.width).sum((1, 3))
        total.add_(gradients.square_().sum(0))


# --- over the weights ------------------------------------------------------------------------------------------------


def spread(model: nn.Module, nodes: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Importance of parameters from the Fisher information of the masks.

    Args:
        model: the model that the masks are of.
        nodes: F of the masks, (units,), by name of the mask; linear, so sums give sums.
        names: parameters wanted.

    Returns:
        {parameter: tensor of its shape}, in the precision of `nodes`; views that repeat values, not to be written.
    """
    parameters = dict(model.named_parameters())
    found = masks_of(model)
    means = [nodes[mask.gate].mean() for mask in found]
    per_layer: dict[str, list[tuple[Mask, Tensor]]] = {}
    for mask, mean in zip(found, means, strict=True):
        per_layer.setdefault(mask.layer, []).append((mask, mean))
    values: dict[str, Tensor] = {}
    for layer, own in per_layer.items():
        for name, _ in model.get_submodule(layer).named_parameters():
            mask, mean = next(entry for entry in own if name.startswith(tuple(f"{s}." for s in entry[0].part.scope)))
            values[f"{layer}.{name}"] = mean
            owner, _, kind = name.rpartition(".")
            if owner in mask.part.rows:
                module = model.get_submodule(f"{layer}.{owner}")
                line = _per_feature(mask, nodes[mask.gate], _features(module)[1])
                values[f"{layer}.{name}"] = line[:, None] if kind == "weight" and not _transposed(module) else line
    elsewhere = stacked(means).mean()
    found_at = {name: values.get(name, elsewhere.to(parameters[name].device)) for name in names}
    return {name: value.expand(parameters[name].shape) for name, value in found_at.items()}


def _per_feature(mask: Mask, nodes: Tensor, features: int) -> Tensor:
    """(features,) importance of every output feature of a projection that makes units.

    Keys that several heads share get the mean of these heads.
    """
    if mask.part.fused:
        third = features // 3
        heads = _per_feature_of(mask, nodes, third)
        return torch.cat([heads, heads, nodes.mean().expand(third)])
    return _per_feature_of(mask, nodes, features)


def _per_feature_of(mask: Mask, nodes: Tensor, features: int) -> Tensor:
    makes = features // mask.width
    return nodes.view(makes, -1).mean(1).repeat_interleave(mask.width)
