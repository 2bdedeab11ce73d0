"""What the tests of samplers and schedules compare with: diffusers' schedulers, other programs' formulas, an exact
model."""

from __future__ import annotations

import copy
import math
import sys
from functools import cache
from itertools import pairwise
from types import ModuleType
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

from gguf_sd.config import SchedulerConfig
from gguf_sd.sampling import SAMPLERS
from gguf_sd.sampling.schedules import train_sigmas

SHAPE = (2, 4, 3, 5)
RAMPS = ("karras", "exponential", "beta")
FORMULAS = ("normal", "simple", "sgm_uniform", "ays")
COMBINATIONS = [(sampler, name) for sampler, info in SAMPLERS.items() for name in info.schedules]
IN_DIFFUSERS = [sampler for sampler, info in SAMPLERS.items() if info.scheduler]
FIELDS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
NAMED = ("timestep_spacing", "steps_offset", "set_alpha_to_one")  # that a source may leave to diffusers' class
# What NVIDIA publishes (https://research.nvidia.com/labs/toronto-ai/AlignYourSteps/howto.html), in more digits.
ALIGN_YOUR_STEPS = {
    "sd1": [14.6146412293, 6.4745760956, 3.8636745985, 2.6946151520, 1.8841921177, 1.3943805092, 0.9642583904,
            0.6523686016, 0.3977456272, 0.1515232662, 0.0291671582],
    "sdxl": [14.6146412293, 6.3184485287, 3.7681790315, 2.1811480769, 1.3405244945, 0.8620721141, 0.5550693289,
             0.3798540708, 0.2332364134, 0.1114188177, 0.0291671582],
}  # fmt: skip


class Mixture:
    """The exact model of data drawn from Gaussians: ``means`` [K], a common ``std``, equal weights.

    Called like a UNet; counts its calls. More than one mean makes it nonlinear.
    """

    def __init__(self, config: SchedulerConfig, means: Any = (-1.5, 0.5, 1.0), std: float = 0.3, levels: Any = None):
        self.sigmas = train_sigmas(config).double().numpy()
        self.levels = levels  # of each call, for where a rounded timestep says too little
        self.kind, self.std, self.calls = config.prediction_type, std, 0
        self.means = torch.tensor(means, dtype=torch.float64)

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        assert timestep.ndim == 0
        if self.levels is None:
            ratio = float(np.interp(float(timestep), np.arange(len(self.sigmas)), self.sigmas))
        else:
            ratio = float(self.levels[self.calls])
        self.calls += 1
        alpha = (1 + ratio**2) ** -0.5
        sigma = ratio * alpha
        distance = x.double()[..., None] - alpha * self.means
        variance = (alpha * self.std) ** 2 + sigma**2
        weights = torch.softmax(-(distance**2) / (2 * variance), dim=-1)
        denoised = (weights * (self.means + alpha * self.std**2 / variance * distance)).sum(-1)
        eps = (x.double() - alpha * denoised) / sigma
        out = {"epsilon": eps, "v_prediction": alpha * eps - sigma * denoised, "sample": denoised}
        return out[self.kind].to(x.dtype)


def formula_sigmas(name: str, config: SchedulerConfig, steps: int, architecture: str = "sd1") -> torch.Tensor:
    """The schedules that diffusers has not, as ComfyUI computes them, without the last 0."""
    levels = train_sigmas(config)
    last = len(levels) - 1
    if name == "ays":
        table = np.log(ALIGN_YOUR_STEPS[architecture][::-1])
        places = np.interp(np.linspace(0, 1, steps + 1), np.linspace(0, 1, len(table)), table)
        return torch.from_numpy(np.exp(places)[::-1][:-1].astype(np.float32))
    if name == "simple":
        return torch.stack([levels[-(1 + int(i * (len(levels) / steps)))] for i in range(steps)])
    points = torch.linspace(last, 0, steps + (name == "sgm_uniform"), dtype=torch.float64)[:steps]
    logs = levels.double().log()
    low, high, share = points.floor().long(), points.ceil().long(), points.frac()
    return ((1 - share) * logs[low] + share * logs[high]).exp().float()


