"""The hash of what a file was made from."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable
from pathlib import Path

from gguf_sd.errors import GgufSdError


def hash_files(paths: Iterable[Path], stop: threading.Event | None = None) -> str:
    """SHA-256 of one file, or of several one after another, sorted by path; cut short when ``stop`` is set."""
    digest, buffer = hashlib.sha256(), bytearray(1 << 20)
    for path in sorted(paths):
        try:
            with open(path, "rb", buffering=0) as file:
                while (count := file.readinto(buffer)) and not (stop and stop.is_set()):
                    digest.update(memoryview(buffer)[:count])
        except OSError as error:
            raise GgufSdError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()
