"""The one model that stays in memory: every scaled expert and every merge is written into its parameters in place.

heads[t]    parameters of task t's own head, never merged                          {name: tensor}
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dfmerge_studies.checkpoints.adapters import load_adapter, other_base
from dfmerge_studies.checkpoints.digest import Contents, json_digest
from dfmerge_studies.checkpoints.function import check_same_function
from dfmerge_studies.checkpoints.in_place import InPlace
from dfmerge_studies.checkpoints.load import (
    Loaded,
    ModelClass,
    has_tokenizer,
    load_model,
    load_tokenizer,
)
from dfmerge_studies.checkpoints.reference import Checkpoint
from dfmerge_studies.checkpoints.token_rows import Union, fit_
from dfmerge_studies.checkpoints.vocabulary import reads_alike
from dfmerge_studies.errors import InputError
from dfmerge_studies.params import TaskVector, align, changed_names, check_finite, float_parameters, task_vector

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Resident(InPlace):
    """The same for models that were loaded from files, with a tokenizer and per-task heads.

    Attributes:
        model: from transformers.
        tokenizer: the base's tokenizer, or the union's.
        heads: per task, its head's parameters; empty for models without heads.
        base_digest: identity of the base's files as they were read.
        expert_digests: the same of the experts, by name.
        other_tokenizers: of experts whose tokenizer differs from the base's in what some text may show, by name.
        union: the vocabulary of all, None where it is the base's.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    heads: Mapping[str, Mapping[str, Tensor]]
    base_digest: str
    expert_digests: Mapping[str, str]
    other_tokenizers: Mapping[str, PreTrainedTokenizerBase]
    union: Union | None = None

    def use_head_(self, task: str) -> None:
        """Put the head of one task on the model; nothing happens for models without heads."""
        put_head_on_(self.model, self.heads.get(task, {}))


def put_head_on_(model: nn.Module, head: Mapping[str, Tensor]) -> None:
    """Replace the parameters of a model's head, which may change its number of classes."""
    for name, tensor in head.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
        if isinstance(module, nn.Linear) and leaf == "weight":
            module.out_features, module.in_features = tensor.shape


def head_names(model: PreTrainedModel, missing: frozenset[str]) -> frozenset[str]:
    """Parameters that belong to a task and not to the shared encoder.

    Args:
        model: a classifier as transformers loaded it from the base.
        missing: parameters that the base's files did not hold (a pooler that pretraining had no use for, say).
    """
    prefix = f"{model.base_model_prefix}."
    return frozenset(n for n in float_parameters(model) if not n.startswith(prefix)) | missing


def head_classes(head: Mapping[str, Tensor]) -> int:
    """Number of classes of a classification head: the rows of its last weight.

    Args:
        head: its parameters by name.
    """
    return [tensor.shape[0] for name, tensor in head.items() if name.endswith("weight")][-1]


