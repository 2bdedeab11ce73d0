"""Notes that are told once: what was told about which model lies in the cache."""

from __future__ import annotations

import json
from pathlib import Path

from gguf_sd.atomic_write import put_in_place, temporary_beside
from gguf_sd.errors import GgufSdError
from gguf_sd_kernels.cache_folder import cache_folder

TOLD = "told.json"
REMEMBERED = 1000  # pairs of note and model; the oldest are told again


def first_time(note: str, model: Path) -> bool:
    """Whether a note about the model at this path was never told on this machine; from now on it was. Where that
    cannot be remembered it is told every time."""
    key, memory = f"{note} {model.resolve()}", cache_folder() / TOLD
    told = _read(memory)
    if key in told:
        return False
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        with temporary_beside(memory) as temporary:
            temporary.write_text(json.dumps([*told, key][-REMEMBERED:], indent=0))
            put_in_place(temporary, memory)
    except (OSError, GgufSdError):
        pass
    return True


def _read(memory: Path) -> list[str]:
    try:
        told = json.loads(memory.read_text())
    except (OSError, ValueError, RecursionError):
        return []
    return [key for key in told if isinstance(key, str)] if isinstance(told, list) else []
