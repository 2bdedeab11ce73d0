"""Noise schedules and samplers: from noise and a model function to clean latents."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguf_sd.sampling.names import SAMPLERS, SCHEDULES, SamplerInfo, resolve_sampler, resolve_schedule
    from gguf_sd.sampling.noise import Noise, NoiseSource
    from gguf_sd.sampling.samplers import Step, sample
    from gguf_sd.sampling.schedules import Schedule, add_noise, make_schedule

_HOMES = {
    "names": ("SAMPLERS", "SCHEDULES", "SamplerInfo", "resolve_sampler", "resolve_schedule"),
    "noise": ("Noise", "NoiseSource"),
    "samplers": ("Step", "sample"),
    "schedules": ("Schedule", "add_noise", "make_schedule"),
}

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


def __getattr__(name: str) -> Any:
    """Imports torch only with what needs it: names of samplers are known without."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"gguf_sd.sampling.{module}"), name)
    raise AttributeError(f"module 'gguf_sd.sampling' has no attribute {name!r}")
