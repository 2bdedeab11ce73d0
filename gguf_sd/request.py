"""What is asked for: settings as the user gives them, and as they are run."""

from __future__ import annotations

import logging
import math
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from gguf_sd.adapters.embedding_files import EmbeddingFile, as_embeddings, check_embedding_files
from gguf_sd.adapters.lora import Lora, as_loras, requested, without_tags
from gguf_sd.adapters.lora_file import lora_table
from gguf_sd.config import Defaults, ModelConfig
from gguf_sd.control import Control, ControlJob, as_controls, control_jobs
from gguf_sd.errors import GgufSdError
from gguf_sd.imaging import images
from gguf_sd.prompt.prompts import unsupported
from gguf_sd.request_fields import typed
from gguf_sd.sampling.names import SAMPLERS, resolve_sampler, resolve_schedule

if TYPE_CHECKING:
    from gguf_sd.adapters.embeddings import Embedding
    from gguf_sd.sampling.init_latents import InitImage
    from gguf_sd.sampling.schedules import Schedule

StrPath = str | os.PathLike[str]
MAX_SEED = 2**64 - 1  # what torch's generators take
DRAWN_SEED = 2**32 - 1  # up to here where none is given: what every other program takes too
RANDOM_SEED = -1  # other programs' word for one that is drawn
MAX_COUNT = 100_000
LARGE = 4  # times the model's own number of pixels
SAFETY_MODES = ("blur", "warn", "off")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """One call for pictures. ``None`` means the model's own default."""

    prompt: str = ""
    negative_prompt: str | None = None  # None: there is none, which SDXL takes for zeros; "" is encoded
    steps: int | None = None
    guidance: float | None = None  # <= 1 runs the UNet without guidance, once a step
    sampler: str | None = None
    schedule: str | None = None
    seed: int | None = None  # picture i has seed + i; None, or -1, draws one
    width: int | None = None  # the size of the picture to start from, if there is one, else the model's own
    height: int | None = None
    batch: int = 1  # pictures painted at once
    count: int = 1  # pictures in all
    clip_skip: int | None = None  # 1 = the text encoder's last layer, 2 = the last but one, … (None: the model's habit)
    original_size: tuple[int, int] | None = None  # SDXL: width, height the picture seems to have had (None: as painted)
    crop: tuple[int, int] = (0, 0)  # SDXL: left, top pixels that seem to have been cut off
    image: Image.Image | None = None  # to start from: image-to-image, and inpainting with a mask
    mask: Image.Image | None = None  # white, or transparent, where to repaint
    strength: float | None = None  # 0 … 1: how much of the picture may change (0.8; 1 with a mask)
    resize: str = "crop"  # how image and mask are brought to size: crop, fit or stretch
    mask_blur: int = 4  # pixels over which the edge of the mask is softened, inwards
    paste: bool = True  # outside the mask, the picture's very pixels
    safety: str = "blur"  # what happens to pictures that the model's safety checker flags: blur, warn or off
    loras: Sequence[Lora | StrPath | tuple[StrPath, float]] = ()  # files, each with its weight: "style.safetensors:0.8"
    lora_dir: StrPath | None = None  # where the LoRAs are that the prompt names: <lora:name:weight>
    embeddings: Sequence[EmbeddingFile | StrPath | tuple[str, StrPath]] = ()  # textual inversion: files, "name=file"
    controls: Sequence[Control | tuple[StrPath, Image.Image | StrPath]] = ()  # ControlNets: GGUF files with pictures


@dataclass(frozen=True)
class Job:
    """A checked request, every value filled in."""

    prompt: str
    negative_prompt: str | None
    steps: int
    guidance: float
    sampler: str
    schedule_name: str
    seed: int
    width: int
    height: int
    batch: int
    count: int
    clip_skip: int | None
    original_size: tuple[int, int]
    crop: tuple[int, int]
    strength: float | None
    resize: str
    mask_blur: int
    schedule: Schedule = field(repr=False, compare=False)
    loras: tuple[Lora, ...]
    embeddings: tuple[Embedding, ...]
    controls: tuple[ControlJob, ...] = field(repr=False)
    picture: InitImage | None = field(repr=False, compare=False)
    paste: bool = field(repr=False, compare=False)
    safety: str = field(repr=False, compare=False)

    @property
    def steps_run(self) -> int:
        """Sampling steps a batch: fewer than ``steps`` where a picture is started from."""
        return self.steps - (self.picture.start_step if self.picture else 0)

    @property
    def guided(self) -> bool:
        return self.guidance > 1

    def batches(self) -> Iterator[list[int]]:
        """The seeds of each batch."""
        seeds = [(self.seed + i) % (MAX_SEED + 1) for i in range(self.count)]
        for first in range(0, self.count, self.batch):
            yield seeds[first : first + self.batch]


