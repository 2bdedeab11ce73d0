"""OpenAI's interface for pictures: `/v1/images/generations`, `/v1/images/edits` and `/v1/models`."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any

from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gguf_sd.errors import GgufSdError
from gguf_sd.field_checks import Between, OneOf, checked_fields, shown
from gguf_sd.keywords import check_known
from gguf_sd.server.desk import Desk
from gguf_sd.server.errors import ApiError
from gguf_sd.server.store import Store
from gguf_sd.server.tickets import Finished, Ticket
from gguf_sd.server.uploads import as_base64, from_bytes

SOURCE = "openai"
OURS = ("seed", "steps", "guidance", "negative_prompt", "sampler", "schedule", "clip_skip")  # settings by our names
OF_EDITS = ("strength", "resize", "mask_blur", "paste")
KINDS = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
MAX_FILES = 4
AUTO = (None, "", "auto")
# Fields of OpenAI's models that ours have not; they are read, and have no effect.
UNUSED = ("user", "quality", "style", "background", "moderation", "input_fidelity", "partial_images")


@dataclass(frozen=True)
class Fields:
    """A request of either kind, but for its pictures. None is the model's default."""

    prompt: str
    model: str | None = None
    n: Annotated[int, Between(1, 10_000)] | None = None
    size: str | None = None
    response_format: Annotated[str, OneOf("b64_json", "url")] | None = None
    output_format: Annotated[str, OneOf(*KINDS)] | None = None
    output_compression: Annotated[int, Between(0, 100)] | None = None
    stream: bool | None = None
    seed: Annotated[int, Between(-1, 2**64 - 1)] | None = None
    steps: Annotated[int, Between(1, 10_000)] | None = None
    guidance: Annotated[float, Between(0, 100)] | None = None
    negative_prompt: str | None = None
    sampler: str | None = None
    schedule: str | None = None
    clip_skip: Annotated[int, Between(1, 128)] | None = None
    strength: Annotated[float, Between(0, 1)] | None = None
    resize: str | None = None
    mask_blur: Annotated[int, Between(0, 256)] | None = None
    paste: bool | None = None


class OpenAI:
    """The routes. Pictures that are asked for as addresses are kept in ``store``."""

    def __init__(self, desk: Desk, store: Store):
        self.desk, self.store = desk, store

    def routes(self) -> list[Route]:
        return [
            Route("/v1/images/generations", self.generations, methods=["POST"]),
            Route("/v1/images/edits", self.edits, methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{name}", self.model, methods=["GET"]),
        ]

    async def generations(self, http: HttpRequest) -> Response:
        self.desk.admit()
        request = read_fields(await self.desk.json(http), OF_EDITS)
        return await self._paint(http, request, {})

    async def edits(self, http: HttpRequest) -> Response:
        self.desk.admit()
        texts, files = await self._form(http)
        images = [file for name, file in files if name in ("image", "image[]")]
        if len(images) != 1:
            raise ApiError(400, f"{len(images)} images are given; this server edits one", "invalid_value", "image")
        most = self.desk.limits.pixels
        pictures = {"image": await self.desk.decoded(from_bytes, images[0], "the image", most)}
        for mask in [file for name, file in files if name == "mask"]:
            pictures["mask"] = await self.desk.decoded(from_bytes, mask, "the mask", most)
        return await self._paint(http, read_fields(texts), pictures)

    async def _form(self, http: HttpRequest) -> tuple[dict[str, Any], list[tuple[str, bytes]]]:
        """Texts by name, as the types that they stand for, and files."""
        if not http.headers.get("content-type", "").startswith("multipart/form-data"):
            raise ApiError(415, "images are edited by multipart/form-data; send that", "unsupported_media_type")
        texts: dict[str, Any] = {}
        files: list[tuple[str, bytes]] = []
        async with http.form(max_files=MAX_FILES, max_fields=64) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    if name not in ("image", "image[]", "mask"):
                        raise ApiError(400, f"there is no file {shown(name)}; give image and mask", param=name[:60])
                    files.append((name, await value.read()))
                else:
                    texts[name] = _from_text(name, value)
        return texts, files

    async def _paint(self, http: HttpRequest, request: Fields, pictures: Mapping[str, Image.Image]) -> Response:
        settings: dict[str, Any] = {name: getattr(request, name) for name in (*OURS, *OF_EDITS)}
        settings = {name: value for name, value in settings.items() if value is not None}
        settings |= {"prompt": request.prompt, **_size(request.size), **pictures}
        model = request.model or self.desk.shelf.default
        ticket = await self.desk.submit(settings, request.n or 1, model, SOURCE)
        await self.desk.finish(ticket, http)
        return await run_in_threadpool(self._reply, ticket, request, str(http.base_url))

    def _reply(self, ticket: Ticket, request: Fields, base: str) -> Response:
        encode = _encoder(request.output_format or "png", request.output_compression)
        data = []
        for index in sorted(ticket.pictures):
            picture, job = ticket.pictures[index], ticket.jobs[index]
            content = encode(picture)
            if request.response_format == "url":
                where = {"url": base + "pictures/" + self.store.keep(content, KINDS[request.output_format or "png"])}
            else:
                where = {"b64_json": as_base64(content)}
            data.append({**where, "revised_prompt": job.prompt, "seed": picture.seed, "flagged": picture.flagged})
        job = ticket.jobs[0]
        facts = {"output_format": request.output_format or "png", "size": f"{job.width}x{job.height}"}
        return JSONResponse({"created": int(time.time()), "data": data, **facts})

    async def models(self, http: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self.desk.shelf.models]})

    async def model(self, http: HttpRequest) -> Response:
        name = http.path_params["name"]
        if name not in self.desk.shelf.models:
            raise ApiError(404, f"there is no model {shown(name)}", "model_not_found", "model")
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        created = self.desk.shelf.models[name].facts["created"]
        return {"id": name, "object": "model", "created": created, "owned_by": "gguf-sd"}


