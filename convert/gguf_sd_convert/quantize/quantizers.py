"""Weights to GGML blocks, with the block scales searched instead of taken from the largest value.

A block of 32 values shares a scale d (and, in the "_1" types, a minimum m). The reference quantiser takes them
from the block's extremes; a scale that clips or stretches a little nearly always has the smaller squared error.
So for each block a handful of scales is tried; for the codes that each of them gives, the best d (and m) is a
least-squares problem with a closed form; the best codes win and are fitted once more. What is compared in the end
is the error of the block as it will be decoded, d and m rounded to float16, and where the reference's block is
better it is taken: no tensor comes out worse than from gguf-py.

Everything works on [blocks, 32] in slices that stay in the processor's cache.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from gguf_sd_kernels.formats import BlockFormat, block_format, row_bytes

SLICE = 8192  # blocks at a time: 1 MiB in float32
F16_MAX = 65504.0
F16_TINY = 2.0**-24  # the smallest positive float16

# Candidate scales as multiples of the reference's, most to least clipping. Gaussian Q4_0: these five and one
# refit give a relative RMSE of 0.0811, 280 candidates 0.0809, the reference's scale alone 0.0833.
SYMMETRIC_SCALES = {8: (0.88, 0.94, 1.0, 1.06, 1.12), 16: (0.9, 0.94, 0.97, 1.0, 1.03, 1.06)}
# Fractions of the block's range that are cut from (below 0: added to) its lower and its upper end.
# Gaussian Q4_1: the sixteen pairs of four cuts give 0.0693, the reference's extremes alone 0.0735.
AFFINE_CUTS = {15: (-0.02, 0.0, 0.025, 0.05), 31: (-0.01, 0.0, 0.015)}


def quantize(x: Tensor, qtype: str) -> Tensor:
    """Rows of weights as rows of blocks.

    x: floating point [rows, cols], finite, cols a multiple of 32. qtype: a name in
    :data:`gguf_sd_kernels.formats.FORMATS`. Returns uint8 [rows, bytes of a row], which
    ``gguf.quants.dequantize`` decodes. Raises ValueError for an unknown type or a width that blocks do not fill.
    """
    fmt = block_format(qtype)
    rows, cols = x.shape
    out = torch.empty(rows, row_bytes(qtype, cols), dtype=torch.uint8)
    blocks, packed = x.reshape(-1, fmt.block_size), out.view(-1, fmt.type_size)
    encode = _q8_0 if qtype == "Q8_0" else _affine if fmt.min_bytes else _symmetric
    for start in range(0, blocks.shape[0], SLICE):
        encode(blocks[start : start + SLICE].float(), fmt, packed[start : start + SLICE])
    return out


def _reciprocal(d: Tensor) -> Tensor:
    """1 / d, and 0 where d is 0 or too small to have a reciprocal."""
    return torch.where(d == 0, 0.0, 1.0 / d).nan_to_num_(0.0, 0.0, 0.0)


def _to_f16(d: Tensor) -> Tensor:
    """float32 values that float16 holds; a scale neither overflows nor vanishes."""
    rounded = d.clamp(-F16_MAX, F16_MAX).half().float()
    return torch.where((rounded == 0) & (d != 0), torch.copysign(torch.full_like(d, F16_TINY), d), rounded)


def _sum(x: Tensor) -> Tensor:
    """Of each block: [n, 32] -> [n, 1]. As a matrix product it takes two thirds of the time of ``sum``."""
    return torch.mv(x, torch.ones(x.shape[1]))[:, None]


def _codes(z: Tensor, low: float, high: float) -> Tensor:
    """The nearest codes, halves upwards, as the reference rounds them. Overwrites z."""
    return z.add_(0.5).floor_().clamp_(low, high)


def _squared_error(x: Tensor, q: Tensor, d: Tensor, m: Tensor | None = None) -> Tensor:
    """Of each block as it will be decoded, [n, 1]."""
    decoded = q * d if m is None else (q * d).add_(m)
    return _sum(decoded.sub_(x).square_())


def _q8_0(x: Tensor, fmt: BlockFormat, out: Tensor) -> None:
    """Byte for byte the reference: 8 bits leave nothing to search for."""
    d = x.abs().amax(1, keepdim=True) / 127
    scaled = x * _reciprocal(d)
    magnitude = scaled.abs()
    whole = magnitude.floor()
    whole += magnitude.sub_(whole).mul_(2).floor_()  # halves away from zero
    out[:, :2] = d.half().view(torch.uint8)
    out[:, 2:] = whole.copysign_(scaled).to(torch.int8).view(torch.uint8)


def _symmetric(x: Tensor, fmt: BlockFormat, out: Tensor) -> None:
    """Q4_0 and Q5_0: value = d * q with q from -zero_point to zero_point - 1."""
    low, high = -fmt.zero_point, fmt.zero_point - 1
    largest, smallest = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    extreme = torch.where(largest > -smallest, largest, smallest)  # the extreme gets the code that reaches further
    unit = extreme / low
    per_unit = _reciprocal(unit)
    z = x * per_unit  # in units of the reference's scale

    best = torch.full_like(unit, -1.0)
    scale = torch.ones_like(unit)
    for factor in SYMMETRIC_SCALES[fmt.zero_point]:
        gain, fitted = _fit_scale(z, torch.mul(z, 1.0 / factor).round_().clamp_(low, high))
        better = gain > best
        best = torch.where(better, gain, best)
        scale = torch.where(better, fitted, scale)
    _, scale = _fit_scale(z, (z * _reciprocal(scale)).round_().clamp_(low, high))

    d = _to_f16(unit * scale)
    per_d = _reciprocal(d)
    reference_d = unit.half().float()
    error = _squared_error(x, _codes(x * per_d, low, high), d)
    worse = _squared_error(x, _codes(z, low, high), reference_d) < error
    q = _codes(x * torch.where(worse, per_unit, per_d), low, high)
    _pack(q.add_(fmt.zero_point), [torch.where(worse, reference_d, d)], fmt, out)


def _fit_scale(z: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """For codes q, the scale with the smallest squared error, and by how much that is below the error of all zeros.
    Overwrites q."""
    qz = _sum(q * z)
    scale = qz / _sum(q.square_()).clamp_(min=1e-12)
    return qz.mul_(scale), scale


def _affine(x: Tensor, fmt: BlockFormat, out: Tensor) -> None:
    """Q4_1 and Q5_1: value = d * q + m with q from 0 to ``levels``."""
    levels = 31 if fmt.high_bytes else 15
    largest, smallest = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    unit = (largest - smallest) / levels
    per_unit = _reciprocal(unit)
    z = (x - smallest).mul_(per_unit)  # 0 … levels, in units of the reference's scale
    z_sum = _sum(z)

    best = torch.full_like(unit, -1.0)
    scale, shift = torch.ones_like(unit), torch.zeros_like(unit)
    for cut_low, cut_high in product(AFFINE_CUTS[levels], repeat=2):
        factor = 1.0 / (1.0 - cut_low - cut_high)
        start = torch.tensor(-levels * cut_low * factor)
        gain, d, m = _fit_line(z, z_sum, torch.add(start, z, alpha=factor).round_().clamp_(0, levels))
        better = gain > best
        best = torch.where(better, gain, best)
        scale, shift = torch.where(better, d, scale), torch.where(better, m, shift)
    _, scale, shift = _fit_line(z, z_sum, (z - shift).mul_(_reciprocal(scale)).round_().clamp_(0, levels))

    d, m = _to_f16(unit * scale), (unit * shift + smallest).clamp_(-F16_MAX, F16_MAX).half().float()
    per_d = _reciprocal(d)
    reference_d, reference_m = unit.half().float(), smallest.half().float()
    error = _squared_error(x, _codes((x - m).mul_(per_d), 0, levels), d, m)
    worse = _squared_error(x, _codes(z, 0, levels), reference_d, reference_m) < error
    q = _codes((x - torch.where(worse, smallest, m)).mul_(torch.where(worse, per_unit, per_d)), 0, levels)
    _pack(q, [torch.where(worse, reference_d, d), torch.where(worse, reference_m, m)], fmt, out)


def _fit_line(z: Tensor, z_sum: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For codes q, the line d * q + m with the smallest squared error: by how much that is below the error of a
    constant, d and m. Overwrites q."""
    n = z.shape[1]
    q_sum = _sum(q)
    covariance = _sum(q * z).sub_(q_sum * z_sum / n)
    variance = _sum(q.square_()).sub_(q_sum.square() / n).clamp_(min=1e-12)
    d = covariance / variance
    return covariance.mul_(d), d, (z_sum - d * q_sum).div_(n)


def _pack(q: Tensor, scales: list[Tensor], fmt: BlockFormat, out: Tensor) -> None:
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
