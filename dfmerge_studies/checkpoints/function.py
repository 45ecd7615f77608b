"""Do a base and an expert compute one function of their weights?  Configurations, buffers, and answers are compared.

Equal shapes do not say it: another `rope_theta`, number of heads or activation makes another model of the same tensors.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import functional_call

from dfmerge_studies.checkpoints.load import quiet_transformers
from dfmerge_studies.checkpoints.probe import PROBE_FAILURES, probe_inputs, probe_logits, relative_error
from dfmerge_studies.checkpoints.reference import Checkpoint
from dfmerge_studies.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# What cannot matter to the answers of given weights; all other fields count.
_NAMES = "architectures auto_map finetuning_task model_type name_or_path tokenizer_class transformers_version"
_LABELS = "id2label label2id num_labels problem_type"  # compared with the data, not with the base
_PRECISION = "dtype torch_dtype"
_OUTPUTS = "output_attentions output_hidden_states output_past output_router_logits return_dict"
_SPEED = "chunk_size_feed_forward gradient_checkpointing pretraining_tp use_cache"
_IGNORED = frozenset(" ".join((_NAMES, _LABELS, _PRECISION, _OUTPUTS, _SPEED)).split())
# What acts in training alone: rates of dropout (but `token_dropout`, a boolean, scales answers), first values, losses.
_TRAINING = re.compile(
    r"dropout|pdrop|layerdrop|_drop_|^init|initializer|init_std|aux_loss|z_loss|jitter|^mask_(time|feature)"
)
# What may matter: whether it does is asked of the model.
_ASKED = re.compile(
    r"(^|_)(bos|cls|eos|eod|mask|pad|sep|unk)_token_id$|^(n_positions|max_position_embeddings|vocab_size)$"
)
_HINT = "Name the base that this expert was fine-tuned from, or the configuration that belongs to its weights"
_SAME = 1e-4  # relative error of outputs of the same weights by the same operations, in any order of sums
# Code beside a model's own that reads its configuration.
_SHARED_CODE = ("modeling_rope_utils", "masking_utils", "modeling_layers")


def check_same_function(base: PreTrainedModel, expert: PreTrainedModel, *, base_file: str, expert_file: str) -> None:
    """Refuse an expert that computes another function of its weights than the base would.

    Args:
        base: the base, on the CPU, in evaluation mode; its head may be replaced by the expert's.
        expert: the expert, likewise, with parameters of the same names and shapes, but for a head.
        base_file: where the base was read from, for the message.
        expert_file: where the expert was read from, for the message.

    Raises:
        InputError: naming the field of the configuration, or the buffer, that differs, with both values and both files.
    """
    asked = check_same_config(base, expert.config, base_file=base_file, expert_file=expert_file)
    _check_buffers(base, expert, base_file, expert_file)
    if not all(bool(parameter.isfinite().all()) for parameter in expert.parameters() if parameter.is_floating_point()):
        return  # such weights equal nothing; where they differ from the base's, they are refused by name
    if _answers_alike(base, expert):
        return
    if not asked:
        raise InputError(
            f"answers otherwise than the base {base_file} does with the same weights",
            where=expert_file,
            hint="The two come with different code; name the base that this expert was fine-tuned from",
        )
    name, ours, theirs = asked[0]
    raise _differs(name, ours, theirs, base_file, expert_file)


def check_same_config(
    base: PreTrainedModel, expert: PreTrainedConfig, *, base_file: str, expert_file: str
) -> list[tuple[str, Any, Any]]:
    """Refuse a configuration under which the base's architecture would compute something else.

    Defaults are filled in on both sides, so that old and new ways to write one thing are equal.

    Args:
        base: the base, whose configuration and code count.
        expert: the configuration of an expert or an adapter.
        base_file: where the base was read from, for the message.
        expert_file: where the expert was read from, for the message.

    Returns:
        Fields that differ and may not matter: name, the expert's value, the base's value.

    Raises:
        InputError: naming the first field that differs and matters.
    """
    declared = {field.name for config in (base.config, expert) for field in fields(config)}
    mine, theirs = dict(_flat(expert.to_dict())), dict(_flat(base.config.to_dict()))
    code: str | None = None
    asked = []
    for name in sorted(mine.keys() | theirs.keys()):
        a, b = mine.get(name), theirs.get(name)
        if a == b or _is_ignored(name, a, b):
            continue
        if name.partition(".")[0] not in declared:
            code = _code_of(base) if code is None else code
            if code and not re.search(rf"\b{re.escape(name.partition('.')[0])}\b", code):
                continue  # a name that no code of this model reads
        if not _ASKED.search(name) or (_is_length(name) and _is_stretched(theirs)):
            raise _differs(name, a, b, base_file, expert_file)
        asked.append((name, a, b))
    return asked


def check_adapter_config(checkpoint: Checkpoint, base: PreTrainedModel, *, base_file: str) -> None:
    """Compare the configuration that an adapter may have beside it with the base's.

    Args:
        checkpoint: the adapter.
        base: the whole model that it sits on.
        base_file: where the base was read from, for the message.

    Raises:
        InputError: naming the field that differs, both values and both files.
    """
    from transformers import AutoConfig

    if checkpoint.read_config().get("model_type") != base.config.model_type:
        return
    with quiet_transformers():
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=checkpoint.trust_remote_code)
    check_same_config(base, config, base_file=base_file, expert_file=str(checkpoint.path))


def _differs(name: str, ours: Any, theirs: Any, base_file: str, expert_file: str) -> InputError:
    return InputError(
        f"{name} is {ours!r:.200}, but {theirs!r:.200} in {base_file}/config.json: the same weights answer otherwise",
        where=f"{expert_file}/config.json",
        hint=_HINT,
    )


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Fields with the names of what they are nested in before theirs."""
    for name, value in config.items():
        if name == "type" and "rope_type" in config:  # its old name
            continue
        if isinstance(value, Mapping) and value and not _is_ignored(name, value, value):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value


