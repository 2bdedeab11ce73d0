"""The server put together, and run."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gguf_sd.errors import GgufSdError
from gguf_sd.imaging.png_metadata import version
from gguf_sd.server.a1111 import Automatic1111
from gguf_sd.server.desk import Desk
from gguf_sd.server.errors import ApiError, as_api_error, interface_of, response
from gguf_sd.server.guard import Guard, Rules
from gguf_sd.server.limits import Limits
from gguf_sd.server.line import Line
from gguf_sd.server.metrics import Metrics
from gguf_sd.server.openai import OpenAI
from gguf_sd.server.page import Page
from gguf_sd.server.shelf import Painter, Shelf
from gguf_sd.server.store import Store
from gguf_sd.server.tickets import QueueFullError
from gguf_sd.server.worker import Worker

log = logging.getLogger(__name__)
BACKLOG = 2048  # callers that the system keeps waiting for an answer at all
HALT_SECONDS = 30.0  # that a painter gets to end its step once it is told to stop


@dataclass
class Settings:
    """Of a server, but for its models."""

    queue: int = 32  # requests that may wait
    batch: int = 4  # pictures painted at once
    limits: Limits = field(default_factory=Limits)
    rules: Rules = field(default_factory=Rules)
    lora_dir: Path | None = None


class Server:
    """The parts of a running server. ``painters`` paint besides or instead of the shelf: one worker each."""

    def __init__(self, shelf: Shelf, settings: Settings, painters: Sequence[Painter] | None = None):
        self.settings = settings
        self.line = Line(settings.queue, settings.batch)
        self.metrics = Metrics(self.line, shelf)
        self.desk = Desk(shelf, self.line, self.metrics, settings.limits, settings.lora_dir)
        self.workers = [Worker(self.line, painter, self.metrics) for painter in painters or [shelf]]
        self.app = self._app()

    def start(self) -> None:
        for worker in self.workers:
            worker.start()

    def stop_taking(self) -> None:
        """What is painted is finished; who waits behind it is told that the server goes."""
        self.line.close()

    def stop(self) -> None:
        """Ends the workers: those that still paint stop at their next step."""
        self.line.close()
        for worker in self.workers:
            worker.halt()
        for worker in self.workers:
            if worker.is_alive():
                worker.join(HALT_SECONDS)

    def _app(self) -> FastAPI:
        @contextlib.asynccontextmanager
        async def life(app: FastAPI) -> AsyncIterator[None]:
            self.start()
            yield
            self.stop()

        store = Store()
        routes = [*Page(self.desk).routes(), *OpenAI(self.desk, store).routes(), *store.routes()]
        routes += [
            *Automatic1111(self.desk).routes(),
            Route("/healthz", self._health),
            Route("/metrics", self._metrics),
        ]
        app = FastAPI(title="gguf-sd", lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)
        app.router.routes.extend(routes)
        for kind in (GgufSdError, ApiError, QueueFullError, HTTPException, ClientDisconnect, Exception):
            app.add_exception_handler(kind, _answer_error)
        rules = self.settings.rules
        if rules.origins:
            app.add_middleware(CORSMiddleware, allow_origins=rules.origins, allow_methods=["*"], allow_headers=["*"])
        app.add_middleware(Guard, rules=rules, answered=self.metrics.answered)
        return app

    async def _health(self, http: HttpRequest) -> Response:
        alive = all(worker.is_alive() for worker in self.workers) and not self.line.closed
        facts = {"status": "ok" if alive else "stopping", "version": version(), "waiting": self.line.waiting()}
        return JSONResponse(facts, 200 if alive else 503)

    async def _metrics(self, http: HttpRequest) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _answer_error(http: HttpRequest, error: Exception) -> Response:
    interface = interface_of(http.url.path)
    if isinstance(error, ClientDisconnect):  # before the request was whole: nobody reads this
        error = ApiError(400, "the request is not complete")
    if isinstance(error, HTTPException):
        error = ApiError(error.status_code, _sentence(error))
    told = as_api_error(error, interface)
    if told.status == 500 and not isinstance(error, ApiError):
        log.error("%s %s failed", http.method, http.url.path, exc_info=error)
    return response(told, interface)


def _sentence(error: HTTPException) -> str:
    known = {404: "there is nothing at this address", 405: "this address does not take that method"}
    return known.get(error.status_code, str(error.detail))


class HttpServer(uvicorn.Server):
    """Stops in steps: at the first signal what is painted is finished, at the second it is given up, and its callers
    are told; at the third nobody is waited for."""

    def __init__(self, config: uvicorn.Config, server: Server):
        super().__init__(config)
        self.server, self.signals = server, 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.signals += 1
        self.server.stop_taking()
        if self.signals > 1:
            for worker in self.server.workers:
                worker.halt()
        self.force_exit = self.signals > 2
        self.should_exit = True


def serve(server: Server, host: str, port: int, tell: str = "") -> None:
    """Runs until it is told to stop. Raises GgufSdError where the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise GgufSdError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port"
        ) from error
    config = uvicorn.Config(server.app, log_level="warning", access_log=False, server_header=False)
    if tell:
        name = f"[{host}]" if ":" in host else host
        print(f"{tell} on http://{name}:{listening.getsockname()[1]}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        HttpServer(config, server).run(sockets=[listening])
