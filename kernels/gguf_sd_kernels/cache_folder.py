"""Where what was found out or built once is kept, for this user."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """$GGUF_SD_CACHE, else gguf-sd under $XDG_CACHE_HOME, else under ~/.cache; a temporary one for who has no home."""
    if own := os.environ.get("GGUF_SD_CACHE"):
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gguf-sd"
    except RuntimeError:  # as in a container whose user has no name
        return Path(tempfile.gettempdir()) / f"gguf-sd-{os.getuid()}"
