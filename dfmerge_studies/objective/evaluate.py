"""Score any model directory on the tasks of a spec."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dfmerge_studies.checkpoints.adapters import load_adapter, other_base
from dfmerge_studies.checkpoints.digest import Contents
from dfmerge_studies.checkpoints.in_place import put_head_on_
from dfmerge_studies.checkpoints.load import has_tokenizer, load_model, load_tokenizer
from dfmerge_studies.checkpoints.missing import check_answers
from dfmerge_studies.checkpoints.reference import Checkpoint, resolve
from dfmerge_studies.checkpoints.resident import head_names
from dfmerge_studies.checkpoints.spread import place_of
from dfmerge_studies.checkpoints.weights import read_tensors
from dfmerge_studies.checkpoints.write import HEADS, read_classes
from dfmerge_studies.errors import InputError
from dfmerge_studies.objective.classes import Classes, classes_of_heads, head_owner, named_classes
from dfmerge_studies.objective.computing import computing
from dfmerge_studies.objective.inputs import check_labels, encode_split, padding_id
from dfmerge_studies.objective.loading import choose_device, find_checkpoints
from dfmerge_studies.objective.problem import Checkpoints
from dfmerge_studies.objective.spreading import place_model_
from dfmerge_studies.objective.used_rows import scored_examples
from dfmerge_studies.params import float_parameters
from dfmerge_studies.progress import Progress, counted, silent
from dfmerge_studies.ranks import SOLO, Ranks
from dfmerge_studies.spec import StudySpec
from dfmerge_studies.tasks.answers import given_answers, judged, taken_answers, wanted_answers
from dfmerge_studies.tasks.data import reordered
from dfmerge_studies.tasks.evaluate import TOKEN_BUDGET
from dfmerge_studies.tasks.labels import class_order
from dfmerge_studies.tasks.metrics import TaskScore
from dfmerge_studies.tasks.settings import HeadTask
from dfmerge_studies.tasks.splits import Split

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class _Evaluate:
    """`evaluate_model` on the other ranks."""

    spec: StudySpec
    reference: str
    split: Split
    tasks: Collection[str] | None

    def __call__(self, memory: dict[str, Any]) -> None:
        evaluate_model(self.spec, self.reference, self.split, tasks=self.tasks, ranks=memory["ranks"])


def evaluate_model(
    spec: StudySpec,
    reference: str,
    split: Split,
    *,
    tasks: Collection[str] | None = None,
    progress: Progress = silent,
    ranks: Ranks = SOLO,
    contents: Contents | None = None,
) -> dict[str, TaskScore]:
    """Scores of a model on every task of a spec.

    A classifier's heads come from the model's own `heads` folder, otherwise from the spec's experts.

    Args:
        spec: tasks, device, dtype.
        reference: directory (relative to the working directory), Hub id, or adapter on the spec's base.
        split: of the tasks' data.
        tasks: those to score; all by default.
        progress: told how far it is.
        ranks: processes that share the inputs.
        contents: what the model's files held when their digest was taken.

    Returns:
        By task.

    Raises:
        InputError: the model cannot be loaded or does not fit the tasks.
        RunError: its files do not hold what `contents` says.
    """
    return ranks.everywhere(
        _Evaluate(spec, reference, split, tasks),
        lambda: _evaluate(spec, reference, split, tasks, progress, ranks, contents or Contents()),
    )


def base_on_guards(
    spec: StudySpec, split: Split, *, progress: Progress = silent, ranks: Ranks = SOLO
) -> dict[str, TaskScore]:
    """What the base scores on the guards of a spec, which other models are compared with; nothing where there are none.

    Args:
        spec: the settings.
        split: of the tasks' data.
        progress: told how far it is.
        ranks: processes that share the inputs.
    """
    guards = [task for task in spec.tasks_on(split) if spec.tasks[task].guard]
    if not guards:
        return {}
    base = str(find_checkpoints(spec).base.path)
    return evaluate_model(spec, base, split, tasks=guards, progress=progress, ranks=ranks)


def _evaluate(
    spec: StudySpec,
    reference: str,
    split: Split,
    wanted: Collection[str] | None,
    progress: Progress,
    ranks: Ranks,
    contents: Contents,
) -> dict[str, TaskScore]:
    found = find_checkpoints(spec)
    checkpoint = resolve(reference, root=Path.cwd(), where="--model", trust_remote_code=spec.trust_remote_code)
    dtype, device = getattr(torch, spec.dtype), choose_device(spec, ranks)
    progress("loading", 0, 1)
    if checkpoint.is_adapter:
        if note := other_base(checkpoint, found.base):
            logger.warning("%s: %s", checkpoint.path, note)
        model = load_adapter(checkpoint, found.base, found.model_class, dtype=dtype, contents=contents)
        missing = frozenset[str]()
    else:
        loaded = load_model(checkpoint, found.model_class, dtype=dtype, headless=True, contents=contents)
        model, missing = loaded.model, loaded.missing
    own = not checkpoint.is_adapter or (spec.tokenizer == "union" and has_tokenizer(checkpoint))
    tokenizer = load_tokenizer(checkpoint if own else found.base)
    heads = _heads(spec, checkpoint, found, dtype, contents) if found.has_heads else {}
    place_model_(model, spec, device)
    of_experts = classes_of_heads(spec, found.base, found.experts)
    classes = {**of_experts, **_classes_of_heads(spec, checkpoint)}
    results: dict[str, TaskScore] = {}
    for task in spec.tasks_on(split):
        if wanted is not None and task not in wanted:
            continue
        settings = spec.tasks[task]
        kind = found.kinds[task]
        examples = encode_split(spec, task, split, model, tokenizer, kind, classes)
        check_labels(spec, task, examples, heads)
        examples = scored_examples(spec, task, split, examples, classes)
        head = heads.get(task, {})
        put_head_on_(model, {name: tensor.to(place_of(model, name)) for name, tensor in head.items()})
        check_answers(
            model,
            missing - head.keys(),
            where=str(checkpoint.path),
            owner=f"the weights, nor in the head of the task {task}",
            hint="Copy the checkpoint again, or name the right one",
        )
        metric, pad_id = spec.metrics(split)[task], padding_id(tokenizer)
        advance = counted(progress, f"{task}: {split}", len(examples))
        budget = spec.token_budget or TOKEN_BUDGET
        ask = computing(spec, device)(
            functools.partial(given_answers, tokenizer=tokenizer, pad_id=pad_id, token_budget=budget, ranks=ranks)
        )
        given = ask(model, settings, kind, examples, progress=advance)
        if metric.labels:
            right = wanted_answers(settings, examples)
            answers = judged(settings, given, right, *named_classes(spec, task, classes))
        else:
            expert = _load_expert(spec, task, found, dtype)
            place_model_(expert, spec, device)
            others = taken_answers(settings, ask(expert, settings, kind, examples))
            answers = judged(settings, given, _in_order_of(spec, classes, of_experts, task, others))
        results[task] = metric.result(answers)
    return results


def _classes_of_heads(spec: StudySpec, checkpoint: Checkpoint) -> dict[str, tuple[str, ...]]:
    """Names of the classes of the heads that a model has in its `heads` folder, of those that say them."""
    files = {task: checkpoint.path / HEADS / f"{task}.safetensors" for task in spec.tasks}
    found = {task: read_classes(file) for task, file in files.items() if file.is_file()}
    return {task: names for task, names in found.items() if names}


def _in_order_of(spec: StudySpec, classes: Classes, of_experts: Classes, task: str, answers: list[Any]) -> list[Any]:
    """Answers of a task's expert as classes of the head that is scored."""
    if task not in classes or task not in of_experts:
        return answers
    order = class_order(tuple(of_experts[task]), tuple(classes[task]), f"tasks.{task}")
    settings = spec.tasks[task]
    assert isinstance(settings, HeadTask)  # others have no classes
    return [reordered(settings, answer, order) for answer in answers]


