"""A diffusers scheduler's JSON -> how the model was trained, and how it is sampled by default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gguf_sd.config import Defaults, SchedulerConfig
from gguf_sd.sampling.names import SAMPLERS
from gguf_sd_convert.sources.json_settings import check_fixed, integer, refusal

FIXED: dict[str, tuple[Any, ...]] = {
    "trained_betas": (None,),
    "rescale_betas_zero_snr": (False,),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
}
RAMPS = ("karras", "exponential", "beta")


@dataclass(frozen=True)
class SchedulerClass:
    """Our sampler for one of diffusers' scheduler classes, its steps, and the class's own defaults for the betas that
    the JSON leaves out."""

    sampler: str
    steps: int
    betas: tuple[float, float] = (0.0001, 0.02)
    beta_schedule: str = "linear"


_BETAS = (0.00085, 0.012)
CLASSES = {
    "PNDMScheduler": SchedulerClass("pndm", 50),
    "DDIMScheduler": SchedulerClass("ddim", 50),
    "DDPMScheduler": SchedulerClass("ddpm", 50),
    "EulerDiscreteScheduler": SchedulerClass("euler", 50),
    "EulerAncestralDiscreteScheduler": SchedulerClass("euler_a", 50),
    "HeunDiscreteScheduler": SchedulerClass("heun", 25, _BETAS),
    "LMSDiscreteScheduler": SchedulerClass("lms", 50),
    "KDPM2DiscreteScheduler": SchedulerClass("dpm2", 25, _BETAS),
    "KDPM2AncestralDiscreteScheduler": SchedulerClass("dpm2_a", 25, _BETAS),
    "DPMSolverMultistepScheduler": SchedulerClass("dpmpp_2m", 25),
    "DPMSolverSDEScheduler": SchedulerClass("dpmpp_sde", 25, _BETAS),
    "UniPCMultistepScheduler": SchedulerClass("unipc", 25),
    "LCMScheduler": SchedulerClass("lcm", 4, _BETAS, "scaled_linear"),
    "TCDScheduler": SchedulerClass("tcd", 4, _BETAS, "scaled_linear"),
}
OTHER = "DPMSolverMultistepScheduler"


def scheduler_config(values: dict[str, Any], name: str) -> tuple[SchedulerConfig, Defaults, list[str]]:
    """The noise schedule, the defaults but for the size, and notes on what was not taken over, of a model called
    ``name`` ("sd1", "sdxl"). Raises GgufSdError for settings that no sampler here has."""
    check_fixed(values, FIXED)
    class_name, notes = str(values.get("_class_name")), []
    kind = CLASSES.get(class_name, CLASSES[OTHER])
    if class_name not in CLASSES:
        notes.append(f"the source's scheduler {class_name} is not known; the default sampler is {kind.sampler}")
    config = SchedulerConfig(
        num_train_timesteps=integer(values, "num_train_timesteps", 1000),
        beta_start=_fraction(values, "beta_start", kind.betas[0]),
        beta_end=_fraction(values, "beta_end", kind.betas[1]),
        beta_schedule=values.get("beta_schedule", kind.beta_schedule),
        prediction_type=values.get("prediction_type", "epsilon"),
        timestep_spacing=values.get("timestep_spacing"),
        steps_offset=_offset(values, name),
        set_alpha_to_one=_flag(values, "set_alpha_to_one"),
    )
    return config, _defaults(values, kind, config, name), notes


def _fraction(values: dict[str, Any], key: str, default: float) -> float:
    value = values.get(key, default)
    if not isinstance(value, int | float) or not 0 < value < 1:
        raise refusal(values, key, "a number between 0 and 1")
    return float(value)


def _flag(values: dict[str, Any], key: str) -> bool | None:
    """None where the source says nothing."""
    value = values.get(key)
    if value is not None and type(value) is not bool:
        raise refusal(values, key, "true or false")
    return value


def _offset(values: dict[str, Any], name: str) -> int:
    value = values.get("steps_offset", 0)
    if type(value) is not int or value < 0:
        raise refusal(values, "steps_offset", "0 or a positive integer")
    # diffusers' Stable Diffusion 1.x pipelines correct any other offset, whether or not the file names it.
    return 1 if name == "sd1" else value


def _defaults(values: dict[str, Any], kind: SchedulerClass, config: SchedulerConfig, name: str) -> Defaults:
    sampler, steps = kind.sampler, kind.steps
    guidance = 5.0 if name == "sdxl" else 7.5
    if sampler == "dpmpp_2m" and values.get("algorithm_type") == "sde-dpmsolver++":
        sampler = "dpmpp_2m_sde"
    if sampler in ("lcm", "tcd"):
        guidance = 1.0
    if name == "sdxl" and sampler == "euler_a" and config.timestep_spacing == "trailing":  # SDXL-Turbo
        steps, guidance = 1, 0.0
    taken = [ramp for ramp in RAMPS if ramp in SAMPLERS[sampler].schedules and values.get(f"use_{ramp}_sigmas")]
    schedule = taken[0] if taken else "model"
    return Defaults(sampler=sampler, schedule=schedule, steps=steps, guidance=guidance)
