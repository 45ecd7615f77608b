"""Passwords, tokens and keys: used, and never shown, stored or exported, in whatever form they were given.

Every test plants a canary and then looks for it wherever somebody else could read.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import quote

import optuna
import psutil
import pytest
from optuna_dashboard import get_note

from dfmerge_studies.errors import RunError
from dfmerge_studies.redact import masked_text
from dfmerge_studies.report.notes import publish
from dfmerge_studies.storage import open_storage, safe_url
from dfmerge_studies.study.provenance import SPEC
from tests.project import Project
from tests.servers import PASSWORD, PostgresServer

CANARY = "hush4711"
AT = "red=0.3,blue=0.8"


def assert_silent(*texts: str, secrets: Iterable[str] = (CANARY,)) -> None:
    """No text has a secret in it."""
    for text in texts:
        for secret in secrets:
            assert secret not in text, text[max(0, text.index(secret) - 200) :][:400]


def stored(project: Project) -> str:
    """Everything in the project's database and files, its spec apart."""
    files = [file for file in project.folder.rglob("*") if file.is_file() and file != project.file]
    texts = [file.read_bytes().decode("utf-8", "replace") for file in files]
    for database in project.folder.glob("*.db"):
        with sqlite3.connect(database) as connection:
            texts.append("\n".join(connection.iterdump()))
    return "\n".join(texts)


def with_dataset(project: Project, **fields: Any) -> None:
    tasks = json.loads(json.dumps(project.spec["tasks"]))
    tasks["red"]["dataset"].update(fields)
    project.write(tasks=tasks)


SETTINGS: dict[str, Any] = {
    "token": CANARY,
    "storage_options": {"key": CANARY, "client_kwargs": {"headers": {"Authorization": f"Bearer {CANARY}"}}},
}


@pytest.mark.slow
def test_settings_of_a_data_set_that_are_secret_are_neither_stored_nor_exported(project):
    with_dataset(project, **SETTINGS)
    said = []
    for line in (
        "run spec.yaml --trials 1",
        "run spec.yaml --trials 2 --json",
        "status spec.yaml",
        "list spec.yaml --json",
        "validate spec.yaml --json",
        "export spec.yaml --out merged",
        f"merge spec.yaml --coefficients {AT} --out single",
        "fisher spec.yaml --expert red --out red.safetensors",
        "report spec.yaml --out site",
        "compare spec.yaml --methods df-merge,averaging --json",
        "repair spec.yaml --json",
    ):
        done = project.cli(*line.split())
        said += [done.stdout, done.stderr]
    publish(optuna.load_study(study_name="colours", storage=open_storage(f"sqlite:///{project.folder}/colours.db")))
    assert_silent(*said, stored(project))
    assert '"red.validation.jsonl"' in (project.folder / "merged/dfmerge.json").read_text()  # the rest is there


@pytest.mark.slow
def test_a_study_of_an_earlier_version_that_has_a_secret_loses_it_at_the_next_run(project):
    project.json("run", "spec.yaml", "--trials", "1")
    study = optuna.load_study(study_name="colours", storage=open_storage(f"sqlite:///{project.folder}/colours.db"))
    old = dict(study.user_attrs[SPEC])
    old["tasks"]["red"]["dataset"]["token"] = CANARY
    old["base"] = f"https://me:{CANARY}@host/base"
    study.set_user_attr(SPEC, old)
    project.cli("report", "spec.yaml", "--out", "site")
    publish(study)
    assert_silent((project.folder / "site/index.html").read_text(), get_note(study))
    project.json("run", "spec.yaml", "--trials", "2")
    now = optuna.load_study(study_name="colours", storage=open_storage(f"sqlite:///{project.folder}/colours.db"))
    assert_silent(json.dumps(now.user_attrs))