def _load_expert(spec: StudySpec, task: str, found: Checkpoints, dtype: torch.dtype) -> PreTrainedModel:
    """A task's own expert, whole and with its head."""
    name = next(name for name, expert in spec.experts.items() if expert.task == task)
    checkpoint = found.experts[name]
    if checkpoint.is_adapter:
        return load_adapter(checkpoint, found.base, found.model_class, dtype=dtype)
    return load_model(checkpoint, found.model_class, dtype=dtype).model


def _heads(
    spec: StudySpec, checkpoint: Checkpoint, found: Checkpoints, dtype: torch.dtype, contents: Contents
) -> Mapping[str, Mapping[str, Tensor]]:
    heads: dict[str, Mapping[str, Tensor]] = {}
    for task in spec.tasks:
        file = checkpoint.path / HEADS / f"{task}.safetensors"
        if file.is_file():
            heads[task] = {n: t.to(dtype) for n, t in read_tensors(file, contents, dtype=dtype).items()}
            continue
        owner = head_owner(spec, task, found.base, found.experts)
        if owner is None:
            raise InputError(
                f"neither {file} nor an expert brings a head for this task",
                where=spec.where(f"tasks.{task}"),
                hint="Add an expert with this task, or remove the task",
            )
        heads[task] = _expert_head(owner, found, dtype)
    return heads


def _expert_head(expert: Checkpoint, found: Checkpoints, dtype: torch.dtype) -> dict[str, Tensor]:
    if expert.is_adapter:
        model = load_adapter(expert, found.base, found.model_class, dtype=dtype)
    else:
        model = load_model(expert, found.model_class, dtype=dtype).model
    names = head_names(model, load_model(found.base, found.model_class, dtype=dtype, headless=True).missing)
    return {name: p.detach() for name, p in float_parameters(model).items() if name in names}
