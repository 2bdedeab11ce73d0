"""Products in 8 bits on a CPU, by oneDNN's operators: for processors that multiply bytes (AVX512-VNNI, AVX-VNNI, AMX).

A weight has 8 bits with a sign and a scale for each output, an activation 8 bits without one, a scale and a zero point
for all of it, taken from its own range. Sums are exact, in int32. Such products take half the time of bfloat16's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gguf_sd_kernels.cpu import processor
from gguf_sd_kernels.formats import quant_format, row_values
from gguf_sd_kernels.reference.decoders import decode_into

# Values at a time while an activation is quantised, so that their float32 copies stay in the L2 cache.
CHUNK_VALUES = 1 << 18
ROW_VALUES = 1 << 19  # the same, of a weight that is encoded
LOWEST_SILU, AT = -0.27846454, -1.2784645  # the smallest value of SiLU, and where it is
# Added to a float32 of less than 2^22, this leaves the nearest integer in the low bits.
ROUNDING = float(3 << 22)
SMALLEST = 1e-30  # a step; less is nothing
OPERATORS = ("qconv_prepack", "qconv_pointwise", "qlinear_prepack", "qlinear_pointwise")


@cache
def has_operators() -> bool:
    """Whether this torch has oneDNN's operators for products in 8 bits."""
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.onednn, name) for name in OPERATORS)


def is_fast() -> bool:
    """Whether such products are there, and this processor has instructions for them."""
    return has_operators() and processor.multiplies_bytes()


class Activation(NamedTuple):
    """``scale * (values - zero)``: uint8 of the activation's shape, channels-last where that is [B, C, H, W]."""

    values: Tensor
    scale: float
    zero: int


def quantize(x: Tensor, silu: bool = False) -> Activation:
    """``x``, or SiLU of it, in 8 bits: float32 or bfloat16 of any shape, over its own range; laid out as x is, which is
    contiguous or channels-last.

    Where a value is not finite, neither is the scale, nor any value of a product.
    """
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    kept = x.permute(0, 2, 3, 1) if channels_last else x.contiguous()
    flat, codes = kept.view(-1), torch.empty(kept.shape, dtype=torch.uint8)
    low, high = _range(flat, silu)
    scale, zero = (high - low) / 255, 0
    if not math.isfinite(scale):
        scale = math.nan
        codes.zero_()
    elif scale < SMALLEST:
        scale = 1.0
        codes.zero_()
    else:
        zero = round(-low / scale)
        _encode(flat, codes.view(-1), 1 / scale, zero, silu)
    return Activation(codes.permute(0, 3, 1, 2) if channels_last else codes, scale, zero)


def _range(x: Tensor, silu: bool) -> tuple[float, float]:
    """The smallest and the largest value of x, or of SiLU of it, and of zero."""
    if not x.numel():
        return 0.0, 0.0
    low, high = (float(end) for end in torch.aminmax(x))
    if silu:
        low = LOWEST_SILU if low < AT else _silu(low)
        high = _silu(high)
    return min(low, 0.0), max(high, 0.0)  # in this order a NaN stays one


def _silu(x: float) -> float:
    return -0.0 if x < -700 else x / (1 + math.exp(-x))


def _encode(x: Tensor, out: Tensor, inverse: float, zero: int, silu: bool) -> None:
    """Writes ``round(x * inverse) + zero`` into ``out``, a few values at a time: as float32, whose low bits hold the
    integer after ROUNDING was added."""
    values = torch.empty(min(len(x), CHUNK_VALUES))
    offset = torch.tensor(ROUNDING + zero)
    for part, codes in zip(x.split(CHUNK_VALUES), out.split(CHUNK_VALUES), strict=True):
        chunk = values[: len(part)].copy_(part)
        if silu:
            F.silu(chunk, inplace=True)
        torch.add(offset, chunk, alpha=inverse, out=chunk)
        codes.copy_(chunk.view(torch.int32))


