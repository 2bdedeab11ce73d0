"""Where a file may be written. Without torch, so that a command can ask before it loads anything."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from gguf_sd.errors import GgufSdError
from gguf_sd_kernels.writers import other_writer


def check_target(path: Path, force: bool, inputs: Iterable[Path] = (), shared: bool = False) -> None:
    """Raises GgufSdError where ``path`` cannot be written, is one of the files or in the folders that are read
    (``inputs``), exists and ``force`` does not allow to replace it, or is being written by another process, unless all
    of those write the same (``shared``)."""
    if path.is_dir():
        raise GgufSdError(f"{path} is a folder; name a .gguf file")
    if (read := _same(path, inputs)) is not None:
        raise GgufSdError(f"{path} would replace {read}, which is read; choose another output")
    if path.exists() and not force:
        raise GgufSdError(f"{path} exists; --force replaces it")
    folder = path.parent
    if not folder.is_dir():
        raise GgufSdError(f"{folder} is no folder; create it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise GgufSdError(f"cannot write to {folder}: permission denied")
    if not shared and (pid := other_writer(path)) is not None:
        raise GgufSdError(f"process {pid} is writing {path} already; wait for it, or choose another output")


def _same(path: Path, inputs: Iterable[Path]) -> Path | None:
    """The input that ``path`` is, by whatever name, link or hard link."""
    try:
        own = path.stat()
    except OSError:  # nothing there, or a link to nothing
        return None
    for source in inputs:
        for file in source.rglob("*") if source.is_dir() else (source,):
            with contextlib.suppress(OSError):
                if os.path.samestat(file.stat(), own):
                    return file
    return None
