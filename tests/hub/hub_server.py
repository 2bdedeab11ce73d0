"""A server that speaks as much of the Hugging Face Hub's API as its client asks for: models, files, commits and LFS.

For fresh processes with HF_ENDPOINT; run as a program it prints its address and serves a folder of repositories.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Repositories by name, each a dictionary of files by revision; ``requests`` are those that came."""

    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    token: str = ""  # without which nothing is written, and gated files are not read
    cut: int | None = None  # bytes of a file after which the connection breaks, once
    requests: list[tuple[str, str]] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS
    address: str = ""
    full: bool = False  # takes no uploads
    ranges: list[int] = field(default_factory=list)  # where requests for the rest of a file began

    def commit(self, revision: str) -> str:
        return COMMIT if revision in ("main", COMMIT) else hashlib.sha1(revision.encode()).hexdigest()

    def gets(self, ending: str) -> int:
        return sum(method == "GET" and path.endswith(ending) for method, path in self.requests)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *given: object) -> None:
        pass

    def _answer(self, status: int, body: bytes | dict[str, Any] = b"", **headers: str) -> None:
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data)), "Content-Type": "application/json"} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    @property
    def _authorised(self) -> bool:
        return not self.hub.token or self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route()

    def do_PUT(self) -> None:
        self._route()

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._info(found[1], found[2] or "main")
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(found[1], found[2], found[3])
        else:
            self._writing(path)

    def _revision(self, repo: str, revision: str) -> dict[str, bytes] | None:
        """The files; None, and an answer, where there are none."""
        if repo not in self.hub.repos:
            self._refuse(401, "RepoNotFound")
            return None
        by_commit = {self.hub.commit(name): files for name, files in self.hub.repos[repo].items()}
        files = self.hub.repos[repo].get(revision, by_commit.get(revision))
        if files is None:
            self._refuse(404, "RevisionNotFound")
        return files

    def _info(self, repo: str, revision: str) -> None:
        if (files := self._revision(repo, revision)) is not None:
            siblings = [{"rfilename": name} for name in files]
            self._answer(200, {"id": repo, "sha": self.hub.commit(revision), "siblings": siblings, "tags": []})

    def _file(self, repo: str, revision: str, name: str) -> None:
        if (files := self._revision(repo, revision)) is None:
            return
        if repo in self.hub.gated and not (self.hub.token and self._authorised):
            self._refuse(403, "GatedRepo")
            return
        if name not in files:
            self._refuse(404, "EntryNotFound")
            return
        data, commit = files[name], self.hub.commit(revision)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        start = re.fullmatch(r"bytes=(\d+)-.*", self.headers.get("Range", ""))
        first = int(start[1]) if start else 0
        self.hub.ranges += [first] if first else []
        if start:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        if self.command == "GET" and self.hub.cut is not None and len(data) > self.hub.cut:
            self._broken_off(data, headers)
            return
        self._answer(206 if start else 200, data[first:], **headers)

    def _broken_off(self, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: self.hub.cut])
        self.wfile.flush()
        self.hub.cut, self.close_connection = None, True
        self.connection.close()

    def _writing(self, path: str) -> None:
        """Creating, uploading and committing."""
        body = self._body()
        if found := re.fullmatch(r"/upload/([0-9a-f]{64})", path):  # an address that was signed
            if self.hub.full:
                self._refuse(413, "Full")
                return
            assert hashlib.sha256(body).hexdigest() == found[1]
            self.hub.objects[found[1]] = body
            self._answer(200)
        elif path == "/api/validate-yaml":
            bad = "license: nonsense" in json.loads(body)["content"]
            errors = [{"message": '"license" must be one of [openrail++]'}] if bad else []
            self._answer(400 if bad else 200, {"errors": errors, "warnings": []})
        elif path == "/api/whoami-v2" and self._authorised and self.hub.token:
            self._answer(200, {"name": "someone", "type": "user", "orgs": []})
        elif not self._authorised or not self.hub.token:
            self._refuse(401, "Unauthorized")
        elif path == "/api/repos/create":
            given = json.loads(body)
            repo = "/".join(part for part in (given.get("organization"), given["name"]) if part)
            if repo in self.hub.repos:
                self._answer(409, {"url": f"{self.hub.address}/{repo}"})
                return
            self.hub.repos[repo] = {"main": {}}
            self._answer(200, {"url": f"{self.hub.address}/{repo}", "id": repo})
        elif found := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".gguf") else "regular",
                 "shouldIgnore": False, "oid": None}
                for f in json.loads(body)["files"]
            ]  # fmt: skip
            self._answer(200, {"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif found := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            self._commit(found[1], body)
        else:
            self._refuse(404, f"EntryNotFound {self.command} {path}")

    def _batch(self, given: dict[str, Any]) -> None:
        objects = [
            {"oid": o["oid"], "size": o["size"],
             "actions": {"upload": {"href": f"{self.hub.address}/upload/{o['oid']}", "header": {}}}}
            for o in given["objects"]
        ]  # fmt: skip
        self._answer(200, {"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def _commit(self, repo: str, body: bytes) -> None:
        import base64

        files = self.hub.repos[repo]["main"]
        for line in (json.loads(line) for line in body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        url = f"{self.hub.address}/{repo}/commit/{COMMIT}"
        self._answer(
            200, {"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": "", "pullRequestUrl": None}
        )


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serves on 127.0.0.1."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
