"""Names that the doctests of the package use."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything of the Hub is imported


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace["quickstart"] = Path(str(files("dfmerge_studies"))) / "quickstart" / "quickstart.yaml"
