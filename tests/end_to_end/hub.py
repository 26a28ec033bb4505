"""A stand-in for the Hugging Face hub: the part of its HTTP API that an upload needs, over real connections.

Files that are kept apart (LFS) are asked for by the batch API and put at another address, as on the hub. What a commit
names is visible only once the commit has come whole.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ROLES = {"hf_writes_0000000000000000000000": "write", "hf_reads_00000000000000000000000": "read"}
WRITES, READS = ROLES
USER = "ada"
LICENSES = {"apache-2.0", "mit"}


@dataclass
class Repo:
    """`commits`: the message of each, and the files after it."""

    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.safetensors filter=lfs"})
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return sha256(repr((len(self.commits), sorted(self.files))).encode()).hexdigest()[:40]


@dataclass
class Hub:
    """`forbidden`: names that the token may not write to. `broken`: beginnings of paths that end in a failure."""

    repos: dict[str, Repo] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    forbidden: set[str] = field(default_factory=set)
    broken: str = ""
    asked: list[str] = field(default_factory=list)
    url: str = ""


@contextmanager
def stand_in() -> Iterator[Hub]:
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answered("GET")

    def do_POST(self) -> None:
        self._answered("POST")

    def do_PUT(self) -> None:
        self._answered("PUT")

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answered(self, method: str) -> None:
        path = self.path.partition("?")[0]
        self.hub.asked.append(f"{method} {path}")
        body = self._body()
        role = ROLES.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        if self.hub.broken and path.startswith(self.hub.broken):
            return self._say(500, {"error": "the disk of the hub is full"})
        if method == "PUT":  # signed addresses need no token
            self.hub.stored[path.rpartition("/")[2]] = body
            return self._say(200, {})
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if role is None:
            return self._say(401, {"error": "Invalid credentials in Authorization header"})
        if path == "/api/whoami-v2":
            token = {"displayName": "t", "role": role}
            return self._say(200, {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": token}})
        return self._of_repo(path, body)

    def _of_repo(self, path: str, body: bytes) -> None:
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        name, act = self._place(path)
        repo = self.hub.repos.get(name)
        if repo is None:
            return self._say(404, {"error": "Repository not found"}, code="RepoNotFound")
        if act == "":
            files = [{"rfilename": file} for file in repo.files]
            return self._say(200, {"id": name, "sha": repo.sha, "private": repo.private, "siblings": files})
        if name in self.hub.forbidden:
            return self._say(403, {"error": "Forbidden: you must use a write token to upload to a repository."})
        if act == "preupload":
            wanted = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": _mode(f["path"]), "shouldIgnore": False} for f in wanted]
            return self._say(200, {"files": modes})
        if act == "batch":
            return self._batch(json.loads(body))
        assert act == "commit", path
        return self._commit(name, repo, [json.loads(line) for line in body.splitlines()])

    def _place(self, path: str) -> tuple[str, str]:
        """The repository that a path is about, and what is asked of it."""
        if batch := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            return batch[1], "batch"
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(preupload|commit)/main)?", path)
        assert found, path
        return found[1], found[2] or ""

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        if name in self.hub.forbidden:
            return self._say(403, {"error": "You don't have the rights to create a model under this namespace"})
        if name in self.hub.repos:
            return self._say(409, {"error": "You already created this model repo"})
        self.hub.repos[name] = Repo(asked["private"] if "private" in asked else asked.get("visibility") == "private")
        return self._say(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def _validate(self, card: str) -> None:
        license = re.search(r"^license: (.*)$", card, re.MULTILINE)
        if license and license[1] not in LICENSES:
            return self._say(400, {"errors": [{"message": f'"license" must be one of {sorted(LICENSES)}'}], "warnings": []})
        return self._say(200, {"errors": [], "warnings": []})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.hub.url}/storage/{wanted['oid']}", "header": {}}}}
            for wanted in asked["objects"]
        ]
        self._say(200, {"transfer": "basic", "objects": objects})

    def _commit(self, name: str, repo: Repo, lines: list[dict[str, Any]]) -> None:
        files, message, is_newest = dict(repo.files), "", True
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
                is_newest = value.get("parentCommit", repo.sha) == repo.sha
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                stored = self.hub.stored.get(value["oid"], b"")
                assert (sha256(stored).hexdigest(), len(stored)) == (value["oid"], value["size"])
                files[value["path"]] = stored
            else:
                assert line["key"] == "deletedFile"
                del files[value["path"]]
        if not is_newest:
            return self._say(412, {"error": "A commit has happened since. Please refresh and try again."})
        repo.files = files
        repo.commits.append((message, files))
        return self._say(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{repo.sha}", "commitOid": repo.sha})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _say(self, status: int, answer: dict[str, Any], *, code: str = "") -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if code:
            self.send_header("X-Error-Code", code)
        if "error" in answer:
            self.send_header("X-Error-Message", answer["error"])
        self.end_headers()
        self.wfile.write(data)


def _mode(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"