class Codes(NamedTuple):
    """A weight in 8 bits: ``scales * values``, int8 ``[out, in]`` or ``[out, in, kh, kw]`` and float32 ``[out]``."""

    values: Tensor
    scales: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Codes:
        """Of float32 or 16-bit values, each output over its own range."""
        flat = weight.permute(0, 2, 3, 1) if weight.dim() == 4 else weight  # in the order of channels-last memory
        rows = flat.reshape(len(flat), -1)
        codes = cls._of_parts((part.float() for part in rows.split(_rows_at_a_time(rows.shape[1]))), rows.shape)
        values = codes.values.view(flat.shape)
        return codes._replace(values=values.permute(0, 3, 1, 2) if weight.dim() == 4 else values)

    @classmethod
    def of_blocks(cls, blocks: Tensor, qtype: str, shape: tuple[int, ...], *, tap_major: bool = True) -> Codes:
        """Of quantised blocks, uint8 ``[out, row_bytes]``, of a weight of ``shape``; a convolution's rows hold
        (kh, kw, in) where ``tap_major``, else (in, kh, kw)."""
        cols = row_values(qtype, blocks.shape[1])
        codes = cls._of_parts(_decoded(blocks, qtype, cols), torch.Size((len(blocks), cols)))
        if len(shape) == 2 or not tap_major:
            return codes._replace(values=codes.values.view(shape))
        out, channels, kh, kw = shape
        return codes._replace(values=codes.values.view(out, kh, kw, channels).permute(0, 3, 1, 2))

    @classmethod
    def _of_parts(cls, parts: Iterator[Tensor], shape: torch.Size) -> Codes:
        """Of some rows at a time, float32 of a memory of their own, which is overwritten."""
        values, scales = torch.empty(shape, dtype=torch.int8), torch.empty(shape[0])
        start = 0
        for part in parts:
            rows = slice(start, start + len(part))
            largest = part.abs().amax(1)
            scales[rows] = torch.where(largest > 0, largest / 127, 1.0)
            part = part.mul(1 / scales[rows, None]).add_(ROUNDING)
            values[rows] = part.view(torch.int32).to(torch.int8)
            start = rows.stop
        return cls(values, scales)


def _rows_at_a_time(cols: int) -> int:
    return max(1, ROW_VALUES // max(1, cols))


def _decoded(blocks: Tensor, qtype: str, cols: int) -> Iterator[Tensor]:
    """The values of some rows at a time, float32 ``[rows, cols]`` in memory that is used again."""
    fmt, step = quant_format(qtype), _rows_at_a_time(cols)
    values = torch.empty(min(step, len(blocks)), cols)
    for part in blocks.split(step):
        some = values[: len(part)]
        decode_into(some.view(-1, fmt.block_size), part.reshape(-1, fmt.type_size), fmt)
        yield some


@dataclass(frozen=True)
class LinearWeight:
    """A linear layer's weight in 8 bits, in oneDNN's order."""

    packed: Tensor
    scales: Tensor  # float32 [out]
    zeros: Tensor  # int32 [out], all zero

    @property
    def nbytes(self) -> int:
        return self.packed.numel() + self.scales.nbytes + self.zeros.nbytes

    @classmethod
    def of(cls, codes: Codes) -> LinearWeight:
        zeros = torch.zeros(len(codes.scales), dtype=torch.int32)
        return cls(torch.ops.onednn.qlinear_prepack(codes.values, None), codes.scales, zeros)


def linear(
    x: Activation,
    weight: LinearWeight,
    bias: Tensor | None,
    dtype: torch.dtype,
    residual: Tensor | None = None,
    gelu: bool = False,
) -> Tensor:
    """``x [..., in]`` times the weight ``[out, in]``, plus ``bias`` float32 ``[out]`` and ``residual`` ``[..., out]``,
    -> ``[..., out]`` of ``dtype``; ``gelu``, which excludes a residual, is applied to it."""
    values = x.values.reshape(-1, x.values.shape[-1])
    own = values, x.scale, x.zero, weight.packed, weight.scales, weight.zeros
    if residual is not None:
        added, multiply = residual.reshape(len(values), -1), torch.ops.onednn.qlinear_pointwise.binary
        y = multiply(*own, added, bias, 1.0, 0, dtype, 1.0, 0, "add", 1.0, "none", [], "")
    else:
        post, kind = ("gelu", "none") if gelu else ("none", "")
        y = torch.ops.onednn.qlinear_pointwise(*own, bias, 1.0, 0, dtype, post, [], kind)
    return y.view(*x.values.shape[:-1], -1)


@dataclass(frozen=True)
class ConvWeight:
    """A convolution's weight in 8 bits, in oneDNN's order, with its stride and padding."""

    packed: Tensor
    scales: Tensor  # float32 [out]
    zeros: Tensor  # int32 [out], all zero
    stride: int
    padding: int

    @property
    def nbytes(self) -> int:
        return self.packed.numel() + self.scales.nbytes + self.zeros.nbytes

    @classmethod
    def of(cls, codes: Codes, stride: int, padding: int) -> ConvWeight:
        steps = [stride] * 2, [padding] * 2, [1, 1]
        packed = torch.ops.onednn.qconv_prepack(codes.values, codes.scales, 1.0, 128, *steps, 1, None)
        return cls(packed, codes.scales, torch.zeros(len(codes.scales), dtype=torch.int32), stride, padding)


def convolve(x: Activation, weight: ConvWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``x [B, in, H, W]`` convolved with the weight ``[out, in, kh, kw]``, plus ``bias`` float32 ``[out]`` ->
    ``[B, out, H', W']`` of ``dtype``, channels-last."""
    own = x.values, x.scale, x.zero, weight.packed, weight.scales, weight.zeros, bias
    steps = [weight.stride] * 2, [weight.padding] * 2, [1, 1]
    return torch.ops.onednn.qconv_pointwise(*own, *steps, 1, 1.0, 0, dtype, "none", [], "")
