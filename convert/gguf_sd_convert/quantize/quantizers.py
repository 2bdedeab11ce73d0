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

from gguf_sd_convert.quantize.k_quants import ENCODERS
from gguf_sd_convert.quantize.scales import AFFINE_CUTS, F16_MAX, SYMMETRIC_SCALES, pack, reciprocal, to_f16
from gguf_sd_kernels.formats import BlockFormat, QuantFormat, quant_format, row_bytes

SLICE = 8192 * 32  # values at a time: 1 MiB in float32


def quantize(x: Tensor, qtype: str) -> Tensor:
    """Rows of weights as rows of blocks.

    x: floating point [rows, cols], finite, cols a whole number of the type's blocks. qtype: a name in
    :data:`gguf_sd_kernels.formats.FORMATS`. Returns uint8 [rows, bytes of a row], which
    ``gguf.quants.dequantize`` decodes. Raises ValueError for a type that is unknown or only read, or a width that
    blocks do not fill.
    """
    fmt = quant_format(qtype)
    rows, cols = x.shape
    out = torch.empty(rows, row_bytes(qtype, cols), dtype=torch.uint8)
    blocks, packed = x.reshape(-1, fmt.block_size), out.view(-1, fmt.type_size)
    step = SLICE // fmt.block_size
    for start in range(0, blocks.shape[0], step):
        _encode(blocks[start : start + step].float(), fmt, packed[start : start + step])
    return out


def _encode(x: Tensor, fmt: QuantFormat, out: Tensor) -> None:
    """Blocks [n, block_size] to their bytes."""
    if not isinstance(fmt, BlockFormat):
        if fmt.name not in ENCODERS:
            raise ValueError(f"{fmt.name} is only read; choose from {', '.join(ENCODERS)}")
        ENCODERS[fmt.name](x, out)
    elif fmt.quant_bytes == fmt.block_size:
        _q8_0(x, fmt, out)
    else:
        (_affine if fmt.min_bytes else _symmetric)(x, fmt, out)


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
    scaled = x * reciprocal(d)
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
    per_unit = reciprocal(unit)
    z = x * per_unit  # in units of the reference's scale

    best = torch.full_like(unit, -1.0)
    scale = torch.ones_like(unit)
    for factor in SYMMETRIC_SCALES[fmt.zero_point]:
        gain, fitted = _fit_scale(z, torch.mul(z, 1.0 / factor).round_().clamp_(low, high))
        better = gain > best
        best = torch.where(better, gain, best)
        scale = torch.where(better, fitted, scale)
    _, scale = _fit_scale(z, (z * reciprocal(scale)).round_().clamp_(low, high))

    d = to_f16(unit * scale)
    per_d = reciprocal(d)
    reference_d = unit.half().float()
    error = _squared_error(x, _codes(x * per_d, low, high), d)
    worse = _squared_error(x, _codes(z, low, high), reference_d) < error
    q = _codes(x * torch.where(worse, per_unit, per_d), low, high)
    pack(q.add_(fmt.zero_point), [torch.where(worse, reference_d, d)], fmt, out)


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
    per_unit = reciprocal(unit)
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
    _, scale, shift = _fit_line(z, z_sum, (z - shift).mul_(reciprocal(scale)).round_().clamp_(0, levels))

    d, m = to_f16(unit * scale), (unit * shift + smallest).clamp_(-F16_MAX, F16_MAX).half().float()
    per_d = reciprocal(d)
    reference_d, reference_m = unit.half().float(), smallest.half().float()
    error = _squared_error(x, _codes((x - m).mul_(per_d), 0, levels), d, m)
    worse = _squared_error(x, _codes(z, 0, levels), reference_d, reference_m) < error
    q = _codes((x - torch.where(worse, smallest, m)).mul_(torch.where(worse, per_unit, per_d)), 0, levels)
    pack(q, [torch.where(worse, reference_d, d), torch.where(worse, reference_m, m)], fmt, out)


def _fit_line(z: Tensor, z_sum: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For codes q, the line d * q + m with the smallest squared error: by how much that is below the error of a
    constant, d and m. Overwrites q."""
    n = z.shape[1]
    q_sum = _sum(q)
    covariance = _sum(q * z).sub_(q_sum * z_sum / n)
    variance = _sum(q.square_()).sub_(q_sum.square() / n).clamp_(min=1e-12)
    d = covariance / variance
    return covariance.mul_(d), d, (z_sum - d * q_sum).div_(n)
