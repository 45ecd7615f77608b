"""Studies in a real PostgreSQL through the command line: whole runs, and a password that nobody gets to see."""

from __future__ import annotations

import signal
from urllib.parse import quote

import pytest
from sqlalchemy.engine import make_url
from transformers import AutoModelForSeq2SeqLM

from dfmerge_studies.storage import open_storage
from tests.project import Project
from tests.servers import PASSWORD, PostgresServer

pytestmark = pytest.mark.postgres

SECRETS = (PASSWORD, quote(PASSWORD, safe=""), quote(PASSWORD), quote(PASSWORD, safe=" +"))


def clean(text: str) -> bool:
    return not any(secret in text for secret in SECRETS)


@pytest.mark.slow
def test_the_password_shows_nowhere_in_a_run_that_is_killed_resumed_and_exported(
    project: Project, postgres: str, postgres_server: PostgresServer
) -> None:
    environment = {"DFMERGE_STORAGE": postgres}
    process = project.start("run", "spec.yaml", "--trials", "3", **environment)
    seen = [process.stderr.readline()]
    process.send_signal(signal.SIGKILL)
    seen += process.communicate()
    for command_line in (
        ("run", "spec.yaml", "--trials", "3"),
        ("status", "spec.yaml"),
        ("list", "spec.yaml", "--json"),
        ("repair", "spec.yaml", "--json"),
        ("export", "spec.yaml", "--out", "merged"),
    ):
        done = project.cli(*command_line, **environment)
        seen += [done.stdout, done.stderr]
    assert "3 of 3 trials complete" in "".join(seen)
    assert AutoModelForSeq2SeqLM.from_pretrained(project.folder / "merged").num_parameters() > 0

    name = make_url(postgres).database or ""
    tables = postgres_server.execute(
        "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY tablename", name
    )
    assert ("study_user_attributes",) in tables
    stored = [str(postgres_server.execute(f"SELECT * FROM {table}", name)) for (table,) in tables]
    assert "colours" in "".join(stored)
    files = [file.read_bytes().decode(errors="replace") for file in project.folder.rglob("*") if file.is_file()]
    assert all(map(clean, (*seen, *stored, *files, postgres_server.log())))


def test_the_password_shows_in_no_message_of_a_run_that_cannot_reach_its_database(
    project: Project, postgres: str
) -> None:
    url = make_url(postgres)
    wrong = url.set(password=PASSWORD + "x")
    hints = {
        wrong: "Correct the user and the password in the URL.",
        url.set(database="missing"): "Create the database, or correct its name in the URL.",
        url.set(port=1): "Run the same command again to go on.",
        url.set(username="nobody"): "Correct the user and the password in the URL.",
    }
    for each, hint in hints.items():
        done = project.cli("run", "spec.yaml", check=1, DFMERGE_STORAGE=each.render_as_string(hide_password=False))
        assert "127.0.0.1" in done.stderr
        assert done.stderr.endswith(f" {hint}\n")
        assert "***" in done.stderr
        assert clean(done.stderr + done.stdout)
    for scheme in ("postgresql", "postgresql+psycopg"):
        done = project.cli("run", "spec.yaml", check=2, DFMERGE_STORAGE=f"{scheme}://u@h/d?password={PASSWORD}")
        assert "among the URL's parameters" in done.stderr
        assert clean(done.stderr + done.stdout)
    hidden = wrong.render_as_string(hide_password=False)
    done = project.process("run", "spec.yaml", "--debug", check=1, DFMERGE_STORAGE=hidden)
    assert "Traceback" in done.stderr
    assert clean(done.stderr + done.stdout)


@pytest.mark.slow
def test_a_run_whose_database_goes_away_shows_no_password_and_its_result_is_applied_later(
    project: Project, postgres: str, postgres_server: PostgresServer
) -> None:
    project.cli("run", "spec.yaml", "--trials", "1", DFMERGE_STORAGE=postgres)
    spec = project.write(storage=postgres)
    before = {file: file.read_bytes() for file in project.folder.rglob("*") if file.is_file() and file != spec}
    postgres_server.stop()
    try:
        done = project.cli("run", "spec.yaml", "--trials", "2", check=1)
    finally:
        postgres_server.start()
    assert clean(done.stderr + done.stdout)
    assert {file: file.read_bytes() for file in before} == before
    done = project.cli("run", "spec.yaml", "--trials", "2", "--json")
    assert clean(done.stderr + done.stdout)


def test_postgres_is_used_with_small_pools_that_look_before_they_send(
    postgres: str, postgres_server: PostgresServer
) -> None:
    storage = open_storage(postgres)
    pool = storage.engine.pool  # type: ignore[attr-defined]
    assert (pool.size(), pool._max_overflow, pool._pre_ping) == (2, 3, True)
    assert storage.get_all_studies() == []
    postgres_server.stop()
    postgres_server.start()
    assert storage.get_all_studies() == []  # though every connection of the pool is dead


@pytest.mark.slow
def test_every_spelling_of_a_postgres_url_is_the_same_storage(project: Project, postgres: str) -> None:
    project.cli("run", "spec.yaml", "--trials", "1", DFMERGE_STORAGE=postgres)
    for scheme in ("postgresql", "postgres"):
        spelling = postgres.replace("postgresql+psycopg", scheme)
        found = project.cli("status", "spec.yaml", "--json", DFMERGE_STORAGE=spelling)
        assert '"complete": 1' in found.stdout
