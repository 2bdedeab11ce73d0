"""The samplers and schedules there are, and the names other programs call them by."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from gguf_sd.errors import GgufSdError

SPACINGS = ("leading", "trailing", "linspace")
SCHEDULES = ("model", *SPACINGS, "karras", "exponential")


@dataclass(frozen=True)
class SamplerInfo:
    """What can be known of a sampler without running it.

    ``sigma_space`` samplers hold latents as x0 + sigma * eps (variance exploding); the others hold
    alpha * x0 + sigma * eps with alpha^2 + sigma^2 = 1, which is what the UNet sees.
    """

    label: str  # as AUTOMATIC1111 shows it
    scheduler: str  # the diffusers class whose results it equals
    sigma_space: bool = False
    stochastic: bool = False  # draws noise while it runs
    schedules: tuple[str, ...] = SCHEDULES
    aliases: tuple[str, ...] = ()


SAMPLERS: dict[str, SamplerInfo] = {
    "pndm": SamplerInfo("PLMS", "PNDMScheduler", schedules=("model", *SPACINGS)),
    "ddim": SamplerInfo("DDIM", "DDIMScheduler", schedules=("model", *SPACINGS)),
    "euler": SamplerInfo("Euler", "EulerDiscreteScheduler", sigma_space=True),
    "euler_a": SamplerInfo(
        "Euler a",
        "EulerAncestralDiscreteScheduler",
        sigma_space=True,
        stochastic=True,
        aliases=("euler_ancestral",),
    ),
    "heun": SamplerInfo("Heun", "HeunDiscreteScheduler", sigma_space=True),
    "dpmpp_2m": SamplerInfo("DPM++ 2M", "DPMSolverMultistepScheduler"),
    "dpmpp_2m_sde": SamplerInfo("DPM++ 2M SDE", "DPMSolverMultistepScheduler", stochastic=True),
    "lcm": SamplerInfo("LCM", "LCMScheduler", stochastic=True, schedules=("model",)),
}

# Other programs' schedules that differ from ours in some timesteps: the error names ours, nothing is swapped.
_NEAREST_SCHEDULE = {
    "normal": "linspace",
    "uniform": "linspace",
    "simple": "trailing",
    "sgm_uniform": "trailing",
    "ddim_uniform": "leading",
    "automatic": "model",
}


def _normal(name: str) -> str:
    """'DPM++ 2M  SDE' -> 'dpmpp_2m_sde'."""
    return re.sub(r"[\s_-]+", "_", name.strip().lower()).replace("++", "pp")


def _sampler_names() -> dict[str, str]:
    """Every accepted name in normal form -> our name."""
    names: dict[str, str] = {}
    for sampler, info in SAMPLERS.items():
        for name in (sampler, info.label, info.scheduler, *info.aliases):
            names.setdefault(_normal(name), sampler)  # a class shared by two samplers means the first
    return names


_NAMES = _sampler_names()


def _unknown(kind: str, name: str, known: Iterable[str], choices: Iterable[str]) -> GgufSdError:
    near = list(dict.fromkeys(difflib.get_close_matches(_normal(name), known, n=3, cutoff=0.6)))
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return GgufSdError(f"unknown {kind} {name!r}; {hint}choose from {', '.join(choices)}")


def resolve_sampler(name: str) -> tuple[str, str | None]:
    """Our name for a sampler, and the schedule the given name implies, if any.

    Case, spaces, hyphens and underscores do not matter. Known are our own names, AUTOMATIC1111's labels
    (``"DPM++ 2M Karras"`` -> ``("dpmpp_2m", "karras")``), ComfyUI's names and diffusers' class names.
    Raises GgufSdError for an unknown name, or a schedule suffix that sampler does not take.
    """
    wanted = _normal(name)
    if wanted in _NAMES:
        return _NAMES[wanted], None
    base, _, suffix = wanted.rpartition("_")
    if suffix in ("karras", "exponential") and base in _NAMES:
        sampler = _NAMES[base]
        return sampler, resolve_schedule(suffix, sampler)
    raise _unknown("sampler", name, _NAMES, SAMPLERS)


def resolve_schedule(name: str, sampler: str) -> str:
    """Our name for a schedule, if ``sampler`` (one of SAMPLERS) takes it; raises GgufSdError otherwise."""
    wanted = _normal(name)
    choices = SAMPLERS[sampler].schedules
    if wanted in choices:
        return wanted
    if wanted in SCHEDULES:
        raise GgufSdError(f"sampler {sampler!r} has no schedule {wanted!r}; with it, choose from {', '.join(choices)}")
    if wanted in _NEAREST_SCHEDULE:
        raise GgufSdError(
            f"schedule {name!r} of other programs is not here; the nearest is {_NEAREST_SCHEDULE[wanted]!r}; "
            f"choose from {', '.join(choices)}"
        )
    raise _unknown("schedule", name, choices, choices)
