"""Solvers of the reverse SDE in sigma space, as k-diffusion has them: DPM-Solver++ (2S) ancestral, SDE and SDE (3M)
(Lu et al. 2022, arXiv:2211.01095)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gguf_sd.sampling.denoiser import Denoiser
from gguf_sd.sampling.noise import Noise
from gguf_sd.sampling.samplers.common import Trajectory
from gguf_sd.sampling.schedules import Schedule
from gguf_sd.sampling.spacings import ancestral_step


def towards(denoised: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """x at another noise level if the denoised latents stay what they are: the first-order exponential step."""
    return denoised + sigma_next / sigma * (x - denoised)


def dpmpp_2s_a(denoiser: Denoiser, x: Tensor, schedule: Schedule, start: int, noise: Noise) -> Trajectory:
    """Ancestral sampling with steps of DPM-Solver++(2S), algorithm 1: an estimate from halfway in log sigma."""
    timesteps = schedule.timesteps.to(x.device)
    for i in range(start, schedule.steps):
        sigma, middle, sigma_next = schedule.evaluation_levels(i)
        denoised = denoiser.denoise(x, timesteps[2 * i], sigma)
        if middle > 0:
            down, up = ancestral_step(sigma, sigma_next)
            halfway = towards(denoised, x, sigma, middle)
            denoised = denoiser.denoise(halfway, timesteps[2 * i + 1], middle)
            x = towards(denoised, x, sigma, down) + noise(x.shape).to(x) * up
        else:
            x = denoised
        x = yield x, denoised


def dpmpp_sde(denoiser: Denoiser, x: Tensor, schedule: Schedule, start: int, noise: Noise) -> Trajectory:
    """DPM-Solver++ (SDE), r = 1/2, eta 1: both stages are ancestral, and share noise.

    Their noise is that of one Brownian motion over sigma. k-diffusion and diffusers let torchsde draw it; here it comes
    from each picture's own generator, two normal tensors a step: other pictures, of the same distribution.
    """
    timesteps = schedule.timesteps.to(x.device)
    for i in range(start, schedule.steps):
        sigma, middle, sigma_next = schedule.evaluation_levels(i)
        denoised = denoiser.denoise(x, timesteps[2 * i], sigma)
        if middle > 0:
            early, whole = brownian_increments(noise, x, (sigma, middle, sigma_next))
            down, up = ancestral_step(sigma, middle)
            halfway = towards(denoised, x, sigma, down) + early * up
            denoised = denoiser.denoise(halfway, timesteps[2 * i + 1], middle)
            down, up = ancestral_step(sigma, sigma_next)
            x = towards(denoised, x, sigma, down) + whole * up
        else:
            x = denoised
        x = yield x, denoised


def brownian_increments(noise: Noise, x: Tensor, sigmas: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Increments of a Brownian motion between three falling sigmas, from the first to the second and from the first to
    the last, each scaled to unit variance."""
    sigma, middle, sigma_next = sigmas
    early, late = noise(x.shape).to(x), noise(x.shape).to(x)
    share = (sigma - middle) / (sigma - sigma_next)
    return early, share**0.5 * early + (1 - share) ** 0.5 * late


def dpmpp_3m_sde(denoiser: Denoiser, x: Tensor, schedule: Schedule, start: int, noise: Noise) -> Trajectory:
    """SDE-DPM-Solver++(3M), eta 1: three estimates of the denoised latents, extrapolated in log sigma.

    As in k-diffusion, which gives the second difference half the weight that order 3 takes; so its order is 2, with a
    smaller error than 2M. diffusers' solver_order 3 has another weight there, which does not vanish with the step.
    """
    timesteps = schedule.timesteps.to(x.device)
    estimates: list[Tensor] = []  # newest first
    steps: list[Tensor] = []  # in log sigma, newest first
    for i in range(start, schedule.steps):
        sigma, sigma_next = schedule.sigmas[i], schedule.sigmas[i + 1]
        denoised = denoiser.denoise(x, timesteps[i], sigma)
        estimates = [denoised, *estimates[:2]]
        if sigma_next > 0:
            steps = [(sigma / sigma_next).log(), *steps[:2]]
            left = torch.exp(-2 * steps[0])  # of what is not denoised
            x = left * x + (1 - left) * denoised + _curvature(estimates, steps)
            x = x + noise(x.shape).to(x) * sigma_next * (1 - left) ** 0.5
        else:
            x = denoised
        x = yield x, denoised


def _curvature(estimates: list[Tensor], steps: list[Tensor]) -> Tensor:
    """What the first and second derivative of the denoised latents add in a step, by divided differences."""
    if len(estimates) == 1:
        return torch.zeros_like(estimates[0])
    h = 2 * steps[0]
    phi_2 = 1 + torch.expm1(-h) / h
    r0 = steps[1] / steps[0]
    newest = (estimates[0] - estimates[1]) / r0
    if len(estimates) == 2:
        return phi_2 * newest
    r1 = steps[2] / steps[0]
    older = (estimates[1] - estimates[2]) / r1
    bend = (newest - older) / (r0 + r1)
    return phi_2 * (newest + r0 * bend) - (phi_2 / h - 1 / 2) * bend
