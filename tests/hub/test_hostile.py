"""A Hub, or what stands between, that answers what no Hub would: a sentence each, and nothing outside of the cache."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.hub.hub_server import COMMIT, Hub
from tests.hub.test_fetch import fetch

NONSENSE = "refused: the Hub's answer for evil/{} makes no sense"
BROKEN = "refused: the connection to the Hub broke off"
GIVEN = {"X-Repo-Commit": COMMIT, "ETag": '"abc"'}


def listing(*names: object) -> bytes:
    return json.dumps({"id": "evil/x", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}).encode()


# By the repository's name: what is answered when it is asked for, and how that ends.
LISTINGS: dict[str, tuple[bytes, str]] = {
    "html": (b"<html>log in</html>", NONSENSE),
    "list": (b"[1, 2]", NONSENSE),
    "types": (b'{"id": 3, "siblings": [{"x": 1}, null]}', NONSENSE),
    "text": (b'{"id": "evil/text", "siblings": "abc"}', NONSENSE),
    "deep": (b"[" * 100_000, NONSENSE),
    "digits": (b'{"id": ' + b"9" * 10_000 + b"}", NONSENSE),
    "above": (listing("../../x.gguf", "/etc/x.gguf", "a/../../y.gguf"), "refused: evil/above holds no files"),
    "backslash": (listing("..\\..\\z.gguf"), "refused: "),
    "control": (listing("\x1b[2Ja\n.gguf", "b.gguf"), r"refused: evil/control holds several models, '\x1b[2Ja\n.gguf'"),
}
# What is answered for the file: status, headers, and how that ends.
FILES: dict[str, tuple[int, dict[str, str], str]] = {
    "elsewhere": (302, GIVEN | {"Location": "file:///etc/passwd"}, "refused: "),
    "round": (302, GIVEN | {"Location": "/evil/round/resolve/main/m.gguf"}, "refused: "),
    "longer": (200, GIVEN | {"Content-Length": "5000"}, BROKEN),
    "terabytes": (200, GIVEN | {"Content-Length": str(10 << 40)}, "refused: "),
    "negative": (200, GIVEN | {"Content-Length": "-5"}, "refused: "),
    "etag": (200, GIVEN | {"ETag": '"../../../../../escaped"'}, NONSENSE),
    "commit": (200, GIVEN | {"X-Repo-Commit": "../../../../../escaped"}, NONSENSE),
    "bare": (200, {}, "refused: "),
}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *given: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.split("/")
        if parts[1] == "api":
            body, _ = LISTINGS.get("".join(parts[4:5]), (listing("m.gguf"), ""))
            self._answer(200, body, {})
        else:
            status, headers, _ = FILES.get(parts[2], (404, {}, ""))
            self._answer(status, b"GGUF" + bytes(100), headers)

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body)), "Connection": "close"} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.close_connection = True


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Hub(address=f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()


def test_one_sentence_each(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "a" / "b"
    home.mkdir(parents=True)
    wanted = {name: ends for name, (_, ends) in LISTINGS.items()} | {name: ends for name, (*_, ends) in FILES.items()}
    lines = fetch(hub, home, *(f"evil/{name}" for name in wanted), HF_HUB_DOWNLOAD_TIMEOUT="5")
    found = dict(zip(wanted, lines, strict=True))
    assert {name: line for name, line in found.items() if not line.startswith(wanted[name].format(name))} == {}
    outside = [p for p in tmp_path.rglob("*") if not p.is_relative_to(home / "hf") and p not in (home, home.parent)]
    assert not outside
    assert not [name for name in os.listdir(home / "hf" / "hub") if "escaped" in name]
