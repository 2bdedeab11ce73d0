"""From a prompt to pictures: load -> encode -> denoise -> decode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from gguf_sd import keywords
from gguf_sd.adapters.lora import Lora, active
from gguf_sd.adapters.read_lora import lora_values
from gguf_sd.adapters.targets import UNET_PART, text_part
from gguf_sd.batching import Task, batches
from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.checkpoint.part_files import PartPaths
from gguf_sd.checkpoint.vae_file import VAEFile
from gguf_sd.errors import GgufSdError, not_finite
from gguf_sd.imaging import masks
from gguf_sd.imaging.images import to_tensor
from gguf_sd.imaging.png_metadata import PARAMETERS, parameters
from gguf_sd.imaging.preview import family, previews
from gguf_sd.models import tiled_vae
from gguf_sd.models.safety import blurred
from gguf_sd.models.text import TextEncoder
from gguf_sd.models.tiny_vae import tiny_config
from gguf_sd.prompt.conditioning import PromptEncoder
from gguf_sd.request import Job, Request, prepare
from gguf_sd.runtime import memory
from gguf_sd.runtime.cuda_graph import Graphing, use_graphs
from gguf_sd.runtime.execution import Execution
from gguf_sd.runtime.memory import MemoryPlan
from gguf_sd.runtime.parts import LoadedAs, Parts
from gguf_sd.runtime.plan import Planner, Workload
from gguf_sd.runtime.planning import Attempt, Planning
from gguf_sd.runtime.tuning import Tuning
from gguf_sd.runtime.turns import Turns
from gguf_sd.sampling import NoiseSource, Step, init_latents, sample
from gguf_sd.sampling.controlled import Controlled, Controller
from gguf_sd.sampling.guidance import Conditioning, Predictor
from gguf_sd.sampling.init_latents import Encoder, InitLatents

OnStep = Callable[[Step], object]


@dataclass(frozen=True)
class Picture:
    """A finished picture and what painted it."""

    image: Image.Image  # its settings are in .info["parameters"]
    seed: int
    job: Job
    flagged: bool = False  # by the safety checker
    weights: str = ""  # quantized, resident or int8, as the UNet's were
    kernels: str = ""  # int8 or torch: the UNet computed in 8 bits, or nothing did; else empty
    graph_bytes: int = 0  # device memory that CUDA graphs held meanwhile
    plan: MemoryPlan | None = None


class Pipeline:
    """A model and where it runs. Parts are loaded when first needed, and kept or dropped as memory allows.

    :meth:`paint` may be called from several threads: one paints a batch, the others wait for it. The stages it is made
    of (:meth:`encode`, :meth:`begin`, :meth:`denoise`, :meth:`decode`) are functions of what they are given, for
    loops of one's own, in one thread at a time.
    """

    def __init__(
        self, model: ModelFile, execution: Execution, tokenizer: Path | None = None, vae: VAEFile | None = None
    ):
        self.model, self.execution = model, execution
        self.vae_file, self.vae_config = vae, vae.config if vae else model.config.vae
        self.parts = Parts(model, execution.device, vae)
        self.tuning = Tuning()  # of the Triton kernels, on their first use
        self.planning = Planning(model, execution, self.vae_dtype, self.parts, vae)
        self._encoder = PromptEncoder(model.config, model.tokenizer(tokenizer), execution.device)
        self._turns = Turns(execution.device, self.parts)

    @classmethod
    def load(
        cls,
        path: Path | str,
        device: str | torch.device | None = "auto",
        dtype: str | torch.dtype | None = "auto",
        weights: str | None = "auto",
        tokenizer: Path | str | None = None,
        vae: Path | str | None = None,
        kernels: str | None = "auto",
        cuda_graph: str | None = "auto",
        max_memory: str | float | None = None,
        placement: str | None = "auto",
        vae_tile: int | str | None = "auto",
        clip_l: Path | str | None = None,
        clip_g: Path | str | None = None,
    ) -> Pipeline:
        """Opens a GGUF file: a whole model, or a UNet with ``clip_l``, SDXL's with ``clip_g`` too, and ``vae``.

        ``weights``: auto, quantized or resident, see :class:`gguf_sd.runtime.memory.MemoryPlan`; ``kernels``: see
        :func:`gguf_sd.runtime.kernel_modes.choose_kernels`; ``cuda_graph``: auto, on or off, see
        :func:`gguf_sd.runtime.cuda_graph.use_graphs`; ``max_memory``: what painting may take of a GPU's memory, or on a
        CPU the whole process of the system's, such as "1.5GB" or a number of GiB (None: GGUF_SD_MAX_MEMORY, else what
        is free less a margin); ``placement``: resident, staged or streamed for all parts, see the same class (auto: as
        memory allows); ``vae_tile``: edge of a tile in latent pixels, on, off or auto, see
        :func:`gguf_sd.runtime.execution.checked_tile`; ``tokenizer``: a folder or a BPE merges file, for GGUF files
        that carry none; ``vae``: another autoencoder than the file's own, full or tiny, see
        :mod:`gguf_sd.checkpoint.vae_file`; ``clip_l``, ``clip_g``: text encoders in the place of the file's own, see
        :mod:`gguf_sd.checkpoint.part_files`. None is the default everywhere.
        Raises GgufSdError for files and settings that cannot work."""
        execution = Execution.choose(device, dtype, weights, kernels, cuda_graph, max_memory, placement, vae_tile)
        texts = {name: keywords.path(name, x) for name, x in (("clip_l", clip_l), ("clip_g", clip_g)) if x is not None}
        model = ModelFile.open(keywords.gguf_path(path), PartPaths(**texts))
        model.check_whole(vae is not None)
        own_vae = None if vae is None else VAEFile.open(keywords.path("vae", vae), model.config.vae)
        own_tokenizer = None if tokenizer is None else keywords.path("tokenizer", tokenizer)
        return cls(model, execution, own_tokenizer, own_vae)

    @property
    def device(self) -> torch.device:
        return self.execution.device

    @property
    def dtype(self) -> torch.dtype:
        return self.execution.dtype

    @property
    def kernels(self) -> str:
        return self.execution.kernels

    @property
    def vae_dtype(self) -> torch.dtype:
        """SDXL's VAE overflows in float16: it computes in a wider dtype."""
        overflows = self.dtype == torch.float16 and self.vae_config.overflows_float16
        return memory.wide_dtype(self.device) if overflows else self.dtype

    def __call__(self, prompt: str | Sequence[str] = "", **settings: Any) -> list[Image.Image]:
        """Paints pictures: the words of :class:`Request` as keywords, PIL images back, each with its settings in
        ``.info["parameters"]``.

        Several prompts give a picture each (``count`` of them), up to ``batch`` at once, seeds counting up;
        ``negative_prompt`` is then one for all, or one each. Raises GgufSdError for settings that cannot work."""
        requests = keywords.requests(prompt, settings)
        jobs = keywords.counted_up(self.prepare(requests[0]), requests)
        return [picture.image for picture in self.paint(jobs)]

    def prepare(self, request: Request) -> Job:
        """Checks a request against the model."""
        return prepare(keywords.with_pictures(request), self.model.config)

    def paint(self, jobs: Job | Sequence[Job], on_step: OnStep = lambda step: None) -> Iterator[Picture]:
        """Yields the pictures of a job, or of several in turn, as they are finished; ``on_step`` is called after every
        sampling step.

        Other threads wait while a batch is painted. Whoever abandons the iterator leaves nothing locked, and no more
        loaded than the memory plan keeps. Raises GgufSdError where memory runs out, or a part of the model produces
        values that are not finite."""
        jobs = [jobs] if isinstance(jobs, Job) else list(jobs)
        if not jobs:
            return
        planner = self.planner(*jobs)
        attempt = Attempt(planner, self.planning.plan(planner))
        conditionings = self._turns.take(jobs[0], attempt, lambda plan: self._encode(jobs, plan))
        planned = list(batches(jobs, conditionings))
        for batch in planned:
            job = batch[0].job

            def work(plan: MemoryPlan, batch: list[Task] = batch, job: Job = job) -> list[Picture]:
                return self._paint(batch, plan, self._graphing(job.steps_run, len(planned), plan), on_step)

            yield from self._turns.take(job, attempt, work)

    def _graphing(self, steps: int, batches: int, plan: MemoryPlan) -> Graphing:
        passes = steps * (batches if plan.placement["unet"] == "resident" else 1)
        return use_graphs(self.execution.cuda_graph, self.device, self.kernels, passes)

    def _paint(self, batch: Sequence[Task], plan: MemoryPlan, graphing: Graphing, on_step: OnStep) -> list[Picture]:
        """The pictures of one batch."""
        job, seeds = batch[0].job, [task.seed for task in batch]
        noise = NoiseSource(seeds, self.dtype, self.device)
        start = self.begin(job, noise, plan)
        latents, graph_bytes = start.latents, 0
        conditioning = Conditioning.joined([task.conditioning for task in batch])
        for step in self.denoise(job, start, conditioning, noise, plan, graphing):
            latents, graph_bytes = step.latents, self.parts.graph_bytes
            on_step(step)
            del step  # with latents of its own
        self._turns.between_stages(plan)
        kernels = self._computed(plan)
        painted = [_pasted(Image.fromarray(pixels.numpy()), job) for pixels in self.decode(latents, plan)]
        self._turns.between_stages(plan)
        shown, flags = self._checked(painted, job.safety, plan)
        return [
            self._finished(Picture(image, task.seed, task.job, flagged, plan.weights, kernels, graph_bytes, plan))
            for image, task, flagged in zip(shown, batch, flags, strict=True)
        ]

    def _computed(self, plan: MemoryPlan) -> str:
        """As :attr:`Picture.kernels`."""
        if "int8" in (plan.weights, self.kernels):
            return "int8"
        return "torch" if self.device.type == "cpu" and not plan.vae_weights else ""

    def encode(self, job: Job, plan: MemoryPlan | None = None) -> Conditioning:
        """The job's prompts through the text encoders, one encoder at a time."""
        return self._encode([job], plan or self.memory_plan(job))[0]

    def _encode(self, jobs: Sequence[Job], plan: MemoryPlan) -> list[Conditioning]:
        self.parts.drop_controls(max(len(job.controls) for job in jobs))
        conditionings: list[Conditioning] = []
        for loras, group in groupby(jobs, key=lambda job: job.loras):
            conditionings += self._encoder(list(group), partial(self._lent_text, plan, loras))
        return conditionings

    def _lent_text(self, plan: MemoryPlan, loras: tuple[Lora, ...], index: int) -> AbstractContextManager[TextEncoder]:
        part = text_part(index)
        return self.parts.text(index, self.dtype, plan.placement[part], active(loras, part))

    def begin(self, job: Job, noise: NoiseSource, plan: MemoryPlan | None = None) -> InitLatents:
        """What the job's sampling starts from, for as many pictures as ``noise`` has seeds."""
        config, vae = self.model.config, self.model.config.vae
        shape = len(noise.seeds), vae.latent_channels, job.height // vae.downscale, job.width // vae.downscale
        if job.picture is None and config.unet.in_channels == vae.latent_channels:
            return init_latents.text_only(config, shape, noise, None)
        plan = plan or self.memory_plan(job)
        with self.parts.vae(self.vae_dtype, plan.placement["vae"], plan.vae_weights) as autoencoder:
            encoder = Encoder(autoencoder, self.device, self.dtype, plan.vae_tile)
            if job.picture is None:
                start = init_latents.text_only(config, shape, noise, encoder)
            else:
                start = init_latents.from_picture(config, shape, noise, encoder, job.picture, job.schedule)
        if not all(x.isfinite().all() for x in (start.latents, start.extra) if x is not None):
            raise GgufSdError(not_finite("VAE", self.vae_dtype, " of the picture to start from"))
        return start

    def denoise(
        self,
        job: Job,
        start: InitLatents,
        conditioning: Conditioning,
        noise: NoiseSource,
        plan: MemoryPlan | None = None,
        graphing: Graphing | None = None,
    ) -> Iterator[Step]:
        """Walks latents [B, 4, h, w] down the job's schedule, yielding after every step; ``graphing``: whether through
        CUDA graphs (None: as the pipeline was told). Raises GgufSdError where they stop being finite, on a GPU after
        the last step."""
        plan = plan or self.memory_plan(job)
        graphing = graphing or self._graphing(job.steps_run, len(list(job.batches())), plan)
        loras = active(job.loras, UNET_PART)
        how = LoadedAs(self.dtype, plan.weights, self.kernels, plan.placement[UNET_PART], loras)
        with self.parts.unet(how, graphing) as unet, self._controllers(job, how) as controllers:
            guided = conditioning.negative is not None and plan.batch_guidance
            self.tuning.before_steps(unet, start.latents, guided)
            passes = 2 if conditioning.negative is not None and not plan.batch_guidance else 1
            evaluations = job.schedule.evaluations(start.start_step or 0)
            denoise = Controlled(unet, controllers, evaluations, passes) if controllers else unet
            predict = Predictor(denoise, conditioning, job.guidance, plan.batch_guidance, start.extra)
            for step in sample(predict, start.latents, job.schedule, noise, start.start_step, start.blend):
                last = step.index + 1 == step.total
                if (last or self.device.type == "cpu") and not step.latents.isfinite().all():  # waits for a GPU
                    when = " by" if self.device.type == "cuda" else " at"
                    raise GgufSdError(not_finite("UNet", self.dtype, f"{when} step {step.index + 1} of {step.total}"))
                yield step

    @contextmanager
    def _controllers(self, job: Job, unet: LoadedAs) -> Iterator[list[Controller]]:
        """A job's ControlNets, loaded as the UNet is."""
        with ExitStack() as stack:
            yield [
                Controller(
                    stack.enter_context(self.parts.control(index, replace(unet, loras=(), control=control.file))),
                    (to_tensor(control.picture) + 1) / 2,
                    control.scale,
                    control.start,
                    control.end,
                )
                for index, control in enumerate(job.controls)
            ]

    @torch.inference_mode()
    def decode(self, latents: Tensor, plan: MemoryPlan | None = None) -> Tensor:
        """Latents [B, 4, h, w] -> uint8 pictures [B, 8h, 8w, 3]. Raises GgufSdError where a value is not finite."""
        if not latents.isfinite().all():
            raise GgufSdError("the latents to decode hold values that are not finite")
        plan = plan or self._plan(latents)
        with self.parts.vae(self.vae_dtype, plan.placement["vae"], plan.vae_weights, plan.vae_encodes) as vae:
            decoded = [tiled_vae.decode(vae, latent[None], plan.vae_tile) for latent in latents.to(self.vae_dtype)]
        pixels = torch.cat(decoded).float() / 2 + 0.5
        del decoded
        if not pixels.isfinite().all():
            raise GgufSdError(not_finite("VAE", self.vae_dtype))
        return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()

    def preview(self, step: Step, safety: str = "blur") -> Image.Image:
        """A cheap look at the first picture of a step: through a tiny autoencoder if that is in use, by a linear map
        for latents of Stable Diffusion's kind, else through the model's own autoencoder. Like the picture it is
        blurred where the model's safety checker flags it, if ``safety`` is blur."""
        plan, config = self._plan(step.latents), self.model.config.vae
        tiny = self.vae_file is not None and self.vae_config == tiny_config(self.vae_config.latent_channels)
        if tiny or family(config) is None:
            with self.parts.vae(self.vae_dtype, plan.placement["vae"], plan.vae_weights, plan.vae_encodes) as vae:
                look = previews(step.denoised[:1], config, vae, plan.vae_tile)
        else:
            look = previews(step.denoised[:1], config, None)
        return self._checked(look, "off" if safety == "warn" else safety, plan)[0][0]

    def _checked(
        self, painted: list[Image.Image], safety: str, plan: MemoryPlan
    ) -> tuple[list[Image.Image], list[bool]]:
        """The pictures as the model's safety checker, if it has one, lets them pass, and which it flagged."""
        if safety == "off" or self.model.config.safety is None:
            return painted, [False] * len(painted)
        with self.parts.safety(self.dtype, plan.placement["safety"]) as checker:
            flags = checker.flagged(painted)
        blur = safety == "blur"
        return [blurred(x) if flagged and blur else x for x, flagged in zip(painted, flags, strict=True)], flags

    def _finished(self, picture: Picture) -> Picture:
        dtype = str(self.dtype).removeprefix("torch.")
        picture.image.info[PARAMETERS] = parameters(picture, self.model.path.stem, self.model.source_hash, dtype)
        return picture

    def prompt_chunks(self, job: Job) -> int:
        """Of 75 tokens, that the longer of a job's prompts has; pictures painted at once have equally many."""
        return self._encoder.chunks(job)

    def memory_plan(self, *jobs: Job) -> MemoryPlan:
        """How jobs would make do with the memory that is free now, or allowed. Raises GgufSdError where they cannot."""
        return self.planning.plan(self.planner(*jobs))

    def planner(self, *jobs: Job) -> Planner:
        """What plans jobs, and tells of a plan what each stage takes."""
        beside: Counter[str] = Counter()
        for job in jobs:
            beside |= lora_values(job.loras, self.model.config)  # the larger of both
        controls = max((job.controls for job in jobs), key=len)
        workload = self.planning.workload(jobs, self._encoder.chunks)
        return self.planning.planner(workload, beside, [control.file for control in controls])

    def _plan(self, latents: Tensor) -> MemoryPlan:
        """That of the batch that is painted, else one for latents [B, 4, h, w]."""
        if self._turns.running is not None:
            return self._turns.running
        size = latents.shape[2], latents.shape[3]
        return self.planning.plan(self.planning.planner(Workload(size, len(latents))))


def _pasted(painted: Image.Image, job: Job) -> Image.Image:
    """With what lies outside the mask put back."""
    if job.picture is None or job.picture.mask is None or not job.paste:
        return painted
    return masks.pasted(painted, job.picture.image, job.picture.mask, job.mask_blur)
