"""The built-in demo models: small, trained here, with the full anatomy of Stable Diffusion 1.x and of SDXL-Turbo."""

from __future__ import annotations

from pathlib import Path


def model_folder() -> Path:
    """The diffusers folder of the first demo model, which ships with the package."""
    return Path(__file__).parent / "model"


def turbo_folder() -> Path:
    """The diffusers folder of the turbo demo model, which ships with the package."""
    return Path(__file__).parent / "turbo"
