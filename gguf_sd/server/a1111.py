"""AUTOMATIC1111's interface, `/sdapi/v1/`, as its clients use it."""

from __future__ import annotations

import json
import time
from typing import Any

from PIL import ImageOps
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gguf_sd.errors import GgufSdError
from gguf_sd.field_checks import shown
from gguf_sd.imaging.masks import to_mask
from gguf_sd.imaging.png_metadata import parse_parameters, text_of
from gguf_sd.server import a1111_lists
from gguf_sd.server.a1111_fields import Fields, read_fields, read_overrides, settings_of
from gguf_sd.server.desk import Desk
from gguf_sd.server.errors import ApiError
from gguf_sd.server.tickets import RUNNING, Ticket
from gguf_sd.server.uploads import as_base64, from_base64

SOURCE = "a1111"
LOOKS = 10.0  # seconds for which previews are made after progress was asked for


class Automatic1111:
    """The routes, and what that program holds for all its clients: the checkpoint in use, and the clip skip."""

    def __init__(self, desk: Desk):
        self.desk, self.model = desk, desk.shelf.default
        self.clip_skip: int | None = None
        self.tickets: dict[int, Ticket] = {}  # that are not over yet, by number

    def routes(self) -> list[Route]:
        """Those that compute, and lists."""
        prefix = "/sdapi/v1"
        own = [
            Route(f"{prefix}/txt2img", self.txt2img, methods=["POST"]),
            Route(f"{prefix}/img2img", self.img2img, methods=["POST"]),
            Route(f"{prefix}/progress", self.progress, methods=["GET"]),
            Route(f"{prefix}/interrupt", self.interrupt, methods=["POST"]),
            Route(f"{prefix}/skip", self.interrupt, methods=["POST"]),
            Route(f"{prefix}/options", self.options, methods=["GET", "POST"]),
            Route(f"{prefix}/png-info", self.png_info, methods=["POST"]),
        ]
        return own + a1111_lists.routes(self.desk, prefix)

    async def txt2img(self, http: HttpRequest) -> Response:
        self.desk.admit()
        fields, overrides = read_fields(await self.desk.json(http))
        if fields.init_images or fields.mask:
            raise GgufSdError("init_images and mask belong to img2img; post there")
        return await self._paint(http, fields, overrides, {})

    async def img2img(self, http: HttpRequest) -> Response:
        self.desk.admit()
        fields, overrides = read_fields(await self.desk.json(http))
        if not fields.init_images:
            raise ApiError(404, "Init image not found: init_images holds none", "init_images")
        pictures = await self.desk.decoded(self._pictures, fields)
        return await self._paint(http, fields, overrides, pictures)

    def _pictures(self, fields: Fields) -> dict[str, Any]:
        most = self.desk.limits.pixels
        assert fields.init_images, "was asked for before"
        pictures: dict[str, Any] = {"image": from_base64(fields.init_images[0], "the init image", most)}
        if fields.mask:
            mask = to_mask(from_base64(fields.mask, "the mask", most))
            pictures["mask"] = ImageOps.invert(mask) if fields.inpainting_mask_invert else mask
        return pictures

    async def _paint(
        self, http: HttpRequest, fields: Fields, overrides: dict[str, Any], pictures: dict[str, Any]
    ) -> Response:
        checkpoint = overrides.get("sd_model_checkpoint")
        model = self._named(checkpoint) if checkpoint else self.model
        settings = settings_of(fields, overrides.get("CLIP_stop_at_last_layers", self.clip_skip)) | pictures
        settings = {name: value for name, value in settings.items() if value is not None}
        ticket = await self.desk.submit(settings, fields.count, model, SOURCE)
        self.tickets[ticket.number] = ticket
        try:
            await self.desk.finish(ticket, http)
        finally:
            del self.tickets[ticket.number]
        return await run_in_threadpool(self._reply, ticket, fields)

    def _reply(self, ticket: Ticket, fields: Fields) -> Response:
        """All pictures; of one that was interrupted those that were finished, and the last look at the next."""
        done = [ticket.pictures[index] for index in sorted(ticket.pictures)]
        images = [as_base64(picture.png) for picture in done]
        if not ticket.whole and ticket.look:
            images.append(as_base64(ticket.look))
        echo = {name: value for name, value in vars(fields).items() if name not in ("init_images", "mask")}
        info = a1111_lists.info(ticket, done, self.desk.shelf.models[ticket.model])
        send = fields.send_images is not False
        return JSONResponse({"images": images if send else [], "parameters": echo, "info": json.dumps(info)})

    async def progress(self, http: HttpRequest) -> Response:
        """Of the request that is painted; of none, where none is."""
        running = [ticket for ticket in self.tickets.values() if ticket.state == RUNNING]
        ticket = min(running, key=lambda ticket: ticket.number, default=None)
        state = {
            "skipped": False,
            "interrupted": False,
            "stopping_generation": False,
            "job": "",
            "job_count": len(self.tickets),
            "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
            "job_no": 0,
            "sampling_step": 0,
            "sampling_steps": 0,
        }
        if ticket is None:
            return JSONResponse(
                {"progress": 0.0, "eta_relative": 0.0, "state": state, "current_image": None, "textinfo": None}
            )
        if http.query_params.get("skip_current_image", "false").lower() != "true":
            ticket.show_for(LOOKS)
        state |= {
            "job": "img2img" if ticket.jobs[0].picture else "txt2img",
            "job_no": len(ticket.pictures),
            "sampling_step": ticket.step,
            "sampling_steps": ticket.steps,
        }
        return JSONResponse(
            {
                "progress": max(ticket.progress, 0.01),
                "eta_relative": self.desk.line.seconds_left(ticket),
                "state": state,
                "current_image": as_base64(ticket.look) if ticket.look else None,
                "textinfo": None,
            }
        )

    async def interrupt(self, http: HttpRequest) -> Response:
        """Ends the request that is painted, of those that came by this interface; its caller gets what there is."""
        for number in sorted(self.tickets):
            if self.tickets[number].state == RUNNING:
                self.tickets[number].cancel()
                break
        return JSONResponse({})

    async def options(self, http: HttpRequest) -> Response:
        if http.method == "POST":
            body = await self.desk.json(http)
            known = self._options()
            chosen = read_overrides({name: value for name, value in body.items() if known.get(name) != value})
            if "sd_model_checkpoint" in chosen:
                self.model = self._named(chosen["sd_model_checkpoint"])
            if "CLIP_stop_at_last_layers" in chosen:
                self.clip_skip = chosen["CLIP_stop_at_last_layers"]
            return JSONResponse(None)
        return JSONResponse(self._options())

    def _options(self) -> dict[str, Any]:
        model = self.desk.shelf.models[self.model]
        return {
            "sd_model_checkpoint": a1111_lists.title(model),
            "sd_checkpoint_hash": model.facts["hash"],
            "CLIP_stop_at_last_layers": self.clip_skip or 1,
            "sd_vae": "Automatic",
            "samples_format": "png",
            "samples_save": False,
        }

    def _named(self, name: str) -> str:
        """The model of a title, name, file name or hash. Raises ApiError."""
        wanted = name.strip().lower()
        for model in self.desk.shelf.models.values():
            names = {a1111_lists.title(model), model.name, model.path.name, model.facts["hash"]}
            names |= {model.facts["hash"][:10]}
            if wanted and wanted in {known.lower() for known in names}:
                return model.name
        choices = ", ".join(map(a1111_lists.title, self.desk.shelf.models.values()))
        raise ApiError(404, f"there is no checkpoint {shown(name)}; choose from {choices}")

    async def png_info(self, http: HttpRequest) -> Response:
        body = await self.desk.json(http)
        if not isinstance(text := body.get("image"), str) or len(body) > 1:
            raise GgufSdError("png-info takes one field, image: a picture as base64")
        image = await self.desk.decoded(from_base64, text, "the image", self.desk.limits.pixels)
        found = text_of(image)
        try:
            parameters = parse_parameters(found) if found.strip() else {}
        except ValueError:
            parameters = {}
        return JSONResponse({"info": found, "items": {"parameters": found} if found else {}, "parameters": parameters})