PASSWORDS = (
    CANARY,
    f"{CANARY}/x",
    f"x/{CANARY}",
    f"a@{CANARY}",
    f"{CANARY}@b",
    f"%25{CANARY}",
    f"?{CANARY}",
    f"#{CANARY}",
)
PASSWORDS += (f"a:{CANARY}", f"{CANARY} y", f"x {CANARY}", f"{CANARY}'\"", f"[{CANARY}", f"{{{CANARY}}}")
URLS = [f"{scheme}://me:{word}@host/db" for scheme in ("postgresql", "mysql", "redis", "grpc") for word in PASSWORDS]
URLS += [f"postgresql://me/you:{word}@host/db" for word in PASSWORDS]
URLS += [
    f"postgresql://me@127.0.0.1:1/db?{name}={CANARY}"
    for name in (
        "password",
        "pwd",
        "PASSWORD",
        "passwd",
        "pass",
        "sslpassword",
        "secret",
        "token",
        "api_key",
        "passfile",
    )
]
URLS += [f"host=127.0.0.1 user=me password={CANARY}", f"host=h password='{CANARY} x'", f"postgresql:/me:{CANARY}@host"]
URLS += [f"postgresql://me:{CANARY}@h:port/d", f"me:{CANARY}@host/db", f"//me:{CANARY}@host/db"]


@pytest.mark.parametrize("url", URLS)
def test_no_form_of_a_url_is_shown_with_its_password(url):
    assert_silent(safe_url(url), masked_text(str(RunError("lost", where=safe_url(url)))))


LINES = [
    "status spec.yaml --storage {url}",
    "run spec.yaml --storage {url}",
    "run spec.yaml --set storage={url}",
    "run spec.yaml --set search.storage={url}",
    "run spec.yaml --set {url}",
    "run spec.yaml --set 'storage: {url}'",
    "run spec.yaml --set 'storage=[{url}'",
    "run spec.yaml --set base={url}",
    "run spec.yaml --set experts.red={url}",
    "compare spec.yaml --multi-task {url}",
    "run spec.yaml --set tasks.red.dataset.data_files={url}",
    "run spec.yaml --set device={url}",
    "run spec.yaml --trials {url}",
    "run spec.yaml {url}",
    "run {url}",
    "evaluate spec.yaml --model {url}",
    "cache ls spec.yaml --cache {url}",
    "cache push spec.yaml --to {url}",
    "report spec.yaml --figures {url}",
]


@pytest.mark.parametrize("line", LINES)
def test_no_message_shows_the_password_of_a_url_wherever_it_was_put(project, line):
    for url in (f"mysql://me:{CANARY}/x@host/db", f"abc://a:b@{CANARY}@host/db"):
        done = project.cli(*shlex.split(line.format(url=url)), check=None)
        assert done.returncode in (1, 2)
        assert done.stderr.startswith("error: ")
        assert_silent(done.stdout, done.stderr)


@pytest.mark.parametrize(
    "line",
    [
        f"storage=postgresql://me:{CANARY}@127.0.0.1:1/d?connect_timeout=1",
        f"tasks.red.dataset.token=[{CANARY}",
        f"tasks.red.dataset.use_auth_token={CANARY}",
        f"tasks.red.dataset.no_such_option={{token: {CANARY}}}",
        f"tasks.red.dataset={{token: {CANARY}}}",
        f"tasks.red.dataset={{path: no/such, token: {CANARY}, storage_options: {{key: {CANARY}}}}}",
        f"cache=s3://AKIA:{CANARY}/x@bucket/y",
        f"cache=redis://:{CANARY}@host/y",
    ],
)
@pytest.mark.parametrize("debug", [False, True])
def test_no_setting_that_fails_is_shown_with_its_secret(project, line, debug):
    done = project.process("run", "spec.yaml", "--set", line, *(["--debug"] if debug else []), check=None)
    assert done.returncode in (1, 2)
    assert_silent(done.stdout, done.stderr)


