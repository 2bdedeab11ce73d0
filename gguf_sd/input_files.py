"""Opening what a user names as input."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

from gguf_sd.errors import GgufSdError


def is_there(path: Path) -> bool:
    """Whether there is something of a name that a stranger chose: one that the system cannot have is not there."""
    try:
        return path.exists()
    except OSError:  # too long, or in a folder that must not be read
        return False


def open_input(path: Path) -> io.BufferedReader:
    """A file's bytes. Raises OSError where it cannot be opened, and GgufSdError for pipes and devices, which may keep a
    reader waiting for ever and cannot be read from the middle."""
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise GgufSdError(f"{path} is a pipe or a device; give a file on disk")
    return open(path, "rb")
