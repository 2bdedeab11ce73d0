"""At which timesteps and noise levels a sampler visits the model.

Every number here equals diffusers' to the bit; that is why dtypes change between float32 and float64 as they
do. ``sigma`` is k-diffusion's: the noise-to-signal ratio sqrt((1 - alphas_cumprod) / alphas_cumprod).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from gguf_sd.config import SchedulerConfig
from gguf_sd.errors import GgufSdError
from gguf_sd.sampling.denoiser import Level
from gguf_sd.sampling.names import SAMPLERS, SPACINGS, resolve_sampler, resolve_schedule

KARRAS_RHO = 7.0  # Karras et al. 2022, arXiv:2206.00364, appendix D.1
LCM_TRAIN_STEPS = 50  # teacher steps that latent consistency models are distilled from, arXiv:2310.04378


def betas(config: SchedulerConfig) -> Tensor:
    """Variance added at each training timestep: float32 [num_train_timesteps].

    Raises GgufSdError for an unknown beta schedule.
    """
    train = config.num_train_timesteps
    if config.beta_schedule == "linear":
        return torch.linspace(config.beta_start, config.beta_end, train, dtype=torch.float32)
    if config.beta_schedule == "scaled_linear":
        return torch.linspace(config.beta_start**0.5, config.beta_end**0.5, train, dtype=torch.float32) ** 2
    if config.beta_schedule == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17
        alpha_bar = [math.cos((i / train + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(train + 1)]
        steps = [min(1 - after / before, 0.999) for before, after in pairwise(alpha_bar)]
        return torch.tensor(steps, dtype=torch.float32)
    raise GgufSdError(
        f"unknown beta schedule {config.beta_schedule!r}; choose from linear, scaled_linear, squaredcos_cap_v2"
    )


def alphas_cumprod(config: SchedulerConfig) -> Tensor:
    """Share of the signal's variance left at each training timestep: float32 [num_train_timesteps]."""
    return torch.cumprod(1.0 - betas(config), dim=0)


def train_sigmas(config: SchedulerConfig) -> Tensor:
    """sigma at each training timestep, rising: float32 [num_train_timesteps]."""
    alphas = alphas_cumprod(config)
    return ((1 - alphas) / alphas) ** 0.5


@dataclass(frozen=True, eq=False)
class Schedule:
    """One run of a sampler, laid out.

    ``timesteps`` has an entry for each evaluation of the model, in order: int64, or float32 for samplers in
    sigma space. ``sigmas`` is float32 and one longer: the noise level of each evaluation, then that of
    the end. ``init_noise_sigma`` scales unit-variance noise to the latents that text-to-image starts from.
    """

    sampler: str
    name: str
    steps: int
    config: SchedulerConfig
    timesteps: Tensor
    sigmas: Tensor
    init_noise_sigma: float

    def first_evaluation(self, start_step: int) -> int:
        """Index into timesteps and sigmas of the first evaluation of a step.

        Raises GgufSdError if there is no such step.
        """
        if not 0 <= start_step < self.steps:
            raise GgufSdError(f"cannot start at step {start_step} of {self.steps}; choose 0 to {self.steps - 1}")
        return start_step * (2 if self.sampler == "heun" else 1)

    def evaluations(self, start_step: int = 0) -> int:
        """How often the model is run: 51 for 50 steps of pndm, 2n - 1 for n of heun, else n."""
        return len(self.timesteps) - self.first_evaluation(start_step)


def make_schedule(config: SchedulerConfig, sampler: str, name: str = "model", steps: int = 50) -> Schedule:
    """The schedule of ``steps`` steps of a sampler, as the sampler's diffusers class lays it out.

    ``sampler`` may be any name :func:`resolve_sampler` knows. ``name``: ``model`` spaces timesteps as the
    model's config says, ``leading``, ``trailing`` and ``linspace`` (arXiv:2305.08891, table 2) override that,
    ``karras`` (arXiv:2206.00364, eq. 5) and ``exponential`` space sigmas. Where the sampler's name implies a
    schedule ("DPM++ 2M Karras"), that takes the place of ``model``.

    Raises GgufSdError for names that are unknown or do not go together, and for steps out of range.
    """
    sampler, implied = resolve_sampler(sampler)
    name = resolve_schedule(name, sampler)
    name = implied if implied and name == "model" else name
    spacing = name if name in SPACINGS else config.timestep_spacing
    if spacing not in SPACINGS:
        raise GgufSdError(f"unknown timestep spacing {spacing!r}; choose from {', '.join(SPACINGS)}")
    _check_steps(config, sampler, steps)

    init_noise_sigma = 1.0
    if sampler in ("pndm", "ddim", "lcm"):
        timesteps, sigmas = _discrete(config, sampler, spacing, steps)
    elif sampler in ("dpmpp_2m", "dpmpp_2m_sde"):
        timesteps, sigmas = _multistep(config, name, spacing, steps)
    else:
        timesteps, sigmas = _continuous(config, name, spacing, steps)
        # "leading" starts below full noise, where latents still hold signal: count its variance as 1.
        sigma_max = sigmas.max()
        init_noise_sigma = float((sigma_max**2 + 1) ** 0.5 if spacing == "leading" else sigma_max)
        if sampler == "heun":  # each step but the last looks ahead, at the level the next one starts from
            timesteps = torch.cat([timesteps[:1], timesteps[1:].repeat_interleave(2)])
            sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    _check_levels(config, sampler, name, steps, timesteps, sigmas)
    return Schedule(sampler, name, steps, config, timesteps, sigmas, init_noise_sigma)


