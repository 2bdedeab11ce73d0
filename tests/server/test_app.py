"""A server as strangers meet it: keys, other pages, sizes, full lines, callers who leave, shutdown, metrics."""

from __future__ import annotations

import base64
import json
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from gguf_sd.request import Request
from gguf_sd.runtime.plan import Planner
from gguf_sd.server.guard import Rules
from gguf_sd.server.shelf import Shelf
from gguf_sd.server.tickets import CANCELLED
from tests.server.conftest import FAST, OPTIONS, Running, as_text, picture, until

Start = Callable[..., Running]
LONG: dict[str, Any] = {"prompt": "a red circle", "steps": 150, "seed": 1}
PATH = "/v1/images/generations"


def metrics(server: Running) -> dict[str, float]:
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(server.get("/metrics").text):
        for sample in family.samples:
            found[" ".join([sample.name, *sample.labels.values()])] = sample.value
    return found


def in_background(server: Running, **settings: Any) -> dict[str, Any]:
    """A request in a thread of its own, begun when this returns; the answer comes under ``answer``."""
    found: dict[str, Any] = {}
    before = len(server.server.line.open_tickets())
    thread = threading.Thread(target=lambda: found.update(answer=server.post(PATH, **settings)))
    thread.start()
    found["thread"] = thread
    until(lambda: len(server.server.line.open_tickets()) > before)
    return found


def test_keys(server_with: Start) -> None:
    server = server_with(rules=Rules(key="sesame"))
    for path in ("/v1/models", "/sdapi/v1/options", "/api/models", "/metrics"):
        assert server.get(path).status_code == 401
        for right in ("Bearer sesame", "Basic " + base64.b64encode(b"any:sesame").decode()):
            assert requests.get(server.url + path, headers={"Authorization": right}, timeout=9).status_code == 200
        for wrong in (
            "Bearer sesam",
            "Bearer",
            "Basic %%",
            "Basic " + base64.b64encode(b"sesame:x").decode(),
            "sesame",
        ):
            answer = requests.get(server.url + path, headers={"Authorization": wrong}, timeout=9)
            assert answer.status_code == 401
            assert "sesame" not in answer.text
    assert server.get("/v1/models").json()["error"]["type"] == "authentication_error"
    assert server.get("/healthz").status_code == server.get("/").status_code == 200


def test_other_pages_and_other_names(server_with: Start) -> None:
    server = server_with(rules=Rules(hosts=frozenset(["127.0.0.1"]), origins=("https://chat.example",)))

    def ask(method: str = "GET", **headers: str) -> requests.Response:
        return requests.request(method, f"{server.url}/v1/models", headers=headers, timeout=9)

    assert ask(Host="rebound.example").status_code == 421
    assert ask(Origin="https://evil.example").status_code == 403
    assert ask(Origin="http://[").status_code == 403, "no address at all"
    assert ask(Origin=server.url).status_code == 200
    allowed = ask(Origin="https://chat.example")
    assert allowed.headers["access-control-allow-origin"] == "https://chat.example"
    preflight = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
    assert ask("OPTIONS", **preflight).status_code == 200
    assert ask("OPTIONS", **(preflight | {"Origin": "https://evil.example"})).status_code == 403


def test_no_other_origin_unless_told(served: Running) -> None:
    answer = requests.get(f"{served.url}/v1/models", headers={"Origin": "https://chat.example"}, timeout=9)
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers
    text = requests.post(served.url + PATH, b'{"prompt": "a"}', headers={"Content-Type": "text/plain"}, timeout=9)
    assert text.status_code == 415, "what a form can send without asking first"


def test_no_path_leads_to_the_file_system(served: Running) -> None:
    for path in ("/static/../app.py", "/static/%2e%2e/app.py", "/static//etc/passwd", "/pictures/..%2f..%2fapp.py"):
        prepared = requests.Request("GET", served.url).prepare()
        prepared.url = served.url + path
        assert requests.Session().send(prepared, timeout=9).status_code == 404


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
@pytest.mark.parametrize("value", [3, [1], {"a": 1}, True])
def test_prompts_that_are_no_text(served: Running, field: str, value: Any) -> None:
    answer = served.post("/api/paint", **({"prompt": "a"} | {field: value}))
    assert answer.status_code == 400
    assert "must be a text" in answer.json()["detail"]


def test_a_request_that_breaks_off_is_no_failure(served: Running, caplog: pytest.LogCaptureFixture) -> None:
    host, _, port = served.url.removeprefix("http://").partition(":")
    head = f"POST {PATH} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    before = metrics(served)
    with socket.create_connection((host, int(port)), timeout=9) as connection:
        connection.sendall(head.encode() + b'{"prompt"')
    until(lambda: metrics(served) != before)
    assert "failed" not in caplog.text
    assert "Exception" not in caplog.text


@pytest.mark.parametrize("how", ["at once", "in pieces"])
def test_uploads_are_bounded(server_with: Start, how: str) -> None:
    server = server_with(rules=Rules(upload=100_000))
    body = b'{"prompt": "' + b"a" * 200_000 + b'"}'
    data: Any = body if how == "at once" else (body[i : i + 10_000] for i in range(0, len(body), 10_000))
    answer = requests.post(server.url + PATH, data, headers={"Content-Type": "application/json"}, timeout=9)
    assert answer.status_code == 413
    assert "more than 100000 bytes" in answer.json()["error"]["message"]


