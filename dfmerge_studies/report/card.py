"""The model card, in the Hub's format, and `dfmerge.json`, the whole provenance of a merged model."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dfmerge_studies.checkpoints.resident import head_classes
from dfmerge_studies.checkpoints.write import PROVENANCE
from dfmerge_studies.methods import Coefficients, label, method_named
from dfmerge_studies.objective.problem import Problem
from dfmerge_studies.points import Point, fine_name, groups_json
from dfmerge_studies.report.adapters import AdapterExport
from dfmerge_studies.report.checked import Checked
from dfmerge_studies.report.origins import CARD as CARD
from dfmerge_studies.report.origins import Origin, license_lines, origin_of, public_name, shared_license
from dfmerge_studies.report.renderings import task_lines
from dfmerge_studies.report.standings import BASE, Scored, Standings, side_by_side
from dfmerge_studies.report.tables import selection_text, sentence
from dfmerge_studies.spec import StudySpec
from dfmerge_studies.study import provenance
from dfmerge_studies.study.winner import Selection
from dfmerge_studies.tasks.encoding import Kind
from dfmerge_studies.tasks.metrics import TaskScore
from dfmerge_studies.tasks.settings import HarnessTask
from dfmerge_studies.tasks.splits import Split

PAPER = "https://arxiv.org/abs/2504.18992"
_PIPELINES = {
    Kind.TEXT_TO_TEXT: "text2text-generation",
    Kind.CAUSAL: "text-generation",
    Kind.CLASSIFICATION: "text-classification",
    Kind.REGRESSION: "text-classification",
    Kind.MULTI_LABEL: "text-classification",
    Kind.TOKENS: "token-classification",
}


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
        base_scores: per split, of the base; nothing where there are no guards, which are compared with it.
        selection: how its trial was named the winner, None where it was not.
        results: the scores with the rows that they rest on, as far as these are known.
        dtype: that the weights are stored in.
        checked: scores of the weights as they are stored, where that is another type than they were merged in.
        verdict: what its study has come to, a line each; nothing for any other trial than the winner.
        adapter: what an adapter keeps of the merge, None for a whole model.
    """

    method: str
    point: Point
    trial: int | None = None
    value: float | None = None
    scores: Mapping[Split, Mapping[str, float]] = field(default_factory=dict)
    expert_scores: Mapping[Split, Mapping[str, float]] = field(default_factory=dict)
    base_scores: Mapping[Split, Mapping[str, float]] = field(default_factory=dict)
    selection: Selection | None = None
    results: Mapping[Split, Mapping[str, TaskScore]] = field(default_factory=dict)
    dtype: str = "float32"
    checked: Checked | None = None
    verdict: Sequence[str] = ()
    adapter: AdapterExport | None = None

    def only(self, task: str) -> Merged:
        """The same with the scores of one task."""
        scores = {split: _only(found, task) for split, found in self.scores.items()}
        experts = {split: _only(found, task) for split, found in self.expert_scores.items()}
        base = {split: _only(found, task) for split, found in self.base_scores.items()}
        checked = self.checked.only(task) if self.checked is not None else None
        return replace(self, scores=scores, expert_scores=experts, base_scores=base, checked=checked, verdict=())


def _only(scores: Mapping[str, float], task: str) -> dict[str, float]:
    return {task: scores[task]} if task in scores else {}


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
        **groups_json(merged.point),
        **merged.point.parameters,
        "scores": merged.scores,
        "expert_scores": merged.expert_scores,
        **({"base_scores": merged.base_scores} if merged.base_scores else {}),
        "dtype": merged.dtype,
        **({"adapter": merged.adapter.described()} if merged.adapter is not None else {}),
        "checked": merged.checked.described() if merged.checked is not None else None,
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


