"""Writing files so that they appear whole or not at all, and where the cache lies."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from gguf_sd.errors import GgufSdError


@contextlib.contextmanager
def temporary_beside(target: Path) -> Iterator[Path]:
    """A new empty file in the target's folder, removed at the end unless :func:`put_in_place` renamed it."""
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
    except OSError as error:
        raise GgufSdError(f"cannot write to {target.parent}: {error.strerror}") from error
    path = Path(name)
    try:
        umask = os.umask(0)
        os.umask(umask)
        os.fchmod(descriptor, 0o666 & ~umask)  # mkstemp's files are for their owner only
        os.close(descriptor)
        yield path
    finally:
        path.unlink(missing_ok=True)


def put_in_place(temporary: Path, target: Path) -> None:
    """Syncs a finished file and renames it to ``target``, durably, in place of what was there."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_png(image: Image.Image, target: Path, text: dict[str, str] | None = None) -> None:
    """Writes a PNG with text chunks. Raises GgufSdError where that cannot be done."""
    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)  # becomes iTXt, which is UTF-8, where Latin-1 does not do
    try:
        with temporary_beside(target) as temporary:
            image.save(temporary, format="PNG", pnginfo=info)
            put_in_place(temporary, target)
    except OSError as error:
        raise GgufSdError(f"cannot write {target}: {error.strerror or error}") from error


def cache_folder() -> Path:
    """$GGUF_SD_CACHE, else gguf-sd under $XDG_CACHE_HOME, else under ~/.cache."""
    if own := os.environ.get("GGUF_SD_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gguf-sd"
