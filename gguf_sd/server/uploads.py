"""Pictures that come in requests: bounded before they are decoded."""

from __future__ import annotations

import base64
import binascii
import io
import warnings

from PIL import Image

from gguf_sd.errors import GgufSdError
from gguf_sd.imaging.images import FORMATS, decoded


def from_bytes(data: bytes, what: str, most: int) -> Image.Image:
    """A picture of one of FORMATS, of up to ``most`` pixels, which its header tells. Raises GgufSdError, which calls it
    ``what``."""
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=formats) as image:
            if not 0 < image.width * image.height <= most:
                raise GgufSdError(f"{what} has {image.width} x {image.height} pixels; this server takes up to {most}")
            return decoded(image)
    except GgufSdError:
        raise
    except Image.DecompressionBombError:  # Pillow looks at the header first
        raise GgufSdError(f"{what} has too many pixels; this server takes up to {most}") from None
    except Exception:  # decoders raise what they like for damaged files
        raise GgufSdError(f"{what} cannot be read: it is none of {', '.join(formats)}, or damaged") from None


def from_base64(text: str, what: str, most: int) -> Image.Image:
    """As :func:`from_bytes`, from base64 with or without ``data:image/png;base64,`` before it."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    if text.startswith(("http://", "https://", "file:")):
        raise GgufSdError(f"{what} is an address; this server fetches nothing, send the picture itself as base64")
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise GgufSdError(f"{what} is no base64") from None
    return from_bytes(data, what, most)


def as_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
