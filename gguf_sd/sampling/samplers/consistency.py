"""Samplers of models distilled for a few steps: latent and trajectory consistency."""

from __future__ import annotations

from torch import Tensor

from gguf_sd.sampling.denoiser import Denoiser
from gguf_sd.sampling.noise import Noise
from gguf_sd.sampling.samplers.common import Trajectory
from gguf_sd.sampling.samplers.grid import Grid
from gguf_sd.sampling.schedules import Schedule

LCM_SIGMA_DATA = 0.5  # boundary conditions of consistency models, arXiv:2310.04378, appendix
LCM_TIMESTEP_SCALING = 10.0
TCD_GAMMA = 0.3  # how far below the next timestep the deterministic part of a step aims, arXiv:2402.19159, eq. 8


def lcm(denoiser: Denoiser, x: Tensor, schedule: Schedule, start: int, noise: Noise) -> Trajectory:
    """Multistep latent consistency sampling: Luo et al. 2023, arXiv:2310.04378, algorithm 3."""
    grid = Grid(schedule)
    timesteps = schedule.timesteps.tolist()
    on_device = schedule.timesteps.to(x.device)
    for i in range(start, schedule.steps):
        prediction = denoiser.predict(x, on_device[i], grid.level(timesteps[i]))
        scaled = timesteps[i] * LCM_TIMESTEP_SCALING
        variance = scaled**2 + LCM_SIGMA_DATA**2
        denoised = scaled / variance**0.5 * prediction.denoised + LCM_SIGMA_DATA**2 / variance * x
        if i + 1 < schedule.steps:
            level_next = grid.level(timesteps[i + 1])
            x = level_next.alpha * denoised + level_next.sigma * noise(x.shape).to(x)
        else:
            x = denoised
        x = yield x, denoised


def tcd(denoiser: Denoiser, x: Tensor, schedule: Schedule, start: int, noise: Noise) -> Trajectory:
    """Strategic stochastic sampling of trajectory consistency models, gamma 0.3: Zheng et al. 2024, arXiv:2402.19159,
    algorithm 4. The last step ends at the level of timestep 0, as diffusers' does."""
    grid = Grid(schedule)
    timesteps = schedule.timesteps.tolist()
    on_device = schedule.timesteps.to(x.device)
    for i in range(start, schedule.steps):
        last = i + 1 == schedule.steps
        target = 0 if last else timesteps[i + 1]
        below = int((1 - TCD_GAMMA) * target)
        denoised, eps = denoiser.predict(x, on_device[i], grid.level(timesteps[i]))
        level = grid.level(below)
        x = level.alpha * denoised + level.sigma * eps
        if not last:
            ratio = grid.alphas_cumprod[target] / grid.alphas_cumprod[below]
            x = ratio**0.5 * x + (1 - ratio) ** 0.5 * noise(x.shape).to(x)
        x = yield x, denoised