@pytest.mark.parametrize(
    "text",
    [
        f"storage: postgresql://me:{CANARY} x@host/db\n name: [\n",
        f'storage: "postgresql://me:{CANARY}@host/db\n',
        f"tasks: {{red: {{dataset: {{token: {CANARY}\n",
        f"storage: postgresql://me:{CANARY}@host/db\nstorage: postgresql://me:{CANARY}@host/db\n",
        f"? postgresql://me:{CANARY}@host/db\n",
    ],
)
def test_a_spec_that_is_no_yaml_is_refused_without_the_lines_around(project, text):
    project.file.write_text(text)
    assert_silent(project.cli("run", "spec.yaml", check=2).stderr)
    assert_silent(project.process("run", "spec.yaml", "--debug", check=None).stderr)


def command_lines(of: psutil.Process) -> Iterator[str]:
    with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
        for process in of.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                yield " ".join(process.cmdline())


WAYS = ("--set with quotes", "environment", "spec", "--storage", "--set")


@pytest.mark.slow
@pytest.mark.postgres
def test_a_password_shows_in_nothing_that_a_whole_study_leaves(
    project: Project, postgres: str, postgres_server: PostgresServer
) -> None:
    """The server's own password, which has to be escaped, given in every way; workers' command lines are read, too."""
    flags, environment = given(project, postgres, WAYS[0])
    started = project.start("run", "spec.yaml", "--workers", "2", "--trials", "4", *flags, anew=True, **environment)
    process, seen = psutil.Process(started.pid), set[str]()
    while started.poll() is None:
        seen.update(command_lines(process))
        time.sleep(0.2)
    said = [*seen, *started.communicate()]
    assert started.returncode == 0
    assert any("worker" in line for line in seen)
    for number, way in enumerate(WAYS):
        flags, environment = given(project, postgres, way)
        for line in (
            f"run spec.yaml --trials {5 + number}{' --no-test' if number else ''}",
            "status spec.yaml",
            f"export spec.yaml --out merged-{number}",
            *([f"report spec.yaml --out site-{number}"] if number == 0 else []),  # one way reads as another
        ):
            done = project.cli(*line.split(), *flags, **environment)
            said += [done.stdout, done.stderr]
    assert "next:" in "".join(said)
    tables = postgres_server.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'", _name(postgres))
    rows = [str(postgres_server.execute(f"SELECT * FROM {table}", _name(postgres))) for (table,) in tables]
    secrets = (PASSWORD, quote(PASSWORD, safe=""), quote(PASSWORD), quote(PASSWORD, safe=" +"))
    assert_silent(*said, *rows, stored(project), secrets=secrets)


def given(project: Project, url: str, way: str) -> tuple[list[str], dict[str, str]]:
    """Flags and environment that name a storage in one of the ways there are; or the spec that does."""
    project.write(storage=url if way == "spec" else None)
    if way == "environment":
        return [], {"DFMERGE_STORAGE": url}
    if way == "--storage":
        return ["--storage", url], {}
    if way.startswith("--set"):
        return ["--set", f"storage={json.dumps(url) if 'quotes' in way else url}"], {}
    return [], {}


def _name(url: str) -> str:
    return url.rpartition("/")[2]


def test_what_other_libraries_log_is_masked(project):
    code = (
        "import logging; from dfmerge_studies.cli.common import quiet_libraries; quiet_libraries();"
        f"logging.getLogger('urllib3').warning('retrying %s', 'https://me:{CANARY}@host/x?token={CANARY}')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "WARNING: retrying https://" in done.stderr
    assert_silent(done.stderr)


def test_ordinary_words_are_left_alone(caplog):
    for text in (
        "the spec names no tokenizer; pad_token: '<pad>', max_length: 32 tokens",
        "Write it as //user:password@host, or leave it to a password file",
        "sqlite:////home/me@work/s.db",
        "org/name@main",
        "https://huggingface.co/org/name@main",
        "/data/a@b/c: key 'x' given twice",
        "mail me@host: at once",
        "Use postgresql+psycopg://USER@HOST/NAME",
    ):
        assert masked_text(text) == text
