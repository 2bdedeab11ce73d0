"""Products in 8 bits on a CPU, by oneDNN's operators: for processors that multiply bytes (AVX512-VNNI, AVX-VNNI, AMX).

A weight has 8 bits with a sign and a scale for each output, an activation 8 bits without one, a scale and a zero point
for all of it, taken from its own range. Sums are exact, in int32. Such products take half the time of bfloat16's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gguf_sd_kernels.cpu import enlarged, native, processor
from gguf_sd_kernels.cpu.linear import GEGLU_ROWS
from gguf_sd_kernels.cpu.norm import check_group_norm, group_norm_silu
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
    """``scale * (values - zero)``: uint8 of the activation's shape, channels-last where that is [B, C, H, W]; with a
    ``margin``, memory goes on with a pixel of zeros all around."""

    values: Tensor
    scale: float
    zero: int
    margin: bool = False

    @property
    def picture(self) -> native.Coded:
        """The only picture of a map, [H, W, C]."""
        return native.Coded(self.values[0].permute(1, 2, 0), self.scale, self.zero)


def quantize(x: Tensor, silu: bool = False, margin: bool = False) -> Activation:
    """``x``, or SiLU of it, in 8 bits: float32 or bfloat16 of any shape, over its own range; laid out as x is, which is
    contiguous or channels-last. A ``margin`` is a wish, which a single picture [1, C, H, W] may be granted.

    Where a value is not finite, neither is the scale, nor any value of a product.
    """
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    kept = x.permute(0, 2, 3, 1) if channels_last else x.contiguous()
    if native.quantizes(kept):
        if margin and channels_last and len(kept) == 1:
            return _map(native.quantize(kept[0], silu, margin=True), margin)
        return _activation(native.quantize(kept, silu), channels_last)
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
    return _activation(native.Coded(codes, scale, zero), channels_last)


def _activation(coded: native.Coded, channels_last: bool) -> Activation:
    return Activation(coded.values.permute(0, 3, 1, 2) if channels_last else coded.values, coded.scale, coded.zero)


def _map(coded: native.Coded, margin: bool) -> Activation:
    """Of a single picture, [H, W, C]."""
    return Activation(coded.values[None].permute(0, 3, 1, 2), coded.scale, coded.zero, margin)


def quantize_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Activation:
    """The layer norm of ``x [..., C]`` with ``weight, bias [C]``, as :func:`quantize` has it."""
    width = x.shape[-1]
    if weight.shape == bias.shape == (width,) and native.quantizes(x, width):
        return _activation(native.layer_norm_quantize(x.contiguous(), *_wide(weight, bias), eps), False)
    return quantize(F.layer_norm(x, (width,), weight, bias, eps))


def quantize_group_norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool = False, margin: bool = False
) -> Activation:
    """The group norm of a picture ``x [1, C, H, W]``, channels-last, with ``weight, bias [C]``, or SiLU of it, as
    :func:`quantize` has it."""
    check_group_norm(x, groups, weight, bias)
    rows = x.permute(0, 2, 3, 1)
    if len(x) == 1 and rows.is_contiguous() and native.quantizes(x, x.shape[1]):
        coded = native.group_norm_quantize(rows[0], groups, *_wide(weight, bias), eps, silu, margin)
        return _map(coded, margin)
    return quantize(group_norm_silu(x, groups, weight, bias, eps, silu=False), silu)


def _wide(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return weight.float().contiguous(), bias.float().contiguous()


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
        if native.encodes(blocks, qtype):
            codes = cls(*native.encode(blocks, qtype))
        else:
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


class _Weight:
    """A weight's codes, until its first product decides which order they get: that of tiles, which :mod:`native` takes,
    or oneDNN's. They are held once."""

    def __init__(self, codes: Codes):
        self.scales = codes.scales  # float32 [out]
        self._values: Tensor | None = codes.values
        self._tiles: native.Packed | None = None

    @property
    def nbytes(self) -> int:
        return self._codes.numel() + 2 * self.scales.nbytes

    @property
    def _codes(self) -> Tensor:
        values = self._values if self._tiles is None else self._tiles.values
        assert values is not None
        return values

    def _in_tiles(self, rows: Tensor) -> native.Packed:
        """Of int8 [out, in] without gaps, which are the codes."""
        if self._tiles is None:
            self._tiles, self._values = native.pack(rows), None
        return self._tiles