def load_resident(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    task_of: Mapping[str, str | None],
    model_class: ModelClass,
    *,
    guards: Sequence[str] = (),
    unite: bool = False,
    dtype: torch.dtype,
    device: torch.device,
    loading: Callable[[str], None] = lambda name: None,
) -> Resident:
    """Load a base and its experts, refuse what does not fit, and keep one model and the task vectors.

    Args:
        base: the model that all experts were fine-tuned from.
        experts: expert name to checkpoint; full models or adapters.
        task_of: expert name to the task whose head it brings (where models have heads).
        model_class: how to read them.
        guards: tasks that the base's own head answers, where it has one.
        unite: whether experts' added tokens are appended to the base's.
        dtype: of parameters and task vectors.
        device: where they go.
        loading: told the name of each model before it is read.

    Raises:
        InputError: naming the tensor, both shapes and both files, or the token, that does not fit.
        RunError: a file changed while the models were loaded.
    """
    contents = Contents()
    loaded = load_model(base, model_class, dtype=dtype, headless=True, contents=contents)
    model, tokenizer = loaded.model, load_tokenizer(base)
    others = _tokenizers(base, experts, tokenizer, contents)
    union = Union.of(tokenizer, others) if unite else None
    if union is not None:
        union.grow_(model)
    classifier = model_class.has_head
    own = head_names(loaded.model, loaded.missing) if classifier else loaded.missing  # the latter of no use to anything
    theta_pre = {n: p.detach() for n, p in float_parameters(model).items() if n not in own}
    for name, tensor in theta_pre.items():
        check_finite(tensor, name, where=str(base.path))
    vectors: list[TaskVector] = []
    heads: dict[str, dict[str, Tensor]] = {}
    if classifier and not own & loaded.missing:
        whole = {name: p.detach().clone().to(device) for name, p in float_parameters(model).items() if name in own}
        heads = {guard: dict(whole) for guard in guards}
    for expert, checkpoint in experts.items():
        loading(expert)
        found = _load_expert(checkpoint, base, model_class, dtype, loaded.unexpected, contents)
        if union is None:
            fit_(found.model, model, tokenizer, where=str(checkpoint.path))
        else:
            union.take_(expert, found.model, model, where=str(checkpoint.path))
        theta = {name: parameter.detach() for name, parameter in float_parameters(found.model).items()}
        head = {name: theta.pop(name) for name in list(theta) if name in own}
        theta.update({name: theta_pre[name] for name in found.missing & theta_pre.keys()})  # of no use to anything
        align(theta_pre, theta, base_file=str(base.path), expert_file=str(checkpoint.path))
        if not checkpoint.is_adapter:
            check_same_function(model, found.model, base_file=str(base.path), expert_file=str(checkpoint.path))
        vectors.append(task_vector(expert, theta_pre, theta))
        task = task_of[expert]
        if classifier and head and task is not None:
            heads.setdefault(task, {name: tensor.to(device) for name, tensor in head.items()})
    if union is not None:
        union.fill_(model)
    names = changed_names(vectors, theta_pre)
    kept = {name: theta_pre[name].clone().to(device) for name in names}
    model.to(device)  # type: ignore[arg-type]  # transformers wraps Module.to
    model.requires_grad_(False)
    vectors = [TaskVector(v.expert, {n: d.to(device) for n, d in v.deltas.items()}) for v in vectors]
    digests = {name: contents.digest(checkpoint) for name, checkpoint in experts.items()}
    return Resident(
        model=model,
        base=kept,
        task_vectors=vectors,
        names=names,
        tokenizer=tokenizer,
        heads=heads,
        base_digest=contents.digest(base) if union is None else _united(contents.digest(base), digests, union),
        expert_digests=digests,
        other_tokenizers=others,
        union=union,
    )


def _tokenizers(
    base: Checkpoint, experts: Mapping[str, Checkpoint], tokenizer: PreTrainedTokenizerBase, contents: Contents
) -> dict[str, PreTrainedTokenizerBase]:
    """Those of experts that may read some text otherwise than the base's.

    Raises:
        InputError: one plainly does, or is of another architecture.
    """
    for checkpoint in experts.values():
        if not checkpoint.is_adapter:
            _check_architecture(checkpoint, base)
        contents.open(checkpoint)
    found = {name: load_tokenizer(checkpoint) for name, checkpoint in experts.items() if has_tokenizer(checkpoint)}
    return {
        name: own
        for name, own in found.items()
        if not reads_alike(tokenizer, own, base_file=str(base.path), expert_file=str(experts[name].path))
    }


def _united(base: str, experts: Mapping[str, str], union: Union) -> str:
    """Identity of a base whose tables have rows of experts' tokens."""
    return json_digest([base, dict(experts), union.identity()])


def _load_expert(
    checkpoint: Checkpoint,
    base: Checkpoint,
    model_class: ModelClass,
    dtype: torch.dtype,
    tolerated: frozenset[str],
    contents: Contents,
) -> Loaded:
    """An expert as a whole model; tensors without a place in the model are refused unless the base has them too."""
    if checkpoint.is_adapter:
        if note := other_base(checkpoint, base):
            logger.warning("%s: %s", checkpoint.path, note)
        model = load_adapter(checkpoint, base, model_class, dtype=dtype, contents=contents)
        loaded = Loaded(model, frozenset(), frozenset())
    else:
        loaded = load_model(checkpoint, model_class, dtype=dtype, contents=contents)
        if odd := loaded.unexpected - tolerated:
            raise InputError(
                f"tensor {min(odd)} has no place in this architecture and does not exist in the base {base.path}",
                where=str(checkpoint.path),
                hint="It would be lost in a merge: fold it into the weights, or name another expert",
            )
    return loaded


def _check_architecture(checkpoint: Checkpoint, base: Checkpoint) -> None:
    ours, theirs = checkpoint.read_config().get("model_type"), base.read_config().get("model_type")
    if ours != theirs:
        raise InputError(
            f"a model of type {ours!r}, but the base {base.path} is {theirs!r}",
            where=str(checkpoint.path / "config.json"),
            hint="Only experts fine-tuned from the base can be merged into it",
        )
