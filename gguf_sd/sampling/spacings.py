"""Ways to space timesteps and noise levels, as numbers alone; :mod:`gguf_sd.sampling.schedules` makes runs of them.

``levels`` is sigma at each training timestep, rising: float64 [num_train_timesteps]. What is returned falls, and leaves
out the 0 that a run ends at.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from gguf_sd.errors import GgufSdError

KARRAS_RHO = 7.0  # Karras et al. 2022, arXiv:2206.00364, appendix D.1
BETA_SHAPE = 0.6  # both parameters of Lee et al. 2024, arXiv:2407.12173
# Sabour et al. 2024, arXiv:2404.14507: the timesteps of ten steps that NVIDIA publishes, and where they end.
ALIGN_YOUR_STEPS = {
    "sd1": (999, 850, 736, 645, 545, 455, 343, 233, 124, 24, 0),
    "sdxl": (999, 845, 730, 587, 443, 310, 193, 116, 53, 13, 0),
}


def spaced(spacing: str, train: int, offset: int, points: int) -> np.ndarray:
    """``points`` of ``train`` timesteps, not yet rounded: Lin et al. 2023, arXiv:2305.08891, table 2."""
    if spacing == "linspace":
        return np.linspace(0, train - 1, points)[::-1]
    if spacing == "leading":
        return np.arange(points)[::-1] * (train // points) + offset
    return np.arange(train, 0, -train / points)[:points].round() - 1  # rounding can leave one too many, at -1


def ramp(name: str, sigma_max: float, sigma_min: float, steps: int) -> np.ndarray:
    """sigmas from one to the other: even in sigma^(1/rho) (karras) or log sigma (exponential), or at even quantiles of
    a beta distribution, which is dense at both ends (beta, as diffusers and AUTOMATIC1111 have it; ComfyUI's takes the
    quantiles of timesteps)."""
    if name == "exponential":
        return np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), steps))
    if name == "beta":
        return sigma_min + beta_quantiles(1 - np.linspace(0, 1, steps)) * (sigma_max - sigma_min)
    start, end = sigma_max ** (1 / KARRAS_RHO), sigma_min ** (1 / KARRAS_RHO)
    return (start + np.linspace(0, 1, steps) * (end - start)) ** KARRAS_RHO


def named(name: str, levels: np.ndarray, steps: int, architecture: str) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps and sigmas of the schedules that go by other programs' formulas, whatever the model's spacing: normal
    is k-diffusion's, sgm_uniform and simple are ComfyUI's."""
    train = len(levels)
    if name == "ays":
        sigmas = align_your_steps(levels, steps, architecture)
        return timesteps_of(sigmas, levels), sigmas
    if name == "normal":
        timesteps = np.linspace(train - 1, 0, steps)
    elif name == "sgm_uniform":
        timesteps = np.linspace(train - 1, 0, steps + 1)[:-1]
    else:
        timesteps = train - 1 - np.floor(np.arange(steps) * (train / steps))
    return timesteps, np.exp(np.interp(timesteps, np.arange(train), np.log(levels)))


def align_your_steps(levels: np.ndarray, steps: int, architecture: str) -> np.ndarray:
    """sigmas of the published ten steps, or as many others, even in log sigma between them.

    Raises GgufSdError for models that no steps were published for.
    """
    if architecture not in ALIGN_YOUR_STEPS or len(levels) != 1000:
        raise GgufSdError(
            f"schedule 'ays' is published for models sd1 and sdxl of 1000 timesteps, not for {architecture!r} of "
            f"{len(levels)}; choose another schedule, such as 'karras'"
        )
    table = np.log(levels[list(ALIGN_YOUR_STEPS[architecture])])
    places = np.linspace(0, len(table) - 1, steps + 1)
    return np.exp(np.interp(places, np.arange(len(table)), table))[:-1]


def beta_quantiles(shares: np.ndarray, shape: float = BETA_SHAPE) -> np.ndarray:
    """Below which values of a symmetric beta distribution lie these shares (0 … 1) of it.

    By Newton's method on the power series of the distribution function, which is nearly linear in x^shape; the upper
    half mirrors the lower.
    """
    scale = shape * math.gamma(shape) ** 2 / math.gamma(2 * shape)
    order = np.arange(64)
    terms = np.cumprod(np.append(1.0, (order[1:] - shape) / order[1:])) * shape / (shape + order)
    wanted = np.minimum(shares, 1 - shares) * scale
    power = wanted.copy()
    for _ in range(12):
        x = power ** (1 / shape)
        found = power * (terms * x[:, None] ** order).sum(-1)
        power = power - (found - wanted) * (1 - x) ** (1 - shape)
    x = power ** (1 / shape)
    return np.where(shares > 0.5, 1 - x, x)


def timesteps_of(sigmas: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Fractional timesteps of sigmas, interpolated in log sigma between the training timesteps."""
    return np.interp(np.log(sigmas), np.log(levels), np.arange(len(levels)))


def ancestral_step(sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
    """The level to step down to, and that of the fresh noise which brings it up to ``sigma_next``."""
    up = (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5
    return (sigma_next**2 - up**2) ** 0.5, up


def log_midpoint(sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """The level halfway in log sigma."""
    return torch.lerp(sigma.log(), sigma_next.log(), 0.5).exp()
