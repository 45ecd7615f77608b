"""Train an expert, or the multi-task model, of a spec, with the tasks, prompts and losses that the spec's study uses.

    python scripts/finetune.py SPEC --task paws --out models/t5-base-paws
    python scripts/finetune.py SPEC --multi-task --out models/t5-base-multitask
    python scripts/finetune.py SPEC --task reviews --lora 16 --lr 5e-4 --out adapters/reviews    # a LoRA adapter
    accelerate launch scripts/finetune.py SPEC --task paws --out models/t5-base-paws      # on several GPUs
    torchrun --nproc_per_node 4 scripts/finetune.py SPEC --task paws --out …              # or in 4 processes of a CPU

The base is the spec's; each task needs a `training_split`. Defaults are the paper's: 64 rows a step, AdamW, a constant
rate of 1e-4, 2500 steps, the weights of the best validation loss; the multi-task model 25000 steps, stopped after 10
evaluations without a better loss, and a step's rows are shared out equally among the tasks.

    loss(x)    mean negative log-likelihood of the right choice's tokens, or -log p(right class)

`--sharpness-aware sam` or `fsam` trains experts that interfere less when merged, in twice the time (`sharpness.py`).

What is written is a model directory: an expert as the spec's `experts` names it, or a model for `dfmerge evaluate`.
With `--lora` it holds the adapter alone, for models that answer with text. Of a multi-task classifier the shared
encoder is the model, and `heads/TASK.safetensors` has each task's head, as `dfmerge export` writes merged classifiers.
`training.json` records the settings and the course of the losses.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.nn.functional  # read before there is a process group, or its default arguments keep that alive
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # beside this script, its neighbours

from dfmerge_studies.checkpoints.load import load_tokenizer
from dfmerge_studies.checkpoints.write import write_model
from dfmerge_studies.errors import DFMergeError, InputError, RunError, did_you_mean
from dfmerge_studies.objective.inputs import encode_split, read_split
from dfmerge_studies.objective.loading import find_checkpoints
from dfmerge_studies.objective.problem import Checkpoints
from dfmerge_studies.report.outputs import model_target
from dfmerge_studies.spec import StudySpec
from dfmerge_studies.tasks.choices import predict
from dfmerge_studies.tasks.encoding import Encoded, Kind
from dfmerge_studies.tasks.evaluate import TOKEN_BUDGET, choice_losses
from dfmerge_studies.tasks.sampling import divided_rows, seeded_generator
from scripts.lora import ALL_LINEAR, LoRA, add_adapter, trainable, write_adapter
from scripts.sharpness import Sharpness, add_arguments, check_processes, read_settings
from scripts.trainee import Trainee, load_trainee

EXPERT_STEPS, MULTI_TASK_STEPS, MULTI_TASK_PATIENCE = 2500, 25000, 10
_ELSEWHERE = ("regression", "multi-label-classification", "token-classification")  # types of tasks
RECORD = "training.json"


@dataclass(frozen=True)
class Data:
    """Tokenised rows of the tasks in training."""

    training: dict[str, list[Encoded]]
    validation: dict[str, list[Encoded]]


@dataclass
class Course:
    """How a training went.

    Attributes:
        best: the trained parameters, in their order, at the step of the lowest validation loss.
        step: that step.
        loss: that loss, the mean over tasks.
        history: per evaluation: step, training and validation loss, accuracy by task.
    """

    best: list[Tensor] = field(default_factory=list)
    step: int = 0
    loss: float = math.inf
    history: list[dict[str, Any]] = field(default_factory=list)


def _class_names(spec: StudySpec, task: str) -> list[str]:
    """Names of a classification task's classes: the spec's, the data's, or numbers up to the largest label."""
    settings = spec.tasks[task]
    if isinstance(settings.doc_to_choice, list):
        return list(settings.doc_to_choice)
    rows = read_split(spec, task, "training", {})
    if rows[0].choices:
        return list(rows[0].choices)
    return [str(label) for label in range(1 + max(row.label for row in rows))]


