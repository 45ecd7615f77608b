"""Everything that a trial needs, loaded and checked once: the resident model, the inputs of tasks, the digests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dfmerge_studies.checkpoints.digest import ids_digest
from dfmerge_studies.checkpoints.load import ModelClass
from dfmerge_studies.checkpoints.reference import Checkpoint
from dfmerge_studies.checkpoints.resident import Resident
from dfmerge_studies.importance.task_fisher import ROW_BUDGET
from dfmerge_studies.objective.classes import Classes
from dfmerge_studies.objective.groups import Groups, layer_groups, parameter_groups
from dfmerge_studies.objective.inputs import check_labels, encode_for_all, read_split
from dfmerge_studies.objective.used_rows import held_out_examples, scored_examples
from dfmerge_studies.ranks import SOLO, Ranks
from dfmerge_studies.spec import StudySpec
from dfmerge_studies.tasks.encoding import Encoded, Kind
from dfmerge_studies.tasks.evaluate import TOKEN_BUDGET
from dfmerge_studies.tasks.metrics import TaskScore
from dfmerge_studies.tasks.splits import Split

_CLASSES = {
    Kind.TEXT_TO_TEXT: ModelClass.SEQ2SEQ,
    Kind.CAUSAL: ModelClass.CAUSAL,
    Kind.CLASSIFICATION: ModelClass.CLASSIFICATION,
    Kind.REGRESSION: ModelClass.CLASSIFICATION,
    Kind.MULTI_LABEL: ModelClass.CLASSIFICATION,
    Kind.TOKENS: ModelClass.TOKENS,
}

ROOMY = 4  # times as many tokens in a batch on a card that has memory for them: it computes while the host launches


@dataclass(frozen=True)
class Checkpoints:
    """The spec's models on disk.

    Attributes:
        base: theta_pre.
        experts: by name, in the order of the spec.
        kinds: how they answer, by task.
    """

    base: Checkpoint
    experts: Mapping[str, Checkpoint]
    kinds: Mapping[str, Kind]

    @property
    def model_class(self) -> ModelClass:
        """The auto class that reads them, the same for all tasks."""
        return _CLASSES[next(iter(self.kinds.values()))]

    @property
    def has_heads(self) -> bool:
        """Whether each task has a head of its own."""
        return self.model_class.has_head


@dataclass(frozen=True)
class TaskInputs:
    """One task, tokenised.

    Attributes:
        splits: examples per split name that is loaded.
        fisher: the inputs that importance is estimated on; the same for a whole study.
        validation: the whole validation split, which `limit` and the Fisher inputs are drawn from.
    """

    splits: dict[str, list[Encoded]]
    fisher: Sequence[Encoded]
    validation: Sequence[Encoded]


@dataclass
class Problem:
    """A loaded spec.

    Attributes:
        spec: the settings.
        checkpoints: where the models are.
        resident: the model in memory.
        tasks: tokenised inputs by task.
        pad_id: token id that batches are padded with.
        reference_scores: what base, experts and other whole models score, by row and split, as far as it is known.
        known_digests: of the data, by split, as far as they are known.
        expert_answers: what each task's own expert answers, by task and split, as far as it is known.
        ranks: the processes that have all this loaded and share the work.
        classes: names of the classes of each task's head, as far as they are known.
        part_entries: entries of the parameters whose importance and sums are in memory at a time; None for all.
        share: bytes of the device that `memory: auto` may take, of several processes on it; None for one alone.
        roomy: batches have `ROOMY` times the default number of tokens where the spec does not say how many.
    """

    spec: StudySpec
    checkpoints: Checkpoints
    resident: Resident
    tasks: dict[str, TaskInputs]
    pad_id: int
    ranks: Ranks = SOLO
    classes: Classes = field(default_factory=dict)
    reference_scores: dict[tuple[str, str], dict[str, TaskScore]] = field(default_factory=dict)
    known_digests: dict[str, dict[str, str]] = field(default_factory=dict)
    expert_answers: dict[tuple[str, str], list[Any]] = field(default_factory=dict)
    rehearsed: set[tuple[str, str]] = field(default_factory=set)
    part_entries: int | None = None
    share: int | None = None
    roomy: bool = False

    @property
    def row_budget(self) -> int:
        """Tokens in one chunk of rows whose importance is computed."""
        return self.spec.importance.row_budget or ROW_BUDGET * (ROOMY if self.roomy else 1)

    @property
    def token_budget(self) -> int:
        """Tokens in one batch that is scored."""
        return self.spec.token_budget or TOKEN_BUDGET * (ROOMY if self.roomy else 1)

    @property
    def kinds(self) -> Mapping[str, Kind]:
        """How the models answer, by task."""
        return self.checkpoints.kinds

    @property
    def base_digest(self) -> str:
        """Identity of the base."""
        return self.resident.base_digest

    @property
    def expert_digests(self) -> dict[str, str]:
        """Identity of every expert."""
        return dict(self.resident.expert_digests)

    @property
    def experts(self) -> list[str]:
        """Names of the experts, in the order of the spec."""
        return list(self.spec.experts)

    @cached_property
    def groups(self) -> Groups:
        """Names of the parameters of each group that has coefficients of its own; empty where experts have one each.

        Raises:
            InputError: the spec's groups do not fit the model.
        """
        return parameter_groups(self.spec, self.resident.model, self.resident.names)

    @cached_property
    def layers(self) -> Groups:
        """Names of the parameters of each layer."""
        return layer_groups(self.resident.model, self.resident.names)

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Entries of each parameter that some expert changed."""
        parameters = dict(self.resident.model.named_parameters())
        return {name: parameters[name].numel() for name in self.resident.names}

    def parts(self, names: Sequence[str] | None = None) -> list[list[str]]:
        """Names of parameters in the parts that importances are computed and merged in, in order.

        Args:
            names: those to split; those on which an expert differs by default.
        """
        names = list(self.resident.names if names is None else names)
        if self.part_entries is None or not names:
            return [names]
        parameters = dict(self.resident.model.named_parameters())
        return split_names({name: parameters[name].numel() for name in names}, self.part_entries)

    def fisher_indices(self) -> dict[str, list[int]]:
        """Validation rows of the Fisher inputs, by task; guards have none."""
        return {name: [example.index for example in self.tasks[name].fisher] for name in self.spec.aims}

    def data_digests(self, split: Split = "validation") -> dict[str, str]:
        """Identity of every task's inputs as the model sees them: prompts and tokenizer included.

        Args:
            split: of the tasks' data.
        """
        if split not in self.known_digests:
            self.known_digests[split] = {
                name: ids_digest(
                    [
                        *(e.index, e.input_ids, e.choices, e.label, e.token_type_ids),
                        *filter(None, (e.targets, e.words)),
                        *([e.question.identity] if e.question is not None else []),
                    ]
                    for e in self.examples(name, split)
                )
                for name in self.spec.tasks_on(split)
            }
        return self.known_digests[split]

    def examples(self, task: str, split: Split) -> list[Encoded]:
        """Tokenised rows of the validation or the test split, the latter loaded when first asked for.

        Args:
            task: name of the task.
            split: of the tasks' data.

        Raises:
            InputError: the task names no test split, or it cannot be read.
        """
        splits = self.tasks[task].splits
        if split not in splits:
            rows = read_split(self.spec, task, split, self.classes)
            found = encode_for_all(self.spec, task, rows, self.resident, self.kinds[task])
            check_labels(self.spec, task, found, self.resident.heads)
            splits[split] = scored_examples(self.spec, task, split, found, self.classes)
        return splits[split]

    def tasks_of(self, split: Split) -> list[str]:
        """Tasks that are scored on a split: those that have it, of held-out rows those that have some."""
        return [name for name in self.spec.tasks_on(split) if split != "holdout" or self.examples(name, split)]

    def hold_out_(self, share: float) -> None:
        """Let the split "holdout" be rows of the validation split that the search does not see.

        Args:
            share: how many, as a share of those that it sees; as many as there are where that is more.
        """
        for name, task in self.tasks.items():
            found = held_out_examples(self.spec, name, task.validation, self.classes, share)
            if task.splits.get("holdout") == found:
                continue
            task.splits["holdout"] = found
            self.known_digests.pop("holdout", None)
            for known in (self.reference_scores, self.expert_answers):
                for key in [key for key in known if key[1] == "holdout"]:
                    del known[key]


def split_names(entries: Mapping[str, int], most: int) -> list[list[str]]:
    """Names in runs of at most so many entries, as even as their sizes allow; one that is larger is alone.

    Args:
        entries: of each name.
        most: entries of one part.
    """
    wanted = -(-sum(entries.values()) // max(1, -(-sum(entries.values()) // most)))
    parts: list[list[str]] = [[]]
    size = 0
    for name, own in entries.items():
        if parts[-1] and (size + own > most or size >= wanted):
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += own
    return parts
