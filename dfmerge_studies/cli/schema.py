"""`schema`: what a spec may hold, for editors."""

from __future__ import annotations

from dfmerge_studies.cli import common


def schema() -> None:
    """Print the JSON schema of a spec, short forms included."""
    from dfmerge_studies.spec.schema import spec_schema

    common.print_json(spec_schema())
