"""What is asked for: settings as the user gives them, and as they are run."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from PIL import Image

from gguf_sd.config import Defaults, ModelConfig
from gguf_sd.errors import GgufSdError
from gguf_sd.imaging import images
from gguf_sd.sampling import Schedule, make_schedule, resolve_sampler, resolve_schedule
from gguf_sd.sampling.init_latents import InitImage

MAX_SEED = 2**32 - 1
SAFETY_MODES = ("blur", "warn", "off")


@dataclass(frozen=True)
class Request:
    """One call for pictures. ``None`` means the model's own default."""

    prompt: str = ""
    negative_prompt: str = ""
    steps: int | None = None
    guidance: float | None = None  # <= 1 runs the UNet without guidance, once a step
    sampler: str | None = None
    schedule: str | None = None
    seed: int | None = None  # picture i has seed + i; None draws one
    width: int | None = None
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


@dataclass(frozen=True)
class Job:
    """A checked request, every value filled in."""

    prompt: str
    negative_prompt: str
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
    mask_blur: int
    schedule: Schedule = field(repr=False, compare=False)
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
    """Fills a request with the model's defaults; raises GgufSdError for values that cannot work."""
    defaults = replace(
        config.defaults,
        **{
            name: value
            for name in ("steps", "guidance", "width", "height")
            if (value := getattr(request, name)) is not None
        },
    )
    _check(defaults, request, config)
    picture, strength = _picture(request, defaults)
    sampler, implied = resolve_sampler(request.sampler or defaults.sampler)
    own_schedule = defaults.schedule if request.sampler is None else "model"
    schedule_name = resolve_schedule(request.schedule or implied or own_schedule, sampler)
    return Job(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        steps=defaults.steps,
        guidance=defaults.guidance,
        sampler=sampler,
        schedule_name=schedule_name,
        seed=random.randint(0, MAX_SEED) if request.seed is None else request.seed,
        width=defaults.width,
        height=defaults.height,
        batch=request.batch,
        count=request.count,
        clip_skip=request.clip_skip,
        original_size=request.original_size or (defaults.width, defaults.height),
        crop=request.crop,
        strength=strength,
        mask_blur=request.mask_blur,
        schedule=make_schedule(config.scheduler, sampler, schedule_name, defaults.steps, config.name),
        picture=picture,
        paste=request.paste,
        safety=request.safety,
    )


def _picture(request: Request, values: Defaults) -> tuple[InitImage | None, float | None]:
    """The picture to start from and its strength; both None for text-to-image."""
    if request.image is None:
        if request.mask is not None:
            raise GgufSdError("a mask needs a picture to repaint: give it with --init-image")
        return None, None
    strength = request.strength if request.strength is not None else (0.8 if request.mask is None else 1.0)
    if not 0 < strength <= 1:
        raise GgufSdError(f"strength must lie above 0 and at most at 1, got {strength:g}")
    steps = min(int(values.steps * strength), values.steps)
    if steps < 1:
        raise GgufSdError(
            f"strength {strength:g} of {values.steps} steps runs no step at all; "
            f"take a strength of at least {1 / values.steps:.3g}, or at least {math.ceil(1 / strength)} steps"
        )
    size = (values.width, values.height)
    image = images.resized(images.to_rgb(request.image), *size, request.resize)
    mask = None if request.mask is None else images.resized(images.to_mask(request.mask), *size, request.resize)
    return InitImage(image, mask, values.steps - steps, mask is not None and strength == 1), strength


def _check(values: Defaults, request: Request, config: ModelConfig) -> None:
    unit = config.vae.downscale
    for name, size in (("width", values.width), ("height", values.height)):
        if size < unit or size % unit:
            low = max(size // unit, 1) * unit
            raise GgufSdError(f"{name} {size} is no multiple of {unit}; the nearest are {low} and {low + unit}")
    for name, count in (("batch", request.batch), ("count", request.count)):
        if count < 1:
            raise GgufSdError(f"{name} must be at least 1, got {count}")
    layers = min(text.num_hidden_layers for text in config.text)
    if request.clip_skip is not None and not 1 <= request.clip_skip <= layers:
        raise GgufSdError(f"clip skip must lie in 1 … {layers}, the text encoder's layers, got {request.clip_skip}")
    if min(*(request.original_size or (1, 1)), *(n + 1 for n in request.crop)) < 1:
        raise GgufSdError(f"sizes and crops count pixels, got {request.original_size} and {request.crop}")
    if request.safety not in SAFETY_MODES:
        raise GgufSdError(f"unknown safety mode {request.safety!r}; choose from {', '.join(SAFETY_MODES)}")
    if not 0 <= request.mask_blur <= 256:
        raise GgufSdError(f"mask blur must lie in 0 … 256 pixels, got {request.mask_blur}")
    if request.seed is not None and not 0 <= request.seed <= MAX_SEED:
        raise GgufSdError(f"seed must lie in 0 … {MAX_SEED}, got {request.seed}")
    if not 0 <= values.guidance <= 100:
        raise GgufSdError(f"guidance must lie in 0 … 100, got {values.guidance}")