class LinearWeight(_Weight):
    """A linear layer's weight in 8 bits."""

    def __init__(self, codes: Codes):
        super().__init__(codes)
        self.zeros = torch.zeros(len(codes.scales), dtype=torch.int32)
        self._ordered = False

    def tiles(self, dtype: torch.dtype) -> native.Packed | None:
        """The weight in tiles, where results of ``dtype`` are computed there."""
        if self._tiles is None and (
            self._ordered or not native.multiplies(len(self.scales), self._codes.shape[1], dtype)
        ):
            return None
        return self._in_tiles(self._codes)

    def ordered(self) -> Tensor:
        """The weight in oneDNN's order."""
        if not self._ordered:
            self._values, self._ordered = torch.ops.onednn.qlinear_prepack(self._codes, None), True
        return self._codes


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
    added = None if residual is None else residual.reshape(len(values), -1).contiguous()
    if (tiles := weight.tiles(dtype)) is not None:
        after = native.GELU if gelu else native.NOTHING
        y = native.linear(native.Coded(values, x.scale, x.zero), tiles, weight.scales, bias, added, after)
        return y.view(*x.values.shape[:-1], -1)
    own = values, x.scale, x.zero, weight.ordered(), weight.scales, weight.zeros
    if added is not None:
        multiply = torch.ops.onednn.qlinear_pointwise.binary
        y = multiply(*own, added, bias, 1.0, 0, dtype, 1.0, 0, "add", 1.0, "none", [], "")
    else:
        post, kind = ("gelu", "none") if gelu else ("none", "")
        y = torch.ops.onednn.qlinear_pointwise(*own, bias, 1.0, 0, dtype, post, [], kind)
    return y.view(*x.values.shape[:-1], -1)


