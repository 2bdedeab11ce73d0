"""Pictures from disk, made to fit: for image-to-image and inpainting."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from gguf_sd.errors import GgufSdError

if TYPE_CHECKING:
    from torch import Tensor

RESIZE_MODES = ("crop", "fit", "stretch")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
MAX_PIXELS = 1 << 26  # 8192 x 8192


def open_image(path: Path) -> Image.Image:
    """A picture of one of FORMATS, the first where the file holds several, turned as its EXIF data say.

    Size and format are known from the header, before anything is decoded. Raises GgufSdError.
    """
    if not path.exists():
        raise GgufSdError(f"the picture {path} does not exist")
    if not path.is_file():
        raise GgufSdError(f"the picture {path} is no file; give a {FORMATS[0]} or another picture")
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    try:
        # What Pillow warns of (odd tags, many pixels) is either harmless or refused below.
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=formats) as image:
            check_size(image, f"the picture {path}")
            return decoded(image)
    except GgufSdError:
        raise
    except Image.UnidentifiedImageError:
        raise GgufSdError(f"cannot read the picture {path}: it is none of {', '.join(formats)}, or damaged") from None
    except Exception as error:  # decoders raise what they like for damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise GgufSdError(f"cannot read the picture {path}: {reason}") from error


def decoded(image: Image.Image) -> Image.Image:
    """An opened picture with its pixels, turned as its EXIF data say. Raises whatever the decoder does.

    Which colours of a palette are transparent is worked out here too: there may be more of them than colours, which
    Pillow does not find before.
    """
    turned = ImageOps.exif_transpose(image)
    turned.load()
    if turned.mode in ("P", "PA") and turned.has_transparency_data:
        return turned.convert("RGBA")
    return turned


def check_size(image: Image.Image, name: str) -> None:
    """Raises GgufSdError for a picture of too many pixels, or of none."""
    if not 0 < image.width * image.height <= MAX_PIXELS:
        raise GgufSdError(
            f"{name} has {image.width} x {image.height} pixels; gguf-sd takes up to {MAX_PIXELS}, make it smaller first"
        )


def eight_bits(image: Image.Image) -> Image.Image:
    """Grey pictures of 16 or 32 bits or of floats as mode L, scaled so that white stays white; others as they are.

    Modes I and F do not say where white is: it is the lowest of 1 (floats only), 255 and 65535 that no pixel exceeds,
    else the brightest pixel. Raises GgufSdError for values that are not finite.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image, dtype=np.float32)
    if not np.isfinite(values).all():
        raise GgufSdError("a picture holds values that are not finite")
    high = float(values.max())
    usual = {"I": (255.0, 65535.0), "F": (1.0, 255.0, 65535.0)}.get(image.mode, (65535.0,))
    white = next((level for level in usual if high <= level), high)
    return Image.fromarray((values.clip(0) * (255 / white)).round().astype(np.uint8))


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB; what is transparent becomes white."""
    image = eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def resized(image: Image.Image, width: int, height: int, mode: str) -> Image.Image:
    """``crop`` fills the size and cuts what sticks out, ``fit`` shows all of the picture and fills the rest by
    stretching its edge pixels, ``stretch`` ignores proportions. Raises GgufSdError for another mode."""
    return resized_like(image, image.size, width, height, mode)


def resized_like(image: Image.Image, like: tuple[int, int], width: int, height: int, mode: str) -> Image.Image:
    """A picture scaled to the size ``like`` of another, then brought to size as that one is, see :func:`resized`: what
    lies on the same spot of both still does."""
    if mode not in RESIZE_MODES:
        raise GgufSdError(f"unknown resize mode {mode!r}; choose from {', '.join(RESIZE_MODES)}")
    if image.size == (width, height) == like:
        return image
    if mode == "fit":
        inner = ImageOps.contain(Image.new("1", like), (width, height)).size
        return _padded(image.resize(inner, Image.Resampling.LANCZOS), width, height)
    cut = _cut(like, width, height) if mode == "crop" else (0.0, 0.0, *like)
    across, down = image.width / like[0], image.height / like[1]
    box = (cut[0] * across, cut[1] * down, min(cut[2] * across, image.width), min(cut[3] * down, image.height))
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def _cut(size: tuple[int, int], width: int, height: int) -> tuple[float, float, float, float]:
    """The largest box of the proportions width : height in the middle of ``size``: left, top, right, bottom."""
    if size[0] * height >= width * size[1]:
        left = (size[0] - size[1] * width / height) / 2
        return left, 0.0, size[0] - left, float(size[1])
    top = (size[1] - size[0] * height / width) / 2
    return 0.0, top, float(size[0]), size[1] - top


def _padded(inner: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (width - inner.width) // 2, (height - inner.height) // 2
    padding = [(top, height - inner.height - top), (left, width - inner.width - left)]
    pixels = np.asarray(inner)
    return Image.fromarray(np.pad(pixels, padding + [(0, 0)] * (pixels.ndim - 2), mode="edge"))


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> float32 [1, 3, H, W], -1 … 1."""
    import torch  # late: pictures and settings are refused without it

    return torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
