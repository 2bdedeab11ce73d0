"""Activations in 8 bits, in blocks of 32 with a scale each, quantised once for all that reads them."""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gguf_sd_kernels.checks import DTYPES, MAX_ELEMENTS, described
from gguf_sd_kernels.triton.launcher import PreparedLaunch, in_order
from gguf_sd_kernels.tuning.launch import Prepared

QUANTIZE_BLOCKS, QUANTIZE_WARPS = 128, 4


@dataclass(frozen=True)
class Int8Activations:
    """Activations of K values a row in blocks of 32: value = scale * code.

    ``codes`` int8 ``[M, K]``, ``scales`` float32 ``[M, K/32]``, ``sums`` int32 ``[M, K/32]`` of each block's codes.
    """

    codes: Tensor
    scales: Tensor
    sums: Tensor


@triton.jit
def quantize_kernel(x, codes, scales, sums, n_blocks, BLOCKS: tl.constexpr):
    """Blocks of x [n_blocks, 32] to int8 by their largest magnitude, rounded to nearest, ties to even."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    mask = (block < n_blocks)[:, None]
    at = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(values), 1)
    steps = values * (127.0 / tl.maximum(largest, 1e-30))[:, None]
    # 1.5 * 2^23 rounds what is added to it to an integer, in its low mantissa bits.
    code = (steps + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    tl.store(codes + at, code.to(tl.int8), mask=mask)
    tl.store(scales + block, largest * (1.0 / 127.0), mask=block < n_blocks)
    tl.store(sums + block, tl.sum(code, 1), mask=block < n_blocks)


def quantize_activations(x: Tensor) -> Int8Activations:
    """Quantises ``x [M, K]``, float16 or bfloat16, per 32 values of a row. Raises ValueError for other x."""
    key = x.device, described(x)
    start = _prepared.get(key) or _prepared.keep(key, _prepare(x))
    shape = (x.shape[0], x.shape[1] // 32)
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(shape, dtype=torch.float32, device=x.device)
    sums = torch.empty(shape, dtype=torch.int32, device=x.device)
    if x.numel():
        start(in_order(x), codes, scales, sums)
    return Int8Activations(codes, scales, sums)


_prepared: Prepared[PreparedLaunch] = Prepared()


def _prepare(x: Tensor) -> PreparedLaunch:
    if x.dtype not in DTYPES or x.ndim != 2 or x.shape[1] % 32 or x.numel() > MAX_ELEMENTS:
        raise ValueError(f"activations to quantise are 16-bit [M, a multiple of 32], got {x.dtype} {list(x.shape)}")
    blocks = x.numel() // 32
    constants, grid = {"BLOCKS": QUANTIZE_BLOCKS}, (triton.cdiv(blocks, QUANTIZE_BLOCKS),)
    return PreparedLaunch(quantize_kernel, grid, x.device, (blocks,), constants, num_warps=QUANTIZE_WARPS)