def test_a_full_line_refuses(server_with: Start) -> None:
    server = server_with(queue=2, batch=1)
    with ThreadPoolExecutor(8) as pool:
        settings = {"prompt": "a red circle", "steps": 20}
        answers = list(pool.map(lambda seed: server.post(PATH, seed=seed, **settings), range(8)))
    codes = [answer.status_code for answer in answers]
    assert set(codes) == {200, 429}
    refused = [answer for answer in answers if answer.status_code == 429]
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)
    assert refused[0].json()["error"]["type"] == "rate_limit_error"
    assert metrics(server)["gguf_sd_requests_total openai 429"] == len(refused)


def test_who_hangs_up_cancels(server_with: Start) -> None:
    server = server_with()
    line = server.server.line
    host, port = server.url.removeprefix("http://").split(":")
    body = b'{"prompt": "a red circle", "steps": 150}'
    head = f"POST {PATH} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(line.open_tickets)
        tickets = line.open_tickets()
    until(lambda: tickets[0].over)
    assert tickets[0].state == CANCELLED
    assert metrics(server)["gguf_sd_cancelled_total"] == 1


def test_shutdown_finishes_the_picture(server_with: Start) -> None:
    server = server_with(batch=1)
    painted = in_background(server, **(LONG | {"steps": 60}))
    waiting = in_background(server, **LONG)
    server.http.handle_exit(15, None)
    painted["thread"].join(30)
    waiting["thread"].join(30)
    assert painted["answer"].status_code == 200
    assert picture(painted["answer"].json()["data"][0]["b64_json"]).size == (64, 64)
    assert waiting["answer"].status_code == 503
    assert "shutting down" in waiting["answer"].json()["error"]["message"]


def test_a_second_signal_gives_up(server_with: Start) -> None:
    server = server_with()
    painted = in_background(server, **(LONG | {"n": 16}))
    server.http.handle_exit(15, None)
    server.http.handle_exit(15, None)
    painted["thread"].join(10)
    assert not painted["thread"].is_alive()
    assert painted["answer"].status_code == 503


def test_metrics_count(server_with: Start) -> None:
    server = server_with()
    assert server.post(PATH, prompt="a", n=3, **FAST).status_code == 200
    assert server.post(PATH, prompt=3).status_code == 400
    found = metrics(server)
    assert found["gguf_sd_pictures_total openai demo-q8_0"] == 3
    assert found["gguf_sd_steps_total"] == 6
    assert found["gguf_sd_requests_total openai 200"] == found["gguf_sd_requests_total openai 400"] == 1
    assert found["gguf_sd_memory_bytes process"] > 1 << 26
    assert found["gguf_sd_model_loaded_bytes demo-q8_0"] > 1 << 20
    assert found["gguf_sd_steps_per_second"] > 0
    assert server.get("/healthz").json()["status"] == "ok"


def test_models_swap_where_memory_holds_one(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, server_with: Start
) -> None:
    class Watch:
        wanted = staticmethod(lambda: ())
        step = staticmethod(lambda step, looks: None)
        finished = staticmethod(lambda index, picture: None)

    shelf = Shelf(models, OPTIONS)

    def paint(name: str) -> set[str]:
        shelf.paint(name, [shelf.prepare(name, Request("a", **FAST))], Watch())
        return {name for name, nbytes in shelf.loaded().items() if nbytes}

    assert paint("demo-q8_0") == {"demo-q8_0"}
    assert paint("demo-q4_0") == {"demo-q8_0", "demo-q4_0"}, "there is room for both"
    assert shelf.swaps == 0
    monkeypatch.setattr(Planner, "plan", lambda self, budget: self.smallest)  # as if there were little
    assert paint("demo-q8_0") == set()
    assert shelf.swaps == 1
    monkeypatch.undo()
    tight = Shelf(models, OPTIONS.__class__(device="cpu", dtype="float32", max_memory="4GiB"))
    shelf = tight
    assert paint("demo-q8_0") == {"demo-q8_0"}
    assert paint("demo-q4_0") == {"demo-q4_0"}, "a budget is for one model at a time"


def test_what_the_page_asks(served: Running) -> None:
    facts = served.get("/api/models").json()
    assert [model["type"] for model in facts["models"]] == ["q8_0", "q4_0"]
    events = list(map(json.loads, served.post("/api/paint", prompt="<b>", count=2, **FAST).iter_lines()))
    pictures = [event for event in events if event["type"] == "picture"]
    assert [event["seed"] for event in pictures] == ["1", "2"]
    assert events[-1] == {"type": "end", "state": "done", "error": ""}
    assert any(event["type"] == "state" and event["look"] for event in events)
    read = requests.post(f"{served.url}/api/settings", base64.b64decode(pictures[1]["png"]), timeout=9).json()
    assert (read["prompt"], read["seed"], read["steps"]) == ("<b>", "2", 2)
    largest = str(2**64 - 1)
    assert f'"seed": "{largest}"' in served.post("/api/paint", prompt="a", steps=2, seed=largest).text
    assert "seed must be a whole number" in served.post("/api/paint", prompt="a", seed="x").json()["detail"]
    start = as_text(picture(pictures[0]["png"]))
    changed = served.post("/api/paint", prompt="a", image=start, strength=0.9, **FAST)
    assert '"type": "end", "state": "done"' in changed.text
    assert served.post("/api/paint", prompt="a", image="x").json()["detail"].startswith("the image")
    assert served.post("/api/paint", prompt="a", folder="/etc").status_code == 400