def read_fields(body: Mapping[str, Any], without: tuple[str, ...] = ()) -> Fields:
    """Raises ApiError, which names the field, for what is unknown, of the wrong type or out of range."""
    known = [field.name for field in fields(Fields) if field.name not in without]
    try:
        check_known(body, [*known, *UNUSED])
        values = {name: value for name, value in body.items() if name not in UNUSED}
        if "prompt" not in values:
            raise GgufSdError("prompt is missing; it takes a text")
        request: Fields = checked_fields(Fields, values)
    except (GgufSdError, ValueError) as error:
        said = str(error)
        param = next((name for name in body if said.startswith(f"{name} ") or repr(name) in said), None)
        raise ApiError(400, said, "invalid_value", param and param[:60]) from None
    if request.stream:
        raise ApiError(400, "pictures are not streamed here; leave stream out", "invalid_value", "stream")
    return request


def _size(text: str | None) -> dict[str, int]:
    if text in AUTO or text is None:
        return {}
    width, by, height = text.partition("x")
    if not (by and width.isascii() and width.isdigit() and height.isascii() and height.isdigit() and len(text) < 12):
        raise ApiError(400, f"size is {shown(text)}; it takes WIDTHxHEIGHT or auto", "invalid_value", "size")
    return {"width": int(width), "height": int(height)}


def _from_text(name: str, text: str) -> Any:
    """A field of a form as JSON would have it."""
    hint = {field.name: str(field.type) for field in fields(Fields)}.get(name, "str")
    try:
        if "bool" in hint:
            return {"true": True, "false": False}[text.lower()]
        if "int" in hint or "float" in hint:
            return float(text) if "float" in hint else int(text)
    except (KeyError, ValueError):
        raise ApiError(400, f"{name} is {shown(text)}, which it does not take", "invalid_value", name) from None
    return text


def _encoder(kind: str, compression: int | None) -> Callable[[Finished], bytes]:
    """PNGs stay as they are, settings and all; other kinds carry none."""

    def encode(picture: Finished) -> bytes:
        if kind == "png":
            return picture.png
        buffer = io.BytesIO()
        Image.open(io.BytesIO(picture.png)).save(
            buffer, kind.upper(), quality=90 if compression is None else compression
        )
        return buffer.getvalue()

    return encode
