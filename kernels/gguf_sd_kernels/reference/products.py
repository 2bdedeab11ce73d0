"""Quantised products in plain torch: the path CPUs take, and the oracle the GPU kernels are tested against.

Weights stay in their GGML blocks and are decoded when they are used. Decoding happens in float32 and is bit
for bit what ``gguf.quants.dequantize`` gives; 16-bit results are that, rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from gguf_sd_kernels.cpu import scratch
from gguf_sd_kernels.cpu.conv import convolve, gathered
from gguf_sd_kernels.cpu.linear import product, product_geglu
from gguf_sd_kernels.cpu.scratch import borrow
from gguf_sd_kernels.formats import quant_format, row_bytes, row_values
from gguf_sd_kernels.reference.decoders import decode_into

# Values decoded at a time. Zen 5, 2 threads, 32 MiB L3: seconds for 859 M Q4_0 weights to bfloat16 are 0.27 at
# 2^18, 0.21 at 2^19, 0.19 at 2^20, 0.17 at 2^21, which takes 8 MiB for the float32 intermediate.
CHUNK_VALUES = 1 << 20
# Of a weight, where memory is short: what is decoded before it is multiplied with, in whole vectors of outputs. Not of
# convolutions that oneDNN runs as such, whose sums it would take in another order. Zen 4, 2 threads, milliseconds whole
# and with 2^20, 2^21, 2^22, 2^23: convolution of [2, 2560, 8, 8] -> 1280 32, 41, 48, 41, 42; of [2, 2560, 16, 16] 101,
# 132, 127, 119, 106; linear [512, 5120] -> 1280 23, 29, 27, 24, 23; GEGLU [512, 1280] -> 10240 51, 56, 53, 50, 49.
PART_VALUES, ROWS = 1 << 23, 64


def dequantize(blocks: Tensor, qtype: str, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
    """Decodes blocks, uint8 ``[rows, row_bytes]``, to ``[rows, cols]`` of ``dtype`` on the same device.

    ``out``, when given, is a contiguous ``[rows, cols]`` tensor of ``dtype`` that receives the result.
    Raises ValueError for blocks or an ``out`` of another shape, type or device.
    """
    _check_blocks(blocks, qtype)
    rows, cols = blocks.shape[0], row_values(qtype, blocks.shape[1])
    if out is None:
        out = torch.empty(rows, cols, dtype=dtype, device=blocks.device)
    elif out.shape != (rows, cols) or out.dtype != dtype or out.device != blocks.device or not out.is_contiguous():
        raise ValueError(
            f"out must be a contiguous {(rows, cols)} {dtype} tensor on {blocks.device}, "
            f"got {tuple(out.shape)} {out.dtype} on {out.device}, strides {out.stride()}"
        )
    fmt = quant_format(qtype)
    in_blocks = blocks.contiguous().view(-1, fmt.type_size)
    out_blocks = out.view(-1, fmt.block_size)
    step = CHUNK_VALUES // fmt.block_size
    in_place = dtype == torch.float32
    values = out_blocks if in_place else out.new_empty(min(step, len(in_blocks)), fmt.block_size, dtype=torch.float32)
    for start in range(0, len(in_blocks), step):
        chunk = slice(start, start + step)
        part = in_blocks[chunk]
        decoded = decode_into(values[chunk] if in_place else values[: len(part)], part, fmt)
        if not in_place:
            out_blocks[chunk] = decoded
    return out


def linear(x: Tensor, blocks: Tensor, qtype: str, bias: Tensor | None = None) -> Tensor:
    """``x @ W.T + bias``: ``x [..., in]``, blocks of ``W [out, in]``, ``bias [out]`` -> ``[..., out]``.

    Computes in ``x.dtype``. Raises ValueError when x or the bias does not fit the blocks.
    """
    out_features = _checked(x, blocks, qtype, bias)
    rows = _rows_at_a_time(x, out_features)
    if rows >= out_features:
        return _apply(product, x, blocks, qtype, bias)
    out = x.new_empty(*x.shape[:-1], out_features)
    for start in range(0, out_features, rows):
        part = slice(start, start + rows)
        out[..., part] = _apply(product, x, blocks[part], qtype, None if bias is None else bias[part])
    return out


def linear_geglu(x: Tensor, blocks: Tensor, qtype: str, bias: Tensor | None = None) -> Tensor:
    """``geglu(linear(x, blocks, qtype, bias))``: ``x [..., in]``, blocks of ``W [2 F, in]`` -> ``[..., F]``.

    The first F outputs are values, the others gates. Raises ValueError like :func:`linear`, and for an odd W.
    """
    if blocks.shape[0] % 2:
        raise ValueError(f"GEGLU takes a weight with an even number of outputs, got {blocks.shape[0]}")
    width = _checked(x, blocks, qtype, bias) // 2
    rows = _rows_at_a_time(x, 2 * width) // 2
    if rows >= width:
        return _apply(product_geglu, x, blocks, qtype, bias)
    out = x.new_empty(*x.shape[:-1], width)
    for start in range(0, width, rows):
        value, gate = slice(start, min(start + rows, width)), slice(width + start, min(width + start + rows, 2 * width))
        own = None if bias is None else torch.cat([bias[value], bias[gate]])
        out[..., value] = _apply(product_geglu, x, torch.cat([blocks[value], blocks[gate]]), qtype, own)
    return out


def _apply(
    multiply: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    x: Tensor,
    blocks: Tensor,
    qtype: str,
    bias: Tensor | None,
) -> Tensor:
    """Decodes the weight and multiplies."""
    with _weight_buffer(x, blocks.shape[0], x.shape[-1]) as buffer:
        weight = dequantize(blocks, qtype, x.dtype, buffer)
        return multiply(x, weight, None if bias is None else bias.to(x.dtype))


def _checked(x: Tensor, blocks: Tensor, qtype: str, bias: Tensor | None) -> int:
    """The outputs of a weight in blocks, which x and bias fit."""
    _check_blocks(blocks, qtype)
    out_features, in_features = blocks.shape[0], row_values(qtype, blocks.shape[1])
    if x.ndim < 1 or x.shape[-1] != in_features:
        raise ValueError(f"x {tuple(x.shape)} does not end in the weight's {in_features} inputs")
    _check_bias(bias, out_features)
    return out_features


def _rows_at_a_time(x: Tensor, rows: int) -> int:
    """How many rows of a weight are decoded together, see :func:`gguf_sd_kernels.cpu.scratch.decode_in_parts`."""
    if x.device.type != "cpu" or not scratch.in_parts() or (torch.is_grad_enabled() and x.requires_grad):
        return rows
    return min(rows, max(ROWS, PART_VALUES // max(1, x.shape[-1]) // ROWS * ROWS))


def conv2d(
    x: Tensor,
    blocks: Tensor,
    qtype: str,
    shape: tuple[int, int, int, int],
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    *,
    tap_major: bool,
) -> Tensor:
    """Convolves ``x [B, IC, H, W]`` with a weight of ``shape`` (OC, IC, KH, KW) -> ``[B, OC, H', W']``.

    ``tap_major``: rows hold (KH, KW, IC), which decode straight into a channels-last weight; otherwise they
    hold (IC, KH, KW). Computes in ``x.dtype``.
    Raises ValueError when x, blocks and shape do not fit one another.
    """
    out_channels, in_channels, *_ = shape
    if x.ndim != 4 or x.shape[1] != in_channels:
        raise ValueError(f"x {tuple(x.shape)} is not [B, {in_channels}, H, W], which a weight {shape} takes")
    _check_bias(bias, out_channels)
    if (columns := gathered(x, shape, stride, padding, tap_major)) is not None:
        return linear(columns, blocks, qtype, bias).permute(0, 3, 1, 2)
    with _weight_buffer(x, out_channels, math.prod(shape[1:])) as buffer:
        weight = conv_weight(blocks, qtype, shape, x.dtype, buffer, tap_major=tap_major)
        return convolve(x, weight, None if bias is None else bias.to(x.dtype), stride, padding)


def conv_weight(
    blocks: Tensor,
    qtype: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    out: Tensor | None = None,
    *,
    tap_major: bool,
) -> Tensor:
    """Decodes a conv weight to ``[OC, IC, KH, KW]``: channels-last strides if ``tap_major``, else contiguous.

    ``out`` is as in :func:`dequantize`, ``[OC, IC*KH*KW]``; the result is a view of it.
    Raises ValueError when the blocks do not hold ``shape``.
    """
    _check_blocks(blocks, qtype)
    oc, ic, kh, kw = shape
    if tuple(blocks.shape) != (oc, row_bytes(qtype, ic * kh * kw)):
        raise ValueError(
            f"{qtype} blocks of a conv weight {shape} are [{oc}, {row_bytes(qtype, ic * kh * kw)}], "
            f"got {list(blocks.shape)}"
        )
    flat = dequantize(blocks, qtype, dtype, out)
    return flat.view(oc, kh, kw, ic).permute(0, 3, 1, 2) if tap_major else flat.view(oc, ic, kh, kw)


def _weight_buffer(x: Tensor, rows: int, cols: int) -> AbstractContextManager[Tensor]:
    """Memory for a decoded weight; memory of its own where autograd will keep the weight."""
    if torch.is_grad_enabled() and x.requires_grad:
        return nullcontext(torch.empty(rows, cols, dtype=x.dtype, device=x.device))
    return borrow((rows, cols), x.dtype, x.device)


def _check_blocks(blocks: Tensor, qtype: str) -> None:
    if blocks.dtype != torch.uint8 or blocks.ndim != 2:
        raise ValueError(f"{qtype} blocks are uint8 [rows, row_bytes], got {blocks.dtype} {list(blocks.shape)}")
    row_values(qtype, blocks.shape[1])


def _check_bias(bias: Tensor | None, features: int) -> None:
    if bias is not None and tuple(bias.shape) != (features,):
        raise ValueError(f"the bias of {features} outputs is [{features}], got {list(bias.shape)}")
