"""Shared fixtures: small real projects on disk."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:  # else it is imported where it is used: `pytest -n` runs no test in the process that reads this first
    from tests.project import Project
    from tests.servers import PostgresServer, ProxyServer

gc.disable()  # until all is imported, which makes a million objects that stay

# A shell's background job ignores Ctrl-C and so would every process that a test starts to interrupt it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Look for garbage from here on, among what tests leave, and not after every 700 objects."""
    gc.freeze()
    gc.set_threshold(20_000)
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that two processes that share the suite end with what is quick."""
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)


# Families and sizes of projects that are not the usual ones. Layers and inputs of a Fisher are what the time of a small
# study goes into, so the project that most tests use has few; "t5-deep" is for tests that need trials to differ.
PROJECTS: dict[str, tuple[str, dict[str, int]]] = {"t5": ("t5", {"layers": 1, "samples": 4}), "t5-deep": ("t5", {})}

NewStorage = Callable[[str], str]
MakeCopy = Callable[[str, Path], "Project"]


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Project]:
    """Projects by family, made once; tests get copies."""
    return {}


@pytest.fixture(scope="session")
def make_copy(originals: dict[str, Project], tmp_path_factory: pytest.TempPathFactory) -> MakeCopy:
    """A function from a family, or a name in `PROJECTS`, and a folder to a copy of that project in the folder."""
    from tests.project import copied, make_project

    def copy(family: str, parent: Path) -> Project:
        if family not in originals:
            kind, sizes = PROJECTS.get(family, (family, {}))
            originals[family] = make_project(tmp_path_factory.mktemp(family) / "project", kind, **sizes)
        return copied(originals[family], parent / family)

    return copy


@pytest.fixture
def project_of(make_copy: MakeCopy, tmp_path: Path) -> Callable[..., Project]:
    """A function from a family to a fresh copy of its project."""
    return lambda family="t5": make_copy(family, tmp_path)


@pytest.fixture
def project(project_of: Callable[..., Project]) -> Project:
    """A fresh copy of the text-to-text project."""
    return project_of("t5")


@pytest.fixture(scope="session")
def finished_original(make_copy: MakeCopy, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The text-to-text project after `run spec.yaml`; tests get copies."""
    project = make_copy("t5", tmp_path_factory.mktemp("finished"))
    project.cli("run", "spec.yaml")
    return project


@pytest.fixture
def finished(finished_original: Project, tmp_path: Path) -> Project:
    """A fresh copy of the text-to-text project with its finished study."""
    from tests.project import copied

    return copied(finished_original, tmp_path / "finished")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A real PostgreSQL server on loopback; who stops it starts it again."""
    from tests.servers import running_postgres

    with running_postgres() as server:
        yield server


@pytest.fixture
def postgres(postgres_server: PostgresServer) -> str:
    """The URL of an empty database on it, password included."""
    return postgres_server.database()


@pytest.fixture
def new_proxy() -> Iterator[Callable[[str], ProxyServer]]:
    """A function that starts a storage proxy on a storage's URL."""
    pytest.importorskip("grpc", reason="grpcio is not installed")
    from tests.servers import ProxyServer

    servers: list[ProxyServer] = []

    def start(storage: str) -> ProxyServer:
        servers.append(ProxyServer(storage))
        servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture
def new_storage(request: pytest.FixtureRequest, tmp_path: Path) -> NewStorage:
    """A function from "sqlite", "journal", "postgres" or "grpc" to the URL of an empty storage; once per kind."""

    def url(kind: str) -> str:
        if kind == "postgres":
            return str(request.getfixturevalue("postgres"))
        if kind == "grpc":
            return str(request.getfixturevalue("new_proxy")(f"sqlite:///{tmp_path}/proxy.db").url)
        return {"sqlite": f"sqlite:///{tmp_path}/s.db", "journal": f"journal:///{tmp_path}/s.log"}[kind]

    return url
