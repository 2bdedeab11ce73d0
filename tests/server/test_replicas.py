"""The server with its painters on Ray Serve's replicas, one of which is killed while it paints."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from gguf_sd.pipeline import Pipeline
from gguf_sd.server.app import Settings
from gguf_sd.server.shelf import Shelf
from tests.server.conftest import OPTIONS, Running, picture, running, until

pytest.importorskip("ray", reason="needs gguf-sd[ray]")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def replicas(shelf: Shelf) -> Iterator[Running]:
    from gguf_sd.server.on_ray import Replicas

    root = Path(__file__).parents[2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(str(root / name) for name in ("", "kernels", "convert")))
        with Replicas(shelf, OPTIONS, "local", 2) as painters, running(shelf, Settings(), painters) as server:
            yield server


def paint(server: Running, seed: int, steps: int, answers: dict[int, requests.Response]) -> threading.Thread:
    def work() -> None:
        answers[seed] = server.post("/v1/images/generations", prompt="a red circle", seed=seed, steps=steps)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_pictures_are_the_same_and_none_is_lost(replicas: Running, models: dict[str, Path]) -> None:
    answers: dict[int, requests.Response] = {}
    threads = [paint(replicas, seed, 100 + seed % 2, answers) for seed in range(4)]  # of two shapes: two at once
    until(lambda: "gguf_sd_steps_total 0.0" not in replicas.get("/metrics").text)
    from tests.batch.test_ray import our_processes  # a module that is skipped where there is no Ray

    victim = our_processes("ServeReplica")[0]
    os.kill(victim, 9)
    for thread in threads:
        thread.join(120)
    pipeline = Pipeline.load(models["demo-q8_0"], "cpu", "float32")
    for seed in range(4):
        assert answers[seed].status_code == 200, answers[seed].text
        (expected,) = pipeline("a red circle", seed=seed, steps=100 + seed % 2)
        (entry,) = answers[seed].json()["data"]
        assert picture(entry["b64_json"]).tobytes() == expected.tobytes()
    assert "gguf_sd_failures_total 0.0" in replicas.get("/metrics").text


def test_looks_and_cancel(replicas: Running) -> None:
    body: dict[str, Any] = {"prompt": "a red circle", "steps": 150}
    with requests.post(f"{replicas.url}/api/paint", json=body, stream=True, timeout=60) as answer:
        for line in answer.iter_lines():
            if b'"look": "' in line:
                break
    until(lambda: not replicas.server.line.open_tickets())
    assert replicas.post("/v1/images/generations", prompt="a", steps=2).status_code == 200, "replicas are free again"
