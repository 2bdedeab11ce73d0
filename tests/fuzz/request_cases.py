"""Cases of requests to the server: through its whole application, in this process; nothing is painted, because every
caller has left by then."""

from __future__ import annotations

import asyncio
import base64
import json
import random
from pathlib import Path
from typing import Any

from gguf_sd.errors import GgufSdError
from gguf_sd.loading import LoadOptions
from gguf_sd.server.app import Server, Settings
from gguf_sd.server.guard import Rules
from gguf_sd.server.limits import Limits
from gguf_sd.server.shelf import Shelf
from tests.fuzz.file_mutators import damaged, mutated_picture, picture
from tests.fuzz.gguf_mutator import mutated_json
from tests.fuzz.text_mutator import mutated_text

A1111 = {
    "prompt": "a cat", "negative_prompt": "dog", "seed": 1, "sampler_name": "Euler a", "scheduler": "Karras",
    "steps": 2, "cfg_scale": 7.5, "width": 64, "height": 64, "batch_size": 1, "n_iter": 2, "clip_skip": 1,
    "enable_hr": False, "alwayson_scripts": {},
    "override_settings": {"sd_model_checkpoint": "m", "CLIP_stop_at_last_layers": 1},
}  # fmt: skip
IMAGES = {"denoising_strength": 0.5, "init_images": ["P"], "mask": "P", "mask_blur": 2, "resize_mode": 1}
OPENAI = {"prompt": "a cat", "model": "m", "n": 1, "size": "64x64", "response_format": "b64_json", "steps": 2,
          "seed": 1, "output_format": "jpeg", "output_compression": 50, "guidance": 2.0, "quality": "high"}  # fmt: skip
PAGE = {"prompt": "a cat", "seed": "12345678901234567890", "steps": 2, "guidance": 7, "sampler": "euler", "width": 64,
        "count": 1, "model": "m", "image": "P", "mask": "P", "strength": 0.5}  # fmt: skip
BODIES: dict[str, dict[str, Any]] = {
    "/sdapi/v1/txt2img": A1111, "/sdapi/v1/img2img": A1111 | IMAGES, "/v1/images/generations": OPENAI,
    "/api/paint": PAGE, "/sdapi/v1/options": {"sd_model_checkpoint": "m", "CLIP_stop_at_last_layers": 2},
    "/sdapi/v1/png-info": {"image": "P"},
}  # fmt: skip
PATHS = ("/", "/static/../../app.py", "/static/%2e%2e/x", "/pictures/../x", "/v1/models/../x", "/v1/models/m",
         "/metrics", "/sdapi/v1/progress", "/sdapi/v1/sd-models", "/\0", "/v1/models/" + "x" * 5000,
         "/static/\ud800x")  # fmt: skip
HEADERS = (
    (b"host", b"evil.example"), (b"host", b"\xff\xff"), (b"host", b"[::1"), (b"origin", b"http://evil.example"),
    (b"content-length", b"9" * 30), (b"content-length", b"-1"), (b"content-type", b"text/plain"), (b"origin", b"http://["),
    (b"content-type", b"application/json; charset=utf-7"), (b"authorization", b"Basic \xff"), (b"range", b"bytes=9-1"),
    (b"authorization", b"Bearer key"), (b"authorization", b"Basic " + b"=" * 99), (b"if-none-match", b"*"),
    (b"if-modified-since", b"\xff"), (b"range", b"bytes=" + b"0-1," * 500), (b"accept-encoding", b"gzip;q=x"),
)  # fmt: skip


