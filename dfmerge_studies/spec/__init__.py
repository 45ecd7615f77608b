"""The spec: one YAML file that says what to merge, how to score it and how to search.

Unknown keys are refused.  Relative paths are relative to the spec's own folder.  docs/specs.md documents every field.
"""

from dfmerge_studies.spec.checks import check_coefficients, without_slopes
from dfmerge_studies.spec.examine import Examined
from dfmerge_studies.spec.fields import (
    DEFAULT_SAMPLER,
    TRACED,
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
    "TRACED",
    "Examined",
    "ExpertSettings",
    "ImportanceSettings",
    "ObjectiveSettings",
    "SearchSettings",
    "StudySpec",
    "WarmStart",
    "check_coefficients",
    "parse_size",
    "without_slopes",
]
