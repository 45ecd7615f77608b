"""What a trial needs of memory, part by part of it, and what follows from how much there is.

    N    entries of all parameters          n    entries that some expert changed
    p    entries of the largest part whose importance and sums are in memory at a time; n where all are
    w    bytes of a weight

    model        w N and heads                  base        w n
    vectors      w per entry of each expert, of LoRA experts their factors
    sums         8 p with an importance, 4 p without        importance      4 p
    activations  of the larger of a chunk of importance and a batch of evaluation, logits included; measured

What is on the host while a device computes: theta_pre and task vectors that are copied when they are used, merged
values that wait for other parts, and a trial's Fishers that may be written to the cache or that parts look at twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial

import torch

from dfmerge_studies.checkpoints.spread import shares_of_devices
from dfmerge_studies.checkpoints.streamed import Streamed, kept_bytes
from dfmerge_studies.errors import InputError
from dfmerge_studies.importance.factors import factor_entries
from dfmerge_studies.importance.nodes import masks_of
from dfmerge_studies.importance.task_fisher import rows_times_tokens, task_fisher
from dfmerge_studies.methods import Estimator, Importance
from dfmerge_studies.objective.cards import SPARE, room_on
from dfmerge_studies.objective.importances import check_importance, writer_for
from dfmerge_studies.objective.in_parts import gathered_on_host, needing_all
from dfmerge_studies.objective.live_bytes import LiveBytes
from dfmerge_studies.objective.problem import Problem
from dfmerge_studies.objective.rehearsal import named, shortened
from dfmerge_studies.spec import parse_size
from dfmerge_studies.tasks.answers import given_answers, writer_of
from dfmerge_studies.tasks.encoding import Encoded
from dfmerge_studies.tasks.evaluate import row_length, token_cost
from dfmerge_studies.tasks.generation import written
from dfmerge_studies.tasks.replay import allow_replays_
from dfmerge_studies.tasks.sampling import torch_generator
from dfmerge_studies.transforms import TRANSFORMS

_ROUNDS = 3  # of making parts smaller until they fit
_EASY = 0.5  # of what is free: below, nothing is measured


@dataclass(frozen=True)
class Needs:
    """Bytes at the peak of a trial, by what they are for, on the device that computes and on the host beside it."""

    model: int = 0
    base: int = 0
    vectors: int = 0
    transform: int = 0
    sums: int = 0
    importance: int = 0
    activations: int = 0
    merged: int = 0
    waiting: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Memory:
    """What a trial needs.

    Attributes:
        device: of the device that computes.
        host: of the host beside it; nothing where the CPU computes.
    """

    device: Needs
    host: Needs


def width_of(problem: Problem) -> int:
    """Bytes of a weight."""
    return torch.empty((), dtype=getattr(torch, problem.spec.dtype)).element_size()


def stored_entries(problem: Problem) -> int:
    """Numbers of one importance as the cache holds it."""
    resident, method = problem.resident, problem.spec.row
    weighed = method.importance is not Importance.UNIFORM
    if method.importance.blocks is not None:
        return factor_entries(resident.model, resident.names, method.importance.blocks)
    if weighed and check_importance(problem, method) is Estimator.MASK_NODES:
        return sum(mask.units for mask in masks_of(resident.model))
    return _changed(problem)


def fisher_bytes(problem: Problem) -> int:
    """Bytes of one importance in the cache."""
    narrow = problem.spec.importance.rounding == "bfloat16" and problem.spec.row.importance.blocks is None
    return (2 if narrow else 4) * stored_entries(problem)


@dataclass(frozen=True)
class Activations:
    """Bytes beside weights, sums and importances: activations, logits, scratch; at most one of the two at a time.

    Attributes:
        importance: of a chunk of inputs whose importance is computed.
        evaluation: of a batch that is scored.
    """

    importance: int = 0
    evaluation: int = 0


def memory_of(problem: Problem, activations: Activations) -> Memory:
    """What a trial of a loaded spec needs, as it is placed.

    Args:
        problem: what is loaded.
        activations: of `activations_of`.
    """
    resident, spec, method = problem.resident, problem.spec, problem.spec.row
    changed, parts = _changed(problem), problem.parts()
    largest = _entries(problem, _largest(problem))
    weighed = method.importance is not Importance.UNIFORM
    entries = sum(problem.sizes[name] for vector in resident.task_vectors for name in vector.deltas)
    each = fisher_bytes(problem) if weighed else 0
    kept = TRANSFORMS[method.transform].kept(entries, changed)
    kept += len(resident.task_vectors) * each if method.importance.blocks is not None else 0  # until the merge
    sums = (8 if weighed else 4) * largest
    on_host = gathered_on_host(problem, method)
    if spec.search.descends:  # importances of all experts; the loss's gradient and its sum, where the merge's sums were
        kept += 0 if on_host else len(resident.task_vectors) * each
        kept += max(0, (4 + width_of(problem)) * changed - sums)
    waiting = len(resident.task_vectors) * each if on_host or spec.cache_place is not None else 0
    merged = width_of(problem) * changed if weighed and len(parts) > 1 else 0
    base, held_base = kept_bytes(resident.base)
    vectors = [kept_bytes(vector.deltas) for vector in resident.task_vectors]
    heads = sum(t.numel() * t.element_size() for head in resident.heads.values() for t in head.values())
    tensors = [*resident.model.parameters(), *resident.model.buffers()]
    device = {
        "model": sum(t.numel() * t.element_size() for t in tensors) + heads,
        "base": base,
        "vectors": sum(there for there, _ in vectors),
        "transform": kept,
        "sums": sums,
        "importance": 4 * largest if weighed else 0,
    }
    if problem.roomy:  # passes are recorded, and their activations stay
        device["activations"] = activations.importance + activations.evaluation
    else:
        folding = device["sums"] + device["importance"]  # which is not there when a batch is scored
        device["activations"] = max(activations.importance, activations.evaluation - folding)

    host = {"base": held_base, "vectors": sum(held for _, held in vectors), "merged": merged, "waiting": waiting}
    if resident.device.type == "cpu":
        return Memory(Needs(**{**device, "merged": merged, "waiting": waiting}), Needs())
    return Memory(Needs(**device), Needs(**host))


def held_bytes(problem: Problem) -> int:
    """Bytes that are there before and after a trial."""
    found = memory_of(problem, Activations()).device
    return found.model + found.base + found.vectors


def place_(problem: Problem) -> None:
    """Decide where theta_pre and task vectors are kept, and in how many parts importances are computed.

    Args:
        problem: what is loaded: the model on its device, all else on the host.

    Raises:
        InputError: `memory` is less than the least that a trial needs.
    """
    problem.roomy = True
    problem.roomy = all(problem.ranks.agreed(lambda: _roomy(problem)))
    if problem.roomy:
        allow_replays_(problem.resident.model)
        problem.resident.keep_on_(host=False)
        problem.part_entries = None
        return
    found = problem.ranks.agreed(lambda: _decided(problem))
    short = [entries for fits, entries in found if not fits]
    if not short or not isinstance(problem.resident.base, Streamed):
        problem.resident.keep_on_(host=bool(short) and problem.resident.device.type != "cpu")
    problem.part_entries = min(short) if short else None


def has_room_for_all(problem: Problem) -> bool:
    """Whether there is memory for all at a time, of a problem that has been placed under another spec.

    Args:
        problem: what is loaded and placed.
    """
    return problem.part_entries is None and _fits(problem, held := held_bytes(problem), _room(problem, held))


def _roomy(problem: Problem) -> bool:
    """Whether a device starts a pass so much later than it ends one that batches should be larger, and has the memory.

    Passes that score are then recorded, too (`tasks/replay.py`), so that their activations stay.
    """
    spec = problem.spec
    if problem.resident.device.type != "cuda" or spec.memory != "auto" or spec.device_map is not None:
        return False
    held = memory_of(problem, Activations()).device.model
    there = _room(problem, held)
    needs = memory_of(problem, activations_of(problem)).device.total
    return there is not None and needs - held <= _EASY * (there - held)


def _decided(problem: Problem) -> tuple[bool, int]:
    """Whether this process has memory for all at a time, and otherwise for the sums of how many entries."""
    held = memory_of(problem, Activations()).device.model
    there = _room(problem, held)
    if there is None or _fits(problem, held, there):
        return True, 0
    if problem.resident.device.type != "cpu":
        problem.resident.keep_on_(host=True)
    entries = _entries_at_a_time(problem, there)
    return entries is None, entries or 0


def _room(problem: Problem, held: int) -> int | None:
    """Bytes that a trial may take of the device that computes, with those that it holds already; None for no bound."""
    spec, device = problem.spec, problem.resident.device
    if spec.memory != "auto":
        return parse_size(spec.memory)
    if problem.share is not None:
        in_parts = device.type == "cuda" or needing_all(problem, spec.row, check_importance(problem, spec.row)) is None
        return int((1 - SPARE) * problem.share) if in_parts else None
    return room_on(shares_of_devices(problem.resident.model), held) if device.type == "cuda" else None


def _fits(problem: Problem, held: int, there: int | None) -> bool:
    """Whether a trial with all parameters at a time takes no more than there is."""
    if there is None:
        return True
    rough = memory_of(problem, Activations()).device.total
    if problem.spec.memory == "auto" and rough - held <= _EASY * (there - held):
        return True
    return rough <= there and memory_of(problem, activations_of(problem)).device.total <= there


def _entries_at_a_time(problem: Problem, there: int) -> int | None:
    """Entries of the parameters whose importance and sums fit into so many bytes, with all that has to be there.

    None where not even the least fits into a share of the host's memory: more passes would help nobody.
    """
    spec, least = problem.spec, max(problem.sizes.values(), default=1)
    per_entry = 12 if spec.row.importance is not Importance.UNIFORM else 4
    problem.part_entries = least
    found = activations_of(problem)
    needs = memory_of(problem, found).device
    fixed = needs.total - needs.sums - needs.importance - needs.activations
    alone = min(shares_of_devices(problem.resident.model).values())  # all parameters of a part may be on one device
    room = int(alone * (there - fixed - found.importance)) // per_entry
    needed = fixed + max(found.evaluation, found.importance + per_entry * least)
    if there < needed and spec.memory != "auto":
        raise InputError(
            f"{spec.memory} is too little: a trial needs {needed / 1e9:.2f} GB at least, "
            f"{(needs.model + needs.base + needs.vectors) / 1e9:.2f} GB of them for the model and the task vectors",
            where=spec.where("memory"),
            hint="Give it more, lower importance.row_budget and token_budget, or use dtype: bfloat16",
        )
    if there < needed and problem.resident.device.type == "cpu":
        return None
    entries = max(room, least)
    for _ in range(_ROUNDS):  # a larger part has more layers' inputs in memory
        problem.part_entries = entries
        over = memory_of(problem, activations_of(problem)).device.total - there
        if over <= 0:
            break
        entries = max(least, _entries(problem, _largest(problem)) - -(-over // per_entry))
    return entries


def activations_of(problem: Problem) -> Activations:
    """What a trial needs at its peak beside weights, sums and importances.

    Measured on the longest inputs, alone and twice in a batch, and carried forward to the batches that the budgets
    allow. Texts that models write are measured at a few tokens.

    Args:
        problem: what is loaded; its model may hold any weights.
    """
    importance = 0
    if problem.spec.row.importance is not Importance.UNIFORM and problem.resident.names:
        importance = _of_importance(problem, _largest(problem))
    return Activations(importance, _of_evaluation(problem))


def _of_importance(problem: Problem, names: list[str]) -> int:
    """Bytes of a chunk of importance, but for the sums of squares themselves."""
    spec, method = problem.spec, problem.spec.row

    def cost(task: str) -> int:
        return max(rows_times_tokens(example, problem.kinds[task]) for example in problem.tasks[task].fisher)

    task = max(spec.aims, key=cost)
    kind, writer, inputs = problem.kinds[task], writer_for(problem, task), problem.tasks[task].fisher
    estimator = check_importance(problem, method)
    estimator = estimator if writer is None else estimator.of_texts
    longest = max(inputs, key=lambda example: rows_times_tokens(example, kind))
    problem.resident.use_head_(task)

    def run(count: int) -> None:
        with named(problem, task, "differentiated"):
            task_fisher(
                problem.resident.model,
                kind,
                [longest] * count,
                pad_id=problem.pad_id,
                names=names,
                estimator=estimator,
                writer=None if writer is None else shortened(writer),
                generator=torch_generator(spec.search.seed, "sampled", task),
                row_budget=1 << 60,
                compact=True,
                blocks=method.importance.blocks,
            )

    run(1)
    sums = 4 * sum(problem.sizes[name] for name in names) if method.importance.blocks is None else 0
    return _grown(run, min(len(inputs), problem.row_budget // max(1, rows_times_tokens(longest, kind))), sums)


def _of_evaluation(problem: Problem) -> int:
    """Bytes of a batch of evaluation."""
    spec, resident = problem.spec, problem.resident
    rows = {task: problem.examples(task, "validation") for task in problem.tasks}
    task = max(rows, key=lambda each: max(token_cost(example, problem.kinds[each]) for example in rows[each]))
    kind, settings = problem.kinds[task], spec.tasks[task]
    longest = max(rows[task], key=lambda example: row_length(example, kind))
    writer = writer_of(settings, resident.tokenizer)
    resident.use_head_(task)

    def run(count: int) -> None:
        inputs: list[Encoded] = [longest] * count
        with named(problem, task, "scored"), torch.inference_mode():
            if writer is not None:
                written(resident.model, kind, inputs, shortened(writer), problem.pad_id)
                return
            given_answers(
                resident.model,
                settings,
                kind,
                inputs,
                tokenizer=resident.tokenizer,
                pad_id=problem.pad_id,
                token_budget=1 << 60,
            )

    run(1)
    return _grown(run, min(len(rows[task]), problem.token_budget // max(1, token_cost(longest, kind))), 0)


def _grown(run: Callable[[int], None], count: int, fixed: int) -> int:
    """Bytes at the peak with so many inputs, from what one and two of them take."""
    peaks: list[int] = []
    for number in (1, 2):
        with LiveBytes() as alive:
            run(number)
        peaks.append(alive.peak)
    one, two = peaks
    return max(0, one - fixed) + (max(1, count) - 1) * max(0, two - one)


def _largest(problem: Problem) -> list[str]:
    """Names of the part with most entries."""
    return max(problem.parts(), key=partial(_entries, problem))


def _entries(problem: Problem, names: Iterable[str]) -> int:
    return sum(problem.sizes[name] for name in names)


def _changed(problem: Problem) -> int:
    return _entries(problem, problem.resident.names)
