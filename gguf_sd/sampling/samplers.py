"""The samplers: functions that walk latents down a schedule, and :func:`sample`, which runs one by name.

A sampler takes ``(denoiser, x, schedule, start, noise)`` and yields ``(x, denoised)`` after every step: the
latents [B, C, H, W] in its own scaling (SamplerInfo.sigma_space) and its current estimate of the clean ones. It
is sent the latents to go on with. ``start`` is the step to begin at. What
happens to latents at a step equals diffusers' scheduler of that name.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gguf_sd.sampling.denoiser import Denoiser, Level, Model
from gguf_sd.sampling.names import SAMPLERS
from gguf_sd.sampling.noise import Noise
from gguf_sd.sampling.schedules import Schedule, alphas_cumprod

Trajectory = Generator[tuple[Tensor, Tensor], Tensor, None]
Blend = Callable[[Tensor, int], Tensor]
SampleFn = Callable[[Denoiser, Tensor, Schedule, int, Noise], Trajectory]

# Adams-Bashforth weights, newest first, by how many model outputs there are.
ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
LCM_SIGMA_DATA = 0.5  # boundary conditions of consistency models, arXiv:2310.04378, appendix
LCM_TIMESTEP_SCALING = 10.0


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


def euler(denoiser: Denoiser, x: Tensor, schedule: Schedule, start: int, noise: Noise) -> Trajectory:
    """Euler steps on the probability-flow ODE: Karras et al. 2022, arXiv:2206.00364, eq. 1."""
    timesteps = schedule.timesteps.to(x.device)
    for i in range(start, schedule.steps):
        sigma, sigma_next = schedule.sigmas[i], schedule.sigmas[i + 1]
        denoised = denoiser.denoise(x, timesteps[i], sigma)
        x = x + (x - denoised) / sigma * (sigma_next - sigma)
        x = yield x, denoised


def euler_a(denoiser: Denoiser, x: Tensor, schedule: Schedule, start: int, noise: Noise) -> Trajectory:
    """Ancestral sampling with Euler steps: Song et al. 2020, arXiv:2011.13456, as in k-diffusion."""
    timesteps = schedule.timesteps.to(x.device)
    for i in range(start, schedule.steps):
        sigma, sigma_next = schedule.sigmas[i], schedule.sigmas[i + 1]
        denoised = denoiser.denoise(x, timesteps[i], sigma)
        sigma_up = (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5
        sigma_down = (sigma_next**2 - sigma_up**2) ** 0.5
        x = x + (x - denoised) / sigma * (sigma_down - sigma)
        x = x + noise(x.shape).to(x) * sigma_up
        x = yield x, denoised


def heun(denoiser: Denoiser, x: Tensor, schedule: Schedule, start: int, noise: Noise) -> Trajectory:
    """Heun's second-order steps, the last one Euler's: Karras et al. 2022, arXiv:2206.00364, algorithm 1."""
    timesteps = schedule.timesteps.to(x.device)
    for i in range(2 * start, 2 * schedule.steps, 2):
        sigma, sigma_next = schedule.sigmas[i], schedule.sigmas[i + 1]
        denoised = denoiser.denoise(x, timesteps[i], sigma)
        slope = (x - denoised) / sigma
        x_next = x + slope * (sigma_next - sigma)
        if sigma_next > 0:
            denoised = denoiser.denoise(x_next, timesteps[i + 1], sigma_next)
            slope_next = (x_next - denoised) / sigma_next
            x_next = x + (slope + slope_next) / 2 * (sigma_next - sigma)
        x = x_next
        x = yield x, denoised


def dpmpp_2m(denoiser: Denoiser, x: Tensor, schedule: Schedule, start: int, noise: Noise) -> Trajectory:
    """DPM-Solver++(2M): Lu et al. 2022, arXiv:2211.01095, algorithm 2."""
    timesteps = schedule.timesteps.to(x.device)
    history = _TwoStep()
    for i in range(start, schedule.steps):
        sigma, sigma_next = schedule.sigmas[i], schedule.sigmas[i + 1]
        level, level_next = Level.from_ratio(sigma), Level.from_ratio(sigma_next)
        denoised = denoiser.predict(x, timesteps[i], level).denoised
        h = (sigma / sigma_next).log()  # the step in log signal-to-noise ratio; infinite for the last
        target = history.extrapolate(denoised, h)
        x = level_next.sigma / level.sigma * x - level_next.alpha * torch.expm1(-h) * target
        x = yield x, denoised


def dpmpp_2m_sde(denoiser: Denoiser, x: Tensor, schedule: Schedule, start: int, noise: Noise) -> Trajectory:
    """SDE-DPM-Solver++(2M), midpoint, eta 1: Lu et al. 2022, arXiv:2211.01095.

    Its noise is drawn in float32 whatever the dtype of the latents, as diffusers does.
    """
    timesteps = schedule.timesteps.to(x.device)
    history = _TwoStep()
    for i in range(start, schedule.steps):
        sigma, sigma_next = schedule.sigmas[i], schedule.sigmas[i + 1]
        level, level_next = Level.from_ratio(sigma), Level.from_ratio(sigma_next)
        denoised = denoiser.predict(x, timesteps[i], level).denoised
        h = (sigma / sigma_next).log()
        target = history.extrapolate(denoised, h)
        replaced = -torch.expm1(-2 * h)  # share of the noise's variance that is drawn anew
        fresh = noise(x.shape, torch.float32).to(x)
        x = level_next.sigma / level.sigma * torch.exp(-h) * x
        x = x + level_next.alpha * replaced * target + level_next.sigma * replaced**0.5 * fresh
        x = yield x, denoised


class _TwoStep:
    """What a two-step solver remembers: the last denoised latents and the step in log SNR it took then."""

    def __init__(self) -> None:
        self.denoised: Tensor | None = None
        self.h = torch.zeros(())

    def extrapolate(self, denoised: Tensor, h: Tensor) -> Tensor:
        """Denoised latents at the middle of the coming step h; as they are for the first and last step."""
        last, h_last = self.denoised, self.h
        self.denoised, self.h = denoised, h
        if last is None or torch.isinf(h):
            return denoised
        return denoised + h / (2 * h_last) * (denoised - last)


class _Grid:
    """Noise levels of the training timesteps, for samplers that step by a fixed stride on them."""

    def __init__(self, schedule: Schedule) -> None:
        config = schedule.config
        self.alphas_cumprod = alphas_cumprod(config)
        self.stride = config.num_train_timesteps // schedule.steps
        self.final = torch.tensor(1.0) if config.set_alpha_to_one else self.alphas_cumprod[0]

    def level(self, timestep: int) -> Level:
        """The level of a timestep; of the end of the run if negative."""
        return Level.from_alpha_cumprod(self.alphas_cumprod[timestep] if timestep >= 0 else self.final)


def ddim(denoiser: Denoiser, x: Tensor, schedule: Schedule, start: int, noise: Noise) -> Trajectory:
    """DDIM with eta 0: Song et al. 2020, arXiv:2010.02502, eq. 12."""
    grid = _Grid(schedule)
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
    grid = _Grid(schedule)
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


def lcm(denoiser: Denoiser, x: Tensor, schedule: Schedule, start: int, noise: Noise) -> Trajectory:
    """Multistep latent consistency sampling: Luo et al. 2023, arXiv:2310.04378, algorithm 3."""
    grid = _Grid(schedule)
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


SAMPLE_FUNCTIONS: dict[str, SampleFn] = {
    "pndm": pndm,
    "ddim": ddim,
    "euler": euler,
    "euler_a": euler_a,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "lcm": lcm,
}
