"""From a prompt to pictures: load -> encode -> denoise -> decode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.checkpoint.vae_file import VAEFile
from gguf_sd.errors import GgufSdError
from gguf_sd.imaging import masks
from gguf_sd.imaging.preview import family, previews
from gguf_sd.models.safety import blurred
from gguf_sd.models.text import Encoded, TextEncoder
from gguf_sd.models.unet import UNet, timestep_embedding
from gguf_sd.models.vae import Autoencoder
from gguf_sd.prompt.tokenizer import Tokens
from gguf_sd.request import Job, Request, prepare
from gguf_sd.runtime import memory
from gguf_sd.runtime.cuda_graph import CudaCapture, GraphedUNet, use_graphs
from gguf_sd.runtime.kernel_modes import choose_kernels, make_resident, use_kernels
from gguf_sd.sampling import NoiseSource, Step, init_latents, sample
from gguf_sd.sampling.guidance import Conditioning, Predictor, Prompt
from gguf_sd.sampling.init_latents import Encoder, InitLatents

SIZE_EMBEDDING = 256  # width of the embedding of each of SDXL's six sizes


@dataclass(frozen=True)
class Picture:
    """A finished picture and what painted it."""

    image: Image.Image
    seed: int
    job: Job
    flagged: bool = False  # by the safety checker


class Pipeline:
    """A model and where it runs. Parts are loaded when first needed, and kept or dropped as memory allows."""

    def __init__(
        self,
        model: ModelFile,
        device: torch.device,
        dtype: torch.dtype,
        weights: str = "auto",
        tokenizer: Path | None = None,
        vae: Path | None = None,
        kernels: str = "auto",
        cuda_graph: str = "auto",
    ):
        self.model, self.device, self.dtype = model, device, dtype
        self.kernels, self.weights = choose_kernels(kernels, weights, device)
        use_graphs(cuda_graph, device, self.kernels, passes=0)  # raises for what cannot be
        self.cuda_graph = cuda_graph
        self.graph_bytes = 0  # device memory that CUDA graphs held during the last denoising
        self._parts: dict[str, Any] = {}
        self.plan = self._plan(model.config.defaults.width * model.config.defaults.height)
        self.vae_file = None if vae is None else VAEFile.open(vae, model.config.vae)
        self.vae_config = self.vae_file.config if self.vae_file else model.config.vae
        overflows = dtype == torch.float16 and self.vae_config.overflows_float16
        self.vae_dtype = memory.wide_dtype(device) if overflows else dtype
        self.tokenizer = model.tokenizer(tokenizer)

    @classmethod
    def load(
        cls,
        path: Path | str,
        device: str = "auto",
        dtype: str = "auto",
        weights: str = "auto",
        tokenizer: Path | None = None,
        vae: Path | None = None,
        kernels: str = "auto",
        cuda_graph: str = "auto",
    ) -> Pipeline:
        """Opens a GGUF file.

        ``weights``: auto, quantized or resident, see :class:`gguf_sd.runtime.memory.Plan`; ``kernels``: see
        :func:`gguf_sd.runtime.kernel_modes.choose_kernels`; ``cuda_graph``: auto, on or off, see
        :func:`gguf_sd.runtime.cuda_graph.use_graphs`; ``tokenizer``: a folder or a BPE merges file, for GGUF files
        that carry none; ``vae``: another autoencoder than the file's own, full or tiny, see
        :mod:`gguf_sd.checkpoint.vae_file`.
        Raises GgufSdError for files and settings that cannot work."""
        chosen = memory.choose_device(device)
        model, kind = ModelFile.open(path), memory.choose_dtype(dtype, chosen)
        return cls(model, chosen, kind, weights, tokenizer, vae, kernels, cuda_graph)

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
            start = self.begin(job, noise)
            latents = start.latents
            for step in self.denoise(job, start, conditioning, noise):
                latents = step.latents
                on_step(step)
            painted = [_finished(Image.fromarray(pixels.numpy()), job) for pixels in self.decode(latents)]
            yield from self._checked(painted, seeds, job)

    @torch.inference_mode()
    def encode(self, job: Job) -> Conditioning:
        """The job's prompts through the text encoders, one encoder at a time."""
        prompts = [job.prompt, job.negative_prompt or ""] if job.guided else [job.prompt]
        encoded: list[list[Encoded]] = [[] for _ in prompts]
        for index, config in enumerate(self.model.config.text):
            encoder = self._part(f"text {index}")
            tokens = [self.tokenizer.encode(prompt, config) for prompt in prompts]
            chunks = max(len(t.ids) for t in tokens)  # both prompts the same number, for guidance in one batch
            for results, some in zip(encoded, tokens, strict=True):
                results.append(self._encode(encoder, some.padded(chunks, config), job.clip_skip))
            self._release(f"text {index}")
        if job.guided and not job.negative_prompt and self.model.config.zero_empty_negative:
            encoded[1] = [_zeroed(result) for result in encoded[1]]
        conditioned = [self._prompt(results, job) for results in encoded]
        return Conditioning(conditioned[0], conditioned[1] if job.guided else None)

    def _encode(self, encoder: TextEncoder, tokens: Tokens, clip_skip: int | None) -> Encoded:
        """Chunks [C, N] to states [1, C * N, hidden_size], weighted; pooled is the first chunk's.

        SD 1.x attends to the last states, normalised; SDXL to the last but one as they are.
        """
        xl = bool(self.model.config.unet.vector_dim)
        states, pooled = encoder.encode(tokens.ids.to(self.device), clip_skip or (2 if xl else 1), not xl)
        states = weighted(states, tokens.weights.to(states)).flatten(0, 1)[None]
        return Encoded(states, None if pooled is None else pooled[:1])

    def _prompt(self, encoded: Sequence[Encoded], job: Job) -> Prompt:
        """SDXL attends to both encoders' states side by side, and takes the pooled text and the picture's sizes besides
        (Podell et al. 2023, arXiv:2307.01952)."""
        context = torch.cat([result.states for result in encoded], dim=-1)
        pooled = encoded[-1].pooled
        if pooled is None:
            return Prompt(context)
        # Each pair as height and width, top and left.
        pairs = job.original_size[::-1], job.crop[::-1], (job.height, job.width)
        sizes = torch.tensor(pairs, device=self.device).flatten()
        embedded = timestep_embedding(sizes, SIZE_EMBEDDING).flatten()[None]
        return Prompt(context, torch.cat([pooled, embedded.to(pooled)], dim=-1))

    def begin(self, job: Job, noise: NoiseSource) -> InitLatents:
        """What the job's sampling starts from, for as many pictures as ``noise`` has seeds."""
        config, vae = self.model.config, self.model.config.vae
        shape = len(noise.seeds), vae.latent_channels, job.height // vae.downscale, job.width // vae.downscale
        if job.picture is None and config.unet.in_channels == vae.latent_channels:
            return init_latents.text_only(config, shape, noise, None)
        encoder = Encoder(self._part("vae"), self.device, self.dtype)
        if job.picture is None:
            start = init_latents.text_only(config, shape, noise, encoder)
        else:
            start = init_latents.from_picture(config, shape, noise, encoder, job.picture, job.schedule)
        self._release("vae")
        return start

    def denoise(self, job: Job, start: InitLatents, conditioning: Conditioning, noise: NoiseSource) -> Iterator[Step]:
        """Walks latents [B, 4, h, w] down the job's schedule, yielding after every step."""
        passes = job.steps_run * (len(list(job.batches())) if self.plan.keep_parts else 1)
        graphed = use_graphs(self.cuda_graph, self.device, self.kernels, passes)
        unet = self._part("graphed unet" if graphed else "unet")
        predict = Predictor(unet, conditioning, job.guidance, self.plan.batch_guidance, start.extra)
        yield from sample(predict, start.latents, job.schedule, noise, start.start_step, start.blend)
        self.graph_bytes = unet.nbytes if graphed else 0
        self._release("graphed unet")
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

    def preview(self, step: Step) -> Image.Image:
        """A cheap look at the first picture of a step: through a tiny autoencoder if that is in use, by a linear map
        for latents of Stable Diffusion's kind, else through the model's own autoencoder."""
        vae = self._part("vae") if self.vae_file or family(self.model.config.vae) is None else None
        linear = isinstance(vae, Autoencoder) and family(self.model.config.vae) is not None
        return previews(step.denoised[:1], self.model.config.vae, None if linear else vae)[0]

    def _checked(self, painted: list[Image.Image], seeds: list[int], job: Job) -> Iterator[Picture]:
        """The pictures as the model's safety checker, if it has one, lets them pass."""
        flags = [False] * len(painted)
        if job.safety != "off" and self.model.config.safety is not None:
            flags = self._part("safety").flagged(painted)
            self._release("safety")
        for image, seed, flagged in zip(painted, seeds, flags, strict=True):
            yield Picture(blurred(image) if flagged and job.safety == "blur" else image, seed, job, flagged)

    def _plan(self, pixels: int) -> memory.Plan:
        model = self.model
        held = sum(
            part.nbytes if isinstance(part, GraphedUNet) else memory.held_bytes(part, self.device)
            for part in self._parts.values()
        )
        return memory.Plan.make(self.weights, self.device, self.dtype, model.unet_values(), model.config, pixels, held)

    def _part(self, name: str) -> Any:
        if name not in self._parts:
            if name == "graphed unet":
                capture = CudaCapture(self.device)
                self._parts[name] = GraphedUNet(self._part("unet"), capture, strict=self.cuda_graph == "on")
            else:
                self._parts[name] = self._load(name)
        return self._parts[name]

    def _release(self, name: str) -> None:
        if not self.plan.keep_parts:
            self._parts.pop(name, None)
            self.model.file.forget_pages()

    def _load(self, name: str) -> nn.Module:
        if name == "unet":
            return self._load_unet()
        part: nn.Module
        if name == "vae":
            part = self.vae_file.load(self.vae_dtype) if self.vae_file else self.model.load_vae(self.vae_dtype)
        elif name == "safety":
            part = self.model.load_safety(self.dtype)
        else:
            part = self.model.load_text(int(name.removeprefix("text ")), self.dtype)
        return part.to(self.device)

    def _load_unet(self) -> UNet:
        unet = self.model.load_unet(self.dtype).to(self.device)
        if self.plan.weights == "resident":
            make_resident(unet, self.dtype, self.kernels)
        if self.kernels != "torch":
            use_kernels(unet, self.kernels)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the blocks as they came from the file
        return unet


def _finished(painted: Image.Image, job: Job) -> Image.Image:
    """With what lies outside the mask put back."""
    if job.picture is None or job.picture.mask is None or not job.paste:
        return painted
    return masks.pasted(painted, job.picture.image, job.picture.mask, job.mask_blur)


def _zeroed(encoded: Encoded) -> Encoded:
    pooled = None if encoded.pooled is None else torch.zeros_like(encoded.pooled)
    return Encoded(torch.zeros_like(encoded.states), pooled)


def weighted(states: Tensor, weights: Tensor) -> Tensor:
    """States [C, N, D] times the weights [C, N] of their tokens, the mean of each chunk kept as it was, as
    AUTOMATIC1111 does. Weights of 1 change nothing."""
    if (weights == 1).all():
        return states
    scaled = states * weights[..., None]
    return scaled * (states.float().mean((1, 2), True) / scaled.float().mean((1, 2), True)).to(states)
