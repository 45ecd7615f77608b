"""What the startup trials of a new study are, where its spec leaves `search.startup` open."""

from __future__ import annotations

from dfmerge_studies.spec import DEFAULT_SAMPLER, DEFAULT_STARTUP, UNIFORM, StudySpec, has_slopes


def new_startup(spec: StudySpec) -> str | None:
    """What they are, as far as the spec alone says it; None where another sampler than `auto` proposes, or none.

    Args:
        spec: the settings.
    """
    search = spec.search
    if (search.stated_sampler or DEFAULT_SAMPLER) != "auto" or not spec.row.searches:
        return None
    if search.startup is not None:
        return search.startup
    return DEFAULT_STARTUP if has_slopes(spec) else UNIFORM
