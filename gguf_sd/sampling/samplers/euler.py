"""Samplers that step along the derivative by sigma: Euler, Heun, LMS and DPM2, and ancestral ones."""

from __future__ import annotations

import torch
from numpy.polynomial import Polynomial
from torch import Tensor

from gguf_sd.sampling.denoiser import Denoiser
from gguf_sd.sampling.noise import Noise
from gguf_sd.sampling.samplers.common import Trajectory, to_d
from gguf_sd.sampling.schedules import Schedule
from gguf_sd.sampling.spacings import ancestral_step

LMS_ORDER = 4


def euler(denoiser: Denoiser, x: Tensor, schedule: Schedule, start: int, noise: Noise) -> Trajectory:
    """Euler steps on the probability-flow ODE: Karras et al. 2022, arXiv:2206.00364, eq. 1."""
    timesteps = schedule.timesteps.to(x.device)
    for i in range(start, schedule.steps):
        sigma, sigma_next = schedule.sigmas[i], schedule.sigmas[i + 1]
        denoised = denoiser.denoise(x, timesteps[i], sigma)
        x = x + to_d(x, sigma, denoised) * (sigma_next - sigma)
        x = yield x, denoised


def euler_a(denoiser: Denoiser, x: Tensor, schedule: Schedule, start: int, noise: Noise) -> Trajectory:
    """Ancestral sampling with Euler steps: Song et al. 2020, arXiv:2011.13456, as in k-diffusion."""
    timesteps = schedule.timesteps.to(x.device)
    for i in range(start, schedule.steps):
        sigma = schedule.sigmas[i]
        denoised = denoiser.denoise(x, timesteps[i], sigma)
        down, up = ancestral_step(sigma, schedule.sigmas[i + 1])
        x = x + to_d(x, sigma, denoised) * (down - sigma)
        x = x + noise(x.shape).to(x) * up
        x = yield x, denoised


def heun(denoiser: Denoiser, x: Tensor, schedule: Schedule, start: int, noise: Noise) -> Trajectory:
    """Heun's second-order steps, the last one Euler's: Karras et al. 2022, arXiv:2206.00364, algorithm 1."""
    timesteps = schedule.timesteps.to(x.device)
    for i in range(start, schedule.steps):
        sigma, ahead, _ = schedule.evaluation_levels(i)
        denoised = denoiser.denoise(x, timesteps[2 * i], sigma)
        slope = to_d(x, sigma, denoised)
        x_next = x + slope * (ahead - sigma)
        if ahead > 0:
            denoised = denoiser.denoise(x_next, timesteps[2 * i + 1], ahead)
            x_next = x + (slope + to_d(x_next, ahead, denoised)) / 2 * (ahead - sigma)
        x = x_next
        x = yield x, denoised


def dpm2(denoiser: Denoiser, x: Tensor, schedule: Schedule, start: int, noise: Noise) -> Trajectory:
    """Midpoint steps, halfway in log sigma, as DPM-Solver-2 takes them (Lu et al. 2022, arXiv:2206.00927); the last one
    is Euler's."""
    timesteps = schedule.timesteps.to(x.device)
    for i in range(start, schedule.steps):
        sigma, middle, sigma_next = schedule.evaluation_levels(i)
        denoised = denoiser.denoise(x, timesteps[2 * i], sigma)
        slope = to_d(x, sigma, denoised)
        if middle > 0:
            halfway = x + slope * (middle - sigma)
            denoised = denoiser.denoise(halfway, timesteps[2 * i + 1], middle)
            slope = to_d(halfway, middle, denoised)
        x = x + slope * (sigma_next - sigma)
        x = yield x, denoised


def dpm2_a(denoiser: Denoiser, x: Tensor, schedule: Schedule, start: int, noise: Noise) -> Trajectory:
    """Ancestral sampling with the midpoint steps of :func:`dpm2`, as in k-diffusion."""
    timesteps = schedule.timesteps.to(x.device)
    for i in range(start, schedule.steps):
        sigma, middle, sigma_next = schedule.evaluation_levels(i)
        denoised = denoiser.denoise(x, timesteps[2 * i], sigma)
        slope = to_d(x, sigma, denoised)
        if middle > 0:
            halfway = x + slope * (middle - sigma)
            denoised = denoiser.denoise(halfway, timesteps[2 * i + 1], middle)
            down, up = ancestral_step(sigma, sigma_next)
            x = x + to_d(halfway, middle, denoised) * (down - sigma) + noise(x.shape).to(x) * up
        else:
            x = x - slope * sigma
        x = yield x, denoised


def lms(denoiser: Denoiser, x: Tensor, schedule: Schedule, start: int, noise: Noise) -> Trajectory:
    """Linear multistep of order 4, as in k-diffusion: the polynomial through the last slopes, integrated."""
    timesteps = schedule.timesteps.to(x.device)
    slopes: list[Tensor] = []  # newest first
    for i in range(start, schedule.steps):
        denoised = denoiser.denoise(x, timesteps[i], schedule.sigmas[i])
        slopes = [to_d(x, schedule.sigmas[i], denoised), *slopes[: LMS_ORDER - 1]]
        weights = _adams_weights(schedule.sigmas[: i + 2].tolist(), len(slopes))
        x = x + sum((w * slope for w, slope in zip(weights, slopes, strict=True)), torch.zeros_like(x))
        x = yield x, denoised


def _adams_weights(sigmas: list[float], order: int) -> list[float]:
    """Integrals over the last interval of the Lagrange polynomials on the ``order`` nodes before its end, newest
    first."""
    *nodes, end = sigmas
    nodes, begin = nodes[: -order - 1 : -1], nodes[-1]
    weights = []
    for node in nodes:
        basis = Polynomial([1.0])
        for other in nodes:
            if other != node:
                basis = basis * Polynomial([-(other - begin), 1.0]) / (node - other)
        weights.append(float(basis.integ()(end - begin)))
    return weights