def model_card(problem: Problem, spec: StudySpec, merged: Merged, task: str | None = None) -> str:
    """A card in the Hub's format: metadata, coefficients, scores, how to make it again.

    Args:
        problem: models and data in memory.
        spec: the settings.
        merged: what was merged, and what is known of it.
        task: whose own folder the card is for; None for the directory of all tasks.
    """
    if task is not None:
        merged = merged.only(task)
    from huggingface_hub import EvalResult, ModelCardData

    scores = _shown_scores(merged)
    splits: Sequence[Split] = list(scores) or ["validation"]
    pipeline = _PIPELINES[problem.kinds[task or next(iter(problem.kinds))]]
    results = [
        EvalResult(
            task_type=pipeline,
            task_name=task,
            dataset_type=_dataset(spec, task),
            dataset_config=task,  # results of one type, config and split would be thrown together
            dataset_name=task,
            dataset_split=getattr(spec.tasks[task], f"{split}_split") or split,
            metric_type=spec.metrics(split)[task].name,
            metric_value=round(score, 4),
        )
        for split, by_task in scores.items()
        for task, score in by_task.items()
    ]
    origins = _origins(problem)
    models = list(dict.fromkeys(model for origin in origins.values() for model in origin.models))
    extra: dict[str, Any] = shared_license(origins)
    data = ModelCardData(
        **extra,
        base_model=models or None,
        base_model_relation="merge" if models else None,
        library_name="transformers" if merged.adapter is None else "peft",
        pipeline_tag=pipeline,
        tags=list(dict.fromkeys(["merge", "dfmerge", "model-merging", "df-merge", spec.method])),
        metrics=sorted({m.name for split in splits for m in spec.metrics(split).values()}),
        model_name=spec.name,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{_body(problem, spec, merged, task)}"


def _origins(problem: Problem) -> dict[str, Origin]:
    """Of the base and the experts, by what they are."""
    found, root = problem.checkpoints, problem.spec.root
    return {
        "base": origin_of(found.base, root),
        **{name: origin_of(expert, root) for name, expert in found.experts.items()},
    }


def _shown_scores(merged: Merged) -> dict[Split, Mapping[str, float]]:
    """Scores by split: of the weights as they are stored, where these were scored."""
    stored: dict[Split, Mapping[str, float]] = {} if merged.checked is None else {"validation": merged.checked.scores}
    return {**merged.scores, **stored}


def _dataset(spec: StudySpec, task: str) -> str:
    """The Hub's name of a task's data, or that of the reader of its files."""
    settings = spec.tasks[task]
    if isinstance(settings, HarnessTask):
        return settings.lm_eval
    path = str(settings.dataset["path"])
    return public_name(path, local=(spec.root / path).exists())


def _body(problem: Problem, spec: StudySpec, merged: Merged, task: str | None) -> str:
    origins = _origins(problem)
    origin = f"trial {merged.trial} of the study `{spec.name}`" if merged.trial is not None else "a single merge"
    lines = [
        f"# {spec.name}",
        "",
        f"{len(spec.experts)} fine-tuned models merged into one with `{merged.method}` ({origin}), without "
        f"training, by [Dynamic Fisher-weighted Merging]({PAPER}) as implemented in `dfmerge-studies`.",
        "",
        *_verdict(merged),
        "## Coefficients",
        "",
        "| expert | model | task | coefficient |",
        "|---|---|---|---|",
        *(
            f"| {name} | `{origins[name].name}` | {expert.task or 'all'} | {merged.point.coefficients[name]:.6g} |"
            for name, expert in spec.experts.items()
        ),
        "",
        f"Base: `{origins['base'].name}`",
        "",
        *_groups(merged),
        *license_lines(origins),
        *_parameters(spec, merged),
        *_score_table(spec, merged),
        "## How to use",
        "",
        "```python",
        *_usage_lines(problem, merged, task),
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


def _verdict(merged: Merged) -> list[str]:
    """What the study has come to."""
    lines = list(map(sentence, merged.verdict))
    return [f"**{lines[0]}**", "", *(f"- {line}" for line in lines[1:]), *([""] if lines[1:] else [])] if lines else []


def _groups(merged: Merged) -> list[str]:
    """Coefficients by expert and group of parameters, whose means the table above has."""
    if not merged.point.groups:
        return []
    names = list(next(iter(merged.point.groups.values())))
    rows = [
        f"| {expert} | {' | '.join(f'{own[name]:.6g}' for name in names)} |"
        for expert, own in merged.point.groups.items()
    ]
    head = ["These are means. Each group of parameters has its own:", "", f"| expert | {' | '.join(names)} |"]
    return [*head, "|---" * (1 + len(names)) + "|", *rows, ""]


def _parameters(spec: StudySpec, merged: Merged) -> list[str]:
    """The method's own parameters, and the seed that some of them are drawn with."""
    values = [f"{label(name).capitalize()}: {value:g}" for name, value in merged.point.parameters.items()]
    return [f"{', '.join(values)}, seed {spec.search.seed}", ""] if values else []


def _command(spec: StudySpec, merged: Merged) -> str:
    fine = {fine_name(expert, g): v for expert, own in merged.point.groups.items() for g, v in own.items()}
    coefficients = ",".join(f"{name}={value!r}" for name, value in (fine or merged.point.coefficients).items())
    method = method_named(merged.method)
    chosen = "" if method.coefficients is Coefficients.FISHER_TRACE else f" --coefficients {shlex.quote(coefficients)}"
    command = f"dfmerge merge SPEC.yaml --out DIR --method {merged.method}{chosen}"
    own = [f"--{name.replace('_', '-')} {value!r}" for name, value in merged.point.parameters.items()]
    return " ".join([command, *own, f"--set search.seed={spec.search.seed}"]) if own or not chosen else command


def _score_table(spec: StudySpec, merged: Merged) -> list[str]:
    scores = _shown_scores(merged)
    if not scores:
        return _precision_lines(spec, merged)
    results = dict(merged.results)
    if merged.checked is not None:
        results["validation"] = merged.checked.written
    rows = [Scored("merged", scores, results=results), Scored("own expert", merged.expert_scores, compete=False)]
    if merged.base_scores:
        rows.append(Scored(BASE, merged.base_scores, compete=False))
    tables = side_by_side(rows, {split: spec.metrics(split).only(found) for split, found in scores.items()})
    what = "; ".join(f"{split}: {table.metrics.heading}" for split, table in tables.items())
    lines = [
        "## Scores",
        "",
        *task_lines(tables),
        "",
        f"{sentence(what)} Coefficients were chosen on the validation split.",
        "",
        *_guards(tables),
        *_named(spec, merged),
        *_precision_lines(spec, merged),
    ]
    if any(not metric.labels for table in tables.values() for metric in table.metrics.values()):
        lines += ["Agreement is the share of inputs that the model answers as the task's own expert does.", ""]
    return lines


def _guards(tables: Mapping[Split, Standings]) -> list[str]:
    """What guards are, and whether the merge keeps them."""
    lines = []
    for split, table in tables.items():
        for name, found in table.guards_of(table.rows[0]).items():
            verb = "loses" if found.drop > 0 else "gains"
            lines.append(
                f"- {name} on {split}: {verb} {abs(found.drop):.1f} points against the base, "
                f"{found.allowed:g} may be lost{'' if found.kept else ': NOT kept'}"
            )
    what = "Guards are tasks that no expert stands for, on which the merge should keep what the base can:"
    return [what, "", *lines, ""] if lines else []


def _named(spec: StudySpec, merged: Merged) -> list[str]:
    """How the trial was named the winner."""
    if merged.selection is None:
        return []
    text = selection_text(merged.selection.described(), spec.metrics("validation"))
    return [f"Trial {merged.trial}, on validation: {text}.", ""]


def _precision_lines(spec: StudySpec, merged: Merged) -> list[str]:
    """In which form the weights are stored, and which of the scores are of that."""
    if merged.adapter is not None:
        return [f"{merged.adapter.line()}. Scores on validation are of the adapter.", ""]
    if merged.checked is None:
        return [f"The weights are stored as {merged.dtype}.", ""]
    also = f" Scores on test are of the merge in {spec.dtype}." if "test" in merged.scores else ""
    told = map(sentence, merged.checked.warnings())
    text = (
        f"The weights were merged in {spec.dtype} and are stored as {merged.dtype}; "
        "scores on validation are of the latter."
    )
    return [" ".join([text + also, *told]), ""]


def _usage_lines(problem: Problem, merged: Merged, task: str | None) -> list[str]:
    if merged.adapter is not None:
        return _usage_of_adapter(problem, task)
    return _usage(problem) if task is None else _usage_of_task(problem, task)


def _usage_of_adapter(problem: Problem, task: str | None) -> list[str]:
    auto = problem.checkpoints.model_class.value.replace("AutoModel", "AutoPeftModel")
    heads = problem.resident.heads
    folder = "DIR" if task is not None or not heads else "DIR/TASK"
    classes = (
        f", num_labels={head_classes(heads[task])}" if task is not None else ", num_labels=CLASSES" if heads else ""
    )
    return [
        f"from peft import {auto}",
        "from transformers import AutoTokenizer",
        "",
        f'model = {auto}.from_pretrained("{folder}"{classes})  # finds the base that adapter_config.json names',
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}")',
    ]


def _usage(problem: Problem) -> list[str]:
    auto = problem.checkpoints.model_class.value
    if not problem.resident.heads:
        return [
            f"from transformers import {auto}, AutoTokenizer",
            "",
            f'model = {auto}.from_pretrained("DIR")',
            'tokenizer = AutoTokenizer.from_pretrained("DIR")',
        ]
    return [
        "from safetensors.torch import load_file",
        f"from transformers import {auto}, AutoTokenizer",
        "",
        'head = load_file("DIR/heads/TASK.safetensors")  # one head per task, never merged',
        "classes = [tensor for name, tensor in head.items() if name.endswith('weight')][-1].shape[0]",
        'tokenizer = AutoTokenizer.from_pretrained("DIR")',
        f'model = {auto}.from_pretrained("DIR", num_labels=classes)',
        "model.load_state_dict(head, strict=False)",
    ]


def _usage_of_task(problem: Problem, task: str) -> list[str]:
    pair = getattr(problem.spec.tasks[task], "doc_to_text_pair", None) is not None
    text = f"a text of the task {task}"
    return [
        "from transformers import pipeline",
        "",
        f'classify = pipeline("{_PIPELINES[problem.kinds[task]]}", "DIR")',
        f'print(classify({{"text": "{text}", "text_pair": "another"}}))' if pair else f'print(classify("{text}"))',
    ]
