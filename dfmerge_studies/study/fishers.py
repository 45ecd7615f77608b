"""The Fisher cache that a spec names."""

from __future__ import annotations

from dfmerge_studies.importance.cache import FisherCache, default_limit, open_cache
from dfmerge_studies.spec import StudySpec, parse_size


def spec_cache(spec: StudySpec) -> FisherCache | None:
    """The spec's Fisher cache."""
    return open_cache(spec.cache_place, spec.workdir, cache_limit(spec), where=spec.where("cache"))


def cache_limit(spec: StudySpec) -> int | None:
    """Bytes that the spec's Fisher cache may take, None for no limit; one that keeps all has none of its own."""
    if spec.cache_limit == "auto":
        return default_limit(spec.cache_place, spec.workdir) if spec.cache_policy == "auto" else None
    return parse_size(spec.cache_limit) if spec.cache_limit is not None else None
