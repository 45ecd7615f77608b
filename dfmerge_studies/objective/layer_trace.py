"""Coefficients of layers without a search, from the Fisher information on random tokens (Xia, 2026, arXiv 2603.21705).

    F          diagonal Fisher information of the base, mean over N = 8 sequences of random tokens
    s[i,l]     tr F[l] |tau[i,l]|^2        bounds, up to a factor, how far merging layer l of expert i goes wrong
    z[i,l]     log s[i,l], less its mean over the expert's layers, over its deviation
    lam[i,l]   1 - sigmoid(z[i,l])         small where much may go wrong

Nothing of the tasks' data is used.  Of a causal model a sequence is its own label, each token after the others; a
text-to-text model reads one and has another one as its answer; of classifiers the classes are those of the expert's
head, each weighed by its probability.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean, pstdev
from typing import Any

import torch

from dfmerge_studies.importance.task_fisher import task_fisher
from dfmerge_studies.methods import Estimator
from dfmerge_studies.objective.groups import Groups
from dfmerge_studies.objective.problem import Problem
from dfmerge_studies.params import TaskVector
from dfmerge_studies.progress import Progress, counted, silent
from dfmerge_studies.tasks.encoding import HEADED, Encoded, Kind
from dfmerge_studies.tasks.sampling import torch_generator

SEQUENCES = 8
TOKENS = 64  # of each, or as many as the model reads
_UNCHANGED = 0.5  # of a layer that the expert did not change: it has no step there


def layer_coefficients_(problem: Problem, groups: Groups, progress: Progress = silent) -> dict[str, dict[str, float]]:
    """Lambda by expert and group of parameters; leaves the base in the resident model.

    Args:
        problem: the loaded spec; its seed decides the tokens.
        groups: names of the parameters of each layer.
        progress: told how far it is.

    Raises:
        InputError: the model's Fisher information cannot be computed.
        RunError: a loss is not finite.
    """
    resident, fishers = problem.resident, dict[tuple[str | None, Kind], dict[str, float]]()
    resident.load_base_()
    found = {}
    for vector in resident.task_vectors:
        own = problem.spec.experts[vector.expert].task
        tasks = [own] if own is not None else problem.spec.aims
        traces: list[Mapping[str, float]] = []
        for task in tasks:
            key = (task if task in resident.heads else None, problem.kinds[task])
            if key not in fishers:
                fishers[key] = _traces(problem, task, groups, progress)
            traces.append(fishers[key])
        mean = {group: fmean(each[group] for each in traces) for group in groups}
        found[vector.expert] = coefficients_from(mean, _sizes(vector, groups))
    return found


def coefficients_from(traces: Mapping[str, float], sizes: Mapping[str, float]) -> dict[str, float]:
    """Lambda of each layer of one expert.

    Args:
        traces: tr F by layer.
        sizes: the squared length of the expert's task vector by layer.
    """
    scores = {layer: traces[layer] * sizes[layer] for layer in traces}
    logs = {layer: math.log(score) for layer, score in scores.items() if score > 0 and math.isfinite(score)}
    if not logs:
        return dict.fromkeys(traces, _UNCHANGED)
    mean, spread = fmean(logs.values()), pstdev(logs.values())
    at = {layer: (value - mean) / spread if spread > 0 else 0.0 for layer, value in logs.items()}
    return {layer: 1.0 / (1.0 + math.exp(at[layer])) if layer in at else _UNCHANGED for layer in traces}


def _sizes(vector: TaskVector, groups: Groups) -> dict[str, float]:
    return {
        group: sum(float(vector.deltas[name].double().square().sum()) for name in names if name in vector.deltas)
        for group, names in groups.items()
    }


def _traces(problem: Problem, task: str, groups: Groups, progress: Progress) -> dict[str, float]:
    resident, kind = problem.resident, problem.kinds[task]
    resident.use_head_(task)
    examples = random_inputs(problem, kind)
    traces: dict[str, float] = {}
    for part in problem.parts([name for names in groups.values() for name in names]):
        values = task_fisher(
            resident.model,
            kind,
            examples,
            pad_id=problem.pad_id,
            names=part,
            estimator=Estimator.EXACT if kind in HEADED else Estimator.EMPIRICAL,
            row_budget=problem.row_budget,
            progress=counted(progress, "random tokens", len(examples)),
            ranks=problem.ranks,
        ).values
        traces.update({name: float(value.double().sum()) for name, value in values.items()})
    return {group: sum(traces[name] for name in names) for group, names in groups.items()}


def random_inputs(problem: Problem, kind: Kind) -> list[Encoded]:
    """The sequences, as inputs of a task whose right answer, where there is one, is the first of one.

    Args:
        problem: the loaded spec.
        kind: how the model answers.
    """
    resident = problem.resident
    embeddings: Any = resident.model.get_input_embeddings()
    vocabulary = min(int(embeddings.weight.shape[0]), len(resident.tokenizer))
    paired = any(example.token_type_ids for inputs in problem.tasks.values() for example in inputs.fisher)
    length = min(TOKENS, resident.tokenizer.model_max_length)
    generator = torch_generator(problem.spec.search.seed, "random tokens")

    def draw() -> tuple[int, ...]:
        tokens = torch.randint(vocabulary - 1, (length,), generator=generator)
        return tuple((tokens + (tokens >= problem.pad_id)).tolist())  # every token but padding

    found = []
    for index in range(SEQUENCES):
        first = draw()
        if kind in HEADED:
            found.append(Encoded(index, first, token_type_ids=(0,) * length if paired else None))
        elif kind is Kind.TEXT_TO_TEXT:
            found.append(Encoded(index, first, (draw(),), 0))
        else:
            found.append(Encoded(index, first[:1], (first[1:],), 0))
    return found
