"""What the samplers share.

A sampler takes ``(denoiser, x, schedule, start, noise)`` and yields ``(x, denoised)`` after every step: the
latents [B, C, H, W] in its own scaling (SamplerInfo.sigma_space) and its current estimate of the clean ones. It
is sent the latents to go on with. ``start`` is the step to begin at. What happens to latents at a step equals
diffusers' scheduler of that name or, where there is none, k-diffusion's function.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

from torch import Tensor

from gguf_sd.sampling.denoiser import Denoiser
from gguf_sd.sampling.noise import Noise
from gguf_sd.sampling.schedules import Schedule

Trajectory = Generator[tuple[Tensor, Tensor], Tensor, None]
SampleFn = Callable[[Denoiser, Tensor, Schedule, int, Noise], Trajectory]


def to_d(x: Tensor, sigma: Tensor, denoised: Tensor) -> Tensor:
    """The derivative of x = x0 + sigma * eps by sigma along the probability-flow ODE (Karras et al. 2022,
    arXiv:2206.00364, eq. 1): the estimate of eps."""
    return (x - denoised) / sigma
