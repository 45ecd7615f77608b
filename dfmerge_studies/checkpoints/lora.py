"""Plain LoRA adapters as the factors that they are, read off beside the one base: no copy of it, no dense matrix kept.

peft puts an adapter on a shell: a copy of the base's modules around the base's own tensors.  What an adapter brings
whole (biases, `modules_to_save`) has tensors of its own there, so the base stays what it was.  Every other adapter is
folded into a model of its own (`adapters`, `folding`).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import functional_call

from dfmerge_studies.checkpoints.adapters import adapter_classes, attached
from dfmerge_studies.checkpoints.digest import Contents
from dfmerge_studies.checkpoints.factored import Factored, Factors
from dfmerge_studies.checkpoints.folding import check_same_answers, tied_names
from dfmerge_studies.checkpoints.function import check_adapter_config
from dfmerge_studies.checkpoints.in_place import put_head_on_
from dfmerge_studies.checkpoints.load import Loaded, ModelClass, loading, quiet_transformers
from dfmerge_studies.checkpoints.probe import probe_inputs, probe_logits
from dfmerge_studies.checkpoints.reference import ADAPTER_PREFIX, Checkpoint
from dfmerge_studies.checkpoints.weights import read_weights
from dfmerge_studies.params import check_finite, float_parameters

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

_ADAPTER = "default"
# Settings that say where factors sit and how large they are; one of any other setting makes more than factors of them.
_WHERE = (
    "target_modules exclude_modules layers_to_transform layers_pattern modules_to_save fan_in_fan_out megatron_core"
)
_SIZES = "r rank_pattern lora_alpha alpha_pattern use_rslora lora_dropout bias init_lora_weights"
_ABOUT = "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode"
_FREE = frozenset(" ".join((_WHERE, _SIZES, _ABOUT)).split())


@dataclass(frozen=True)
class Kept:
    """What an adapter makes of the base.

    Attributes:
        deltas: tau, on the CPU, of the parameters that it changes.
        head: its head's parameters; empty for models without heads.
    """

    deltas: Factored
    head: dict[str, Tensor]


def keep_factors(
    checkpoint: Checkpoint,
    config: PeftConfig,
    base: Checkpoint,
    loaded: Loaded,
    own: Collection[str],
    model_class: ModelClass,
    *,
    contents: Contents,
) -> Kept | None:
    """The factors of a plain LoRA adapter.

    Args:
        checkpoint: the directory of the adapter.
        config: its settings.
        base: the whole model that it sits on.
        loaded: the base in memory, on the CPU; left as it is found.
        own: the base's parameters that are no encoder's but a task's.
        model_class: the auto class that reads the base.
        contents: what files held when they were read before; is told what they hold now.

    Returns:
        None where it is more than factors beside the base: it has to be folded into a copy.

    Raises:
        InputError: the adapter does not fit the base, or its factors do not answer as it does live.
        RunError: a file changed while it was being read, or between two reads.
    """
    model = loaded.model
    if not _is_plain(config):
        return None
    brought = read_weights(checkpoint, contents, dtype=torch.float16)  # each in the type that it is stored in
    brought = {
        name.removeprefix(ADAPTER_PREFIX).replace(".base_layer.", "."): tensor for name, tensor in brought.items()
    }
    parameters = dict(model.named_parameters())
    resized = {n: t for n, t in brought.items() if n in parameters and t.shape != parameters[n].shape}
    if not _same_rows(checkpoint, model, resized, own, model_class):
        return None
    if model_class.has_head and loaded.missing - brought.keys():
        return None  # folding finds out whether answers depend on what neither file has
    check_adapter_config(checkpoint, model, base_file=str(base.path))
    biases = {name for name in parameters if name.endswith("bias")} if config.bias != "none" else set()  # type: ignore[attr-defined]
    shell = _shell(model, biases | brought.keys())
    put_head_on_(shell, {name: torch.zeros(tensor.shape, dtype=model.dtype) for name, tensor in resized.items()})
    with torch.random.fork_rng(devices=[]):  # peft draws factors before it reads them
        wrapped, _ = attached(shell, checkpoint, copy.deepcopy(config), base, contents)
    return _read_off(wrapped, model, brought, frozenset(own), model_class, where=str(checkpoint.path))


def _is_plain(config: PeftConfig) -> bool:
    from peft import LoraConfig

    if type(config) is not LoraConfig or config.init_lora_weights not in (True, False, "gaussian"):
        return False
    usual = LoraConfig()
    pairs = [(getattr(config, f.name), getattr(usual, f.name)) for f in fields(usual) if f.name not in _FREE]
    return all(a == b or not (a or b) for a, b in pairs)


def _same_rows(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    resized: Mapping[str, Tensor],
    own: Collection[str],
    model_class: ModelClass,
) -> bool:
    """Whether what an adapter brings in another size is a whole head of its classes, if anything."""
    if not model_class.has_head:
        return not resized
    classes = len(adapter_classes(checkpoint))
    rows: set[int | None] = {tensor.shape[0] for tensor in resized.values()} or {model.config.num_labels}
    return resized.keys() <= set(own) and rows == {classes}


def _shell(model: PreTrainedModel, apart: Collection[str]) -> PreTrainedModel:
    """A model's modules anew around its tensors, but for some parameters, which are copied."""
    tensors = [parameter for name, parameter in model.named_parameters() if name not in apart]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*tensors, *model.buffers())})


