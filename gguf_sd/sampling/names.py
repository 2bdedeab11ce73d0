"""The samplers and schedules there are, and the names other programs call them by."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from gguf_sd.errors import GgufSdError
from gguf_sd.field_checks import shown

SPACINGS = ("leading", "trailing", "linspace")
GRID_SCHEDULES = ("model", *SPACINGS)  # of samplers that step on the training timesteps
RAMPS = ("karras", "exponential", "beta")
SCHEDULES = (*GRID_SCHEDULES, *RAMPS, "normal", "simple", "sgm_uniform", "ays")


@dataclass(frozen=True)
class SamplerInfo:
    """What can be known of a sampler without running it.

    ``sigma_space`` samplers hold latents as x0 + sigma * eps (variance exploding); the others hold
    alpha * x0 + sigma * eps with alpha^2 + sigma^2 = 1, which is what the UNet sees.
    """

    label: str  # as AUTOMATIC1111 shows it
    scheduler: str | None  # the diffusers class whose results it equals; None: k-diffusion's function is followed
    sigma_space: bool = False
    stochastic: bool = False  # draws noise while it runs
    evaluations: int = 1  # of the model a step; where 2, the last step does with 1
    spacing: str = "linspace"  # of timesteps where neither the model nor the user names one, as that class has it
    ends_clean: bool = False  # the last step goes to no noise where the model does not say where to
    schedules: tuple[str, ...] = SCHEDULES
    schedule: str = "model"  # where the user names the sampler and no schedule
    aliases: tuple[str, ...] = ()


def _sigma_space(label: str, scheduler: str | None, *aliases: str, noise: bool = False, order: int = 1) -> SamplerInfo:
    return SamplerInfo(label, scheduler, sigma_space=True, stochastic=noise, evaluations=order, aliases=aliases)


SAMPLERS: dict[str, SamplerInfo] = {
    "pndm": SamplerInfo("PLMS", "PNDMScheduler", spacing="leading", schedules=GRID_SCHEDULES),
    "ddim": SamplerInfo("DDIM", "DDIMScheduler", spacing="leading", ends_clean=True, schedules=GRID_SCHEDULES),
    "ddpm": SamplerInfo("DDPM", "DDPMScheduler", stochastic=True, spacing="leading", schedules=GRID_SCHEDULES),
    "euler": _sigma_space("Euler", "EulerDiscreteScheduler"),
    "euler_a": _sigma_space("Euler a", "EulerAncestralDiscreteScheduler", "euler_ancestral", noise=True),
    "heun": _sigma_space("Heun", "HeunDiscreteScheduler", order=2),
    "lms": _sigma_space("LMS", "LMSDiscreteScheduler"),
    "dpm2": _sigma_space("DPM2", "KDPM2DiscreteScheduler", "dpm_2", order=2),
    "dpm2_a": _sigma_space(
        "DPM2 a", "KDPM2AncestralDiscreteScheduler", "dpm_2_a", "dpm_2_ancestral", "dpm2_ancestral", noise=True, order=2
    ),
    "dpmpp_2m": SamplerInfo("DPM++ 2M", "DPMSolverMultistepScheduler"),
    "dpmpp_2m_sde": SamplerInfo(
        "DPM++ 2M SDE", "DPMSolverMultistepScheduler", stochastic=True, aliases=("dpmpp_2m_sde_gpu",)
    ),
    # Steps that are even in time end in one from sigma 0.23 to 0.03, over which the third order overshoots;
    # AUTOMATIC1111 too has exponential ones by default.
    "dpmpp_3m_sde": replace(_sigma_space("DPM++ 3M SDE", None, "dpmpp_3m_sde_gpu", noise=True), schedule="exponential"),
    "dpmpp_sde": _sigma_space("DPM++ SDE", "DPMSolverSDEScheduler", "dpmpp_sde_gpu", noise=True, order=2),
    "dpmpp_2s_a": _sigma_space("DPM++ 2S a", None, "dpmpp_2s_ancestral", noise=True, order=2),
    "unipc": SamplerInfo("UniPC", "UniPCMultistepScheduler", aliases=("uni_pc", "uni_pc_bh2")),
    "lcm": SamplerInfo("LCM", "LCMScheduler", stochastic=True, spacing="leading", schedules=("model",)),
    "tcd": SamplerInfo("TCD", "TCDScheduler", stochastic=True, spacing="leading", schedules=("model",)),
}

# Other programs' names of schedules that visit the same noise levels.
_SCHEDULE_ALIASES = {
    "automatic": "model",
    "default": "model",
    "discrete": "model",  # stable-diffusion.cpp's
    "uniform": "normal",  # AUTOMATIC1111's, k-diffusion's get_sigmas
    "ddim_uniform": "leading",
    "ddim": "leading",  # AUTOMATIC1111's label of ddim_uniform
    "polyexponential": "exponential",  # with rho 1, the default
    "sgmuniform": "sgm_uniform",
    "align_your_steps": "ays",
}


def _normal(name: str) -> str:
    """'DPM++ 2M  SDE' -> 'dpmpp_2m_sde', and so for 'dpm++2m_sde' and 'k_dpmpp_2m_sde'."""
    plain = re.sub(r"[\s_-]+", "_", name.strip().lower()).replace("++", "pp")
    return re.sub(r"^dpmpp(?=\d)", "dpmpp_", plain.removeprefix("k_"))


def _sampler_names() -> dict[str, str]:
    """Every accepted name in normal form -> our name."""
    names: dict[str, str] = {}
    for sampler, info in SAMPLERS.items():
        for name in (sampler, info.label, info.scheduler or sampler, *info.aliases):
            names.setdefault(_normal(name), sampler)  # a class shared by two samplers means the first
    return names


_NAMES = _sampler_names()
_SCHEDULE_NAMES = {name: name for name in SCHEDULES} | _SCHEDULE_ALIASES


def _unknown(kind: str, name: str, known: Iterable[str], choices: Iterable[str]) -> GgufSdError:
    near = list(dict.fromkeys(difflib.get_close_matches(_normal(name), known, n=3, cutoff=0.6)))
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return GgufSdError(f"unknown {kind} {shown(name)}; {hint}choose from {', '.join(choices)}")


def resolve_sampler(name: str) -> tuple[str, str | None]:
    """Our name for a sampler, and the schedule the given name implies, if any.

    Case, spaces, hyphens and underscores do not matter. Known are our own names, AUTOMATIC1111's labels
    (``"DPM++ 2M Karras"`` -> ``("dpmpp_2m", "karras")``), the names of ComfyUI and stable-diffusion.cpp, and diffusers'
    class names. Raises GgufSdError for an unknown name, or a schedule suffix that sampler does not take.
    """
    wanted = _normal(name)
    if wanted in _NAMES:
        return _NAMES[wanted], None
    for schedule in sorted(_SCHEDULE_NAMES, key=len, reverse=True):
        base = wanted.removesuffix("_" + schedule)
        if base != wanted and base in _NAMES:
            sampler = _NAMES[base]
            return sampler, resolve_schedule(schedule, sampler)
    raise _unknown("sampler", name, _NAMES, SAMPLERS)


def resolve_schedule(name: str, sampler: str) -> str:
    """Our name for a schedule, if ``sampler`` (one of SAMPLERS) takes it; raises GgufSdError otherwise."""
    choices = SAMPLERS[sampler].schedules
    wanted = _SCHEDULE_NAMES.get(_normal(name))
    if wanted is None:
        known = [other for other, ours in _SCHEDULE_NAMES.items() if ours in choices]
        raise _unknown("schedule", name, known, choices)
    if wanted not in choices:
        called = shown(wanted) if wanted == _normal(name) else f"{shown(wanted)} ({shown(name)[1:-1]})"
        raise GgufSdError(f"sampler {sampler!r} has no schedule {called}; with it, choose from {', '.join(choices)}")
    return wanted
