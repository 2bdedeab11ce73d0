"""A 3x3 convolution of a map enlarged to twice its size by nearest neighbours, on a CPU.

Each of the four pixels that one becomes sees only 2x2 pixels of the small map, with the taps that fall on the same
pixel summed. So four convolutions with 2x2 taps do, 4/9 of the products, and the enlarged map never exists.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

# (row, column): 0 the upper or left one of the pixels that one becomes, 1 the lower or right one.
PHASES = (0, 0), (0, 1), (1, 0), (1, 1)

# Pixels of the small map from which on less arithmetic is worth summing the weights for. Zen 4, 2 threads, bfloat16,
# time against the enlarged map's: 640 channels of 32x32 0.67, 512 of 64x64 0.52, 256 of 256x256 0.50; 1280 of 16x16
# 2.5.
MIN_PIXELS = 1024


def pays(x: Tensor, size: tuple[int, int], weight: Tensor, stride: int, padding: int) -> bool:
    """Whether :func:`conv2d_enlarged` is the faster way to convolve ``x [B, I, H, W]``, enlarged to ``size`` (H, W)."""
    doubled = size == (2 * x.shape[2], 2 * x.shape[3])
    plain = weight.shape[2:] == (3, 3) and stride == padding == 1
    return x.is_cpu and doubled and plain and x.shape[0] * x.shape[2] * x.shape[3] >= MIN_PIXELS


def phase_weights(weight: Tensor) -> list[Tensor]:
    """``[O, I, 3, 3]`` -> the ``[O, I, 2, 2]`` of each of the PHASES, channels-last; sums are made in float32."""

    def summed(w: Tensor, phase: int, dim: int) -> Tensor:
        first, second, third = w.unbind(dim)
        return torch.stack([first, second + third] if phase == 0 else [first + second, third], dim)

    wide = weight.float() if weight.dtype.itemsize == 2 else weight
    return [
        summed(summed(wide, i, 2), j, 3).to(weight.dtype).contiguous(memory_format=torch.channels_last)
        for i, j in PHASES
    ]


def interleaved(phases: Iterable[Tensor], height: int, width: int) -> Tensor:
    """The large map ``[B, O, 2 * height, 2 * width]`` of what the convolution with each phase's weight makes of the
    small one with a row or column of zeros, or of neighbours, on each side: ``[B, O, height + 1, width + 1]``."""
    out = None
    for (i, j), y in zip(PHASES, phases, strict=True):
        if out is None:
            out = y.new_empty(y.shape[0], 2 * height, 2 * width, y.shape[1]).permute(0, 3, 1, 2)
        out[:, :, i::2, j::2] = y[:, :, i : i + height, j : j + width]
    assert out is not None
    return out


def conv2d_enlarged(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.conv2d`` of ``x [B, I, H, W]`` enlarged to ``[B, I, 2H, 2W]`` with ``weight [O, I, 3, 3]`` and padding 1."""
    phases = (F.conv2d(x, kernel, bias, padding=1) for kernel in phase_weights(weight))
    return interleaved(phases, x.shape[2], x.shape[3])