def prepare(request: Request, config: ModelConfig) -> Job:
    """Fills a request with the model's defaults; raises GgufSdError for values that cannot work.

    What is asked for and has no effect is told in one line of the log each.
    """
    from gguf_sd.adapters.embeddings import load_embeddings
    from gguf_sd.adapters.read_lora import check_loras
    from gguf_sd.sampling.schedules import make_schedule  # late, as is all that imports torch: see checked

    request = checked(request)
    controls = as_controls(request.controls)
    seen = [control.picture() for control in controls]
    values = _filled(request, config, seen)
    _check(values, request, config)
    sampler, implied = resolve_sampler(request.sampler or values.sampler)
    own_schedule = values.schedule if request.sampler is None else SAMPLERS[sampler].schedule
    schedule_name = resolve_schedule(request.schedule or implied or own_schedule, sampler)
    picture, strength = _picture(request, values)
    loras = requested_loras(request)
    for note in (*_without_effect(request, values, config), *check_loras(loras, config)):
        log.warning("%s", note)
    return Job(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        steps=values.steps,
        guidance=values.guidance,
        sampler=sampler,
        schedule_name=schedule_name,
        seed=random.randint(0, DRAWN_SEED) if request.seed in (None, RANDOM_SEED) else request.seed,
        width=values.width,
        height=values.height,
        batch=request.batch,
        count=request.count,
        clip_skip=request.clip_skip,
        original_size=request.original_size or (values.width, values.height),
        crop=request.crop,
        strength=strength,
        resize=request.resize,
        mask_blur=request.mask_blur,
        loras=loras,
        embeddings=load_embeddings(as_embeddings(request.embeddings), config),
        controls=control_jobs(controls, seen, (values.width, values.height), request.resize, config),
        schedule=make_schedule(config.scheduler, sampler, schedule_name, values.steps, config.name),
        picture=picture,
        paste=request.paste,
        safety=request.safety,
    )


def checked(request: Request) -> Request:
    """The request with values of the declared types, see :func:`gguf_sd.request_fields.typed`, in the ranges that hold
    for every model. Raises GgufSdError, so that a wrong value is found before a model is looked at, or torch
    imported."""
    request = typed(request)
    for name, count, most in (("batch", request.batch, MAX_COUNT), ("count", request.count, MAX_COUNT)):
        if not 1 <= count <= most:
            raise GgufSdError(f"{name} must be at least 1 and at most {most}, got {count}")
    if request.steps is not None and request.steps < 1:
        raise GgufSdError(f"steps must be at least 1, got {request.steps}")
    if request.guidance is not None and not 0 <= request.guidance <= 100:
        raise GgufSdError(f"guidance must lie in 0 … 100, got {request.guidance}")
    if request.seed is not None and not RANDOM_SEED <= request.seed <= MAX_SEED:
        raise GgufSdError(f"seed must lie in 0 … {MAX_SEED}, or be -1 for a random one, got {request.seed}")
    if request.strength is not None and not 0 < request.strength <= 1:
        raise GgufSdError(f"strength must lie above 0 and at most at 1, got {request.strength:g}")
    if min(*(request.original_size or (1, 1)), *(n + 1 for n in request.crop)) < 1:
        raise GgufSdError(f"sizes and crops count pixels, got {request.original_size} and {request.crop}")
    if not 0 <= request.mask_blur <= 256:
        raise GgufSdError(f"mask blur must lie in 0 … 256 pixels, got {request.mask_blur}")
    if request.safety not in SAFETY_MODES:
        raise GgufSdError(f"unknown safety mode {request.safety!r}; choose from {', '.join(SAFETY_MODES)}")
    if request.resize not in images.RESIZE_MODES:
        raise GgufSdError(f"unknown resize mode {request.resize!r}; choose from {', '.join(images.RESIZE_MODES)}")
    _check_names(request)
    for lora in requested_loras(request):
        lora_table(lora.path)
    check_embedding_files(as_embeddings(request.embeddings))
    for control in as_controls(request.controls):
        control.picture()
    if request.mask is not None and request.image is None:
        raise GgufSdError("a mask needs a picture to repaint: give it with --init-image")
    return request


def requested_loras(request: Request) -> tuple[Lora, ...]:
    """The LoRAs of a request, checked or not, those that its prompt names included."""
    folder = None if request.lora_dir is None else Path(request.lora_dir)
    return requested(as_loras(request.loras), request.prompt, folder)


