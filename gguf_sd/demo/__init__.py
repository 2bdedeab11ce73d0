"""The built-in demo model: small, trained from scratch, with the full anatomy of Stable Diffusion."""

from __future__ import annotations

from pathlib import Path


def model_folder() -> Path:
    """The diffusers folder that ships with the package."""
    return Path(__file__).parent / "model"
