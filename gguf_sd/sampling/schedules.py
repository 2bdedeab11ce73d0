"""At which timesteps and noise levels a sampler visits the model.

Every number here equals diffusers' to the bit, where diffusers has it (but beta's and midpoints, to rounding); that is
why dtypes change between float32 and float64 as they do. ``sigma`` is k-diffusion's: the noise-to-signal ratio
sqrt((1 - alphas_cumprod) / alphas_cumprod).
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
from gguf_sd.sampling import spacings
from gguf_sd.sampling.denoiser import Level
from gguf_sd.sampling.names import GRID_SCHEDULES, RAMPS, SAMPLERS, SPACINGS, resolve_sampler, resolve_schedule

TEACHER_STEPS = 50  # that latent and trajectory consistency models are distilled from, arXiv:2310.04378
DISTILLED = ("lcm", "tcd")
ON_THE_GRID = ("pndm", "ddim", "ddpm", *DISTILLED)  # samplers that step on the training timesteps


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

    ``timesteps`` has an entry for each evaluation of the model, in order: int64 on the training timesteps, float32
    between them. ``sigmas`` is float32 and one longer: the noise level of each evaluation, then that of
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
        return start_step * SAMPLERS[self.sampler].evaluations

    def evaluations(self, start_step: int = 0) -> int:
        """How often the model is run: n + 1 for n steps of pndm, 2n - 1 where a step takes two, else n."""
        return len(self.timesteps) - self.first_evaluation(start_step)

    def evaluation_levels(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """sigma at the start of a step that takes two evaluations, at the second one, and at its end; the last step
        has one, so that second and end are both the end of the run."""
        first, last = 2 * step, len(self.sigmas) - 1
        return self.sigmas[first], self.sigmas[min(first + 1, last)], self.sigmas[min(first + 2, last)]


def make_schedule(
    config: SchedulerConfig, sampler: str, name: str = "model", steps: int = 50, architecture: str = "sd1"
) -> Schedule:
    """The schedule of ``steps`` steps of a sampler, as the sampler's diffusers class lays it out.

    ``sampler`` may be any name :func:`resolve_sampler` knows. ``name``: ``model`` spaces timesteps as the
    model's config says, or where it says nothing as the sampler's class does; ``leading``, ``trailing`` and
    ``linspace`` (arXiv:2305.08891, table 2) override that; ``karras`` (arXiv:2206.00364, eq. 5), ``exponential`` and
    ``beta`` (arXiv:2407.12173) space sigmas; ``normal``, ``simple`` and ``sgm_uniform`` are ComfyUI's; ``ays``
    (arXiv:2404.14507) is a table that goes by ``architecture``, the model's: sd1 or sdxl. Where the sampler's name
    implies a schedule ("DPM++ 2M Karras"), that takes the place of ``model``.

    Raises GgufSdError for names that are unknown or do not go together, and for steps out of range.
    """
    sampler, implied = resolve_sampler(sampler)
    name = resolve_schedule(name, sampler)
    name = implied if implied and name == "model" else name
    spacing = name if name in SPACINGS else config.timestep_spacing or SAMPLERS[sampler].spacing
    if spacing not in SPACINGS:
        raise GgufSdError(f"unknown timestep spacing {spacing!r}; choose from {', '.join(SPACINGS)}")
    _check_steps(config, sampler, steps)

    init_noise_sigma = 1.0
    if sampler in ON_THE_GRID:
        timesteps, sigmas = _discrete(config, sampler, spacing, steps)
    else:
        timesteps, sigmas = _free(config, sampler, name, spacing, steps, architecture)
    if SAMPLERS[sampler].sigma_space:
        # "leading" starts below full noise, where latents still hold signal: count its variance as 1.
        spaced, sigma_max = name in (*GRID_SCHEDULES, *RAMPS), sigmas.max()
        init_noise_sigma = float((sigma_max**2 + 1) ** 0.5 if spaced and spacing == "leading" else sigma_max)
    _check_levels(config, sampler, name, steps, timesteps, sigmas)
    if SAMPLERS[sampler].evaluations == 2:
        timesteps, sigmas = _with_second_evaluations(config, sampler, timesteps, sigmas)
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
    most = TEACHER_STEPS if sampler in DISTILLED else config.num_train_timesteps
    if not 1 <= steps <= most:
        raise GgufSdError(f"cannot take {steps} steps with sampler {sampler!r}; choose 1 to {most}")


def _check_levels(
    config: SchedulerConfig, sampler: str, name: str, steps: int, timesteps: Tensor, sigmas: Tensor
) -> None:
    """Near num_train_timesteps steps, spacings run off the end or visit a level twice (division by 0)."""
    divides = sampler.startswith("dpmpp") or sampler in ("unipc", "lms")
    repeats = divides and bool((sigmas.diff() >= 0).any())
    if repeats or timesteps.max() >= config.num_train_timesteps or timesteps.min() < 0:
        raise GgufSdError(
            f"{steps} steps are too many for sampler {sampler!r} with schedule {name!r} and a model of "
            f"{config.num_train_timesteps} timesteps; take fewer steps"
        )


def _discrete(config: SchedulerConfig, sampler: str, spacing: str, steps: int) -> tuple[Tensor, Tensor]:
    """Timesteps on the training grid: DDIM, DDPM, PLMS (its second one twice) and consistency models."""
    if sampler in DISTILLED:
        teacher = np.arange(TEACHER_STEPS, 0, -1) * (config.num_train_timesteps // TEACHER_STEPS) - 1
        picks = np.linspace(0, TEACHER_STEPS, steps, endpoint=False)
        timesteps = torch.from_numpy(teacher[np.floor(picks).astype(np.int64)])
    else:
        points = spacings.spaced(spacing, config.num_train_timesteps, config.steps_offset, steps)
        timesteps = torch.from_numpy(points.round().astype(np.int64))
        if sampler == "pndm":
            timesteps = torch.cat([timesteps[:1], timesteps[1:2], timesteps[1:]])
    levels = train_sigmas(config)
    index = timesteps.clamp(0, config.num_train_timesteps - 1)  # out of range is refused later
    clean = sampler in ("lcm", "ddpm") or (sampler != "tcd" and ends_clean(config, sampler))
    return timesteps, torch.cat([levels[index], torch.zeros(1) if clean else levels[:1]])


def ends_clean(config: SchedulerConfig, sampler: str) -> bool:
    """Whether DDIM and PLMS end at no noise at all, and not at the level of timestep 0."""
    return SAMPLERS[sampler].ends_clean if config.set_alpha_to_one is None else config.set_alpha_to_one


def _free(
    config: SchedulerConfig, sampler: str, name: str, spacing: str, steps: int, architecture: str
) -> tuple[Tensor, Tensor]:
    """Timesteps of each step, between those of training too, and sigmas down to 0."""
    levels = train_sigmas(config).numpy()
    if name in (*GRID_SCHEDULES, *RAMPS):
        lay_out = _continuous if SAMPLERS[sampler].sigma_space else _multistep
        timesteps, sigmas = lay_out(config, sampler, name, spacing, steps)
    else:
        timesteps, sigmas = spacings.named(name, levels.astype(np.float64), steps, architecture)
        timesteps = timesteps.astype(np.float32)
    return torch.from_numpy(timesteps), torch.from_numpy(np.append(sigmas, 0.0).astype(np.float32))


def _continuous(
    config: SchedulerConfig, sampler: str, name: str, spacing: str, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Fractional timesteps and their sigmas: the samplers in sigma space."""
    levels, train = train_sigmas(config).numpy(), config.num_train_timesteps
    timesteps = spacings.spaced(spacing, train, config.steps_offset, steps).astype(np.float32)
    sigmas = np.interp(timesteps, np.arange(train), levels)
    if name in RAMPS:
        sigmas = spacings.ramp(name, float(sigmas[0]), float(sigmas[-1]), steps)
        timesteps = spacings.timesteps_of(sigmas, levels).astype(np.float32)
        if name == "karras" and sampler in ("dpm2", "dpm2_a"):
            timesteps = timesteps.round()
    return timesteps, sigmas


