"""Linear layers with both operands in 8 bits: activations are quantised per 32 too, products are int8 x int8.

GeForce cards multiply int8 at several times their rate for float16 with float32 sums. It costs accuracy: with
activations in 8 bits a result is off by about 0.6 % of its norm, so it is a choice, not the default, and no good
for layers whose inputs have outliers: keys and values of cross-attention, the first and the last convolution.

Activations are quantised by a launch of their own, once, and not by each tile of N anew.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, Product, best_splits, multiprocessors
from .linear import DTYPES, MAX_ELEMENTS
from .repack import PackedWeight
from .triton_tiles import add_splits, store_tile, tile_position, weight_rows
from .workspace import split_workspace

INT8_TYPES = ("Q4_0", "Q8_0")
# UNTUNED. A step is one block of 32, as every block has scales of its own. Tiles of 32 x 64 spill on sm_86.
SMALL_M, LARGE_M = Launch(64, 64, 32, warps=4, stages=4), Launch(128, 64, 32, warps=8, stages=4)
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


@triton.jit
def _weight_codes(quants, rows, k, K, QTYPE: tl.constexpr):
    """int8 [R, 32]: Q8_0's values, or Q4_0's nibbles, 8 too large."""
    if QTYPE == "Q8_0":
        packed = tl.load(quants + rows[:, None] * K + k + tl.arange(0, 32)[None, :])
        codes = (packed ^ 0x80).to(tl.int8, bitcast=True)
    else:
        packed = tl.load(quants + rows[:, None] * (K // 2) + k // 2 + tl.arange(0, 16)[None, :])
        pairs = tl.join(packed & 0x0F, packed >> 4)
        codes = tl.permute(pairs, (0, 2, 1)).reshape(rows.shape[0], 32).to(tl.int8, bitcast=True)
    return codes


@triton.jit(do_not_specialize=["M", "steps"])
def linear_int8_kernel(
    codes,
    x_scales,
    sums,
    quants,
    scales,
    bias,
    residual,
    out,
    partials,
    counters,
    M,
    N,
    K,
    steps,  # of 32, a program
    QTYPE: tl.constexpr,
    GEGLU: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """out [M, N] = x . w^T with the epilogue of store_tile. Grid: (tiles, splits).

    The int32 sum of a block starts at 0x4B400000, the bits of 1.5 * 2^23: read as float32 it is that number plus
    the sum, which is at most 32 * 127 * 128 and so stays within the mantissa. This saves a conversion a value.
    """
    tile_m, tile_n = tile_position(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rows_m = tl.minimum(tile_m * BLOCK_M + tl.arange(0, BLOCK_M), M - 1)
    rows_n = weight_rows(tile_n, N, BLOCK_N, GEGLU)
    x_tile = codes + rows_m[:, None] * K + tl.arange(0, 32)[None, :]
    start, stop = 0, K
    if SPLIT:
        start = tl.program_id(1) * steps * 32
        stop = tl.minimum(start + steps * 32, K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(start, stop, 32):
        of_x = rows_m * (K // 32) + k // 32
        first = tl.full((BLOCK_M, BLOCK_N), 0x4B400000, tl.int32)
        if QTYPE == "Q4_0":
            first -= (8 * tl.load(sums + of_x))[:, None]  # the zero point of nibbles
        weights = _weight_codes(quants, rows_n, k, K, QTYPE)
        products = tl.dot(tl.load(x_tile + k), weights.T, first, out_dtype=tl.int32)
        scale = tl.load(scales + rows_n * (K // 32) + k // 32).to(tl.float32)
        factor = tl.load(x_scales + of_x)[:, None] * scale[None, :]
        acc += (products.to(tl.float32, bitcast=True) - 12582912.0) * factor
    if SPLIT:
        acc, last = add_splits(acc, partials, counters, BLOCK_M, BLOCK_N)
        if last:
            store_tile(acc, out, bias, residual, None, tile_m, tile_n, M, N, 1, BLOCK_M, BLOCK_N, GEGLU)
    else:
        store_tile(acc, out, bias, residual, None, tile_m, tile_n, M, N, 1, BLOCK_M, BLOCK_N, GEGLU)


def quantize_activations(x: Tensor) -> Int8Activations:
    """Quantises ``x [M, K]``, float16 or bfloat16, per 32 values of a row. Raises ValueError for other x."""
    if x.dtype not in DTYPES or x.ndim != 2 or x.shape[1] % 32 or x.numel() > MAX_ELEMENTS:
        raise ValueError(f"activations to quantise are 16-bit [M, a multiple of 32], got {x.dtype} {list(x.shape)}")
    x = x.contiguous()
    shape = (x.shape[0], x.shape[1] // 32)
    codes = torch.empty_like(x, dtype=torch.int8)
    scales = torch.empty(shape, dtype=torch.float32, device=x.device)
    sums = torch.empty(shape, dtype=torch.int32, device=x.device)
    if blocks := scales.numel():
        grid = (triton.cdiv(blocks, QUANTIZE_BLOCKS),)
        quantize_kernel[grid](x, codes, scales, sums, blocks, BLOCKS=QUANTIZE_BLOCKS, num_warps=QUANTIZE_WARPS)
    return Int8Activations(codes, scales, sums)


def linear_int8(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    geglu: bool = False,
    launch: Launch | None = None,
) -> Tensor:
    """As :func:`gguf_sd_kernels.linear.linear_fused`, x quantised to 8 bits: Q4_0 and Q8_0 weights only.

    Raises ValueError for other types, dtypes other than float16 and bfloat16, or shapes that do not fit.
    """
    n, k = weight.rows, weight.cols
    if weight.qtype not in INT8_TYPES:
        raise ValueError(f"products in 8 bits take {' and '.join(INT8_TYPES)} weights, got {weight.qtype}")
    if x.ndim < 1 or x.shape[-1] != k:
        raise ValueError(f"x {list(x.shape)} does not end in the weight's {k} inputs")
    if geglu and (n % 2 or residual is not None):
        raise ValueError(f"GEGLU halves the outputs, of which there are {n}, and takes no residual")
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"the bias of {n} outputs is [{n}], got {list(bias.shape)}")
    out = x.new_empty(*x.shape[:-1], n // 2 if geglu else n)
    if residual is not None and residual.shape != out.shape:
        raise ValueError(f"the residual of a result {list(out.shape)} has its shape, got {list(residual.shape)}")
    quantised = quantize_activations(x.reshape(-1, k))
    m = len(quantised.codes)
    if m * n > MAX_ELEMENTS:
        raise ValueError(f"{m} rows of {n} outputs are too many for 32-bit offsets; split the batch")
    if not m:
        return out
    launch = launch or _launch(Product("linear", weight.qtype, m, n, k), multiprocessors(x.device))
    tiles = triton.cdiv(m, launch.block_m) * triton.cdiv(n, launch.block_n)
    steps = triton.cdiv(k // 32, launch.splits)
    splits = triton.cdiv(k // 32, steps)  # none without work
    partials, counters = split_workspace(splits, tiles, launch.block_m * launch.block_n, x.device)
    linear_int8_kernel[(tiles, splits)](
        quantised.codes,
        quantised.scales,
        quantised.sums,
        weight.quants,
        weight.scales,
        bias,
        None if residual is None else residual.contiguous(),
        out,
        partials,
        counters,
        m,
        n,
        k,
        steps,
        QTYPE=weight.qtype,
        GEGLU=geglu,
        SPLIT=splits > 1,
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        GROUP_M=8,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return out


def _launch(product: Product, processors: int) -> Launch:
    launch = SMALL_M if product.m <= 64 else LARGE_M
    splits = best_splits(product, launch, processors)
    return Launch(launch.block_m, launch.block_n, 32, launch.warps, launch.stages, splits=splits)
