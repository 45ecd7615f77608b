"""The JSON schema of a spec, for editors: pydantic's own, and the short forms that a spec may have."""

from __future__ import annotations

from typing import Any

from dfmerge_studies.spec.fields import SEARCHES
from dfmerge_studies.spec.known import cell_schema
from dfmerge_studies.spec.study import StudySpec

SCHEMA = "https://raw.githubusercontent.com/dfmerge-studies/dfmerge-studies/main/docs/spec.schema.json"  # for editors
DRAFT = "https://json-schema.org/draft/2020-12/schema"


def spec_schema() -> dict[str, Any]:
    """A schema that takes every spec that `StudySpec` takes; what depends on other fields or on files it cannot say."""
    schema = StudySpec.model_json_schema()
    fields = schema["properties"]
    kinds = schema["$defs"]["ObjectiveSettings"]["properties"]["kind"]["enum"]
    _also(
        fields["experts"]["additionalProperties"],
        {"type": "string", "description": "its model, of the task of its name"},
    )
    _also(fields["objective"], {"enum": kinds})
    _also(fields["method"], cell_schema())
    _also(fields["baselines"]["items"], cell_schema())
    _also(fields["search"], {"enum": list(SEARCHES), "description": "all fields of a search by one word"})
    search = schema["$defs"]["SearchSettings"]["properties"]
    search["warm_start"]["anyOf"].append({"type": "string", "description": "name of a study in the same storage"})
    search["granularity"]["anyOf"].append({"enum": ["model", "layers"], "description": "one of an expert, of a layer"})
    # A task without a type is of the type choice: which of the two it is, the required fields of both say.
    fields["tasks"]["additionalProperties"].pop("discriminator")
    return {"$schema": DRAFT, **schema}


def _also(field: dict[str, Any], short: dict[str, Any]) -> None:
    """Let a field have a short form too."""
    whole = {name: field.pop(name) for name in list(field) if name not in ("default", "description")}
    field["anyOf"] = [short, whole]
