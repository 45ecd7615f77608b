"""The spec: one YAML file that says what to merge, how to score it and how to search.

Unknown keys are refused.  Relative paths are relative to the spec's own folder.  docs/specs.md documents every field.
"""

from dfmerge_studies.spec.checks import check_coefficients, has_slopes, without_slopes
from dfmerge_studies.spec.examine import Examined
from dfmerge_studies.spec.fields import (
    DEFAULT_SAMPLER,
    DEFAULT_STARTUP,
    DESCENT,
    TRACED,
    UNIFORM,
    ExpertSettings,
    ImportanceSettings,
    ObjectiveSettings,
    SearchSettings,
    WarmStart,
    parse_size,
)
from dfmerge_studies.spec.study import StudySpec

__all__ = [
    "DEFAULT_SAMPLER",
    "DEFAULT_STARTUP",
    "DESCENT",
    "TRACED",
    "UNIFORM",
    "Examined",
    "ExpertSettings",
    "ImportanceSettings",
    "ObjectiveSettings",
    "SearchSettings",
    "StudySpec",
    "WarmStart",
    "check_coefficients",
    "has_slopes",
    "parse_size",
    "without_slopes",
]
