"""What quantisers share: candidate scales, scales that float16 holds, and blocks put together."""

from __future__ import annotations

import torch
from torch import Tensor

from gguf_sd_kernels.formats import BlockFormat

F16_MAX = 65504.0
F16_TINY = 2.0**-24  # the smallest positive float16

# Candidate scales as multiples of the reference's, most to least clipping. Gaussian Q4_0: these five and one
# refit give a relative RMSE of 0.0811, 280 candidates 0.0809, the reference's scale alone 0.0833.
SYMMETRIC_SCALES = {8: (0.88, 0.94, 1.0, 1.06, 1.12), 16: (0.9, 0.94, 0.97, 1.0, 1.03, 1.06)}
# Fractions of the block's range that are cut from (below 0: added to) its lower and its upper end.
# Gaussian Q4_1: the sixteen pairs of four cuts give 0.0693, the reference's extremes alone 0.0735.
AFFINE_CUTS = {15: (-0.02, 0.0, 0.025, 0.05), 31: (-0.01, 0.0, 0.015)}


def reciprocal(d: Tensor) -> Tensor:
    """1 / d, and 0 where d is 0 or too small to have a reciprocal."""
    return torch.where(d == 0, 0.0, 1.0 / d).nan_to_num_(0.0, 0.0, 0.0)


def to_f16(d: Tensor) -> Tensor:
    """float32 values that float16 holds; a scale neither overflows nor vanishes."""
    rounded = d.clamp(-F16_MAX, F16_MAX).half().float()
    return torch.where((rounded == 0) & (d != 0), torch.copysign(torch.full_like(d, F16_TINY), d), rounded)


def pack(q: Tensor, scales: list[Tensor], fmt: BlockFormat, out: Tensor) -> None:
    """Codes 0 … 31 [n, 32], as floats, and the block's float16 fields -> blocks, in the order of the format."""
    for i, value in enumerate(scales):
        out[:, 2 * i : 2 * i + 2] = value.half().view(torch.uint8)
    start = 2 * len(scales)
    if fmt.high_bytes:
        high = (q >= 16).to(q.dtype)
        q = q - 16 * high
        weights = 2.0 ** torch.arange(8)
        out[:, start : start + 4] = (high.view(-1, 4, 8) * weights).sum(-1).to(torch.uint8)
        start += 4
    half = fmt.block_size // 2
    out[:, start:] = q[:, half:].mul(16).add_(q[:, :half]).to(torch.uint8)
