"""`gguf-sd serve` as a program."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import requests

from benchmarks.serve import load
from gguf_sd.cli.main import main
from tests.server.conftest import until
from tests.server.test_app import Start


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["absent.gguf"], "absent.gguf does not exist"),
        (["--port", "99999"], "--port is 99999"),
        (["--queue", "0"], "--queue is 0"),
        (["--api-key", ""], "the API key is empty"),
        (["--lora-dir", "absent"], "absent does not exist"),
        (["--max-upload", "much"], "--max-upload is 'much'"),
        (["--type", "q8_0,q9_9"], "q9_9"),
        (["--device", "tpu"], "unknown device"),
    ],
)
def test_arguments_that_make_no_sense(
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("GGUF_SD_CACHE", str(tmp_path / "cache"))
    assert main(["serve", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "cache").exists(), "nothing is converted first"


def test_two_models_of_one_name(models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = models["demo-q8_0"]
    assert main(["serve", str(path), str(path)]) == 2
    assert "two models are called demo-q8_0" in capsys.readouterr().err


def test_without_its_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve"]) == 2
    assert "pip install 'gguf-sd[serve]'" in capsys.readouterr().err


def test_an_address_in_use(models: dict[str, Path], server_with: Start, capsys: pytest.CaptureFixture[str]) -> None:
    port = server_with().url.rpartition(":")[2]
    assert main(["serve", str(models["demo-q8_0"]), "--port", port]) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


@pytest.mark.slow
def test_a_signal_ends_it_after_the_picture(models: dict[str, Path]) -> None:
    program = [sys.executable, "-m", "gguf_sd", "serve", str(models["demo-q8_0"]), "--port", "0"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    url = process.stdout.readline().split()[-1]
    found: dict[str, Any] = {}
    body = {"prompt": "a red circle", "steps": 100}

    def paint() -> None:
        found["answer"] = requests.post(f"{url}/v1/images/generations", json=body, timeout=60)

    thread = threading.Thread(target=paint)
    thread.start()
    until(lambda: painting(url))
    process.send_signal(signal.SIGTERM)
    thread.join(60)
    assert found["answer"].status_code == 200
    assert process.wait(30) == 0
    assert process.stderr is not None
    assert process.stderr.read() == ""


def painting(url: str) -> bool:
    return "gguf_sd_steps_total 0.0" not in requests.get(f"{url}/metrics", timeout=9).text


@pytest.mark.slow
def test_two_hundred_requests_of_twenty_clients(server_with: Start) -> None:
    """See benchmarks/serve/load.py, which runs the program itself and writes what it found down."""
    server = server_with(queue=8)
    server.post("/v1/images/generations", prompt="a", n=4, steps=2)
    done = load.run(server.url, requests=200, clients=20, steps=3)
    assert not done.wrong
    assert sum(done.codes.values()) == 200
    assert set(done.codes) == {200, 429}
    assert done.memory[-1] - done.memory[0] < 50e6
