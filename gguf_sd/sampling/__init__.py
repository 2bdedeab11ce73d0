"""Noise schedules and samplers: from noise and a model function to clean latents."""

from gguf_sd.sampling.names import SAMPLERS, SCHEDULES, SamplerInfo, resolve_sampler, resolve_schedule
from gguf_sd.sampling.noise import Noise, NoiseSource
from gguf_sd.sampling.samplers import Step, sample
from gguf_sd.sampling.schedules import Schedule, add_noise, make_schedule

__all__ = [
    "SAMPLERS",
    "SCHEDULES",
    "Noise",
    "NoiseSource",
    "SamplerInfo",
    "Schedule",
    "Step",
    "add_noise",
    "make_schedule",
    "resolve_sampler",
    "resolve_schedule",
    "sample",
]