def fractional_timesteps(sigmas: torch.Tensor, config: SchedulerConfig) -> torch.Tensor:
    logs = train_sigmas(config).double().log().numpy()
    return torch.from_numpy(np.interp(sigmas.double().log().numpy(), logs, np.arange(len(logs)))).float()


def scheduler_class(name: str) -> Any:
    """A class of diffusers; that of DPM-Solver++ SDE without torchsde, which it only draws noise with."""
    if name != "DPMSolverSDEScheduler":
        return getattr(diffusers, name)
    sys.modules.setdefault("torchsde", ModuleType("torchsde"))
    try:
        from diffusers.schedulers.scheduling_dpmsolver_sde import DPMSolverSDEScheduler
    finally:
        if not hasattr(sys.modules["torchsde"], "__file__"):
            del sys.modules["torchsde"]
    return DPMSolverSDEScheduler


@cache
def _constructed(kind: str, options: tuple[tuple[str, Any], ...]) -> Any:
    """Constructors lay out a thousand steps, which takes some of them a second."""
    return scheduler_class(kind)(**dict(options))


OWN = {
    "pndm": {"skip_prk_steps": True},
    "ddim": {"clip_sample": False},
    "ddpm": {"clip_sample": False},
    "dpmpp_2m_sde": {"algorithm_type": "sde-dpmsolver++"},
}


def oracle(sampler: str, name: str, config: SchedulerConfig, steps: int, architecture: str = "sd1") -> Any:
    """diffusers' scheduler of a sampler and schedule, with its timesteps set."""
    options = {key: getattr(config, key) for key in (*FIELDS, *NAMED) if getattr(config, key) is not None}
    if sampler not in ("pndm", "ddim"):
        options.pop("set_alpha_to_one", None)
    if name in ("leading", "trailing", "linspace"):
        options["timestep_spacing"] = name
    if name in FORMULAS:
        options["timestep_spacing"] = "linspace"
    ramp = {f"use_{name if name in RAMPS else 'exponential'}_sigmas": True} if name in (*RAMPS, *FORMULAS) else {}
    kind = SAMPLERS[sampler].scheduler or "EulerDiscreteScheduler"
    if sampler == "euler_a" and ramp:  # not in diffusers: its ancestral steps on Euler's sigmas
        ramped = oracle("euler", name, config, steps, architecture)
        scheduler = copy.deepcopy(_constructed(kind, tuple(options.items())))
        scheduler.set_timesteps(steps)
        scheduler.timesteps, scheduler.sigmas = ramped.timesteps, ramped.sigmas
        return scheduler
    scheduler = copy.deepcopy(_constructed(kind, tuple({**options, **ramp, **OWN.get(sampler, {})}.items())))
    if name in FORMULAS:
        sigmas = formula_sigmas(name, config, steps, architecture)
        scheduler._convert_to_exponential = lambda *args, **kwargs: sigmas.double().numpy()
    scheduler.set_timesteps(steps)
    if name in FORMULAS and not SAMPLERS[sampler].sigma_space:
        scheduler.timesteps = fractional_timesteps(sigmas, config)
    return scheduler


class Brownian:
    """Stands for torchsde in diffusers' scheduler: a Brownian motion over sigma, from the pictures' generators."""

    def __init__(self, latents: torch.Tensor, generators: Any):
        self.shape, self.dtype, self.generators = latents.shape, latents.dtype, generators
        self.begun: Any = None

    def __call__(self, sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
        fresh = randn_tensor(self.shape, generator=self.generators, dtype=self.dtype)
        if self.begun is None:
            walked = fresh * (sigma - sigma_next) ** 0.5
            self.begun = (sigma_next, walked)
        else:
            middle, before = self.begun
            walked, self.begun = before + fresh * (middle - sigma_next) ** 0.5, None
        return walked / (sigma - sigma_next) ** 0.5


def oracle_loop(scheduler: Any, model: Any, latents: torch.Tensor, generators: Any = None, start: int = 0) -> list[Any]:
    """The denoising loop of diffusers' pipelines: latents after every evaluation."""
    draws = "generator" in scheduler.step.__code__.co_varnames
    if hasattr(scheduler, "noise_sampler"):
        scheduler.noise_sampler = Brownian(latents, generators)
    if isinstance(scheduler, diffusers.LMSDiscreteScheduler) and start:
        # It takes weights for slopes that it has not seen; k-diffusion begins anew, as if the run were a short one.
        scheduler.sigmas, scheduler.timesteps = scheduler.sigmas[start:], scheduler.timesteps[start:]
        start = 0
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start * scheduler.order)
    trajectory = []
    for t in scheduler.timesteps[start * scheduler.order :]:
        output = model(scheduler.scale_model_input(latents, t), t)
        options = {"generator": generators} if draws else {}
        latents = scheduler.step(output, t, latents, **options).prev_sample
        trajectory.append(latents)
    return trajectory