class RequestCases:
    def __init__(self, whole: Path):
        shelf = Shelf({"m": whole}, LoadOptions(device="cpu", dtype="float32"))
        settings = Settings(limits=Limits(size=128, upload=1 << 20, pixels=1 << 16), rules=Rules(None, 1 << 20))
        self.app = Server(shelf, settings).app
        self.locked = Server(shelf, Settings(rules=Rules("key", 1 << 20, frozenset({"localhost"})))).app
        self.runner = asyncio.Runner()
        self.kinds = {"request": self.request}

    def request(self, rng: random.Random) -> None:
        """Raises GgufSdError for an answer that refuses, AssertionError for one that says the server failed."""
        app = self.app if rng.random() < 0.9 else self.locked
        method, path, headers, body = "POST", rng.choice(list(BODIES)), [(b"host", b"localhost")], b""
        use = rng.random()
        if use < 0.1:
            method, path = rng.choice(("GET", "GET", "HEAD", "PUT", "OPTIONS", "\0")), rng.choice((*PATHS, *BODIES))
        elif use < 0.25:
            path, (body, kind) = "/v1/images/edits", self._form(rng)
            headers.append((b"content-type", kind))
        elif use < 0.3:
            path, body = "/api/settings", mutated_picture(rng)
        else:
            body = self._json(BODIES[path], rng)
            headers.append((b"content-type", b"application/json"))
        if rng.random() < 0.1:
            headers.append(rng.choice(HEADERS))
        status, answer = self.runner.run(_asked(app, method, path, headers, body, rng.random() < 0.1))
        assert 200 <= status < 500, (status, answer[:500])
        if status >= 400 and answer and method != "HEAD":
            json.loads(answer)
            raise GgufSdError(f"{status}: {answer[:300]!r}")

    def _json(self, values: dict[str, Any], rng: random.Random) -> bytes:
        if rng.random() < 0.2:
            values = values | {"prompt": mutated_text(rng)[:20_000]}
        text = json.dumps(values) if rng.random() < 0.2 else mutated_json(values, rng)
        small = picture("PNG", rng) if rng.random() < 0.6 else mutated_picture(rng)[:100_000]
        text = text.replace('"P"', json.dumps(base64.b64encode(small).decode()))
        return damaged(text.encode("utf-8", "surrogatepass"), rng)

    def _form(self, rng: random.Random) -> tuple[bytes, bytes]:
        """A form of several parts, some of them strange, and its content type."""
        parts = []
        fields = {"prompt": "a cat", "n": "1", "size": "64x64", "steps": "2", "strength": "0.5", "paste": "true"}
        for name in rng.sample(list(fields), rng.randrange(1, len(fields))):
            value = fields[name] if rng.random() < 0.7 else rng.choice(("", "nan", "9" * 5000, "\0", "1e999", "é"))
            parts.append(f'Content-Disposition: form-data; name="{name}"\r\n\r\n{value}'.encode())
        for name in rng.choice((("image",), ("image", "mask"), ("image[]",), ("x",), ("image",) * 6)):
            head = f'Content-Disposition: form-data; name="{name}"; filename="../{name}.png"\r\n\r\n'
            parts.append(head.encode() + mutated_picture(rng)[:50_000])
        mark = rng.choice((b"xyz", b"xyz", b"xyz", b"", b"x" * 300))
        body = b"".join(b"--" + mark + b"\r\n" + part + b"\r\n" for part in parts) + b"--" + mark + b"--\r\n"
        return damaged(body, rng), b"multipart/form-data; boundary=" + mark


async def _asked(app: Any, method: str, path: str, headers: Any, body: bytes, torn: bool) -> tuple[int, bytes]:
    """Status and body of an answer; ``torn``: the caller leaves before the body is complete."""
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
        "path": path, "raw_path": path.encode("utf-8", "replace"), "query_string": b"", "root_path": "",
        "headers": headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
    }  # fmt: skip
    messages = [
        {"type": "http.request", "body": body[i : i + 60_000], "more_body": True} for i in range(0, len(body), 60_000)
    ]
    messages += [] if torn else [{"type": "http.request", "body": b"", "more_body": False}]
    waiting, sent = iter(messages), []

    async def receive() -> dict[str, Any]:
        return next(waiting, {"type": "http.disconnect"})

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    if not sent:
        return 400, b"{}" if torn else b""
    content = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], content