def load_data(
    spec: StudySpec, tasks: Sequence[str], model: Any, tokenizer: Any, kind: Kind, validation_rows: int | None
) -> Data:
    """Tokenise the training and validation rows of some tasks.

    Args:
        spec: describes the tasks.
        tasks: their names.
        model: whose limits count.
        tokenizer: its tokenizer.
        kind: how it answers.
        validation_rows: at most so many validation rows per task, drawn with the spec's seed.
    """
    training = {task: encode_split(spec, task, "training", model, tokenizer, kind, {}) for task in tasks}
    validation = {}
    for task in tasks:
        rows = encode_split(spec, task, "validation", model, tokenizer, kind, {})
        kept = divided_rows(len(rows), validation_rows, None, seeded_generator(spec.search.seed, "limit", task))[0]
        validation[task] = [rows[row] for row in kept]
    return Data(training, validation)


def _endless(rows: Sequence[Encoded], seed: int, task: str) -> Iterator[Encoded]:
    """The rows again and again, every time in another order."""
    generator = seeded_generator(seed, "finetune", task)
    while True:
        for row in generator.permutation(len(rows)):
            yield rows[int(row)]


def _by_task(rows: Sequence[tuple[str, Encoded]]) -> dict[str, list[Encoded]]:
    """Rows of a batch, grouped by task."""
    groups: dict[str, list[Encoded]] = {}
    for task, row in rows:
        groups.setdefault(task, []).append(row)
    return groups


def evaluate(trainee: Trainee, data: Data, accelerator: Accelerator, budget: int) -> tuple[float, dict[str, float]]:
    """Mean validation loss over tasks, and the accuracy of those with choices; every process scores its share.

    Args:
        trainee: the model.
        data: its rows.
        accelerator: who the others are.
        budget: tokens of one batch.
    """
    losses, scores = [], {}
    for task, rows in data.validation.items():
        trainee.take_head_(task)
        mine = rows[accelerator.process_index :: accelerator.num_processes]
        table = choice_losses(trainee.model, trainee.kind, mine, pad_id=trainee.pad_id, token_budget=budget)
        right = [prediction == row.label for prediction, row in zip(predict(table), mine, strict=True)]
        share = [(losses_[row.label or 0], hit) for losses_, row, hit in zip(table, mine, right, strict=True)]
        everything = gather_object(share)
        losses.append(sum(loss for loss, _ in everything) / len(everything))
        if not any(row.targets for row in rows):  # a text is not written for every evaluation: its loss says enough
            scores[task] = sum(hit for _, hit in everything) / len(everything)
    return sum(losses) / len(losses), scores


def train(trainee: Trainee, data: Data, accelerator: Accelerator, options: argparse.Namespace, budget: int) -> Course:
    """Train in place and leave the weights of the best validation loss.

    Args:
        trainee: the model.
        data: its rows.
        accelerator: spreads each step's rows over the processes and averages their gradients.
        options: of the command line.
        budget: tokens of one batch of an evaluation.

    Raises:
        RunError: a loss is not finite.
    """
    parameters = trainable(trainee)
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=options.weight_decay)
    wrapped, optimizer = accelerator.prepare(trainee, optimizer)
    sharpness = Sharpness(trainee, accelerator, options.sharpness) if options.sharpness is not None else None
    sources = {task: _endless(rows, options.seed, task) for task, rows in data.training.items()}
    names, drawn, since, course = list(sources), 0, time.monotonic(), Course()
    losses: list[float] = []
    for step in range(1, options.steps + 1):
        # All processes draw the same rows and take every n-th, so that a step is the same for any number of them.
        order = [names[(drawn + i) % len(names)] for i in range(options.batch_size)]
        drawn += options.batch_size
        batch = [(task, next(sources[task])) for task in order]
        mine = batch[accelerator.process_index :: accelerator.num_processes]
        gradient = partial(_gradient_, wrapped, mine, accelerator, options.micro_batch or len(mine))
        losses.append(gradient() if sharpness is None else sharpness.gradient_(step, mine, gradient))
        optimizer.step()
        optimizer.zero_grad()
        if step % options.evaluate_every and step != options.steps:
            continue
        loss, scores = evaluate(trainee, data, accelerator, budget)
        trained = sum(losses) / len(losses)
        if not math.isfinite(loss + trained):
            raise RunError(f"the loss is not finite at step {step}", hint="Lower --lr")
        course.history.append({"step": step, "training": trained, "validation": loss, "accuracy": scores})
        losses = []
        if loss < course.loss:
            course.best, course.step, course.loss = [p.detach().cpu().clone() for p in parameters], step, loss
        accelerator.print(_line(course, options.steps, time.monotonic() - since), file=sys.stderr)
        behind = sum(entry["step"] > course.step for entry in course.history)
        if options.patience is not None and behind >= options.patience:
            break
    with torch.no_grad():
        for parameter, value in zip(parameters, course.best, strict=True):
            parameter.copy_(value)
    return course


