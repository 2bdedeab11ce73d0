"""Pictures to disk, whole or not at all."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from gguf_sd.atomic_write import put_if_free, put_in_place, temporary_beside


def save_png(image: Image.Image, target: Path, text: dict[str, str] | None = None, replace: bool = True) -> None:
    """Writes a PNG with text chunks. Raises GgufSdError where that cannot be done, and FileExistsError where there is
    a file already that is not to be replaced."""
    info = PngInfo()
    for key, value in (text or {}).items():
        # Becomes iTXt, which is UTF-8, where Latin-1 does not do; names of files need not be Unicode.
        info.add_text(key, value.encode("utf-8", "backslashreplace").decode("utf-8"))
    put = put_in_place if replace else put_if_free
    with temporary_beside(target) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)
        put(temporary, target)
