"""The built-in demo models: small, trained here, one with the full anatomy of Stable Diffusion 1.x, one with that of
SDXL-Turbo."""

from __future__ import annotations

from pathlib import Path


def model_folder() -> Path:
    """The diffusers folder of the first demo model, which ships with the package."""
    return Path(__file__).parent / "model"


def turbo_folder() -> Path:
    """The diffusers folder of the turbo demo model, which ships too."""
    return Path(__file__).parent / "turbo"


def star_file() -> Path:
    """A LoRA for the turbo demo model, which adds a shape, the star."""
    return Path(__file__).parent / "star.safetensors"
