"""The built-in demo model: small, trained here, with the full anatomy of Stable Diffusion 1.x. Another one, like
SDXL-Turbo, is built in where it was trained, see ``tools/demo_model/train_turbo.py``."""

from __future__ import annotations

from pathlib import Path


def model_folder() -> Path:
    """The diffusers folder of the first demo model, which ships with the package."""
    return Path(__file__).parent / "model"


def turbo_folder() -> Path:
    """Where the diffusers folder of the turbo demo model belongs; it does not ship with the package yet."""
    return Path(__file__).parent / "turbo"
