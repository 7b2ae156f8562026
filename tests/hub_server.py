"""A hub on this machine: what a push and a download of a model need of the Hugging Face API."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """What the server holds.

    Attributes:
        address: of the server, `http://127.0.0.1:PORT`.
        files: of each repository, by `OWNER/NAME`.
        requests: `METHOD path` of all that was asked.
    """

    address: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def commit_of(self, repository: str) -> str:
        """An id of the repository's present state."""
        state = sorted((k, hashlib.sha1(v).hexdigest()) for k, v in self.files[repository].items())
        return hashlib.sha1(repr(state).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Nothing on the terminal."""

    def _send(self, content: bytes, *, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any, **options: Any) -> None:
        self._send(json.dumps(value).encode(), Content_Type="application/json", **options)

    def _missing(self) -> None:
        self._json({"error": "not found"}, status=404, X_Error_Code="RepoNotFound")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repository = "/".join(parts[2:4])
            if repository not in self.hub.files:
                return self._missing()
            if parts[4:5] == ["tree"]:
                return self._json(
                    [
                        {"type": "file", "path": name, "size": len(content), "oid": oid_of(content)}
                        for name, content in self.hub.files[repository].items()
                    ]
                )
            return self._json(
                {
                    "id": repository,
                    "sha": self.hub.commit_of(repository),
                    "private": False,
                    "siblings": [{"rfilename": name} for name in self.hub.files[repository]],
                }
            )
        repository, name = "/".join(parts[:2]), "/".join(parts[4:])
        content = self.hub.files.get(repository, {}).get(name)
        if content is None:
            return self._missing()
        commit = self.hub.commit_of(repository)
        return self._send(content, ETag=f'"{oid_of(content)}"', X_Repo_Commit=commit)

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"POST {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/repos/create":
            asked = json.loads(body)
            repository = f"{asked['organization']}/{asked['name']}"
            self.hub.files.setdefault(repository, {})
            return self._json({"url": f"{self.hub.address}/{repository}", "name": repository})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        parts = path.strip("/").split("/")
        repository, action = "/".join(parts[2:4]), parts[4]
        if action == "preupload":  # all files go with the commit itself
            named = [f["path"] for f in json.loads(body)["files"]]
            answers = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in named]
            return self._json({"files": answers})
        assert action == "commit", path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.hub.files[repository][line["value"]["path"]] = content
        commit = self.hub.commit_of(repository)
        url = f"{self.hub.address}/{repository}/commit/{commit}"
        return self._json({"commitUrl": url, "commitOid": commit, "pullRequestUrl": None})


def oid_of(content: bytes) -> str:
    """git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def local_hub() -> Iterator[Hub]:
    """A hub that answers on the loopback address alone, while the block lasts."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
