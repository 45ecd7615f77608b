"""The one model that stays in memory: every scaled expert and every merge is written into its parameters in place.

heads[t]    parameters of task t's own head, never merged                          {name: tensor}
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dfmerge_studies.checkpoints.adapters import load_adapter, other_base, read_config
from dfmerge_studies.checkpoints.digest import Contents, json_digest
from dfmerge_studies.checkpoints.function import check_same_function
from dfmerge_studies.checkpoints.in_place import InPlace, put_head_on_
from dfmerge_studies.checkpoints.load import (
    Loaded,
    ModelClass,
    has_tokenizer,
    load_model,
    load_tokenizer,
)
from dfmerge_studies.checkpoints.lora import keep_factors
from dfmerge_studies.checkpoints.reference import Checkpoint
from dfmerge_studies.checkpoints.spread import Place, spread_
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

    def spread_(self, places: Mapping[str, Place]) -> None:
        """Spread the model over several devices, and put heads where the model has its own.

        Args:
            places: as for `spread.spread_`.
        """
        spread_(self.model, places)
        self.heads = {
            task: {name: tensor.to(self.place_of(name)) for name, tensor in head.items()}
            for task, head in self.heads.items()
        }


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
    stay: bool = False,
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
        stay: whether base values and task vectors stay on the host until `keep_on_` says where they are kept.
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
    ours = _Base(base, loaded, tokenizer, model_class, dtype, own, theta_pre, union)
    for expert, checkpoint in experts.items():
        loading(expert)
        vector, head = ours.expert(expert, checkpoint, contents)
        vectors.append(vector)
        task = task_of[expert]
        if classifier and head and task is not None:
            heads.setdefault(task, {name: tensor.to(device) for name, tensor in head.items()})
    if union is not None:
        union.fill_(model)
    names = changed_names(vectors, theta_pre)
    kept = {name: theta_pre[name].clone() for name in names}
    model.to(device)  # type: ignore[arg-type]  # transformers wraps Module.to
    model.requires_grad_(False)
    digests = {name: contents.digest(checkpoint) for name, checkpoint in experts.items()}
    resident = Resident(
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
    if not stay:
        resident.keep_on_(host=False)
    return resident


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


@dataclass(frozen=True)
class _Base:
    """What an expert is compared with while it is loaded, all of it on the CPU."""

    checkpoint: Checkpoint
    loaded: Loaded
    tokenizer: PreTrainedTokenizerBase
    model_class: ModelClass
    dtype: torch.dtype
    own: frozenset[str]
    theta_pre: Mapping[str, Tensor]
    union: Union | None

    def expert(self, name: str, checkpoint: Checkpoint, contents: Contents) -> tuple[TaskVector, dict[str, Tensor]]:
        """An expert's task vector, and its head's parameters."""
        if not checkpoint.is_adapter:
            return self._compared(name, checkpoint, self._whole(checkpoint, contents))
        if note := other_base(checkpoint, self.checkpoint):
            logger.warning("%s: %s", checkpoint.path, note)
        config = read_config(checkpoint, self.model_class, contents)
        if self.union is None:
            kept = keep_factors(
                checkpoint, config, self.checkpoint, self.loaded, self.own, self.model_class, contents=contents
            )
            if kept is not None:
                return TaskVector(name, kept.deltas), kept.head
        model = load_adapter(
            checkpoint, self.checkpoint, self.model_class, dtype=self.dtype, config=config, contents=contents
        )
        return self._compared(name, checkpoint, Loaded(model, frozenset(), frozenset()))

    def _whole(self, checkpoint: Checkpoint, contents: Contents) -> Loaded:
        """A whole model; tensors without a place in the model are refused unless the base has them too."""
        loaded = load_model(checkpoint, self.model_class, dtype=self.dtype, contents=contents)
        if odd := loaded.unexpected - self.loaded.unexpected:
            raise InputError(
                f"tensor {min(odd)} has no place in this architecture and does not exist in the base "
                f"{self.checkpoint.path}",
                where=str(checkpoint.path),
                hint="It would be lost in a merge: fold it into the weights, or name another expert",
            )
        return loaded

    def _compared(self, name: str, checkpoint: Checkpoint, found: Loaded) -> tuple[TaskVector, dict[str, Tensor]]:
        """What differs between the base and an expert that is a model of its own."""
        model, where, base_file = self.loaded.model, str(checkpoint.path), str(self.checkpoint.path)
        if self.union is None:
            fit_(found.model, model, self.tokenizer, where=where)
        else:
            self.union.take_(name, found.model, model, where=where)
        theta = {name: parameter.detach() for name, parameter in float_parameters(found.model).items()}
        head = {name: theta.pop(name) for name in list(theta) if name in self.own}
        theta.update({name: self.theta_pre[name] for name in found.missing & self.theta_pre.keys()})  # of no use
        align(self.theta_pre, theta, base_file=base_file, expert_file=where)
        if not checkpoint.is_adapter:
            check_same_function(model, found.model, base_file=base_file, expert_file=where)
        return task_vector(name, self.theta_pre, theta), head


def _check_architecture(checkpoint: Checkpoint, base: Checkpoint) -> None:
    ours, theirs = checkpoint.read_config().get("model_type"), base.read_config().get("model_type")
    if ours != theirs:
        raise InputError(
            f"a model of type {ours!r}, but the base {base.path} is {theirs!r}",
            where=str(checkpoint.path / "config.json"),
            hint="Only experts fine-tuned from the base can be merged into it",
        )
