"""Opening what a user names as input."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

from gguf_sd.errors import GgufSdError


def open_input(path: Path) -> io.BufferedReader:
    """A file's bytes. Raises OSError where it cannot be opened, and GgufSdError for pipes and devices, which may keep a
    reader waiting for ever and cannot be read from the middle."""
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise GgufSdError(f"{path} is a pipe or a device; give a file on disk")
    return open(path, "rb")
