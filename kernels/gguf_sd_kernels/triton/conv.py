"""Convolutions whose weight is decoded inside the product: implicit GEMM over channels-last activations.

M counts output pixels, N output channels, K = taps * IC in (KH, KW, IC) order, so a step of BLOCK_K stays inside
one tap and reads BLOCK_K neighbouring channels of each pixel.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gguf_sd_kernels.checks import channels_last, conv_sizes, with_rows
from gguf_sd_kernels.repack import PackedWeight
from gguf_sd_kernels.triton.tiles import (
    decode_tile,
    finish_tile,
    multiply,
    split_range,
    tap_at,
    tile_position,
    weight_rows,
    windows,
)
from gguf_sd_kernels.triton.workspace import divide
from gguf_sd_kernels.tuning.launch import Launch, choose, gpu_family, multiprocessors


# One compilation serves every size of picture.
@triton.jit(do_not_specialize=["M", "H", "W", "OH", "OW", "stride", "padding", "steps"])
def conv_kernel(
    x,
    quants,
    scales,
    mins,
    bias,
    residual,
    emb,
    emb_stride,
    out,
    partials,
    counters,
    M,
    N,
    K,
    H,
    W,
    IC,
    OH,
    OW,
    stride,
    padding,
    steps,  # of BLOCK_K, a program
    QTYPE: tl.constexpr,
    TAPS_W: tl.constexpr,
    SPLIT: tl.constexpr,
    SWAP: tl.constexpr,
    PTX: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """out [B * OH * OW, N] from x [B, H, W, IC] and w [N, taps, IC], with the epilogue of store_tile.

    Grid: (tiles, splits). ``emb`` is [B, N].
    """
    tile_m, tile_n = tile_position(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rows_n = weight_rows(tile_n, N, BLOCK_N, False)
    top, left, pixel = windows(tile_m, M, H, W, OH, OW, stride, padding, BLOCK_M)
    corner = pixel * IC  # of each pixel's window
    channels = tl.arange(0, BLOCK_K)
    DTYPE: tl.constexpr = x.dtype.element_ty
    start, stop = split_range(steps, K, BLOCK_K, SPLIT)
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for k in range(start, stop, BLOCK_K):
        shift, inside = tap_at(k, top, left, H, W, IC, TAPS_W)
        values = tl.load(x + (corner + (shift * IC + k))[:, None] + channels[None, :], mask=inside[:, None], other=0.0)
        weights = decode_tile(quants, scales, mins, rows_n, k, K, QTYPE, DTYPE, PTX, BLOCK_K)
        acc = multiply(values, weights, acc, SWAP, WIDEN)
    if SWAP:
        acc = acc.T
    finish_tile(
        acc,
        out,
        bias,
        residual,
        emb,
        emb_stride,
        partials,
        counters,
        tile_m,
        tile_n,
        M,
        N,
        OH * OW,
        BLOCK_M,
        BLOCK_N,
        False,
        SPLIT,
    )


def conv2d_fused(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    *,
    residual: Tensor | None = None,
    emb: Tensor | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """Convolves ``x [B, IC, H, W]`` with a tap-major weight of shape ``(OC, IC, KH, KW)`` -> ``[B, OC, OH, OW]``.

    Adds ``bias [OC]``, ``emb [B, OC]`` (to every pixel of a picture) and ``residual``, of the result's shape.
    float16 and bfloat16, sums in float32; the result is channels-last, and so should x and residual be, or they
    are copied. Raises ValueError for a weight in (IC, KH, KW) order, which is to be dequantized, for channels
    that are no multiple of 32, other dtypes, and shapes that do not fit.
    """
    sizes = conv_sizes(x, weight, bias, stride, padding, residual=residual, emb=emb)
    emb = with_rows(emb)
    out = torch.empty(sizes.result, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if not sizes.batch:
        return out
    product = sizes.product
    launch = launch or choose(product, gpu_family(x.device), multiprocessors(x.device))
    if sizes.ic % launch.block_k:
        raise ValueError(f"a step of {launch.block_k} channels does not divide {sizes.ic}")
    programs = divide(product, launch, x.device)
    conv_kernel[programs.grid](
        channels_last(x),
        weight.quants,
        weight.scales,
        weight.mins,
        bias,
        channels_last(residual),
        emb,
        0 if emb is None else emb.stride(0),
        out,
        programs.partials,
        programs.counters,
        *sizes.numbers,
        stride,
        padding,
        programs.steps,
        QTYPE=weight.qtype,
        TAPS_W=sizes.kw,
        SPLIT=programs.splits > 1,
        **launch.decoding(x),
        **launch.tile,
    )
    return out
