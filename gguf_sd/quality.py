"""How much one picture differs from another."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

PEAK = 255.0
WINDOW, SIGMA = 11, 1.5  # SSIM's Gaussian window, pixels
C1, C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2

ImageLike = Image.Image | np.ndarray


def psnr(picture: ImageLike, reference: ImageLike) -> float:
    """Peak signal-to-noise ratio of 8-bit pictures [H, W, 3], dB; infinite where they are equal."""
    a, b = _pair(picture, reference)
    error = float(((a - b) ** 2).mean())
    return math.inf if error == 0 else 10 * math.log10(PEAK**2 / error)


def ssim(picture: ImageLike, reference: ImageLike) -> float:
    """Structural similarity of 8-bit pictures [H, W, 3], -1 … 1: the mean over channels and over all places where the
    11x11 Gaussian window fits (Wang et al. 2004, "Image quality assessment: from error visibility to structural
    similarity"). Raises ValueError for pictures smaller than the window."""
    a, b = _pair(picture, reference)
    if min(a.shape[-2:]) < WINDOW:
        raise ValueError(f"SSIM takes pictures of at least {WINDOW}x{WINDOW} pixels, got {list(a.shape[-2:])}")
    at = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    line = torch.exp(-(at**2) / (2 * SIGMA**2))
    window = torch.outer(line, line)[None, None] / line.sum() ** 2

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(x[:, None], window)

    mean_a, mean_b = mean(a), mean(b)
    variance_a, variance_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    similar = (2 * mean_a * mean_b + C1) * (2 * covariance + C2)
    return float((similar / ((mean_a**2 + mean_b**2 + C1) * (variance_a + variance_b + C2))).mean())


def _pair(picture: ImageLike, reference: ImageLike) -> tuple[Tensor, Tensor]:
    """Both as float64 [3, H, W]."""
    a, b = np.asarray(picture), np.asarray(reference)
    if a.shape != b.shape:
        raise ValueError(f"the pictures differ in size: {list(a.shape)} and {list(b.shape)}")
    first, second = (torch.from_numpy(x.astype(np.float64)).permute(2, 0, 1) for x in (a, b))
    return first, second
