"""A running server of the demo model in two types, and its address."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
import uvicorn
from PIL import Image

from gguf_sd.demo import model_folder
from gguf_sd.loading import LoadOptions
from gguf_sd.server.app import HttpServer, Server, Settings
from gguf_sd.server.shelf import Painter, Shelf
from gguf_sd_convert.convert import ConvertOptions, convert

OPTIONS = LoadOptions(device="cpu", dtype="float32")
FAST = {"steps": 2, "seed": 1}


@dataclass
class Running:
    url: str
    server: Server
    http: HttpServer

    def post(self, path: str, **settings: Any) -> requests.Response:
        return requests.post(self.url + path, json=settings, timeout=60)

    def get(self, path: str) -> requests.Response:
        return requests.get(self.url + path, timeout=60)


def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    """Waits for something to become true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


@contextmanager
def running(shelf: Shelf, settings: Settings, painters: Sequence[Painter] | None = None) -> Iterator[Running]:
    """A server on a free port of this machine, ended at the end."""
    server = Server(shelf, settings, painters)
    config = uvicorn.Config(server.app, "127.0.0.1", 0, log_level="warning")
    socket = config.bind_socket()
    http = HttpServer(config, server)
    thread = threading.Thread(target=lambda: http.run(sockets=[socket]), daemon=True)
    thread.start()
    until(lambda: http.started)
    try:
        yield Running(f"http://127.0.0.1:{socket.getsockname()[1]}", server, http)
    finally:
        http.handle_exit(2, None)
        thread.join(30)
        assert not thread.is_alive(), "the server stops"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("served")
    paths = {f"demo-{kind}": folder / f"demo-{kind}.gguf" for kind in ("q8_0", "q4_0")}
    for name, path in paths.items():
        convert(model_folder(), path, ConvertOptions(type=name.removeprefix("demo-")))
    return paths


@pytest.fixture(scope="session")
def shelf(models: dict[str, Path]) -> Shelf:
    return Shelf(models, OPTIONS)


@pytest.fixture(scope="module")
def served(shelf: Shelf) -> Iterator[Running]:
    with running(shelf, Settings()) as server:
        yield server


@pytest.fixture
def server_with(shelf: Shelf) -> Iterator[Callable[..., Running]]:
    """Starts servers of other settings."""
    opened: list[Any] = []

    def start(**settings: Any) -> Running:
        opened.append(running(shelf, Settings(**settings)))
        server: Running = opened[-1].__enter__()
        return server

    yield start
    for manager in opened:
        manager.__exit__(None, None, None)


def picture(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def as_text(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
