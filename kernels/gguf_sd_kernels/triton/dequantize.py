"""Decoding whole weights on the GPU, for products done by cuBLAS and cuDNN.

Values are computed in float32 and rounded once, bit for bit what gguf-py decodes, rounded.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gguf_sd_kernels.repack import PackedWeight
from gguf_sd_kernels.triton.launcher import PreparedLaunch
from gguf_sd_kernels.triton.tiles import decode_bytes, decode_nibbles
from gguf_sd_kernels.tuning.launch import Prepared

# Untuned. 64 blocks are 2048 values: with 4 warps 16 values a thread, of which a thread writes 16 bytes at a time.
BLOCKS, WARPS = 64, 4
GATHER_VALUES, GATHER_WARPS = 1024, 4


@triton.jit
def dequantize_kernel(quants, scales, mins, out, n_blocks, QTYPE: tl.constexpr, BLOCKS: tl.constexpr):
    """out [n_blocks, 32] = the values of each block, in the order of the file."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    mask = block < n_blocks
    WIDTH: tl.constexpr = 32 if QTYPE == "Q8_0" else 16
    packed = tl.load(quants + block[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], mask=mask[:, None], other=0)
    if QTYPE == "Q8_0":
        codes = decode_bytes(packed, tl.float32, False)
    else:
        codes = decode_nibbles(packed, 8 if QTYPE == "Q4_0" else 0, tl.float32, False)
    values = codes.reshape(BLOCKS, 32) * tl.load(scales + block, mask=mask, other=0.0).to(tl.float32)[:, None]
    if QTYPE == "Q4_1":
        values += tl.load(mins + block, mask=mask, other=0.0).to(tl.float32)[:, None]
    at = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(out + at, values.to(out.dtype.element_ty), mask=mask[:, None])


@triton.jit
def dequantize_taps_kernel(
    quants, scales, mins, out, n_values, channels, QTYPE: tl.constexpr, TAPS: tl.constexpr, VALUES: tl.constexpr
):
    """out [OC, taps, IC] from blocks along (IC, taps): writes in order, and gathers each value's nibble.

    Neighbouring values are TAPS apart in the file, so a cache line serves several of them and other taps later.
    """
    at = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    mask = at < n_values
    row_tap = at // channels
    stored = (row_tap // TAPS * channels + at % channels) * TAPS + row_tap % TAPS
    block, within = stored // 32, stored % 32
    if QTYPE == "Q8_0":
        codes = tl.load(quants + stored, mask=mask, other=0).to(tl.float32) - 128.0
    else:
        byte = tl.load(quants + block * 16 + within % 16, mask=mask, other=0).to(tl.int32)
        codes = ((byte >> (within // 16 * 4)) & 0x0F).to(tl.float32)
        if QTYPE == "Q4_0":
            codes -= 8.0
    values = codes * tl.load(scales + block, mask=mask, other=0.0).to(tl.float32)
    if QTYPE == "Q4_1":
        values += tl.load(mins + block, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, values.to(out.dtype.element_ty), mask=mask)


def dequantize_packed(weight: PackedWeight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Decodes to ``weight.shape`` in ``dtype``: float32, float16 or bfloat16, each rounded once.

    A convolution comes out in channels-last strides whichever way its blocks lie, as cuDNN wants it.
    ``out``, when given, is contiguous, of ``dtype``, and has as many elements; the result is a view of it.
    Raises ValueError for another dtype or ``out``, or 2^31 values and more.
    """
    key = weight.kind, weight.device, dtype
    start = _prepared.get(key) or _prepared.keep(key, _prepare(weight, dtype))
    rows, cols = weight.rows, weight.cols
    if out is None:
        out = torch.empty(rows * cols, dtype=dtype, device=weight.device)
    elif out.numel() != rows * cols or out.dtype != dtype or out.device != weight.device or not out.is_contiguous():
        raise ValueError(
            f"out must be a contiguous {dtype} tensor of {rows * cols} elements on {weight.device}, "
            f"got {list(out.shape)} {out.dtype} on {out.device}, strides {out.stride()}"
        )
    start(weight.quants, weight.scales, weight.mins, out)
    if len(weight.shape) != 4:
        return out.view(weight.shape)
    oc, ic, kh, kw = weight.shape
    return out.view(oc, kh, kw, ic).permute(0, 3, 1, 2)


_prepared: Prepared[PreparedLaunch] = Prepared()


def _prepare(weight: PackedWeight, dtype: torch.dtype) -> PreparedLaunch:
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"weights are decoded to float32, float16 or bfloat16, got {dtype}")
    rows, cols = weight.rows, weight.cols
    values = rows * cols
    if values >= 2**31 - GATHER_VALUES:
        raise ValueError(f"a weight of {rows} x {cols} values is too large for 32-bit offsets")
    taps = weight.shape[2] * weight.shape[3] if len(weight.shape) == 4 else 1
    constants: dict[str, Any] = {"QTYPE": weight.qtype}
    if taps == 1 or weight.tap_major:
        grid, numbers = (triton.cdiv(values // 32, BLOCKS),), (values // 32,)
        constants |= {"BLOCKS": BLOCKS}
        return PreparedLaunch(dequantize_kernel, grid, weight.device, numbers, constants, num_warps=WARPS)
    grid = (triton.cdiv(values, GATHER_VALUES),)
    constants |= {"TAPS": taps, "VALUES": GATHER_VALUES}
    return PreparedLaunch(
        dequantize_taps_kernel, grid, weight.device, (values, weight.shape[1]), constants, num_warps=GATHER_WARPS
    )
