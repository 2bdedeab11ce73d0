"""The page at `/`, and what it asks for."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from gguf_sd.errors import GgufSdError
from gguf_sd.field_checks import shown
from gguf_sd.imaging.png_metadata import parse_parameters, text_of
from gguf_sd.keywords import check_known
from gguf_sd.sampling.names import SAMPLERS
from gguf_sd.server.desk import Desk
from gguf_sd.server.tickets import CANCELLED, FAILED, WAITING, Ticket
from gguf_sd.server.uploads import as_base64, from_base64, from_bytes

SOURCE = "page"
FOLDER = Path(__file__).parent / "static"
SETTINGS = ("prompt", "negative_prompt", "seed", "steps", "guidance", "sampler", "schedule", "width", "height",
            "clip_skip", "strength", "resize", "mask_blur", "paste")  # fmt: skip
FOREVER = 1e9


class Page:
    def __init__(self, desk: Desk):
        self.desk = desk

    def routes(self) -> list[Any]:
        return [
            Route("/", self.index, methods=["GET"]),
            Route("/api/models", self.models, methods=["GET"]),
            Route("/api/paint", self.paint, methods=["POST"]),
            Route("/api/settings", self.settings, methods=["POST"]),
            Mount("/static", StaticFiles(directory=FOLDER)),
        ]

    async def index(self, http: HttpRequest) -> Response:
        return FileResponse(FOLDER / "index.html", headers={"Cache-Control": "no-cache"})

    async def models(self, http: HttpRequest) -> Response:
        """Models with their defaults, samplers with their schedules, LoRAs, limits."""
        limits = self.desk.limits
        loras = await run_in_threadpool(lambda: list(self.desk.loras()))
        return JSONResponse(
            {
                "models": [model.facts for model in self.desk.shelf.models.values()],
                "samplers": {x: {"label": i.label, "schedules": list(i.schedules)} for x, i in SAMPLERS.items()},
                "loras": loras,
                "limits": {"size": limits.size, "steps": limits.steps, "count": limits.count},
            }
        )

    async def paint(self, http: HttpRequest) -> Response:
        """Lines of JSON, as things happen: see :func:`events`. A caller who leaves cancels."""
        self.desk.admit()
        body = await self.desk.json(http)
        check_known(body, [*SETTINGS, "model", "count", "image", "mask"])
        settings = {name: value for name, value in body.items() if name in SETTINGS and value is not None}
        if isinstance(seed := settings.get("seed"), str) and seed.isascii() and seed.isdigit() and len(seed) <= 20:
            settings["seed"] = int(seed)  # JavaScript's numbers are exact up to 2^53
        for name in ("image", "mask"):
            if (text := body.get(name)) is not None:
                if not isinstance(text, str):
                    raise GgufSdError(f"{name} is {shown(text)}; it takes a picture as base64")
                settings[name] = await self.desk.decoded(from_base64, text, f"the {name}", self.desk.limits.pixels)
        count, model = body.get("count", 1), body.get("model", self.desk.shelf.default)
        if type(count) is not int or not isinstance(model, str):
            raise GgufSdError(f"count and model are {shown(count)} and {shown(model)}; they take a number and a text")
        ticket = await self.desk.submit(settings, count, model, SOURCE, FOREVER)
        return StreamingResponse(self._lines(ticket, http), media_type="application/x-ndjson")

    async def _lines(self, ticket: Ticket, http: HttpRequest) -> AsyncIterator[str]:
        sent: set[int] = set()
        yield _line(self._state(ticket))
        async for _ in self.desk.changes(ticket, http):
            for event in events(ticket, sent):
                yield _line(event)
            yield _line(self._state(ticket))
        for event in events(ticket, sent):
            yield _line(event)
        yield _line({"type": "end", "state": ticket.state, "error": ticket.error})

    def _state(self, ticket: Ticket) -> dict[str, Any]:
        return {
            "type": "state",
            "state": ticket.state,
            "ahead": self.desk.line.ahead(ticket) if ticket.state == WAITING else 0,
            "step": ticket.step,
            "steps": ticket.steps,
            "progress": round(ticket.progress, 4),
            "seconds_left": round(self.desk.line.seconds_left(ticket), 1),
            "look": as_base64(ticket.look) if ticket.look and ticket.state not in (FAILED, CANCELLED) else None,
        }

    async def settings(self, http: HttpRequest) -> Response:
        """The settings in the bytes of a picture."""
        data = await http.body()
        image = await self.desk.decoded(from_bytes, data, "the picture", self.desk.limits.pixels)
        text = text_of(image)
        if not text.strip():
            raise GgufSdError("the picture carries no settings")
        try:
            found = parse_parameters(text)
        except ValueError as error:
            raise GgufSdError(f"the picture carries settings that cannot be read: {error}") from None
        return JSONResponse(found | ({"seed": str(found["seed"])} if "seed" in found else {}))


def events(ticket: Ticket, sent: set[int]) -> list[dict[str, Any]]:
    """The pictures of a ticket that were not sent yet, in order; they are marked as sent."""
    found = []
    for index in sorted(set(ticket.pictures) - sent):
        sent.add(index)
        picture, job = ticket.pictures[index], ticket.jobs[index]
        found.append(
            {
                "type": "picture",
                "png": as_base64(picture.png),
                "seed": str(picture.seed),
                "flagged": picture.flagged,
                "parameters": picture.parameters,
                "width": job.width,
                "height": job.height,
            }
        )
    return found


def _line(event: dict[str, Any]) -> str:
    return json.dumps(event) + "\n"
