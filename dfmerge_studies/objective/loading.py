"""From a spec to what its trials need: models and data found, loaded on their device and placed in its memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dfmerge_studies.checkpoints.reference import resolve
from dfmerge_studies.checkpoints.resident import load_resident
from dfmerge_studies.errors import InputError
from dfmerge_studies.objective.cards import check_device_map
from dfmerge_studies.objective.classes import classes_of_heads
from dfmerge_studies.objective.computing import computing
from dfmerge_studies.objective.inputs import check_labels, encode_for_all, padding_id, read_split
from dfmerge_studies.objective.memory import place_
from dfmerge_studies.objective.preflight import read_indices
from dfmerge_studies.objective.problem import Checkpoints, Problem, TaskInputs
from dfmerge_studies.objective.spreading import spread_problem_
from dfmerge_studies.objective.used_rows import fisher_rows, scored_examples
from dfmerge_studies.progress import Progress, silent
from dfmerge_studies.ranks import SOLO, Ranks
from dfmerge_studies.spec import StudySpec
from dfmerge_studies.tasks.encoding import HEADED, Kind
from dfmerge_studies.tasks.folding import settle_folding
from dfmerge_studies.tasks.splits import Split


def find_checkpoints(spec: StudySpec) -> Checkpoints:
    """Resolve the spec's models to directories and decide how they answer.

    Raises:
        InputError: one of them is not there.
    """
    trust = spec.trust_remote_code
    base = resolve(spec.base, root=spec.root, where=spec.where("base"), trust_remote_code=trust)
    if base.is_adapter:
        raise InputError(
            "the base is an adapter", where=spec.where("base"), hint="Name the whole model that adapters sit on"
        )
    experts = {
        name: resolve(e.model, root=spec.root, where=spec.where(f"experts.{name}"), trust_remote_code=trust)
        for name, e in spec.experts.items()
    }
    generator = Kind.TEXT_TO_TEXT if base.read_config().get("is_encoder_decoder") else Kind.CAUSAL
    kinds = {name: Kind(task.type) if task.type in HEADED else generator for name, task in spec.tasks.items()}
    return Checkpoints(base, experts, kinds)


@dataclass(frozen=True)
class _Load:
    """`load_problem` on the other ranks."""

    spec: StudySpec
    indices: Mapping[str, list[int]] | None
    splits: Sequence[Split]

    def __call__(self, memory: dict[str, Any]) -> None:
        memory["problem"] = load_problem(self.spec, indices=self.indices, splits=self.splits, ranks=memory["ranks"])
        memory.pop("made", None)


def load_problem(
    spec: StudySpec,
    *,
    indices: Mapping[str, list[int]] | None = None,
    splits: Sequence[Split] = (),
    progress: Progress = silent,
    ranks: Ranks = SOLO,
    share: int | None = None,
) -> Problem:
    """Load models and validation data of a spec.

    Args:
        spec: what to load.
        indices: Fisher inputs that a study has already fixed; otherwise the spec's own, otherwise a seeded draw.
        splits: what is read now, besides "validation"; other splits are read when they are first asked for.
        progress: told of each step.
        ranks: processes that load the same and share the work.
        share: bytes of the device that `memory: auto` may take, where other processes are on it that load the same.

    Raises:
        InputError: anything that does not fit, before anything is computed.
    """

    def load() -> Problem:
        problem = _load_problem(spec, indices, progress, ranks, share)
        for split in splits:
            for task in spec.tasks_on(split):
                problem.examples(task, split)
        _check_alike(problem, splits)
        return problem

    return ranks.everywhere(_Load(spec, indices, splits), load)


def _check_alike(problem: Problem, splits: Sequence[Split]) -> None:
    """Refuse ranks, on other machines perhaps, that have other models or data under the same names."""
    if problem.ranks.size == 1:
        return

    def identity() -> dict[str, str]:
        data = {f"{split} data of {t}": d for split in splits for t, d in problem.data_digests(split).items()}
        return {"base": problem.base_digest, **problem.expert_digests, **data}

    first, *others = problem.ranks.agreed(identity)
    for rank, other in enumerate(others, 1):
        different = [name for name in first if other.get(name) != first[name]]
        if different:
            raise InputError(
                f"rank {rank} has another {', another '.join(different)} than rank 0",
                hint="Give every machine the same files",
            )


def _load_problem(
    spec: StudySpec, indices: Mapping[str, list[int]] | None, progress: Progress, ranks: Ranks, share: int | None
) -> Problem:
    steps = len(spec.experts) + 2 + len(spec.tasks)
    progress("checking files", 0, steps)
    checkpoints = find_checkpoints(spec)
    device, dtype = choose_device(spec, ranks), getattr(torch, spec.dtype)
    wanted = indices or read_indices(spec)
    classes = classes_of_heads(spec, checkpoints.base, checkpoints.experts)
    # Before the weights: it fails sooner.
    rows = {name: read_split(spec, name, "validation", classes) for name in spec.tasks}
    progress("loading models", 1, steps)
    resident = load_resident(
        checkpoints.base,
        checkpoints.experts,
        {name: expert.task for name, expert in spec.experts.items()},
        checkpoints.model_class,
        guards=[name for name, task in spec.tasks.items() if task.guard],
        unite=spec.tokenizer == "union",
        dtype=dtype,
        device=device if spec.device_map is None else torch.device("cpu"),  # until it is spread
        stay=True,
        loading=lambda name: progress(f"loading {name}", 1 + list(spec.experts).index(name), steps),
    )
    tasks = {}
    for done, name in enumerate(spec.tasks):
        progress(f"reading {name}", len(spec.experts) + 2 + done, steps)
        if checkpoints.has_heads and name not in resident.heads:
            guard = spec.tasks[name].guard
            raise InputError(
                "a guard is answered by the base's own head, and the base has none"
                if guard
                else "no expert brings a head for this task",
                where=spec.where(f"tasks.{name}"),
                hint="Guard a task of a base with a head, or leave it out"
                if guard
                else "Add an expert with this task, or remove the task",
            )
        everything = encode_for_all(spec, name, rows[name], resident, checkpoints.kinds[name])
        check_labels(spec, name, everything, resident.heads)
        fisher = [everything[row] for row in fisher_rows(spec, name, len(everything), wanted)]
        tasks[name] = TaskInputs(
            {"validation": scored_examples(spec, name, "validation", everything, classes)}, fisher, everything
        )
    pad_id = padding_id(resident.tokenizer)
    problem = Problem(spec, checkpoints, resident, tasks, pad_id, ranks, classes, share=share)
    spread_problem_(problem)
    with computing(spec, device):  # the model has the base's weights, on every rank
        for name, task in tasks.items():
            settle_folding(resident.model, checkpoints.kinds[name], task.validation, pad_id)
    place_(problem)
    progress("ready", steps, steps)
    return problem


def choose_device(spec: StudySpec, ranks: Ranks = SOLO) -> torch.device:
    """The device that a spec means.

    Args:
        spec: names a device, or "auto" (CUDA where there is one, else the CPU).
        ranks: several ranks have a device each, which their launcher decided.

    Raises:
        InputError: it is not there, or a `device_map` has no devices to spread a model over.
    """
    check_device_map(spec, ranks)
    if ranks.device is not None:
        return ranks.device
    if spec.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(spec.device)
    if device.type == "mps":
        raise InputError(
            "the device 'mps' has no float64, in which importance is checked",
            where=spec.where("device"),
            hint="Use device: cpu",
        )
    there = {"cpu": True, "cuda": torch.cuda.is_available()}[device.type]
    if not there or (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise InputError(
            f"the device {spec.device!r} is not available ({torch.cuda.device_count()} CUDA devices)",
            where=spec.where("device"),
            hint="Use device: auto",
        )
    return device
