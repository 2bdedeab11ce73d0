"""Runs a sampler by name: :func:`sample`. The samplers themselves are plain generator functions, see
:mod:`gguf_sd.sampling.samplers.common`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gguf_sd.sampling.denoiser import Denoiser, Model
from gguf_sd.sampling.names import SAMPLERS
from gguf_sd.sampling.noise import Noise
from gguf_sd.sampling.samplers import consistency, euler, grid, multistep, stochastic
from gguf_sd.sampling.samplers.common import SampleFn, Trajectory
from gguf_sd.sampling.schedules import Schedule

Blend = Callable[[Tensor, int], Tensor]
SAMPLE_FUNCTIONS: dict[str, SampleFn] = {
    "pndm": grid.pndm,
    "ddim": grid.ddim,
    "ddpm": grid.ddpm,
    "euler": euler.euler,
    "euler_a": euler.euler_a,
    "heun": euler.heun,
    "lms": euler.lms,
    "dpm2": euler.dpm2,
    "dpm2_a": euler.dpm2_a,
    "dpmpp_2m": multistep.dpmpp_2m,
    "dpmpp_2m_sde": multistep.dpmpp_2m_sde,
    "dpmpp_3m_sde": stochastic.dpmpp_3m_sde,
    "dpmpp_sde": stochastic.dpmpp_sde,
    "dpmpp_2s_a": stochastic.dpmpp_2s_a,
    "unipc": multistep.unipc,
    "lcm": consistency.lcm,
    "tcd": consistency.tcd,
}


@dataclass(frozen=True)
class Step:
    """One finished step: ``index`` of ``total``, counted from 0.

    ``latents`` [B, C, H, W] is where the sampler stands, still noisy until the last step. ``denoised`` is its
    estimate of the finished latents, the one to preview. Both in the dtype of the latents given.
    """

    index: int
    total: int
    latents: Tensor
    denoised: Tensor


def sample(
    model: Model,
    latents: Tensor,
    schedule: Schedule,
    noise: Noise | None = None,
    start_step: int | None = None,
    blend: Blend | None = None,
) -> Iterator[Step]:
    """Denoises latents [B, C, H, W], yielding after every step; the last Step holds the result.

    ``model(latents, timestep)`` gets latents as the UNet wants them, in the dtype of ``latents``, and a 0-dim
    timestep on their device; it returns the prediction [B, C, H, W] with guidance applied. The arithmetic
    between its calls is float32 (float64 if the latents are).

    Without ``start_step`` the latents are unit-variance noise, scaled here (text-to-image). With it they are
    taken as they are, noised for that step by :func:`add_noise` (image-to-image). ``blend(x, step)`` may change the
    latents before each later ``step``, and after the last, when ``step`` is ``schedule.steps`` (inpainting).

    Raises GgufSdError for a start_step out of range, ValueError for a stochastic sampler without ``noise``.
    """
    start = 0 if start_step is None else start_step
    schedule.first_evaluation(start)
    if noise is None:
        if SAMPLERS[schedule.sampler].stochastic:
            raise ValueError(f"sampler {schedule.sampler!r} draws noise: pass a NoiseSource")
        noise = _no_noise
    x = latents.to(torch.promote_types(latents.dtype, torch.float32))
    if start_step is None:
        x = x * schedule.init_noise_sigma
    denoiser = Denoiser(model, schedule.config.prediction_type, latents.dtype)
    trajectory = SAMPLE_FUNCTIONS[schedule.sampler](denoiser, x, schedule, start, noise)
    return _steps(trajectory, start, schedule.steps, latents.dtype, blend or (lambda x, step: x))


@torch.no_grad()
def _steps(trajectory: Trajectory, start: int, end: int, dtype: torch.dtype, blend: Blend) -> Iterator[Step]:
    x, denoised = next(trajectory)
    for step in range(start, end):
        x = blend(x, step + 1)
        yield Step(step - start, end - start, x.to(dtype), denoised.to(dtype))
        if step + 1 < end:
            x, denoised = trajectory.send(x)


def _no_noise(shape: object, dtype: torch.dtype | None = None) -> Tensor:
    raise AssertionError("a sampler declared deterministic asked for noise")
