"""Pictures to disk, whole or not at all."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from gguf_sd.atomic_write import put_if_free, put_in_place, temporary_beside


def save_png(image: Image.Image, target: Path, text: dict[str, str] | None = None, replace: bool = True) -> None:
    """Writes a PNG with text chunks. Raises GgufSdError where that cannot be done, and FileExistsError where there is
    a file already that is not to be replaced."""
    put = put_in_place if replace else put_if_free
    with temporary_beside(target) as temporary:
        image.save(temporary, format="PNG", pnginfo=_chunks(text or {}))
        put(temporary, target)


def png_bytes(image: Image.Image, text: dict[str, str] | None = None) -> bytes:
    """The bytes of the file that :func:`save_png` writes."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=_chunks(text or {}))
    return buffer.getvalue()


def _chunks(text: dict[str, str]) -> PngInfo:
    info = PngInfo()
    for key, value in text.items():
        # Becomes iTXt, which is UTF-8, where Latin-1 does not do; names of files need not be Unicode.
        info.add_text(key, value.encode("utf-8", "backslashreplace").decode("utf-8"))
    return info