def _multistep(
    config: SchedulerConfig, sampler: str, name: str, spacing: str, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Integer timesteps of the DPM-Solver family, which leaves the last point of a spacing to sigma 0."""
    levels, train = train_sigmas(config).numpy(), config.num_train_timesteps
    if name in RAMPS:
        sigmas = spacings.ramp(name, float(levels[-1]), float(levels[0]), steps)
        timesteps = spacings.timesteps_of(sigmas, levels)
        if name == "karras" and (sampler == "unipc" or config.beta_schedule != "squaredcos_cap_v2"):
            timesteps = timesteps.round()  # the others are cut off below
    else:
        points = steps if spacing == "trailing" else steps + 1
        timesteps = spacings.spaced(spacing, train, config.steps_offset, points)[:steps].round()
        sigmas = np.interp(timesteps, np.arange(train), levels)
    return timesteps.astype(np.int64), sigmas


def _with_second_evaluations(
    config: SchedulerConfig, sampler: str, timesteps: Tensor, sigmas: Tensor
) -> tuple[Tensor, Tensor]:
    """After each step's evaluation but the last one's another: at the level of the next step (heun), or halfway to it
    or, of ancestral samplers, to what they step down to."""
    starts, following = sigmas[:-2], sigmas[1:-1]
    if sampler == "heun":
        second, halfway = following, timesteps[1:]
    else:
        down = sampler in ("dpm2_a", "dpmpp_2s_a")
        second = spacings.log_midpoint(starts, spacings.ancestral_step(starts, following)[0] if down else following)
        found = spacings.timesteps_of(second.numpy(), train_sigmas(config).numpy())
        halfway = torch.from_numpy(found.astype(np.float32))
    timesteps = torch.cat([torch.stack([timesteps[:-1], halfway], dim=1).flatten(), timesteps[-1:]])
    return timesteps, torch.cat([torch.stack([starts, second], dim=1).flatten(), sigmas[-2:]])
