"""Dynamic Fisher-weighted Merging of fine-tuned language models, as Optuna studies.

The commands are thin skins over what is here:

    StudySpec.from_yaml(file)            read and validate a spec
    open_study(spec).run()               create the study or join it, and work until its total is reached
    load_problem(spec)                   models and data of a spec, in memory
    merge(problem, coefficients)         one merge, scored; the model stays in `problem.resident.model`
    diagonal_fisher(model, forward, inputs)    exact diagonal Fisher of any model under any loss
    evaluate_model(spec, model, split)   scores of any model directory
    merge_models(base, experts, coefficients)    models in memory, merged into a new one
    optimize_merge(base, experts, score)         a study of models in memory
    compare(spec, methods, seeds=3)      methods side by side, each a study per seed

Nothing heavy is imported before it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dfmerge_studies.errors import DFMergeError, InputError, RunError
    from dfmerge_studies.importance.fisher import diagonal_fisher
    from dfmerge_studies.objective.evaluate import evaluate_model
    from dfmerge_studies.objective.in_memory import merge_models
    from dfmerge_studies.objective.loading import load_problem
    from dfmerge_studies.objective.merger import Merger, Outcome
    from dfmerge_studies.objective.once import merge
    from dfmerge_studies.objective.problem import Problem
    from dfmerge_studies.report.export import export_merge, export_trial
    from dfmerge_studies.spec import StudySpec
    from dfmerge_studies.study.comparison import Comparison, compare
    from dfmerge_studies.study.in_memory import MergeResult, optimize_merge
    from dfmerge_studies.study.session import Session, open_study
    from dfmerge_studies.tasks.own import add_metric

__all__ = [
    "Comparison",
    "DFMergeError",
    "InputError",
    "MergeResult",
    "Merger",
    "Outcome",
    "Problem",
    "RunError",
    "Session",
    "StudySpec",
    "add_metric",
    "compare",
    "diagonal_fisher",
    "evaluate_model",
    "export_merge",
    "export_trial",
    "load_problem",
    "merge",
    "merge_models",
    "open_study",
    "optimize_merge",
]

_HOMES = {
    "errors": ("DFMergeError", "InputError", "RunError"),
    "importance.fisher": ("diagonal_fisher",),
    "objective.evaluate": ("evaluate_model",),
    "objective.in_memory": ("merge_models",),
    "objective.merger": ("Merger", "Outcome"),
    "objective.once": ("merge",),
    "objective.loading": ("load_problem",),
    "objective.problem": ("Problem",),
    "report.export": ("export_merge", "export_trial"),
    "spec": ("StudySpec",),
    "study.comparison": ("Comparison", "compare"),
    "study.in_memory": ("MergeResult", "optimize_merge"),
    "study.session": ("Session", "open_study"),
    "tasks.own": ("add_metric",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
