"""The model card, in the Hub's format, and `dfmerge.json`, the whole provenance of a merged model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfmerge_studies.checkpoints.write import PROVENANCE
from dfmerge_studies.methods import METHODS, Point, label
from dfmerge_studies.objective.problem import Problem
from dfmerge_studies.report.renderings import task_lines
from dfmerge_studies.report.standings import Scored, side_by_side
from dfmerge_studies.report.tables import selection_text
from dfmerge_studies.spec import StudySpec
from dfmerge_studies.study import provenance
from dfmerge_studies.study.winner import Selection
from dfmerge_studies.tasks.splits import Split

CARD = "README.md"
PAPER = "https://arxiv.org/abs/2504.18992"


@dataclass(frozen=True)
class Merged:
    """A merge, as its card tells of it.

    Attributes:
        method: row of the method table.
        point: coefficients, and the method's own parameters.
        trial: number of the trial, None for a merge outside any study.
        value: what the trial was worth.
        scores: per split, per task.
        expert_scores: per split, of each task's own expert.
        selection: how its trial was named the winner, None where it was not.
    """

    method: str
    point: Point
    trial: int | None = None
    value: float | None = None
    scores: Mapping[Split, Mapping[str, float]] = field(default_factory=dict)
    expert_scores: Mapping[Split, Mapping[str, float]] = field(default_factory=dict)
    selection: Selection | None = None


def provenance_json(problem: Problem, spec: StudySpec, merged: Merged) -> str:
    """Everything that is needed to make the same weights again, as JSON."""
    content: dict[str, Any] = {
        "format": 1,
        "study": spec.name if merged.trial is not None else None,
        "trial": merged.trial,
        "value": merged.value,
        "selection": merged.selection.described() if merged.selection is not None else None,
        "method": merged.method,
        "coefficients": dict(merged.point.coefficients),
        "coefficients_hex": {name: float(value).hex() for name, value in merged.point.coefficients.items()},
        **merged.point.parameters,
        "scores": merged.scores,
        "expert_scores": merged.expert_scores,
        "base": {"reference": spec.base, "digest": problem.base_digest},
        "experts": {
            name: {"reference": expert.model, "task": expert.task, "digest": problem.expert_digests[name]}
            for name, expert in spec.experts.items()
        },
        "data": problem.data_digests(),
        "fisher_indices": problem.fisher_indices(),
        "spec": provenance.describe_spec(spec),
        "versions": provenance.library_versions(),
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def model_card(problem: Problem, spec: StudySpec, merged: Merged) -> str:
    """A card in the Hub's format: metadata, coefficients, scores, how to make it again."""
    from huggingface_hub import EvalResult, ModelCardData

    splits: Sequence[Split] = list(merged.scores) or ["validation"]
    results = [
        EvalResult(
            task_type="text-classification",
            task_name=task,
            dataset_type=str(spec.tasks[task].dataset["path"]),
            dataset_config=task,  # results of one type, config and split would be thrown together
            dataset_name=task,
            dataset_split=spec.tasks[task].validation_split if split == "validation" else spec.tasks[task].test_split,
            metric_type=spec.metrics(split)[task].name,
            metric_value=round(score, 4),
        )
        for split, scores in merged.scores.items()
        for task, score in scores.items()
    ]
    data = ModelCardData(
        base_model=[_public(reference) for reference in (spec.base, *(e.model for e in spec.experts.values()))],
        library_name="transformers",
        tags=["merge", "model-merging", "df-merge", spec.method],
        metrics=sorted({m.name for split in splits for m in spec.metrics(split).values()}),
        model_name=spec.name,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{_body(problem, spec, merged)}"


def _public(reference: str) -> str:
    """A model as other people may read its name: as the spec has it, but without the folders of one machine."""
    return Path(reference).name if Path(reference).expanduser().is_absolute() else reference


def _body(problem: Problem, spec: StudySpec, merged: Merged) -> str:
    origin = f"trial {merged.trial} of the study `{spec.name}`" if merged.trial is not None else "a single merge"
    lines = [
        f"# {spec.name}",
        "",
        f"{len(spec.experts)} fine-tuned models merged into one with `{merged.method}` ({origin}), without "
        f"training, by [Dynamic Fisher-weighted Merging]({PAPER}) as implemented in `dfmerge-studies`.",
        "",
        "## Coefficients",
        "",
        "| expert | model | task | coefficient |",
        "|---|---|---|---|",
        *(
            f"| {name} | `{_public(expert.model)}` | {expert.task or 'all'} | {merged.point.coefficients[name]:.6g} |"
            for name, expert in spec.experts.items()
        ),
        "",
        f"Base: `{_public(spec.base)}`",
        "",
        *_parameters(spec, merged),
        *_score_table(spec, merged),
        "## How to use",
        "",
        "```python",
        *_usage(problem),
        "```",
        "",
        "## How to make it again",
        "",
        "```sh",
        f"pip install dfmerge-studies=={provenance.library_versions().get('dfmerge-studies', '')}",
        _command(spec, merged),
        "```",
        "",
        f"The spec, the digests of all weights and data, the rows that Fisher information was estimated on and the "
        f"versions of the libraries are in [`{PROVENANCE}`]({PROVENANCE}).",
        "",
    ]
    return "\n".join(lines)


def _parameters(spec: StudySpec, merged: Merged) -> list[str]:
    """The method's own parameters, and the seed that some of them are drawn with."""
    values = [f"{label(name).capitalize()}: {value:g}" for name, value in merged.point.parameters.items()]
    return [f"{', '.join(values)}, seed {spec.search.seed}", ""] if values else []


def _command(spec: StudySpec, merged: Merged) -> str:
    coefficients = ",".join(f"{name}={value!r}" for name, value in merged.point.coefficients.items())
    command = f"dfmerge merge SPEC.yaml --out DIR --method {merged.method} --coefficients {coefficients}"
    own = [f"{each.flag} {merged.point.parameters[each.name]!r}" for each in METHODS[merged.method].parameters]
    return " ".join([command, *own, f"--set search.seed={spec.search.seed}"]) if own else command


def _score_table(spec: StudySpec, merged: Merged) -> list[str]:
    if not merged.scores:
        return []
    rows = [Scored("merged", merged.scores), Scored("own expert", merged.expert_scores, compete=False)]
    tables = side_by_side(rows, {split: spec.metrics(split) for split in merged.scores})
    what = "; ".join(f"{split}: {table.metrics.heading}" for split, table in tables.items())
    lines = [
        "## Scores",
        "",
        *task_lines(tables),
        "",
        f"{what[0].upper()}{what[1:]}. Coefficients were chosen on the validation split.",
        "",
        *_named(spec, merged),
    ]
    if any(not metric.labels for table in tables.values() for metric in table.metrics.values()):
        lines += ["Agreement is the share of inputs that the model answers as the task's own expert does.", ""]
    return lines


def _named(spec: StudySpec, merged: Merged) -> list[str]:
    """How the trial was named the winner."""
    if merged.selection is None:
        return []
    text = selection_text(merged.selection.described(), spec.metrics("validation"))
    return [f"Trial {merged.trial}, on validation: {text}.", ""]


def _usage(problem: Problem) -> list[str]:
    if not problem.resident.heads:
        auto = problem.checkpoints.model_class.value
        return [
            f"from transformers import {auto}, AutoTokenizer",
            "",
            f'model = {auto}.from_pretrained("DIR")',
            'tokenizer = AutoTokenizer.from_pretrained("DIR")',
        ]
    return [
        "from safetensors.torch import load_file",
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
        "",
        'head = load_file("DIR/heads/TASK.safetensors")  # one classification head per task, never merged',
        "classes = [tensor for name, tensor in head.items() if name.endswith('weight')][-1].shape[0]",
        'tokenizer = AutoTokenizer.from_pretrained("DIR")',
        'model = AutoModelForSequenceClassification.from_pretrained("DIR", num_labels=classes)',
        "model.load_state_dict(head, strict=False)",
    ]