def oracle_noise(seeds: Any, shape: Any = SHAPE, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, list[Any]]:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return randn_tensor(shape, generator=generators, dtype=dtype), generators


def finished_steps(sampler: str, trajectory: list[Any]) -> list[Any]:
    """Of latents after every evaluation, those after every step."""
    if SAMPLERS[sampler].evaluations == 2:
        return [*trajectory[1:-1:2], trajectory[-1]]
    return trajectory[1:] if sampler == "pndm" and len(trajectory) > 1 else trajectory


# k-diffusion's functions, from its formulas: ``denoise(x, sigma)``, ``draw()`` of unit variance; latents of each step.


def down_and_up(sigma: float, sigma_next: float) -> tuple[float, float]:
    """In float32, as it rounds there."""
    begin, end = torch.tensor(sigma), torch.tensor(sigma_next)
    up = min(end, (end**2 * (begin**2 - end**2) / begin**2) ** 0.5)
    return float((end**2 - up**2) ** 0.5), float(up)


def k_dpmpp_2s_ancestral(denoise: Any, x: torch.Tensor, sigmas: list[float], draw: Any) -> list[torch.Tensor]:
    trajectory = []
    for sigma, sigma_next in pairwise(sigmas):
        denoised = denoise(x, sigma)
        down, up = down_and_up(sigma, sigma_next)
        if down == 0:
            x = x + (x - denoised) / sigma * (down - sigma)
        else:
            t, t_next = -math.log(sigma), -math.log(down)
            h = t_next - t
            s = t + h / 2
            halfway = math.exp(-s) / math.exp(-t) * x - math.expm1(-h / 2) * denoised
            x = math.exp(-t_next) / math.exp(-t) * x - math.expm1(-h) * denoise(halfway, math.exp(-s))
        if sigma_next > 0:
            x = x + draw() * up
        trajectory.append(x)
    return trajectory


def k_dpmpp_3m_sde(denoise: Any, x: torch.Tensor, sigmas: list[float], draw: Any) -> list[torch.Tensor]:
    trajectory: list[Any] = []
    seen: list[Any] = []  # (denoised, h) of the steps before, newest first
    for sigma, sigma_next in pairwise(sigmas):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            trajectory.append(denoised)
            break
        h = math.log(sigma) - math.log(sigma_next)
        h_eta = 2 * h
        x = math.exp(-h_eta) * x - math.expm1(-h_eta) * denoised
        phi_2 = math.expm1(-h_eta) / h_eta + 1
        phi_3 = phi_2 / h_eta - 0.5
        if len(seen) == 1:
            ((denoised_1, h_1),) = seen
            x = x + phi_2 * (denoised - denoised_1) / (h_1 / h)
        elif len(seen) == 2:
            (denoised_1, h_1), (denoised_2, h_2) = seen
            r0, r1 = h_1 / h, h_2 / h
            d1_0, d1_1 = (denoised - denoised_1) / r0, (denoised_1 - denoised_2) / r1
            d1 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1)
            x = x + phi_2 * d1 - phi_3 * (d1_0 - d1_1) / (r0 + r1)
        x = x + draw() * sigma_next * math.sqrt(-math.expm1(-2 * h))
        seen = [(denoised, h), *seen[:1]]
        trajectory.append(x)
    return trajectory


K_DIFFUSION = {"dpmpp_2s_a": k_dpmpp_2s_ancestral, "dpmpp_3m_sde": k_dpmpp_3m_sde}
