"""From a prompt to pictures: load -> encode -> denoise -> decode."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from gguf_sd import memory
from gguf_sd.config import Defaults, ModelConfig
from gguf_sd.errors import GgufSdError
from gguf_sd.model_file import ModelFile
from gguf_sd.models.text import Encoded
from gguf_sd.models.unet import UNet, timestep_embedding
from gguf_sd.sampling.names import resolve_sampler, resolve_schedule
from gguf_sd.sampling.noise import NoiseSource
from gguf_sd.sampling.samplers import Step, sample
from gguf_sd.sampling.schedules import Schedule, make_schedule
from gguf_sd.tokenizer import Tokenizer

MAX_SEED = 2**32 - 1
SIZE_EMBEDDING = 256  # width of the embedding of each of SDXL's six sizes
NOT_CROPPED = (0, 0)  # top, left


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
    schedule: Schedule = field(repr=False, compare=False)

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
        schedule=make_schedule(config.scheduler, sampler, schedule_name, defaults.steps),
    )


def _check(values: Defaults, request: Request, config: ModelConfig) -> None:
    unit = config.vae.downscale
    for name, size in (("width", values.width), ("height", values.height)):
        if size < unit or size % unit:
            low = max(size // unit, 1) * unit
            raise GgufSdError(f"{name} {size} is no multiple of {unit}; the nearest are {low} and {low + unit}")
    for name, count in (("batch", request.batch), ("count", request.count)):
        if count < 1:
            raise GgufSdError(f"{name} must be at least 1, got {count}")
    if request.seed is not None and not 0 <= request.seed <= MAX_SEED:
        raise GgufSdError(f"seed must lie in 0 … {MAX_SEED}, got {request.seed}")
    if not 0 <= values.guidance <= 100:
        raise GgufSdError(f"guidance must lie in 0 … 100, got {values.guidance}")


@dataclass(frozen=True)
class Picture:
    """A finished picture and what painted it."""

    image: Image.Image
    seed: int
    job: Job


class Prompt(NamedTuple):
    """An encoded prompt: what the UNet attends to [1, N, context_dim], and SDXL's vector of pooled text and sizes
    [1, vector_dim]."""

    context: Tensor
    vector: Tensor | None = None


@dataclass(frozen=True)
class Conditioning:
    """The encoded prompt and, for guidance, the negative prompt."""

    positive: Prompt
    negative: Prompt | None


class Pipeline:
    """A model and where it runs. Parts are loaded when first needed, and kept or dropped as memory allows."""

    def __init__(self, model: ModelFile, device: torch.device, dtype: torch.dtype, weights: str = "auto"):
        self.model, self.device, self.dtype, self.weights = model, device, dtype, weights
        self.plan = self._plan(model.config.defaults.width * model.config.defaults.height)
        overflows = dtype == torch.float16 and model.config.vae.overflows_float16
        self.vae_dtype = memory.wide_dtype(device) if overflows else dtype
        self._parts: dict[str, Any] = {}
        self._tokenizer: Tokenizer | None = None

    @classmethod
    def load(cls, path: Path | str, device: str = "auto", dtype: str = "auto", weights: str = "auto") -> Pipeline:
        """Opens a GGUF file. ``weights``: auto, quantized or resident, see :class:`gguf_sd.memory.Plan`.
        Raises GgufSdError for files and settings that cannot work."""
        chosen = memory.choose_device(device)
        return cls(ModelFile.open(path), chosen, memory.choose_dtype(dtype, chosen), weights)

    def __call__(self, prompt: str = "", **settings: Any) -> list[Image.Image]:
        """Paints pictures: the words of :class:`Request` as keywords, PIL images back."""
        return [picture.image for picture in self.paint(self.prepare(Request(prompt, **settings)))]

    def prepare(self, request: Request) -> Job:
        """Checks a request against the model."""
        return prepare(request, self.model.config)

    def paint(self, job: Job, on_step: Callable[[Step], object] = lambda step: None) -> Iterator[Picture]:
        """Yields the job's pictures as they are finished; ``on_step`` is called after every sampling step."""
        self.plan = self._plan(job.width * job.height * min(job.batch, job.count))
        conditioning = self.encode(job)
        for seeds in job.batches():
            noise = NoiseSource(seeds, self.dtype, self.device)
            latents = noise(self._latent_shape(job, len(seeds)))
            for step in self.denoise(job, latents, conditioning, noise):
                latents = step.latents
                on_step(step)
            for pixels, seed in zip(self.decode(latents), seeds, strict=True):
                yield Picture(Image.fromarray(pixels.numpy()), seed, job)

    @torch.inference_mode()
    def encode(self, job: Job) -> Conditioning:
        """The job's prompts through the text encoders, one encoder at a time."""
        prompts = [job.prompt, job.negative_prompt] if job.guided else [job.prompt]
        tokenizer = self._tokenizer = self._tokenizer or self.model.tokenizer()
        encoded: list[list[Encoded]] = [[] for _ in prompts]
        for index, config in enumerate(self.model.config.text):
            encoder = self._part(f"text {index}")
            for prompt, results in zip(prompts, encoded, strict=True):
                results.append(encoder.encode(tokenizer.encode(prompt, config).to(self.device)))
            self._release(f"text {index}")
        conditioned = [self._prompt(results, job) for results in encoded]
        if not job.guided:
            return Conditioning(conditioned[0], None)
        if not job.negative_prompt and self.model.config.zero_empty_negative:
            conditioned[1] = self._prompt([_zeroed(result) for result in encoded[1]], job)
        return Conditioning(conditioned[0], conditioned[1])

    def _prompt(self, encoded: Sequence[Encoded], job: Job) -> Prompt:
        """SD 1.x attends to its encoder's last states; SDXL to both encoders' last but one, and takes the pooled text
        and the picture's sizes besides (Podell et al. 2023, arXiv:2307.01952)."""
        if not self.model.config.unet.vector_dim:
            return Prompt(encoded[0].last)
        context = torch.cat([result.penultimate for result in encoded], dim=-1)
        pooled = encoded[-1].pooled
        assert pooled is not None
        original = target = (job.height, job.width)
        sizes = torch.tensor([*original, *NOT_CROPPED, *target], device=self.device)
        embedded = timestep_embedding(sizes, SIZE_EMBEDDING).flatten()[None]
        return Prompt(context, torch.cat([pooled, embedded.to(pooled)], dim=-1))

    def denoise(self, job: Job, latents: Tensor, conditioning: Conditioning, noise: NoiseSource) -> Iterator[Step]:
        """Walks unit-variance latents [B, 4, h, w] down the job's schedule, yielding after every step."""
        predict = _Predictor(self._part("unet"), conditioning, job.guidance, self.plan.batch_guidance)
        yield from sample(predict, latents, job.schedule, noise)
        self._release("unet")

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, 4, h, w] -> uint8 pictures [B, 8h, 8w, 3]. Raises GgufSdError where a latent is not finite."""
        if not latents.isfinite().all():
            raise GgufSdError(
                f"the UNet produced values that are not finite in {str(self.dtype).removeprefix('torch.')}; "
                "try --dtype float32 or bfloat16"
            )
        images = [self._part("vae").decode(latent[None]) for latent in latents.to(self.vae_dtype)]
        self._release("vae")
        pixels = torch.cat(images).float() / 2 + 0.5
        if not pixels.isfinite().all():
            raise GgufSdError("the VAE produced values that are not finite; try --dtype float32 or bfloat16")
        return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()

    def _plan(self, pixels: int) -> memory.Plan:
        model = self.model
        return memory.Plan.make(self.weights, self.device, self.dtype, model.unet_values(), model.config, pixels)

    def _latent_shape(self, job: Job, batch: int) -> tuple[int, int, int, int]:
        vae = self.model.config.vae
        return batch, vae.latent_channels, job.height // vae.downscale, job.width // vae.downscale

    def _part(self, name: str) -> Any:
        if name not in self._parts:
            self._parts[name] = self._load(name).to(self.device)
        return self._parts[name]

    def _release(self, name: str) -> None:
        if not self.plan.keep_parts:
            self._parts.pop(name, None)
            self.model.file.forget_pages()

    def _load(self, name: str) -> nn.Module:
        if name == "vae":
            return self.model.load_vae(self.vae_dtype)
        if name != "unet":
            return self.model.load_text(int(name.removeprefix("text ")), self.dtype)
        unet = self.model.load_unet(self.dtype)
        if self.plan.weights == "resident":
            memory.make_resident(unet, self.dtype)
        return unet


def _zeroed(encoded: Encoded) -> Encoded:
    pooled = None if encoded.pooled is None else torch.zeros_like(encoded.pooled)
    return Encoded(torch.zeros_like(encoded.last), torch.zeros_like(encoded.penultimate), pooled)


class _Predictor:
    """The UNet under classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598)."""

    def __init__(self, unet: UNet, conditioning: Conditioning, guidance: float, batched: bool):
        self.unet, self.conditioning, self.guidance, self.batched = unet, conditioning, guidance, batched

    @torch.inference_mode()
    def __call__(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """latents [B, 4, h, w], 0-dim timestep -> prediction [B, 4, h, w]."""
        positive, negative = self.conditioning.positive, self.conditioning.negative
        if negative is None:
            return self._run(latents, timestep, [positive])
        if self.batched:
            without, with_prompt = self._run(latents, timestep, [negative, positive]).chunk(2)
        else:
            without = self._run(latents, timestep, [negative])
            with_prompt = self._run(latents, timestep, [positive])
        return without + self.guidance * (with_prompt - without)

    def _run(self, latents: Tensor, timestep: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The predictions for each prompt in turn, [prompts * B, 4, h, w]."""
        batch = len(latents)
        context = torch.cat([prompt.context.expand(batch, -1, -1) for prompt in prompts])
        vectors = [prompt.vector.expand(batch, -1) for prompt in prompts if prompt.vector is not None]
        repeated = latents.repeat(len(prompts), 1, 1, 1)
        return self.unet(repeated, timestep.expand(len(repeated)), context, torch.cat(vectors) if vectors else None)