class GatedWeight(_Weight):
    """The weight of a GEGLU's projection in 8 bits, ``[2 F, in]``: values, then gates; its bias, float32 ``[2 F]``."""

    def __init__(self, codes: Codes, bias: Tensor | None):
        super().__init__(codes)
        self.bias = bias
        self._halves: tuple[LinearWeight, ...] | None = None

    @property
    def nbytes(self) -> int:
        return super().nbytes if self._halves is None else sum(half.nbytes for half in self._halves)

    def tiles(self, dtype: torch.dtype) -> native.Packed | None:
        """The weight in tiles, where results of ``dtype`` are computed there; its blocks of columns, and from now on
        scales and bias, hold some values and their gates in turn."""
        if self._tiles is not None:
            return self._tiles
        if self._halves is not None or not native.multiplies(len(self.scales), self._codes.shape[1], dtype):
            return None
        order = self.mixed(torch.arange(len(self.scales)))
        self.scales, self.bias = self.scales[order], None if self.bias is None else self.bias[order]
        return self._in_tiles(self._codes[order])

    @staticmethod
    def mixed(halves: Tensor) -> Tensor:
        """``[..., 2 F]``, values and then gates -> in the order of the blocks."""
        return halves.unflatten(-1, (2, -1, native.BLOCK // 2)).transpose(-3, -2).flatten(-3)

    @staticmethod
    def unmixed(blocks: Tensor) -> Tensor:
        """And back."""
        return blocks.unflatten(-1, (-1, 2, native.BLOCK // 2)).transpose(-3, -2).flatten(-3)

    def halves(self) -> tuple[LinearWeight, ...]:
        """Those of the values and of the gates."""
        if self._halves is None:
            parts = zip(self._codes.chunk(2), self.scales.chunk(2), strict=True)
            self._halves, self._values = tuple(LinearWeight(Codes(*part)) for part in parts), None
        return self._halves


def linear_geglu(x: Activation, weight: GatedWeight, dtype: torch.dtype) -> Tensor:
    """``value * gelu(gate)``, the halves of the projection of ``x [..., in]`` -> ``[..., F]`` of ``dtype``."""
    rows = x._replace(values=x.values.reshape(-1, x.values.shape[-1]))
    if (tiles := weight.tiles(dtype)) is not None:
        coded = native.Coded(*rows[:3])
        out = native.linear(coded, tiles, weight.scales, weight.bias, after=native.GATE)
        return out.view(*x.values.shape[:-1], -1)
    value, gate = weight.halves()
    value_bias, gate_bias = (None, None) if weight.bias is None else weight.bias.chunk(2)
    out = torch.empty(len(rows.values), len(value.scales), dtype=dtype)
    for codes, result in zip(rows.values.split(GEGLU_ROWS), out.split(GEGLU_ROWS), strict=True):
        part = rows._replace(values=codes)
        gates = linear(part, gate, gate_bias, dtype, gelu=True)
        torch.mul(gates, linear(part, value, value_bias, dtype), out=result)
    return out.view(*x.values.shape[:-1], -1)


def linear_halves(x: Activation, weight: GatedWeight, dtype: torch.dtype) -> Tensor:
    """The projection itself, ``[..., 2 F]``: the values, then the gates."""
    if (tiles := weight.tiles(dtype)) is not None:
        rows = native.Coded(x.values.reshape(-1, x.values.shape[-1]), x.scale, x.zero)
        y = native.linear(rows, tiles, weight.scales, weight.bias)
        return GatedWeight.unmixed(y).view(*x.values.shape[:-1], -1)
    biases = (None, None) if weight.bias is None else weight.bias.chunk(2)
    return torch.cat([linear(x, half, bias, dtype) for half, bias in zip(weight.halves(), biases, strict=True)], dim=-1)


class ConvWeight(_Weight):
    """A convolution's weight in 8 bits, with its stride and padding. oneDNN's order is that for maps as large as the
    first it meets: with AMX that of others may differ, which costs a copy at each call."""

    def __init__(self, codes: Codes, stride: int, padding: int):
        super().__init__(codes)
        self.stride, self.padding, self.shape = stride, padding, tuple(codes.values.shape)
        self.zeros = torch.zeros(len(codes.scales), dtype=torch.int32)
        self._ordered = False

    @property
    def steps(self) -> tuple[list[int], list[int], list[int]]:
        """Strides, paddings and dilations."""
        return [self.stride] * 2, [self.padding] * 2, [1, 1]

    def tiles(self, dtype: torch.dtype) -> native.Packed | None:
        """The weight in tiles, where results of ``dtype`` are computed there: of a map with a margin."""
        out, channels, kernel, other = self.shape
        plain = self.stride == self.padding == 1 and kernel == other and kernel in (2, 3)
        if self._tiles is None and (self._ordered or not plain or not native.multiplies(out, channels, dtype)):
            return None
        return self._in_tiles(self._codes if self._tiles else self._codes.permute(0, 2, 3, 1).reshape(out, -1))

    def ordered(self, shape: Sequence[int]) -> Tensor:
        """The weight in oneDNN's order, for an x [B, in, H, W] of this shape where it is the first."""
        if not self._ordered:
            order = self.scales, 1.0, 128, *self.steps, 1, list(shape)
            self._values, self._ordered = torch.ops.onednn.qconv_prepack(self._codes, *order), True
        return self._codes


def convolve(
    x: Activation, weight: ConvWeight, bias: Tensor | None, dtype: torch.dtype, residual: Tensor | None = None
) -> Tensor:
    """``x [B, in, H, W]`` convolved with the weight ``[out, in, kh, kw]``, plus ``bias`` float32 ``[out]`` and
    ``residual`` ``[B, out, H', W']`` -> ``[B, out, H', W']`` of ``dtype``, channels-last."""
    tiles = weight.tiles(dtype) if len(x.values) == 1 and weight.shape[2] == 3 else None
    if tiles is None:
        own = x.values.contiguous(memory_format=torch.channels_last), x.scale, x.zero
        packed = weight.ordered(x.values.shape), weight.scales, weight.zeros, bias
        y = torch.ops.onednn.qconv_pointwise(*own, *packed, *weight.steps, 1, 1.0, 0, dtype, "none", [], "")
        return y if residual is None else y.add_(residual)
    added = None if residual is None else residual[0].permute(1, 2, 0).contiguous()
    y = native.convolve(_with_margin(x).picture, tiles, weight.scales, bias, added)
    return y[None].permute(0, 3, 1, 2)


def convolve_enlarged(x: Activation, phases: Sequence[ConvWeight], bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The convolution of a picture ``x [1, in, H, W]`` enlarged to twice its size, by the weights of
    :func:`gguf_sd_kernels.cpu.enlarged.phase_weights`, plus ``bias`` float32 ``[out]`` -> ``[1, out, 2 H, 2 W]``."""
    tiles = [packed for weight in phases if (packed := weight.tiles(dtype)) is not None]
    if len(tiles) < len(phases):
        each = (convolve(x, weight, bias, dtype) for weight in phases)
        return enlarged.interleaved(each, *x.values.shape[2:])
    y = native.convolve_enlarged(_with_margin(x).picture, tiles, [weight.scales for weight in phases], bias)
    return y[None].permute(0, 3, 1, 2)


def _with_margin(x: Activation) -> Activation:
    if x.margin:
        return x
    coded = x.picture
    return _map(coded._replace(values=native.with_margin(coded.values, x.zero)), True)
