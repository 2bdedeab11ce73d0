"""Convolution with a freshly decoded weight on a CPU.

oneDNN reorders a weight into its own blocked layout on every call. Deep in the UNet, where images are 8x8 or
16x16 and weights have 15 or 30 million values, that costs more than the arithmetic. There the convolution is a
matrix product of gathered pixels, which are few, with the weight as it lies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gguf_sd_kernels.cpu.linear import product

# Gather when at most this many output pixels meet at least this many weights. Zen 5, 2 threads, bfloat16, time
# against F.conv2d on the same channels-last operands, pixels x (IC -> OC): 128 x (2560 -> 1280) 0.36,
# 128 x (1280 -> 1280) 0.47, 512 x (2560 -> 1280) 0.71, 512 x (1280 -> 1280) 0.80; beyond the limits
# 512 x (640 -> 640) 1.09, 2048 x (640 -> 640) 1.14. With (IC, KH, KW) weights: 0.25, 0.33, 0.65, 0.86.
MAX_PIXELS, MIN_WEIGHTS = 512, 10_000_000


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """``F.conv2d`` of ``x [B, IC, H, W]`` with ``weight [OC, IC, KH, KW]``, on a CPU in the faster form."""
    tap_major = weight.is_contiguous(memory_format=torch.channels_last)
    columns = gathered(x, weight.shape, stride, padding, tap_major)
    if columns is None:
        return F.conv2d(x, weight, bias, stride, padding)
    flat = (weight.permute(0, 2, 3, 1) if tap_major else weight).reshape(weight.shape[0], -1)
    return product(columns, flat, bias).permute(0, 3, 1, 2)


def gathered(x: Tensor, shape: Sequence[int], stride: int, padding: int, tap_major: bool) -> Tensor | None:
    """What each output pixel of a convolution sees, ``[B, H', W', KH * KW * IC]``, or IC * KH * KW unless
    ``tap_major``; None where a convolution with a weight of ``shape`` (OC, IC, KH, KW) is faster without."""
    kernel = shape[2], shape[3]
    height, width = ((n + 2 * padding - k) // stride + 1 for n, k in zip(x.shape[2:], kernel, strict=True))
    pixels = x.shape[0] * height * width
    if x.device.type != "cpu" or kernel == (1, 1) or not 0 < pixels <= MAX_PIXELS or math.prod(shape) < MIN_WEIGHTS:
        return None
    return _gather(x, kernel, (height, width), stride, padding, tap_major).view(x.shape[0], height, width, -1)


def _gather(
    x: Tensor, kernel: tuple[int, int], size: tuple[int, int], stride: int, padding: int, tap_major: bool
) -> Tensor:
    """What each output pixel sees: ``[B * H' * W', KH * KW * IC]``, or IC * KH * KW unless ``tap_major``."""
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding)).contiguous()
    batch, _, row, channels = padded.shape
    image, line = padded.shape[1] * row * channels, row * channels
    windows = padded.as_strided(
        (batch, *size, *kernel, channels),
        (image, stride * line, stride * channels, line, channels, 1),
    )
    if not tap_major:
        windows = windows.permute(0, 1, 2, 5, 3, 4)
    return windows.reshape(-1, math.prod(kernel) * channels)
