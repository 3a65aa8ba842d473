"""A model hub on this machine: what huggingface_hub asks of one to read repositories, and a log of what it was asked.

Sources: huggingface_hub's own requests (``HfApi.model_info``, ``hf_hub_download``, its ``hf_raise_for_status``), and
RFC 9110 for ranges.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_tests"
_API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?")
_TREE = re.compile(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)")
_RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


class Request(NamedTuple):
    """What was asked, and how many bytes of body were sent.

    Attributes:
        method: "GET" or "HEAD".
        path: Without the query.
        range: The first and the last byte asked for, or None.
        status: Of the answer.
        sent: Bytes of the body.
    """

    method: str
    path: str
    range: tuple[int, int] | None
    status: int
    sent: int


class Hub:
    """Repositories by name, each with its revisions: a commit for each name of a branch.

    Attributes:
        url: Of the server.
        log: All requests so far.
        failing: Statuses to answer the next requests with, whatever they ask for.
    """

    def __init__(self) -> None:
        self.url = ""
        self.log: list[Request] = []
        self.failing: list[int] = []
        self._files: dict[str, dict[str, dict[str, bytes]]] = {}
        self._refs: dict[str, dict[str, str]] = {}
        self._gated: set[str] = set()

    def add(self, repo: str, files: dict[str, bytes], *, branch: str = "main", gated: bool = False) -> str:
        """Put a commit on a branch, and return its hash."""
        commit = hashlib.sha1(repr((repo, branch, sorted(files.items()))).encode()).hexdigest()
        self._files.setdefault(repo, {})[commit] = dict(files)
        self._refs.setdefault(repo, {})[branch] = commit
        if gated:
            self._gated.add(repo)
        return commit

    def sent(self, name: str) -> int:
        """Bytes of the bodies of all answers about a file."""
        return sum(each.sent for each in self.log if each.path.endswith("/" + name))

    def ranges(self, name: str) -> list[tuple[int, int] | None]:
        """What was asked of a file, in order."""
        return [each.range for each in self.log if each.path.endswith("/" + name) and each.method == "GET"]

    def answer(self, path: str, token: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and whole body for a path."""
        if self.failing:
            return self.failing.pop(0), {}, b"{}"
        found = _RESOLVE.fullmatch(path) or _TREE.fullmatch(path) or _API.fullmatch(path)
        repo = found[1] if found else ""
        if found is None or repo not in self._files:
            return 401 if not token else 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        revision = unquote(found[2] or "main")
        commit = self._refs[repo].get(revision, revision)
        files = self._files[repo].get(commit)
        if files is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if found.re is _API:
            return 200, {}, json.dumps(_model(repo, commit, files)).encode()
        if repo in self._gated and token != TOKEN:
            return 403 if token else 401, {"X-Error-Code": "GatedRepo"}, b"{}"
        if found.re is _TREE:
            return 200, {}, json.dumps([_entry(name, data) for name, data in files.items()]).encode()
        name = unquote(found[3])
        if name not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b"{}"
        told = {"ETag": f'"{_sha(files[name])}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        return 200, told, files[name]


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _large(name: str, data: bytes) -> dict[str, object]:
    """What is told of files that are kept beside git, as the hub has those of weights."""
    if not name.endswith((".safetensors", ".bin")):
        return {}
    return {"lfs": {"sha256": _sha(data), "size": len(data), "pointerSize": 134}}


def _entry(name: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(data), "oid": _sha(data)}


def _model(repo: str, commit: str, files: dict[str, bytes]) -> dict[str, object]:
    siblings = [
        {"rfilename": name, "size": len(data), "blobId": _git(data), **_large(name, data)}
        for name, data in files.items()
    ]
    return {"id": repo, "modelId": repo, "sha": commit, "private": False, "tags": [], "siblings": siblings}


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def _answer(self, *, body: bool) -> None:
            path = urlsplit(self.path).path
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            status, told, data = hub.answer(path, token)
            asked = _RANGE.fullmatch(self.headers.get("Range") or "")
            span = (int(asked[1]), int(asked[2])) if asked else None
            if span and status == 200:
                status = 206
                told["Content-Range"] = f"bytes {span[0]}-{min(span[1], len(data) - 1)}/{len(data)}"
                data = data[span[0] : span[1] + 1]
            hub.log.append(Request(self.command, path, span, status, len(data) if body else 0))
            self.send_response(status)
            for name, value in {**told, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing on stderr: the log is the hub's."""

    return Handler


@contextmanager
def running():
    """A hub that answers as long as the context lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def point_to(hub: Hub, monkeypatch, home) -> None:
    """Have huggingface_hub in this process, which read its settings when it was imported, use a hub and a home."""
    from huggingface_hub import constants

    from loratools.io import hub as store

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    store.hub.cache_clear()
