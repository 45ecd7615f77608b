"""optuna-dashboard behind a guard: loopback, read-only, and artifacts that cannot run.

The dashboard has no authentication, and whoever reaches it can delete studies; stored HTML would run in its origin.
The guard answers only hosts that it knows (a page of another site must not reach it by a name that resolves here), only
GET and HEAD unless writing is allowed, and takes every power from artifacts.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import re
import socket
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from urllib.parse import urlsplit
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

import optuna
from optuna.artifacts import FileSystemArtifactStore
from optuna.storages import BaseStorage

from dfmerge_studies.errors import DFMergeError, InputError
from dfmerge_studies.report.notes import publish
from dfmerge_studies.storage import is_read_only, storage_errors, study_names
from dfmerge_studies.study.provenance import reading_study

logger = logging.getLogger(__name__)
REFRESH_SECONDS = 20.0
_HARDENING = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
# The dashboard's own scripts, and no others: notes may hold HTML. Styles are written inline by its components.
_PAGES = (
    "default-src 'self'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; base-uri 'none'; "
    "frame-ancestors 'none'; form-action 'none'"
)
_ARTIFACT = re.compile(r"/+artifacts(/|$)")


class Guard:
    """WSGI middleware around the dashboard.

    Args:
        app: the dashboard.
        hosts: names that it may be asked by; None for any.
        writable: whether requests may change anything.
    """

    def __init__(self, app: WSGIApplication, *, hosts: frozenset[str] | None, writable: bool) -> None:
        self._app = app
        self._hosts = hosts
        self._writable = writable

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer a request."""
        refusal = self._refusal(environ)
        if refusal is not None:
            status, reason = refusal
            body = json.dumps({"reason": reason}).encode()
            headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), *_HARDENING.items()]
            start_response(status, headers)
            return [body]
        artifact = _ARTIFACT.match(environ.get("PATH_INFO", "")) is not None

        def hardened(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
            kept = [(name, value) for name, value in headers if name.lower() not in _REPLACED]
            kept += _HARDENING.items()
            if artifact:
                kept += [("Content-Security-Policy", "sandbox"), ("Content-Disposition", "attachment")]
            else:
                kept += [(name, value) for name, value in headers if name.lower() == "content-disposition"]
                kept.append(("Content-Security-Policy", _PAGES))
            return start_response(status, kept, exc_info)

        return self._app(environ, hardened)

    def _refusal(self, environ: WSGIEnvironment) -> tuple[str, str] | None:
        host = environ.get("HTTP_HOST", "")
        if self._hosts is not None and _host_name(host) not in self._hosts:
            return "403 Forbidden", "this host name is not served; open the address that the dashboard printed"
        if environ["REQUEST_METHOD"] in ("GET", "HEAD"):
            return None
        if not self._writable:
            return "405 Method Not Allowed", "this dashboard is read-only; start it with --writable to change studies"
        origin = environ.get("HTTP_ORIGIN")
        foreign = origin is not None and urlsplit(origin).netloc != host
        if foreign or environ.get("HTTP_SEC_FETCH_SITE", "same-origin") not in ("same-origin", "none"):
            return "403 Forbidden", "a page of another site may not change studies"
        return None


_REPLACED = {"access-control-allow-origin", "content-disposition", *(name.lower() for name in _HARDENING)}


def is_loopback(host: str) -> bool:
    """Whether an address is of this machine alone.

    Args:
        host: a name or an address.
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host_name(header: str) -> str:
    """The name in a Host header, without its port."""
    if not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[\w.-]+)(:\d+)?", header):
        return ""
    return urlsplit(f"//{header}").hostname or ""


def _served_names(host: str) -> frozenset[str] | None:
    if is_loopback(host):
        return frozenset({"localhost", "127.0.0.1", "::1", host})
    if host in ("0.0.0.0", "::"):
        return None  # every interface was asked for: its names cannot be known
    return frozenset({host.lower()})


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)


def dashboard_server(
    storage: BaseStorage, artifacts: Path, *, host: str = "127.0.0.1", port: int = 8080, writable: bool = False
) -> WSGIServer:
    """A server of optuna-dashboard on a storage; it listens already, `serve_forever` answers.

    Args:
        storage: from `open_storage`.
        artifacts: folder of the artifacts.
        host: address to listen on.
        port: 0 for any that is free.
        writable: whether visitors may change and delete studies.

    Raises:
        InputError: the address cannot be had.
    """
    from optuna_dashboard import wsgi

    app = wsgi(storage, artifact_store=FileSystemArtifactStore(artifacts))
    guarded = Guard(app, hosts=_served_names(host), writable=writable)
    try:
        return make_server(host, port, guarded, _Server6 if ":" in host else _Server, _Quiet)
    except OSError as error:
        raise InputError(
            f"cannot listen on {host}:{port}: {error.strerror or error}",
            where="--port",
            hint="Choose another port, or 0 for any that is free",
        ) from error


class Publisher:
    """Brings notes and figures of a storage's studies up to date, at once and then from time to time.

    Args:
        storage: from `open_storage`.
        seconds: between two looks.
    """

    def __init__(self, storage: BaseStorage, seconds: float = REFRESH_SECONDS) -> None:
        self._storage = storage
        self._seconds = seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="publisher", daemon=True)

    def __enter__(self) -> Publisher:
        self.publish()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join(timeout=5)

    def publish(self) -> None:
        """Look at every study once; a storage that cannot be written to is shown as it is."""
        if is_read_only(self._storage):
            return
        try:
            with storage_errors():
                names = study_names(self._storage)
        except DFMergeError as error:
            logger.warning("notes and figures are not up to date: %s", error)
            return
        for name in names:
            try:
                with storage_errors(), reading_study(name):
                    publish(optuna.load_study(study_name=name, storage=self._storage))
            except DFMergeError as error:  # the others are shown all the same
                logger.warning("notes and figures are not up to date: %s", error)

    def _work(self) -> None:
        while not self._over.wait(self._seconds):
            self.publish()