def _check_names(request: Request) -> None:
    if request.sampler is None:
        return
    sampler, _ = resolve_sampler(request.sampler)
    if request.schedule is not None:
        resolve_schedule(request.schedule, sampler)


def _filled(request: Request, config: ModelConfig, seen: Sequence[Image.Image]) -> Defaults:
    """The model's defaults under the request's values; the size is that of the picture to start from, else of the first
    that a ControlNet sees, cut to whole latents as diffusers does, unless one is asked for."""
    names = ("steps", "guidance", "width", "height")
    given = {name: value for name in names if (value := getattr(request, name)) is not None}
    unit = config.vae.downscale
    if (picture := _giving_the_size(request.image, seen)) is not None:
        if min(picture.size) < unit:
            what = "the picture to start from" if request.image is not None else "the picture of a ControlNet"
            raise GgufSdError(
                f"{what} has {picture.width} x {picture.height} pixels; it needs at least {unit} along each side"
            )
        width, height = (side - side % unit for side in picture.size)
        given = {"width": width, "height": height} | given
    return replace(config.defaults, **given)


def _giving_the_size(image: Image.Image | None, seen: Sequence[Image.Image]) -> Image.Image | None:
    return image if image is not None or not seen else seen[0]


def _picture(request: Request, values: Defaults) -> tuple[InitImage | None, float | None]:
    """The picture to start from and its strength; both None for text-to-image."""
    if request.image is None:
        return None, None
    from gguf_sd.imaging import masks
    from gguf_sd.sampling.init_latents import InitImage

    strength = request.strength if request.strength is not None else (0.8 if request.mask is None else 1.0)
    steps = min(int(values.steps * strength), values.steps)
    if steps < 1:
        raise GgufSdError(
            f"strength {strength:g} of {values.steps} steps runs no step at all; "
            f"take a strength of at least {1 / values.steps:.3g}, or at least {math.ceil(1 / strength)} steps"
        )
    size = (values.width, values.height)
    image = images.resized(images.to_rgb(request.image), *size, request.resize)
    mask = None if request.mask is None else masks.fitted_mask(request.mask, request.image.size, *size, request.resize)
    return InitImage(image, mask, values.steps - steps, mask is not None and strength == 1), strength


def _check(values: Defaults, request: Request, config: ModelConfig) -> None:
    unit = config.vae.downscale
    for name, size in (("width", values.width), ("height", values.height)):
        if size < unit or size % unit:
            low = max(size // unit, 1) * unit
            raise GgufSdError(f"{name} {size} is no multiple of {unit}; the nearest are {low} and {low + unit}")
    if values.width * values.height > images.MAX_PIXELS:
        raise GgufSdError(f"{values.width} x {values.height} is too large; the limit are {images.MAX_PIXELS} pixels")
    layers = min(text.num_hidden_layers for text in config.text)
    if request.clip_skip is not None and not 1 <= request.clip_skip <= layers:
        raise GgufSdError(f"clip skip must lie in 1 … {layers}, the text encoder's layers, got {request.clip_skip}")


def _without_effect(request: Request, values: Defaults, config: ModelConfig) -> Iterator[str]:
    """What is asked for and does nothing here, or something unexpected: a sentence each."""
    standard = Request()
    if request.image is None:
        for name in ("strength", *(["resize"] if not request.controls else [])):
            if getattr(request, name) != getattr(standard, name):
                yield f"{name} has no effect without a picture to start from (--init-image)"
    if (request.image is not None or request.controls) and request.width is None and request.height is None:
        usual = config.defaults.width * config.defaults.height
        if values.width * values.height > LARGE * usual:
            yield (
                f"the picture's own size {values.width}x{values.height} is painted, the model's is "
                f"{config.defaults.width}x{config.defaults.height}; --width and --height set another"
            )
    if request.mask is None:
        for name in ("mask_blur", "paste"):
            if getattr(request, name) != getattr(standard, name):
                yield f"{name.replace('_', ' ')} has no effect without a mask (--mask)"
    if request.negative_prompt and values.guidance <= 1:
        yield f"the negative prompt has no effect at guidance {values.guidance:g}; give --guidance above 1"
    if not config.unet.vector_dim and (request.original_size or request.crop != standard.crop):
        yield "original size and crop have no effect: only SDXL models take them"
    yield from unsupported(without_tags(request.prompt))
    if request.negative_prompt and values.guidance > 1:
        yield from unsupported(request.negative_prompt)
