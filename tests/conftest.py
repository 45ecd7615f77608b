"""Shared fixtures: small real projects on disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.project import Project, make_project


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Project]:
    """Projects by family, made once; tests get copies."""
    return {}


@pytest.fixture
def project_of(originals: dict[str, Project], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory):
    """A function from a family to a fresh copy of its project."""

    def copy(family: str = "t5") -> Project:
        if family not in originals:
            originals[family] = make_project(tmp_path_factory.mktemp(family) / "project", family)
        folder = tmp_path / family
        shutil.copytree(originals[family].folder, folder)
        return Project(folder, family, dict(originals[family].spec))

    return copy


@pytest.fixture
def project(project_of) -> Project:
    """A fresh copy of the text-to-text project."""
    return project_of("t5")
