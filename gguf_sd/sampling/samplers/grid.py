"""Samplers that step on the training timesteps: DDIM, PLMS and DDPM."""

from __future__ import annotations

import torch
from torch import Tensor

from gguf_sd.sampling.denoiser import Denoiser, Level
from gguf_sd.sampling.noise import Noise
from gguf_sd.sampling.samplers.common import Trajectory
from gguf_sd.sampling.schedules import Schedule, alphas_cumprod, ends_clean

# Adams-Bashforth weights, newest first, by how many model outputs there are.
ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


class Grid:
    """Noise levels of the training timesteps, for samplers that step by a fixed stride on them."""

    def __init__(self, schedule: Schedule) -> None:
        config = schedule.config
        self.alphas_cumprod = alphas_cumprod(config)
        self.stride = config.num_train_timesteps // schedule.steps
        self.final = torch.tensor(1.0) if ends_clean(config, schedule.sampler) else self.alphas_cumprod[0]

    def level(self, timestep: int) -> Level:
        """The level of a timestep; of the end of the run if negative."""
        return Level.from_alpha_cumprod(self.alphas_cumprod[timestep] if timestep >= 0 else self.final)


def ddim(denoiser: Denoiser, x: Tensor, schedule: Schedule, start: int, noise: Noise) -> Trajectory:
    """DDIM with eta 0: Song et al. 2020, arXiv:2010.02502, eq. 12."""
    grid = Grid(schedule)
    timesteps = schedule.timesteps[start:]
    for t, timestep in zip(timesteps.tolist(), timesteps.to(x.device), strict=True):
        denoised, eps = denoiser.predict(x, timestep, grid.level(t))
        level_next = grid.level(t - grid.stride)
        x = level_next.alpha * denoised + level_next.sigma * eps
        x = yield x, denoised


def pndm(denoiser: Denoiser, x: Tensor, schedule: Schedule, start: int, noise: Noise) -> Trajectory:
    """PLMS: Liu et al. 2022, arXiv:2202.09778, eq. 12, begun with an improved Euler step, not Runge-Kutta.

    That first step costs two evaluations. Model outputs are averaged as they are, before v becomes eps. Begun
    at a later step, timesteps run one stride ahead of the latents after the first step: diffusers, whose
    pictures these are, does not repeat a timestep there.
    """
    grid = Grid(schedule)
    timesteps = schedule.timesteps[start:]
    pairs = list(zip(timesteps.tolist(), timesteps.to(x.device), strict=True))

    def transfer(x: Tensor, output: Tensor, t: int, t_next: int) -> tuple[Tensor, Tensor]:
        denoised, eps = denoiser.split(output, x, grid.level(t))
        level_next = grid.level(t_next)
        return level_next.alpha * denoised + level_next.sigma * eps, denoised

    t, timestep = pairs[0]
    outputs = [denoiser.output(x, timestep)]
    ahead, denoised = transfer(x, outputs[0], t, t - grid.stride)
    if len(pairs) == 1:
        yield ahead, denoised
        return
    t, timestep = pairs[1]
    mean = (outputs[0] + denoiser.output(ahead, timestep)) / 2
    x, denoised = transfer(x, mean, t + grid.stride, t)
    x = yield x, denoised

    for t, timestep in pairs[2:]:
        outputs = [denoiser.output(x, timestep), *outputs[:3]]
        weights = ADAMS_BASHFORTH[len(outputs)]
        mean = sum((w * out for w, out in zip(weights, outputs, strict=True)), torch.zeros_like(x))
        x, denoised = transfer(x, mean, t, t - grid.stride)
        x = yield x, denoised


def ddpm(denoiser: Denoiser, x: Tensor, schedule: Schedule, start: int, noise: Noise) -> Trajectory:
    """Ancestral sampling with the smaller variance: Ho et al. 2020, arXiv:2006.11239, eq. 6 and 7.

    Noise is drawn for the last step too, unless it is that of timestep 0, and comes to nothing: so diffusers does.
    """
    grid = Grid(schedule)
    timesteps = schedule.timesteps.tolist()
    on_device = schedule.timesteps.to(x.device)
    for i in range(start, schedule.steps):
        left = grid.alphas_cumprod[timesteps[i]]
        denoised = denoiser.predict(x, on_device[i], Level.from_alpha_cumprod(left)).denoised
        last = i + 1 == schedule.steps
        left_next = torch.ones(()) if last else grid.alphas_cumprod[timesteps[i + 1]]
        alpha = left / left_next
        mean = (left_next**0.5 * (1 - alpha) * denoised + alpha**0.5 * (1 - left_next) * x) / (1 - left)
        variance = (1 - left_next) / (1 - left) * (1 - alpha)
        x = mean + variance**0.5 * noise(x.shape).to(x) if timesteps[i] > 0 else mean
        x = yield x, denoised