def _is_ignored(name: str, a: Any, b: Any) -> bool:
    leaf = str(name).rpartition(".")[2]
    numbers = all(value is None or type(value) in (int, float) for value in (a, b))
    generation = leaf in _generation_fields() and not _ASKED.search(leaf) and leaf != "decoder_start_token_id"
    return leaf in _IGNORED or leaf.startswith("_") or generation or bool(numbers and _TRAINING.search(leaf))


@functools.cache
def _generation_fields() -> frozenset[str]:
    """Settings of generation, which older checkpoints have among the model's; nothing is generated here."""
    from transformers import GenerationConfig

    return frozenset(GenerationConfig().to_dict())  # type: ignore[no-untyped-call]


def _is_length(name: str) -> bool:
    return name.endswith(("positions", "position_embeddings"))


def _is_stretched(config: Mapping[str, Any]) -> bool:
    """Whether rotary positions depend on the longest input that a model is made for."""
    kinds = [value for name, value in config.items() if name.endswith("rope_type")]
    return any(kind not in (None, "default") for kind in kinds)


def _code_of(model: PreTrainedModel) -> str:
    """The source of all modules that a model is made of, empty where it cannot be had."""
    names = {type(module).__module__ for module in model.modules()} | {type(model.config).__module__}
    names |= {f"transformers.{name}" for name in _SHARED_CODE}
    try:
        return "\n".join(
            inspect.getsource(sys.modules[name])
            for name in sorted(names)
            if name in sys.modules and not name.startswith("torch.")
        )
    except (OSError, TypeError):
        return ""


def _check_buffers(base: PreTrainedModel, expert: PreTrainedModel, base_file: str, expert_file: str) -> None:
    ours, theirs = dict(expert.named_buffers()), dict(base.named_buffers())
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs:
            owner, other = (base_file, expert_file) if name in theirs else (expert_file, base_file)
            raise InputError(f"buffer {name} is in {owner} alone, not in {other}", where=expert_file, hint=_HINT)
        a, b = _common_part(ours[name], theirs[name])
        if not torch.equal(a, b):
            raise InputError(
                f"buffer {name} differs from that of the base {base_file}, by up to "
                f"{float((a.double() - b.double()).abs().max()):.3g}; only parameters are merged",
                where=expert_file,
                hint="Use experts that were trained with the base's buffers (running statistics, say) held fixed",
            )


def _common_part(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Tables of positions may be longer in one model."""
    if a.dim() != b.dim():
        return a, b
    part = tuple(slice(min(sizes)) for sizes in zip(a.shape, b.shape, strict=True))
    return a[part], b[part]


@torch.no_grad()
def _answers_alike(base: PreTrainedModel, expert: PreTrainedModel) -> bool:
    """Whether the base with the expert's parameters answers a few tokens as the expert does."""
    theta = {name: parameter.data for name, parameter in expert.named_parameters()}
    probes = probe_inputs(expert, generator=expert.can_generate())
    try:
        live = [probe_logits(expert, probe) for probe in probes]
    except PROBE_FAILURES:  # whoever scores it says why
        return True
    try:
        ours = [functional_call(base, theta, (), probe).logits for probe in probes]
    except PROBE_FAILURES:
        return False
    return all(relative_error(a, b) <= _SAME for a, b in zip(ours, live, strict=True))