def _read_off(
    wrapped: Any,
    model: PreTrainedModel,
    stored: Mapping[str, Tensor],
    own: frozenset[str],
    model_class: ModelClass,
    *,
    where: str,
) -> Kept | None:
    """What a live adapter adds to the base, compared with it on a few tokens."""
    wrapped.eval()
    base, live, factors = float_parameters(model), _parameters(wrapped), _factors(wrapped, stored)
    if factors is None or live.keys() != base.keys() or not factors.keys() <= base.keys():
        return None
    # peft saves embeddings whole beside their factors.
    whole = {name for name in base if live[name] is not base[name] and not torch.equal(live[name], base[name])}
    names = [name for name in base if name in factors or name in whole]
    if any(name in names for each in tied_names(model) for name in each):
        return None  # folding finds out whether all uses of it change alike
    theta = {name: live[name].detach() for name in names}
    for name, pair in factors.items():
        theta[name] = (theta[name] + pair.dense()).to(theta[name].dtype)
    for name, tensor in theta.items():
        check_finite(tensor, name, where=where)
    _check_answers(wrapped, model, theta, generator=model_class is ModelClass.SEQ2SEQ, where=where)
    deltas: dict[str, Factors | Tensor] = {}
    for name in names:
        if name in own or (name not in whole and factors[name].is_zero):
            continue
        start = base[name].detach()
        deltas[name] = theta[name].to(start.dtype) - start if name in whole else factors[name]
    head = {name: theta.get(name, base[name].detach()).clone() for name in base if name in own}
    return Kept(Factored(deltas), head)


def _parameters(wrapped: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters under an adapter's factors, by the names that they have in the base."""
    found = {}
    for name, parameter in float_parameters(wrapped.get_base_model()).items():
        if ".lora_" not in name and ".original_module." not in name:
            found[name.replace(".base_layer.", ".").replace(f".modules_to_save.{_ADAPTER}.", ".")] = parameter
    return found


def _factors(wrapped: Any, stored: Mapping[str, Tensor]) -> dict[str, Factors] | None:
    """Factors by the name of the parameter that they change, in the type that they are stored in; None for odd ones."""
    from peft.tuners.lora.layer import Embedding, Linear, LoraLayer

    def kept(tensor: Any, name: str) -> Tensor:
        own = stored.get(name)
        found: Tensor = tensor.detach()
        return found if own is None or not own.is_floating_point() else found.to(own.dtype)

    everything = {}
    for path, layer in wrapped.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if type(layer) not in (Linear, Embedding) or layer.lora_variant or any(layer.lora_bias.values()):
            return None
        if isinstance(layer, Linear):
            sides, leaf = (layer.lora_B[_ADAPTER].weight, layer.lora_A[_ADAPTER].weight), "lora_{}.weight"
            transposed = bool(layer.fan_in_fan_out)
        else:
            sides, leaf = (layer.lora_embedding_B[_ADAPTER], layer.lora_embedding_A[_ADAPTER]), "lora_embedding_{}"
            transposed = True
        left, right = (kept(t, f"{path}.{leaf.format(side)}") for t, side in zip(sides, "BA", strict=True))
        everything[f"{path}.weight"] = Factors(left, right, float(layer.scaling[_ADAPTER]), transposed)
    return everything


@torch.no_grad()
def _check_answers(
    wrapped: Any, model: PreTrainedModel, theta: Mapping[str, Tensor], *, generator: bool, where: str
) -> None:
    """Refuse factors under which the base answers otherwise than the live adapter does."""
    what, hint = "the adapter fails on a few tokens", "Name the base that the adapter was trained on"
    with loading(where, what, hint), quiet_transformers():
        probes = probe_inputs(model, generator=generator)
        live = [probe_logits(wrapped, probe) for probe in probes]
        ours = [functional_call(model, dict(theta), (), probe).logits for probe in probes]
    for one, other in zip(live, ours, strict=True):
        check_same_answers(one, other, model.dtype, where)
