"""Pictures from disk, made to fit: for image-to-image and inpainting."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps, UnidentifiedImageError
from torch import Tensor

from gguf_sd.errors import GgufSdError

RESIZE_MODES = ("crop", "fit", "stretch")


def open_image(path: Path) -> Image.Image:
    """Any picture that Pillow reads, turned as its EXIF data say. Raises GgufSdError."""
    try:
        with Image.open(path) as image:
            turned = ImageOps.exif_transpose(image)
            turned.load()
            return turned
    except FileNotFoundError:
        raise GgufSdError(f"the picture {path} does not exist") from None
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise GgufSdError(f"cannot read the picture {path}: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB; what is transparent becomes white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def to_mask(image: Image.Image) -> Image.Image:
    """Mode L, 255 where to repaint: where the picture is white, or, if it has transparency, where it is transparent."""
    if image.has_transparency_data:
        return ImageOps.invert(image.convert("RGBA").getchannel("A"))
    return image.convert("L")


def resized(image: Image.Image, width: int, height: int, mode: str) -> Image.Image:
    """``crop`` fills the size and cuts what sticks out, ``fit`` shows all of the picture and fills the rest by
    stretching its edge pixels, ``stretch`` ignores proportions. Raises GgufSdError for another mode."""
    if mode not in RESIZE_MODES:
        raise GgufSdError(f"unknown resize mode {mode!r}; choose from {', '.join(RESIZE_MODES)}")
    if image.size == (width, height):
        return image
    if mode == "stretch":
        return image.resize((width, height), Image.Resampling.LANCZOS)
    if mode == "crop":
        return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    inner = ImageOps.contain(image, (width, height), Image.Resampling.LANCZOS)
    left, top = (width - inner.width) // 2, (height - inner.height) // 2
    padding = [(top, height - inner.height - top), (left, width - inner.width - left)]
    pixels = np.asarray(inner)
    return Image.fromarray(np.pad(pixels, padding + [(0, 0)] * (pixels.ndim - 2), mode="edge"))


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> float32 [1, 3, H, W], -1 … 1."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1


def mask_tensor(mask: Image.Image) -> Tensor:
    """Mode L -> float32 [1, 1, H, W]: 1 where to repaint, 0 elsewhere, nothing between."""
    return (torch.from_numpy(np.array(mask)) >= 128).float()[None, None]


def pasted(painted: Image.Image, original: Image.Image, mask: Image.Image, blur: int) -> Image.Image:
    """The painted picture inside the mask, the original's very pixels outside. The edge is softened over ``blur``
    pixels, inwards."""
    inside = mask.point(lambda value: 255 if value >= 128 else 0)
    soft = inside
    if blur:
        # Shrunk first, so that the blurred edge ends where the mask ends.
        shrunk = inside.filter(ImageFilter.MinFilter(2 * blur + 1))
        soft = shrunk.filter(ImageFilter.GaussianBlur(blur / 2))
        soft = Image.composite(soft, Image.new("L", soft.size), inside)
    return Image.composite(painted, original, soft)
