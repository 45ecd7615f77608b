"""A stand-in of the Hub's HTTP API on loopback: what huggingface_hub asks of it when a model is pushed."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

OWNER = "me"


class Hub(ThreadingHTTPServer):
    """Repositories in memory; what they hold is what was uploaded.

    Attributes:
        token: that requests must bring.
        repositories: files by path, by repository.
        private: which repositories are private.
        fail: a path, or a part of one, of requests that are refused with 500.
        tokens: what the requests brought.
    """

    daemon_threads = True

    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token = token
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.fail: str | None = None
        self.tokens: set[str | None] = set()
        self.blobs: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, content: Any, status: int = 200, **headers: str) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def _refused(self) -> bool:
        authorization = self.headers.get("Authorization")
        self.server.tokens.add(authorization)
        if authorization != f"Bearer {self.server.token}":
            self._answer({"error": f"Invalid credentials {authorization}"}, 401)
            return True
        if self.server.fail is not None and self.server.fail in self.path:
            self._answer({"error": f"no room left for {authorization}"}, 403)
            return True
        return False

    def do_GET(self) -> None:
        if self._refused():
            return
        name = self.path.removeprefix("/api/models/")
        if name not in self.server.repositories:
            self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return
        self._answer({"id": name, "private": name in self.server.private, "sha": "0" * 40})

    def do_POST(self) -> None:
        body = self._body()
        if self._refused():
            return
        if self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in files
            ]
            self._answer({"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            uploads = [{**o, "actions": {"upload": {"href": f"{self.server.url}/blobs/{o['oid']}"}}} for o in objects]
            self._answer({"transfer": "basic", "objects": uploads})
        elif "/commit/" in self.path:
            self._commit(body)
        else:
            self._answer({"error": f"no such path: {self.path}"}, 404)

    def do_PUT(self) -> None:
        data = self._body()
        self.server.blobs[hashlib.sha256(data).hexdigest()] = data
        self._answer({})

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted.get('organization') or OWNER}/{wanted['name']}"
        url = f"{self.server.url}/{name}"
        if name in self.server.repositories:
            self._answer({"error": "You already created this model repo", "url": url}, 409)
            return
        self.server.repositories[name] = {}
        if wanted.get("private") or wanted.get("visibility") == "private":
            self.server.private.add(name)
        self._answer({"url": url, "name": name})

    def _commit(self, body: bytes) -> None:
        name = self.path.removeprefix("/api/models/").split("/commit/")[0]
        files = self.server.repositories[name]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
        url = f"{self.server.url}/{name}/commit/{'1' * 40}"
        self._answer({"success": True, "commitOid": "1" * 40, "commitUrl": url})


@contextmanager
def running_hub(token: str) -> Iterator[Hub]:
    """A stand-in for as long as the context lasts."""
    with Hub(token) as hub:
        thread = Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
