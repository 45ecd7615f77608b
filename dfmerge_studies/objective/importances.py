"""The importance of one expert's parameters at one coefficient: from the cache, or from its tasks' Fisher inputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dfmerge_studies.checkpoints.digest import ids_digest, json_digest
from dfmerge_studies.checkpoints.spread import devices_of
from dfmerge_studies.errors import InputError
from dfmerge_studies.importance.cache import FisherCache, FisherKey, Shelf
from dfmerge_studies.importance.factors import block_names
from dfmerge_studies.importance.nodes import masks_of
from dfmerge_studies.importance.task_fisher import task_fisher, whole
from dfmerge_studies.methods import UNSCALED, Estimator, Importance, Method
from dfmerge_studies.objective.in_parts import Float32, InParts, check_parts
from dfmerge_studies.objective.problem import Problem
from dfmerge_studies.points import Coefficient
from dfmerge_studies.progress import Progress, counted, silent
from dfmerge_studies.tasks.answers import writer_along
from dfmerge_studies.tasks.encoding import HEADED, Kind
from dfmerge_studies.tasks.generation import Writer
from dfmerge_studies.tasks.sampling import torch_generator


def check_importance(problem: Problem, method: Method) -> Estimator:
    """The estimator of a method's importance, which must know the model's layers if it works by layers.

    Raises:
        InputError: naming the layers that it does not know, or a task of texts, among which no expectation is taken.
    """
    estimator = Estimator(method.estimator_for(problem.spec.importance.estimator))
    if method.importance.blocks is not None:
        _check_blocks(problem, method, estimator)
    texts = [task for task in problem.tasks if _has_no_choices(problem, task)]
    if texts and estimator is not Estimator.EMPIRICAL and method.importance is not Importance.UNIFORM:
        raise InputError(
            f"the estimator {estimator} takes an expectation over choices, and the texts of {texts[0]} have none",
            where=problem.spec.where("importance.estimator"),
            hint="Use empirical, which takes the word pieces of the texts themselves",
        )
    _check_targets(problem, method, estimator)
    if estimator is Estimator.MASK_NODES and method.importance is not Importance.UNIFORM:
        masks_of(problem.resident.model)
    check_parts(problem, method, estimator)
    return estimator


def _check_blocks(problem: Problem, method: Method, estimator: Estimator) -> None:
    spec, resident = problem.spec, problem.resident
    if estimator is Estimator.MASK_NODES:
        what, field = "has no blocks of mask nodes", "importance.estimator"
    elif method.scale_for(spec.importance.scale) != UNSCALED:
        what, field = "has no mean or power of a block's entries", "importance"
    elif not block_names(resident.model, resident.names):
        what, field = "finds no linear layer that an expert changed", "experts"
    else:
        return
    raise InputError(
        f"the method {method.name!r} {what}", where=spec.where(field), hint="Leave it out, or use df-merge"
    )


def _check_targets(problem: Problem, method: Method, estimator: Estimator) -> None:
    """Refuse questions of lm-evaluation-harness whose target is no text, where importance goes along it."""
    if estimator is not Estimator.EMPIRICAL or method.importance is Importance.UNIFORM:
        return
    for task, inputs in problem.tasks.items():
        odd = next((each.index for each in inputs.fisher if each.question is not None and not each.choices), None)
        if odd is not None:
            raise InputError(
                f"row {odd} has no target text that importance could be estimated along",
                where=problem.spec.where(f"tasks.{task}"),
                hint="Use estimator: sampled, which goes along what the model writes, or a method without importance",
            )


def _has_no_choices(problem: Problem, task: str) -> bool:
    """Whether an input of a task has nothing to choose among, but a text of the data."""
    if writer_for(problem, task) is not None:
        return False
    inputs = problem.tasks[task].fisher
    harness = any(each.question is not None and len(each.choices) < 2 for each in inputs)
    return harness or any(each.text is not None for each in inputs)


def writer_for(problem: Problem, task: str) -> Writer | None:
    """How a model writes the texts that a task's importance is drawn along; None where it writes none.

    Args:
        problem: what is loaded.
        task: name of the task.
    """
    return writer_along(problem.spec.tasks[task], problem.resident.tokenizer, problem.tasks[task].fisher)


# Kinds that a key names: one head may be taken for either of two. The first kinds had no name in it.
_NAMED_IN_KEYS = HEADED - {Kind.CLASSIFICATION}
Uses = Callable[[int, Coefficient], float]  # from an expert's position and its coefficient: see `Importances`


def asked_once(index: int, coefficient: Coefficient) -> float:
    """Every Fisher will be asked for once more."""
    return 1.0


class Importances:
    """Importances of a problem's experts; those that are computed overwrite the resident model.

    Args:
        problem: the loaded spec.
        method: row of the method table.
        cache: where they are kept, or None; a cache by itself keeps all that is computed.
        uses: how often a trial's Fisher will be asked for again, from the position of the expert and its coefficient.

    Raises:
        InputError: the method's importance cannot be estimated for this kind of model.
    """

    def __init__(
        self,
        problem: Problem,
        method: Method,
        cache: Shelf | FisherCache | None,
        uses: Uses = asked_once,
    ) -> None:
        self.problem = problem
        self.shelf = cache if isinstance(cache, Shelf) else Shelf(cache)
        self._uses = uses
        self.estimator = check_importance(problem, method)
        self._blocks = method.importance.blocks
        # Rounded to 16 bits, moments have negative eigenvalues.
        self._rounding = problem.spec.importance.rounding if self._blocks is None else "float32"

    def at(
        self, index: int, coefficient: Coefficient, names: Sequence[str] | None = None, *, progress: Progress = silent
    ) -> tuple[Mapping[str, Tensor], bool]:
        """Fisher information of one expert at theta_pre + coefficient * tau, from the cache where it is there.

        An expert without a task of its own is weighed by the mean over all tasks.

        Args:
            index: position of the expert.
            coefficient: lambda, one number or one per parameter.
            names: parameters; those on which an expert differs by default.
            progress: told how far it is.

        Returns:
            The values by parameter name, in float32, each made when it is asked for; and whether they came from the
            cache.
        """
        resident, ranks = self.problem.resident, self.problem.ranks
        names = list(resident.names if names is None else names)
        if len(self.problem.parts(names)) > 1:
            return InParts(self, names, progress).whole(index, coefficient)
        key = self.key(index, coefficient, names)
        stored = ranks.from_leader(lambda: self.shelf.get(key))  # what the leader has or lacks, all have or lack
        if stored is not None:
            there = {name: value.to(resident.place_of(name)) for name, value in stored.items()}
            return self._by_parameter(there, names), True
        start = time.perf_counter()
        values = self.computed(index, coefficient, names, progress=progress)

        def keep() -> dict[str, Tensor]:
            rounded = self.rounded(values)
            self.put(index, coefficient, key, rounded, seconds=time.perf_counter() - start)
            return rounded

        kept = ranks.from_leader(keep)
        assert kept is not None
        values.clear()
        return self._by_parameter(kept, names), False

    def computed(
        self,
        index: int,
        coefficient: Coefficient,
        names: Sequence[str],
        *,
        part: str = "",
        progress: Progress = silent,
    ) -> dict[str, Tensor]:
        """The mean of the Fishers of an expert's tasks at theta_pre + coefficient * tau; right on the leader alone.

        Args:
            index: position of the expert.
            coefficient: lambda.
            names: parameters.
            part: which part of all parameters they are, to be shown.
            progress: told how far it is.
        """
        resident, spec, expert = self.problem.resident, self.problem.spec, self.problem.experts[index]
        resident.load_scaled_(index, coefficient)
        tasks = self._fisher_tasks(index)
        values: dict[str, Tensor] = {}
        for task in tasks:
            resident.use_head_(task)
            inputs = self.problem.tasks[task].fisher
            result = task_fisher(
                resident.model,
                self.problem.kinds[task],
                inputs,
                pad_id=self.problem.pad_id,
                names=names,
                estimator=self._estimator(task),
                writer=self._writer(task),
                generator=torch_generator(spec.search.seed, "sampled", task),  # the same draws for every part
                row_budget=self.problem.row_budget,
                compact=True,
                blocks=self._blocks,
                progress=counted(progress, f"{expert}: fisher{part}", len(inputs)),
                ranks=self.problem.ranks,
            )
            for name in list(result.values):
                value = result.values.pop(name).div_(len(tasks))
                values[name] = values[name].add_(value) if name in values else value
        return values

    def rounded(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Values in the stored type, taken out of `values`.

        What is used now and what the cache gives later must be the same, or resuming would change the study.
        """
        dtype = getattr(torch, self._rounding)
        found = {name: values.pop(name).to(dtype) for name in list(values)}
        for device in devices_of(self.problem.resident.model):
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # once per Fisher: its time is what keeping it must be worth
        return found

    def put(
        self, index: int, coefficient: Coefficient, key: FisherKey, values: Mapping[str, Tensor], *, seconds: float
    ) -> None:
        """Hand a Fisher to the shelf.

        Args:
            index: position of the expert.
            coefficient: lambda.
            key: of the values.
            values: as `rounded` gives them.
            seconds: that computing them took.
        """
        self.shelf.put(key, values, seconds=seconds, uses=self._uses(index, coefficient))

    def _writer(self, task: str) -> Writer | None:
        return writer_for(self.problem, task)

    def _estimator(self, task: str) -> Estimator:
        """The estimator as it is for a task."""
        return self.estimator if self._writer(task) is None else self.estimator.of_texts

    def key(self, index: int, coefficient: Coefficient, names: Sequence[str]) -> FisherKey:
        """Identity of a Fisher."""
        problem = self.problem
        expert = problem.experts[index]
        labelled = self.estimator is Estimator.EMPIRICAL
        tasks = self._fisher_tasks(index)
        estimators = dict.fromkeys(map(self._estimator, tasks))
        inputs = {
            task: [
                ids_digest(
                    [
                        e.input_ids,
                        e.choices,
                        e.token_type_ids,
                        e.label if labelled else None,
                        *([e.words] if e.words else []),
                    ]
                    for e in problem.tasks[task].fisher
                ),
                self._head_owner(task),
                *([[writer.max_gen_toks, writer.until]] if (writer := self._writer(task)) is not None else []),
                *([kind.value] if (kind := problem.kinds[task]) in _NAMED_IN_KEYS else []),
            ]
            for task in tasks
        }
        return FisherKey(
            base=problem.base_digest,
            expert=problem.expert_digests[expert],
            expert_name=expert,
            coefficient=_exactly(coefficient),
            estimator=" ".join(filter(None, (self._blocks, " and ".join(estimators)))),
            inputs=json_digest(inputs),
            indices={task: rows for task, rows in problem.fisher_indices().items() if task in tasks},
            seed=problem.spec.search.seed if any(each.draws for each in estimators) else None,
            parameters=json_digest(list(names)),
            compute_dtype=problem.spec.dtype,
            dtype=self._rounding,
        )

    def _by_parameter(self, stored: Mapping[str, Tensor], names: Sequence[str]) -> Mapping[str, Tensor]:
        """Importances as the cache holds them, which is by mask for mask nodes, as those of parameters, in float32."""
        if self.estimator is not Estimator.MASK_NODES:
            return Float32(stored)
        values = {name: value.float() for name, value in stored.items()}
        return whole(self.problem.resident.model, values, estimator=self.estimator, names=names)

    def _fisher_tasks(self, index: int) -> list[str]:
        task = self.problem.spec.experts[self.problem.experts[index]].task
        return [task] if task is not None else self.problem.spec.aims

    def _head_owner(self, task: str) -> str | None:
        """Digest of the expert whose head a task uses."""
        if task not in self.problem.resident.heads:
            return None
        owners = (name for name, expert in self.problem.spec.experts.items() if expert.task == task)
        return self.problem.expert_digests[next(owners)]


def _exactly(coefficient: Coefficient) -> str:
    """Lambda as a key has it, to the last bit: one number, or a digest of one per parameter."""
    if isinstance(coefficient, Mapping):
        return f"by parameter {json_digest({name: float(lam).hex() for name, lam in sorted(coefficient.items())})}"
    return float(coefficient).hex()
