"""Masks: which part of a picture is painted anew, and how soft its edge is."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from gguf_sd.errors import GgufSdError
from gguf_sd.imaging.images import eight_bits, resized_like

REPAINT = 128  # values from here on are repainted


def to_mask(image: Image.Image) -> Image.Image:
    """Mode L, 255 where to repaint: where the picture is transparent, or, if it is opaque throughout (editors save
    opaque masks with an alpha channel too), where it is white."""
    image = eight_bits(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        alpha = layer.getchannel("A")
        if np.asarray(alpha).min() < 255:
            return ImageOps.invert(alpha)
        image = layer.convert("RGB")
    return image.convert("L")


def fitted_mask(image: Image.Image, picture: tuple[int, int], width: int, height: int, mode: str) -> Image.Image:
    """The mask of a picture of the size ``picture``, brought to the size to paint together with that, mode L.

    Raises GgufSdError where nothing is left to repaint.
    """
    mask = to_mask(image)
    if np.asarray(mask).max() < REPAINT:
        raise GgufSdError("the mask selects nothing: no part is white or transparent; make white what to change")
    fitted = resized_like(mask, picture, width, height, mode)
    if np.asarray(fitted).max() < REPAINT:
        raise GgufSdError(
            f"the mask selects nothing at {width} x {height}: its white part was cut off or is too thin; "
            "draw it thicker, or try --resize fit"
        )
    return fitted


def mask_tensor(mask: Image.Image) -> Tensor:
    """Mode L -> float32 [1, 1, H, W]: 1 where to repaint, 0 elsewhere, nothing between."""
    return (torch.from_numpy(np.array(mask)) >= REPAINT).float()[None, None]


def latent_mask(hole: Tensor, size: tuple[int, int]) -> Tensor:
    """[1, 1, H, W] -> [1, 1, h, w], the pixel in the corner of each latent deciding, as in diffusers. Where all of a
    thin mask falls between those corners, every latent that it touches is repainted."""
    mask = F.interpolate(hole, size=size)
    return mask if mask.any() else F.adaptive_max_pool2d(hole, size)


def pasted(painted: Image.Image, original: Image.Image, mask: Image.Image, blur: int) -> Image.Image:
    """The painted picture inside the mask, the original's very pixels outside. The edge is softened over ``blur``
    pixels, inwards."""
    inside = np.asarray(mask) >= REPAINT
    return Image.composite(painted, original, Image.fromarray(_softened(inside, blur)))


def _softened(inside: np.ndarray, blur: int) -> np.ndarray:
    """Bools [H, W] -> uint8: 0 outside, rising over ``blur`` pixels from the edge to 255.

    How deep a pixel lies is how often the mask can be shrunk by a pixel before it is gone; that is set against the
    deepest pixel nearby in the same part of the mask, so that a thin line reaches 255 in its middle like a wide one.
    """
    depth, left = inside.astype(np.uint16), inside
    for _ in range(blur):
        left = ~_spread(~left)
        if not left.any():
            break
        depth += left
    deepest = depth
    for _ in range(int(depth.max()) - 1):
        deepest = _spread(deepest) * inside
    return np.where(inside, depth * 255.0 / np.maximum(deepest, 1), 0).round().astype(np.uint8)


def _spread(values: np.ndarray) -> np.ndarray:
    """The highest of the 3 x 3 pixels around each of [H, W]; one axis, then the other."""
    rows = values.copy()
    np.maximum(rows[1:], values[:-1], out=rows[1:])
    np.maximum(rows[:-1], values[1:], out=rows[:-1])
    both = rows.copy()
    np.maximum(both[:, 1:], rows[:, :-1], out=both[:, 1:])
    np.maximum(both[:, :-1], rows[:, 1:], out=both[:, :-1])
    return both