def _gradient_(wrapped: nn.Module, rows: Sequence[tuple[str, Encoded]], accelerator: Accelerator, size: int) -> float:
    """Add the gradient of the step's loss, from this process's rows, `size` of them at a time; their mean loss."""
    wrapped.train()
    total = 0.0
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        last = start + size >= len(rows)
        with nullcontext() if last else accelerator.no_sync(wrapped):  # gradients are averaged once a step
            loss = wrapped(_by_task(part)) * (len(part) / len(rows))
            accelerator.backward(loss)
        total += float(loss.detach())
    return total


def _line(course: Course, steps: int, seconds: float) -> str:
    entry = course.history[-1]
    known = ", ".join(f"{task} {100 * score:.1f} %" for task, score in entry["accuracy"].items())
    scores = f" ({known})" if known else ""
    return (
        f"step {entry['step']}/{steps}: training loss {entry['training']:.4f}, validation loss "
        f"{entry['validation']:.4f}{scores}, best at step {course.step}, {seconds:.0f} s"
    )


def _save(
    trainee: Trainee, found: Checkpoints, classes: Mapping[str, list[str]], out: Path, record: str, *, force: bool
) -> None:
    """Write the model directory."""
    trainee.take_head_(next(iter(trainee.heads), ""))
    heads = trainee.heads if len(trainee.heads) > 1 else {}
    tokenizer = load_tokenizer(found.base)
    write_model(
        trainee.model,
        tokenizer,
        out,
        source=found.base.path,
        heads=heads,
        classes=classes,
        texts={RECORD: record},
        force=force,
        mark=RECORD,
    )


