"""Where requests of all interfaces are checked and handed in, and where their callers wait."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest

from gguf_sd.adapters.lora import SUFFIX, TAG
from gguf_sd.errors import GgufSdError
from gguf_sd.field_checks import shown
from gguf_sd.json_text import json_object
from gguf_sd.request import MAX_SEED, Request
from gguf_sd.server.errors import ApiError
from gguf_sd.server.limits import NAME, Limits
from gguf_sd.server.line import Line
from gguf_sd.server.metrics import Metrics
from gguf_sd.server.shelf import Shelf
from gguf_sd.server.tickets import CANCELLED, FAILED, Ticket

T = TypeVar("T")
DECODERS = 2  # requests whose bodies are taken apart at the same time


@dataclass
class Desk:
    shelf: Shelf
    line: Line
    metrics: Metrics
    limits: Limits = field(default_factory=Limits)
    lora_dir: Path | None = None
    _decoding: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(DECODERS))

    def loras(self) -> dict[str, Path]:
        """LoRAs that prompts may name."""
        if self.lora_dir is None:
            return {}
        found = sorted(self.lora_dir.rglob(f"*{SUFFIX}"))
        return {path.stem: path for path in found}

    async def submit(
        self, settings: Mapping[str, Any], count: int, model: str, source: str, looks: float = 0.0
    ) -> Ticket:
        """A ticket for ``count`` pictures in the line; ``looks``: for how many seconds previews are made. Raises
        GgufSdError for what cannot be painted, QueueFullError and ShuttingDownError."""
        ticket = await run_in_threadpool(self._ticket, settings, count, model, source)
        ticket.show_for(looks)
        self.line.submit(ticket)
        return ticket

    def _ticket(self, settings: Mapping[str, Any], count: int, model: str, source: str) -> Ticket:
        if model not in self.shelf.models:
            raise ApiError(404, f"there is no model {shown(model)}; GET the list of models", "model_not_found", "model")
        self.limits.check(settings, count)
        for name in ("prompt", "negative_prompt"):
            if isinstance(text := settings.get(name), str):  # what is none the request refuses
                self._check_loras(text)
        request = Request(**settings, batch=self.line.batch, lora_dir=self.lora_dir)
        job = self.shelf.prepare(model, request)
        self.limits.check({"width": job.width, "height": job.height, "steps": job.steps}, count)
        jobs = [replace(job, seed=(job.seed + i) % (MAX_SEED + 1)) for i in range(count)]
        return Ticket(model, jobs, self.shelf.chunks(model, job), source)

    def _check_loras(self, prompt: str) -> None:
        """Raises GgufSdError, which names no folder, for LoRAs that this server does not have."""
        if not (names := [match[1].strip() for match in TAG.finditer(prompt)]):
            return
        there = self.loras()
        for name in names:
            if name.removesuffix(SUFFIX) not in there:
                known = f"it has {', '.join(list(there)[:20])}" if there else "it has none"
                raise GgufSdError(f"the prompt names the LoRA {shown(name)}, which this server does not have; {known}")

    async def finish(self, ticket: Ticket, http: HttpRequest) -> None:
        """Waits until the ticket is over; a caller who leaves cancels it. Raises ApiError where it failed, or was
        cancelled without a picture."""
        async for _ in self.changes(ticket, http):
            pass
        if ticket.state == FAILED:
            raise ApiError(503 if self.line.closed else 500, ticket.error, "painting_failed")

    async def changes(self, ticket: Ticket, http: HttpRequest) -> AsyncIterator[None]:
        """Yields after changes of a ticket until it is over; several may be told as one. However the iteration ends,
        a ticket that is not over is cancelled."""
        changed, loop = asyncio.Event(), asyncio.get_running_loop()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(changed.set)

        unwatch = ticket.watch(tell)
        gone = asyncio.create_task(_gone(http))
        gone.add_done_callback(lambda task: changed.set())
        try:
            while not ticket.over and not gone.done():
                await changed.wait()
                changed.clear()
                yield
        finally:
            unwatch()
            gone.cancel()
            ticket.cancel()
            if ticket.state == CANCELLED:
                self.metrics.cancelled.inc()

    async def json(self, http: HttpRequest) -> dict[str, Any]:
        """The JSON object of a request. Raises ApiError for another content type, GgufSdError for what is none."""
        kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, f"the content type is {shown(kind)}; send application/json", "unsupported_media_type")
        body = await http.body()
        found: dict[str, Any] = await self.decoded(json_object, body, "the request", self.limits.upload)
        if (name := next((name for name in found if len(name) > NAME), None)) is not None:
            raise GgufSdError(f"there is no setting {shown(name)}")
        return found

    async def decoded(self, read: Callable[..., T], *args: Any) -> T:
        """``read(*args)`` in a thread, but a few at a time: what is read may be large."""
        async with self._decoding:
            return await run_in_threadpool(read, *args)

    def admit(self) -> None:
        """Before anything large is read. Raises QueueFullError and ShuttingDownError where it would be in vain."""
        self.line.check_room()


async def _gone(http: HttpRequest) -> None:
    """Returns when the caller has left."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
