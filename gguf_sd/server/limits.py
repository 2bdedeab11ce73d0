"""What one request may ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gguf_sd.errors import GgufSdError

NAME = 100  # characters of a sampler's name and of the like


@dataclass(frozen=True)
class Limits:
    """Pixels along a side, sampling steps, pictures, characters of a prompt; bytes of a request, and pixels of a
    picture in it."""

    size: int = 2048
    steps: int = 150
    count: int = 16
    prompt: int = 8000
    upload: int = 32 << 20
    pixels: int = 1 << 24

    def check(self, settings: Mapping[str, Any], count: int) -> None:
        """``settings``: keywords of a request. Raises GgufSdError for what is too much; what has another type than it
        should is left to the request itself."""
        if not 1 <= count <= self.count:
            raise GgufSdError(f"this server paints 1 to {self.count} pictures a request, {count} are asked for")
        for name in ("width", "height"):
            value = settings.get(name)
            if isinstance(value, int) and value > self.size:
                raise GgufSdError(f"{name} is {value}; this server paints up to {self.size} pixels along a side")
        image = settings.get("image")
        if image is not None and (settings.get("width") is None or settings.get("height") is None):
            self.check({"width": image.width, "height": image.height}, 1)
        steps = settings.get("steps")
        if isinstance(steps, int) and steps > self.steps:
            raise GgufSdError(f"steps is {steps}; this server runs up to {self.steps}")
        for name, text in settings.items():
            most = self.prompt if name in ("prompt", "negative_prompt") else NAME
            if isinstance(text, str) and len(text) > most:
                raise GgufSdError(
                    f"{name.replace('_', ' ')} has {len(text)} characters; this server takes up to {most}"
                )