def finetune(spec: StudySpec, tasks: Sequence[str], out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train on the tasks and write the model.

    Args:
        spec: base and tasks.
        tasks: names of the tasks to train on; several make a multi-task model.
        out: directory to make.
        options: of the command line.

    Returns:
        What training.json holds.

    Raises:
        InputError: the spec, the data or the options do not fit.
    """
    for task in tasks:
        if (type_ := spec.tasks[task].type) in _ELSEWHERE:
            raise InputError(
                f"this script trains no heads for tasks of type {type_}",
                where=spec.where(f"tasks.{task}"),
                hint="Train the expert with transformers' Trainer, as its examples do",
            )
    # Experts may be trained anew in their own place.
    out = model_target(spec.derive(experts={}, multi_task=None), out, force=options.force, mark=RECORD)
    accelerator = Accelerator(
        cpu=spec.device == "cpu",
        mixed_precision=options.precision,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],  # heads of other tasks
    )
    if options.batch_size % accelerator.num_processes:
        what = f"--batch-size {options.batch_size} cannot be shared out among {accelerator.num_processes} processes"
        raise InputError(what, hint="Choose a multiple")
    if options.sharpness is not None:
        check_processes(accelerator)
    set_seed(options.seed)
    found = find_checkpoints(spec.derive(experts={}))  # those are still to be trained
    classification = found.has_heads
    classes = {task: _class_names(spec, task) for task in tasks} if classification else {}
    trainee = load_trainee(found, tasks, classes)
    adapter = add_adapter(trainee.model, options.adapter, found) if options.adapter else None
    data = load_data(
        spec, tasks, trainee.model, load_tokenizer(found.base), found.kinds[tasks[0]], options.validation_rows
    )
    set_seed(options.seed, device_specific=True)  # dropout differs between processes, fresh heads do not
    course = train(trainee, data, accelerator, options, spec.token_budget or TOKEN_BUDGET)
    settings = ("steps", "batch_size", "lr", "weight_decay", "evaluate_every", "patience", "precision", "seed")
    record = {
        "base": spec.base,
        "tasks": list(tasks),
        "settings": {name: getattr(options, name) for name in settings} | {"sharpness_aware": options.sharpness},
        "lora": asdict(options.adapter) if options.adapter else None,
        "processes": accelerator.num_processes,
        "best_step": course.step,
        "validation_loss": course.loss,
        "history": course.history,
    }
    text = json.dumps(record, indent=2) + "\n"
    if accelerator.is_main_process and adapter is not None:
        write_adapter(adapter, load_tokenizer(found.base), out, text, mark=RECORD, force=options.force)
    elif accelerator.is_main_process:
        _save(trainee, found, classes, out, text, force=options.force)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return record


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line.

    Args:
        arguments: without the program's name; those of the process by default.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path, help="YAML spec whose base and tasks to use")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--task", help="train the expert of this task")
    what.add_argument("--multi-task", action="store_true", help="train one model on all tasks")
    parser.add_argument("--out", type=Path, required=True, help="model directory to make")
    parser.add_argument("--force", action="store_true", help="replace a model that this script wrote to --out")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="set a field of the spec")
    parser.add_argument("--steps", type=int, help=f"updates (default {EXPERT_STEPS}; multi-task {MULTI_TASK_STEPS})")
    parser.add_argument("--batch-size", type=int, default=64, help="rows per update, over all processes")
    parser.add_argument("--micro-batch", type=int, help="rows in memory at once per process (default: all)")
    parser.add_argument("--lr", type=float, default=1e-4, help="constant learning rate of AdamW")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train a LoRA adapter of this rank, not the model")
    parser.add_argument("--lora-alpha", type=int, help="its scale is alpha / rank (default: twice the rank)")
    parser.add_argument(
        "--lora-targets", nargs="+", default=[ALL_LINEAR], metavar="NAME", help="its linear layers (default: all)"
    )
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--evaluate-every", type=int, default=100, metavar="STEPS", help="validation loss is taken")
    parser.add_argument(
        "--patience", type=int, help="stop after so many evaluations that are no better (multi-task: 10)"
    )
    parser.add_argument("--validation-rows", type=int, help="take the loss on so many rows per task (default: all)")
    parser.add_argument("--precision", choices=["no", "bf16", "fp16"], default="no", help="mixed precision")
    parser.add_argument("--seed", type=int, default=0, help="of heads, order of rows and dropout")
    add_arguments(parser)
    options = parser.parse_args(arguments)
    options.sharpness = read_settings(parser, options)
    if options.steps is None:
        options.steps = MULTI_TASK_STEPS if options.multi_task else EXPERT_STEPS
    if options.patience is None and options.multi_task:
        options.patience = MULTI_TASK_PATIENCE
    for name in (
        "steps",
        "batch_size",
        "micro_batch",
        "evaluate_every",
        "patience",
        "validation_rows",
        "lora",
        "lora_alpha",
    ):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    options.adapter = LoRA(options.lora, options.lora_alpha, options.lora_targets) if options.lora else None
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and write; exits with 2 for bad input, 1 for a run that failed."""
    options = read_arguments(arguments)
    try:
        spec = StudySpec.from_yaml(options.spec, options.set)
        if options.task is not None and options.task not in spec.tasks:
            hint = did_you_mean(options.task, spec.tasks) or f"Tasks: {', '.join(spec.tasks)}"
            raise InputError(f"no task {options.task!r}", where=str(options.spec), hint=hint)
        tasks = [options.task] if options.task is not None else list(spec.tasks)
        record = finetune(spec, tasks, options.out, options)
    except DFMergeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(f"{options.out}: step {record['best_step']}, validation loss {record['validation_loss']:.4f}")


if __name__ == "__main__":
    main()