def add_noise(latents: Tensor, noise: Tensor, schedule: Schedule, step: int = 0) -> Tensor:
    """Noised latents [B, C, H, W] as the sampler holds them when ``step`` begins; keeps their dtype.

    ``noise`` is of unit variance. Raises GgufSdError if the schedule has no such step.
    """
    sigma = schedule.sigmas[schedule.first_evaluation(step)]
    dtype = torch.promote_types(latents.dtype, torch.float32)
    clean, eps = latents.to(dtype), noise.to(dtype)
    if SAMPLERS[schedule.sampler].sigma_space:
        return (clean + sigma * eps).to(latents.dtype)
    level = Level.from_ratio(sigma)
    return (level.alpha * clean + level.sigma * eps).to(latents.dtype)


def _check_steps(config: SchedulerConfig, sampler: str, steps: int) -> None:
    most = LCM_TRAIN_STEPS if sampler == "lcm" else config.num_train_timesteps
    if not 1 <= steps <= most:
        raise GgufSdError(f"cannot take {steps} steps with sampler {sampler!r}; choose 1 to {most}")


def _check_levels(
    config: SchedulerConfig, sampler: str, name: str, steps: int, timesteps: Tensor, sigmas: Tensor
) -> None:
    """Near num_train_timesteps steps, spacings run off the end or visit a level twice (division by 0)."""
    repeats = sampler.startswith("dpmpp") and bool((sigmas.diff() >= 0).any())
    if repeats or timesteps.max() >= config.num_train_timesteps or timesteps.min() < 0:
        raise GgufSdError(
            f"{steps} steps are too many for sampler {sampler!r} with schedule {name!r} and a model of "
            f"{config.num_train_timesteps} timesteps; take fewer steps"
        )


def _spaced(config: SchedulerConfig, spacing: str, points: int) -> np.ndarray:
    """``points`` falling timesteps, not yet rounded: Lin et al. 2023, arXiv:2305.08891, table 2."""
    train = config.num_train_timesteps
    if spacing == "linspace":
        return np.linspace(0, train - 1, points)[::-1]
    if spacing == "leading":
        return np.arange(points)[::-1] * (train // points) + config.steps_offset
    return np.arange(train, 0, -train / points)[:points].round() - 1  # rounding can leave one too many, at -1


def _discrete(config: SchedulerConfig, sampler: str, spacing: str, steps: int) -> tuple[Tensor, Tensor]:
    """Timesteps on the training grid: DDIM, PLMS (its second one twice) and latent consistency."""
    if sampler == "lcm":
        teacher = np.arange(LCM_TRAIN_STEPS, 0, -1) * (config.num_train_timesteps // LCM_TRAIN_STEPS) - 1
        picks = np.linspace(0, LCM_TRAIN_STEPS, steps, endpoint=False)
        timesteps = torch.from_numpy(teacher[np.floor(picks).astype(np.int64)])
    else:
        timesteps = torch.from_numpy(_spaced(config, spacing, steps).round().astype(np.int64))
        if sampler == "pndm":
            timesteps = torch.cat([timesteps[:1], timesteps[1:2], timesteps[1:]])
    levels = train_sigmas(config)
    last = torch.zeros(1) if config.set_alpha_to_one or sampler == "lcm" else levels[:1]
    index = timesteps.clamp(0, config.num_train_timesteps - 1)  # out of range is refused later
    return timesteps, torch.cat([levels[index], last])


def _continuous(config: SchedulerConfig, name: str, spacing: str, steps: int) -> tuple[Tensor, Tensor]:
    """Fractional timesteps and their sigmas: the Euler family."""
    levels = train_sigmas(config).numpy()
    timesteps = _spaced(config, spacing, steps).astype(np.float32)
    sigmas = np.interp(timesteps, np.arange(len(levels)), levels)
    if name in ("karras", "exponential"):
        sigmas = _sigma_ramp(name, float(sigmas[0]), float(sigmas[-1]), steps)
        timesteps = _timesteps_of(sigmas, levels).astype(np.float32)
    return torch.from_numpy(timesteps), _ending_at_zero(sigmas)


def _multistep(config: SchedulerConfig, name: str, spacing: str, steps: int) -> tuple[Tensor, Tensor]:
    """Integer timesteps of the DPM-Solver family, which leaves the last point of a spacing to sigma 0."""
    levels = train_sigmas(config).numpy()
    if name in ("karras", "exponential"):
        sigmas = _sigma_ramp(name, float(levels[-1]), float(levels[0]), steps)
        timesteps = _timesteps_of(sigmas, levels)
        if name == "karras" and config.beta_schedule != "squaredcos_cap_v2":
            timesteps = timesteps.round()  # the others are cut off below
    else:
        points = steps if spacing == "trailing" else steps + 1
        timesteps = _spaced(config, spacing, points)[:steps].round()
        sigmas = np.interp(timesteps, np.arange(len(levels)), levels)
    return torch.from_numpy(timesteps.astype(np.int64)), _ending_at_zero(sigmas)


def _ending_at_zero(sigmas: np.ndarray) -> Tensor:
    return torch.from_numpy(np.append(sigmas, 0.0).astype(np.float32))


def _sigma_ramp(name: str, sigma_max: float, sigma_min: float, steps: int) -> np.ndarray:
    """Falling sigmas, even in sigma^(1/rho) (karras) or in log sigma (exponential)."""
    if name == "exponential":
        return np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), steps))
    start, end = sigma_max ** (1 / KARRAS_RHO), sigma_min ** (1 / KARRAS_RHO)
    return (start + np.linspace(0, 1, steps) * (end - start)) ** KARRAS_RHO


def _timesteps_of(sigmas: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Fractional timesteps of sigmas, interpolated in log sigma between the training timesteps."""
    return np.interp(np.log(sigmas), np.log(levels), np.arange(len(levels)))
