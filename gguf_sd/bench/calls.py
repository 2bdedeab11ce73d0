"""What the UNet is fed while it paints: calls recorded in a few sampling runs of the model itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gguf_sd.adapters.targets import UNET_PART
from gguf_sd.config import ModelConfig
from gguf_sd.pipeline import Pipeline
from gguf_sd.request import Job, Request
from gguf_sd.runtime.parts import LoadedAs
from gguf_sd.sampling import NoiseSource, sample
from gguf_sd.sampling.guidance import Conditioning, Denoise, Predictor
from gguf_sd.sampling.schedules import alphas_cumprod

POSITIONS = 1 << 16  # of latents in all calls that are kept: 16 calls at 512x512
MOST = 768  # calls kept of small models
CALLS_PER_PROMPT = 6  # kept, about
STEPS, FEW_STEPS = 20, 10  # at most, of a run; and of one whose pictures have MANY positions or more
MANY = 1 << 10


@dataclass(frozen=True)
class Samples:
    """Calls of the UNet: latents [N, C, h, w] and timesteps [N] as it is given them, which of the ``contexts``
    [P, M, context_dim] (and ``vectors`` [P, vector_dim], SDXL) each attends to, and how much a squared error of each
    matters for the finished picture, [N] with mean 1."""

    latents: Tensor
    timesteps: Tensor
    prompt: Tensor
    weights: Tensor
    contexts: Tensor
    vectors: Tensor | None = None

    def __len__(self) -> int:
        return len(self.latents)

    def subset(self, index: Tensor) -> Samples:
        """Some of the calls, by their numbers."""
        prompts, prompt = self.prompt[index].unique(return_inverse=True)
        weights = self.weights[index]
        return Samples(
            self.latents[index],
            self.timesteps[index],
            prompt,
            weights / weights.mean(),
            self.contexts[prompts],
            None if self.vectors is None else self.vectors[prompts],
        )


def default_count(config: ModelConfig) -> int:
    """How many calls are kept of a model, its own size of picture assumed."""
    return max(8, min(MOST, POSITIONS // _positions(config)))


def prompts_for(count: int) -> int:
    """How many prompts are painted to record so many calls, where there are as many."""
    return max(2, -(-count // CALLS_PER_PROMPT))


def _positions(config: ModelConfig) -> int:
    defaults, scale = config.defaults, config.vae.downscale
    return (defaults.width // scale) * (defaults.height // scale)


class _Recorder:
    """Stands for the UNet in a sampling run and keeps what it is given."""

    def __init__(self, unet: Denoise):
        self.unet = unet
        self.calls: list[tuple[Tensor, Tensor]] = []

    def project(self, context: Tensor) -> Tensor:
        return self.unet.project(context)

    def step(
        self,
        latents: Tensor,
        timesteps: Tensor,
        projected: Tensor,
        vector: Tensor | None = None,
        *,
        control: Sequence[Tensor] = (),
    ) -> Tensor:
        self.calls.append((latents.float().cpu().clone(), timesteps.cpu().clone()))
        return self.unet.step(latents, timesteps, projected, vector, control=control)


@torch.inference_mode()
def record(
    pipeline: Pipeline,
    prompts: Sequence[str],
    count: int,
    seed: int = 0,
    progress: Callable[[str], object] = lambda name: None,
) -> Samples:
    """Paints as many of the prompts as ``count`` calls want, by the model's own defaults and picture i with
    ``seed + i``; keeps ``count`` of the UNet's calls, both halves of guidance, drawn evenly. ``progress`` is called
    after every picture with its prompt."""
    runs: list[Samples] = []
    for i, prompt in enumerate(prompts[: prompts_for(count)]):
        request = Request(prompt=prompt, seed=seed + i)
        job = pipeline.prepare(request)
        most = FEW_STEPS if _positions(pipeline.model.config) >= MANY else STEPS
        if job.steps > most:
            job = pipeline.prepare(replace(request, steps=most))
        runs.append(_run(pipeline, job))
        progress(prompt)
    whole = _joined(runs)
    generator = torch.Generator().manual_seed(seed)
    return whole.subset(torch.randperm(len(whole), generator=generator)[:count])


def _run(pipeline: Pipeline, job: Job) -> Samples:
    """All calls of one run."""
    plan = pipeline.memory_plan(job)
    conditioning = pipeline.encode(job, plan)
    noise = NoiseSource([job.seed], pipeline.dtype, pipeline.device)
    start = pipeline.begin(job, noise, plan)
    how = LoadedAs(pipeline.dtype, plan.weights, pipeline.kernels, plan.placement[UNET_PART])
    with pipeline.parts.unet(how) as unet:
        recorder = _Recorder(unet)
        predict = Predictor(recorder, conditioning, job.guidance, True, start.extra)
        for _ in sample(predict, start.latents, job.schedule, noise, start.start_step, start.blend):
            pass
    return _samples(pipeline.model.config, job, conditioning, recorder.calls)


def _samples(
    config: ModelConfig, job: Job, conditioning: Conditioning, calls: Sequence[tuple[Tensor, Tensor]]
) -> Samples:
    negative, positive = conditioning.negative, conditioning.positive
    sides = [positive] if negative is None else [negative, positive]
    # guided = without + guidance * (with - without): what an error of each half is multiplied by
    shares = torch.tensor([1.0] if negative is None else [1 - job.guidance, job.guidance]).square()
    vectors = [side.vector for side in sides if side.vector is not None]
    effects = step_effects(config, [float(t[0]) for _, t in calls])
    return Samples(
        torch.cat([x for x, _ in calls]),
        torch.cat([t for _, t in calls]),
        torch.arange(len(sides)).repeat(len(calls)),
        torch.cat([shares * effect for effect in effects]),
        torch.cat([side.context for side in sides]).float().cpu(),
        torch.cat(vectors).float().cpu() if vectors else None,
    )


def _joined(runs: Sequence[Samples]) -> Samples:
    prompts = [len(run.contexts) for run in runs]
    first = [sum(prompts[:i]) for i in range(len(runs))]
    weights = torch.cat([run.weights for run in runs])
    vectors = [run.vectors for run in runs if run.vectors is not None]
    return Samples(
        torch.cat([run.latents for run in runs]),
        torch.cat([run.timesteps for run in runs]),
        torch.cat([run.prompt + base for run, base in zip(runs, first, strict=True)]),
        weights / weights.mean(),
        torch.cat([run.contexts for run in runs]),
        torch.cat(vectors) if vectors else None,
    )


def step_effects(config: ModelConfig, timesteps: Sequence[float]) -> list[float]:
    """How much a squared error of the predicted noise at each of a run's calls matters for the finished latents.

    In x = x0 + sigma * eps a step from sigma to sigma' moves x by (sigma' - sigma) * eps, so that is what an error is
    multiplied by. Later steps take it for noise in part: for latents of unit variance 1 / (1 + sigma^2) of its square
    is left."""
    alphas = alphas_cumprod(config.scheduler).double()
    sigmas = []
    for t in timesteps:
        alpha = float(alphas[min(max(round(t), 0), len(alphas) - 1)])
        sigmas.append(((1 - alpha) / alpha) ** 0.5)
    steps = zip(sigmas, [*sigmas[1:], 0.0], strict=True)
    return [max(abs(sigma - following), 1e-4) ** 2 / (1 + sigma**2) for sigma, following in steps]
